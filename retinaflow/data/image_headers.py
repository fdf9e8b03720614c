"""What is in the header of an image file: its size, whether it is whole, and how many bits a value has.

No pixel is decoded. A file is whole when what ends or measures its format is there: the end marker of a JPEG, the last
chunk of a PNG, the size in the header of a BMP; a cut WebP cannot be opened.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from retinaflow.data.decoding_limits import PNG_START, open_header, start_of_scan

_JPEG_START, _JPEG_END = b"\xff\xd8", b"\xff\xd9"
_TAIL = 4096
"""Bytes at the end of a JPEG that are searched for its end marker first; cameras append thumbnails and padding."""
_SAMPLED = 32
"""PNG files whose bit depth is looked at."""


def header_size(path: Path) -> tuple[int, int] | str:
    """(height, width) of the stored pixels from the header of an image file, or the reason why it cannot be used."""
    if not path.is_file():
        # To open a named pipe would wait for a writer.
        return "no regular file" if path.exists() else "no such file"
    try:
        with path.open("rb") as file, open_header(file) as image:
            size, kind = (image.height, image.width), image.format or ""
        return f"the {'JPEG' if kind == 'MPO' else kind} is cut short" if _is_cut_file(path, kind) else size
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, ValueError, SyntaxError) as error:
        return "not an image file" if isinstance(error, UnidentifiedImageError) else str(error)


def _is_cut_file(path: Path, kind: str) -> bool:
    bytes_there = path.stat().st_size
    with path.open("rb") as file:
        if kind in ("JPEG", "MPO"):
            # OpenCV fills the missing rows of a cut JPEG with grey, without an error.
            file.seek(max(bytes_there - _TAIL, 0))
            return _JPEG_END not in file.read() and is_cut_jpeg(np.fromfile(path, dtype=np.uint8))
        if kind == "PNG":
            return not _has_last_chunk(file, bytes_there)
        start = file.read(64)
    if kind == "BMP" and len(start) >= 54:
        return bytes_there < _bytes_of_bmp(start)
    return False


def _has_last_chunk(file: BinaryIO, bytes_there: int) -> bool:
    """Whether the chunks of a PNG lead to IEND within the file; each begins with its length."""
    offset = len(PNG_START)
    while offset + 12 <= bytes_there:
        file.seek(offset)
        length, name = struct.unpack(">I4s", file.read(8))
        if name == b"IEND":
            return True
        offset += 12 + length
    return False


def _bytes_of_bmp(start: bytes) -> int:
    """Where the pixels of an uncompressed BMP end; 0 for others."""
    offset, header, width, height, _, bits, compression = struct.unpack("<IIiiHHI", start[10:34])
    if header < 40 or compression not in (0, 3):
        return 0
    return int(offset + (width * bits + 31) // 32 * 4 * abs(height))


def is_jpeg(data: NDArray[np.uint8]) -> bool:
    """Whether the bytes of a file begin as those of a JPEG."""
    return data[:2].tobytes() == _JPEG_START


def is_cut_jpeg(data: NDArray[np.uint8]) -> bool:
    """Whether a JPEG lacks its end marker in its last bytes and, because phones append whole videos, also after the
    start of its pixels (before that, a thumbnail may have an end marker of its own)."""
    return _JPEG_END not in data[-_TAIL:].tobytes() and _JPEG_END not in data[start_of_scan(data) :].tobytes()


def depth_notice(files: NDArray[np.str_], root: Path) -> str | None:
    """A line about PNG files of 16 bits of which less than the upper half of the range is used, from a sample of the
    files (paths under ``root``); None where there is nothing to report. Only the upper 8 of 16 bits are read."""
    names = files[np.strings.endswith(np.strings.lower(files), ".png")] if len(files) else files
    chosen = np.unique(np.linspace(0, len(names) - 1, _SAMPLED).round().astype(np.int64)) if len(names) else ()
    sample = [root / str(names[number]) for number in chosen]
    deep = [path for path in sample if _bits_of_png(path) == 16]
    largest, example = 0, None
    for path in deep:
        pixels = cv2.imdecode(np.fromfile(path, dtype=np.uint8), cv2.IMREAD_UNCHANGED)
        if pixels is not None and pixels.dtype == np.uint16 and int(pixels.max()) >= largest:
            largest, example = int(pixels.max()), path
    if example is None or largest >= 1 << 15:
        return None
    return (
        f"{len(deep)} of {len(sample)} sampled PNG files have 16 bits per value, of which at most "
        f"{largest.bit_length()} are used (the largest value is {largest:,}, in {example.name}): the upper 8 of 16 "
        f"bits are read, 0 to {largest >> 8} of 255. Scale the files to 8 bits first"
    )


def _bits_of_png(path: Path) -> int:
    try:
        with path.open("rb") as file:
            start = file.read(25)
    except OSError:
        return 0
    return start[24] if len(start) == 25 and start.startswith(PNG_START) else 0
