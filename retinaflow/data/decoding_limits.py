"""What decoding an image file may cost beyond its pixels: a small file must not keep a process busy or fill its memory.

The pixels are known from the header. What else a file can hold is counted here, before a decoder meets it:

- A JPEG may have millions of parts before its pixels, and may paint them over and over: each scan of a progressive JPEG
  takes as long as a whole image, and has as few as ten bytes. Ordinary files have 1 to 14.
- A PNG may hold texts and a colour profile that are compressed 1000 to 1. No detector looks at them, so they are cut
  out.

Measured on files of 16 MB and 49 million pixels: minutes and 530 MB without these limits, 3 s and 290 MB with them.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

MAX_SCANS = 100
"""Scans of a JPEG. libjpeg-turbo's advice to programs that read files of strangers is a limit of this kind."""
MAX_PARTS = 10_000
"""Parts of a file that are read one by one."""
MAX_PIXELS = 178_956_970
"""Pixels of an image: the size from which Pillow refuses to open a file. OpenCV is given the same."""
_SOS, _EOI = 0xDA, 0xD9
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
"""The next marker after the data of a scan, in which FF is followed by 00 or by a restart marker."""
PNG_START = b"\x89PNG\r\n\x1a\n"
_COMPRESSED = (b"zTXt", b"iTXt", b"iCCP")


def open_header(file: BinaryIO, formats: Sequence[str] | None = None) -> Image.Image:
    """As ``PIL.Image.open``, which reads the header alone. Raises OSError for a header of more than ``MAX_PARTS``
    parts."""
    return Image.open(_FewReads(file), formats=formats)  # type: ignore[arg-type]


class _FewReads(io.RawIOBase):
    """A file that can be read a limited number of times."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        # A part is read in up to four steps: its kind, its length, its content, a checksum.
        self._file, self._left = file, 4 * MAX_PARTS

    def read(self, size: int = -1, /) -> bytes:
        self._left -= 1
        if self._left < 0:
            raise OSError(f"the header has more than {MAX_PARTS:,} parts")
        return self._file.read(size)

    def seek(self, offset: int, whence: int = 0, /) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


def start_of_scan(data: NDArray[np.uint8]) -> int:
    """Offset at which the pixels of a JPEG begin, after its segments of a marker and a length each."""
    offset = 2
    for _ in range(MAX_PARTS):
        if offset + 4 > len(data) or data[offset] != 0xFF or data[offset + 1] == _SOS:
            break
        is_fill = data[offset + 1] == 0xFF
        offset += 1 if is_fill else 2 + int(data[offset + 2]) * 256 + int(data[offset + 3])
    return offset


def has_many_scans(data: NDArray[np.uint8]) -> bool:
    """Whether a JPEG has more than ``MAX_SCANS`` scans."""
    content = data.tobytes()
    # Both bytes stand elsewhere too, in thumbnails and in videos that phones append: then the scans are counted.
    if content.count(bytes((0xFF, _SOS))) <= MAX_SCANS:
        return False
    scans, offset = 0, start_of_scan(data)
    for _ in range(MAX_PARTS):
        found = _MARKER.search(content, offset)
        if found is None or content[found.start() + 1] == _EOI:
            return False
        scans += content[found.start() + 1] == _SOS
        if scans > MAX_SCANS:
            return True
        offset = found.end() + int.from_bytes(content[found.end() : found.end() + 2], "big")
    return True


def without_compressed_parts(data: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The file without the compressed texts and colour profile of a PNG; any other file as it is."""
    content = data.tobytes()
    if not content.startswith(PNG_START) or not any(kind in content for kind in _COMPRESSED):
        return data
    parts, offset = [PNG_START], len(PNG_START)
    while offset + 8 <= len(content):
        end = offset + 12 + int.from_bytes(content[offset : offset + 4], "big")
        if content[offset + 4 : offset + 8] not in _COMPRESSED:
            parts.append(content[offset:end])
        offset = end
    return np.frombuffer(b"".join(parts), dtype=np.uint8)
