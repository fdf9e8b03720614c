"""A small file that would cost minutes or gigabytes is refused, or costs as little as its pixels do."""

from __future__ import annotations

import io
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from retinaflow.data.decoding_limits import MAX_PARTS, MAX_SCANS, has_many_scans, without_compressed_parts
from retinaflow.data.images import UnreadableImageError, decode_bytes, header_size
from retinaflow.errors import DataError
from retinaflow.runs.served_images import Limits, image_at


def encoded(kind: str, *, size: tuple[int, int] = (48, 32), **options: object) -> bytes:
    """A photo-like image, (width, height)."""
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def jpeg_with(parts: bytes) -> bytes:
    """An ordinary JPEG with more parts before its pixels."""
    data = encoded("JPEG")
    return data[:2] + parts + data[2:]


def jpeg_of_scans(more: int) -> bytes:
    """A progressive JPEG whose last scan is there that many times more."""
    data = encoded("JPEG", progressive=True)
    return data[:-2] + data[data.rfind(b"\xff\xda") : -2] * more + data[-2:]


def png_with(kind: bytes, start: bytes, count: int, expanded: int = 7_000_000) -> bytes:
    """A PNG with so many parts at its end that are small in the file and large when they are read."""
    data, part = encoded("PNG"), zlib.compress(bytes(expanded), 9)
    return data[:-12] + b"".join(chunk(kind, b"k%d" % number + start + part) for number in range(count)) + data[-12:]


REFUSED: dict[str, Callable[[], bytes]] = {
    "a million fill bytes": lambda: jpeg_with(b"\xff" * 1_000_000),
    "a million comments": lambda: jpeg_with(b"\xff\xfe\0\2" * 1_000_000),
    "a million colour profiles": lambda: jpeg_with(b"\xff\xe2\0\2" * 1_000_000),
    "a million chunks": lambda: encoded("PNG")[:33] + chunk(b"prVt", b"") * 1_000_000 + encoded("PNG")[33:],
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_header_of_a_million_parts_is_refused_at_once(name: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(REFUSED[name]())
    started = time.process_time()
    assert header_size(path) == f"the header has more than {MAX_PARTS:,} parts"
    with pytest.raises(DataError, match="not an image file"):
        image_at(path, Limits())
    # Seconds without the limit.
    assert time.process_time() - started < 1


def test_the_scans_of_a_jpeg_are_limited() -> None:
    # Pillow writes 10 scans of a colour image.
    for more, is_refused in ((0, False), (MAX_SCANS - 10, False), (MAX_SCANS - 9, True), (50_000, True)):
        data = np.frombuffer(jpeg_of_scans(more), dtype=np.uint8)
        assert has_many_scans(data) == is_refused, more
        if is_refused:
            with pytest.raises(UnreadableImageError, match="a JPEG may have 100 scans, but has more"):
                decode_bytes(data, (32, 48), (32, 48), name="image")
        else:
            decode_bytes(data, (32, 48), (32, 48), name="image")


def test_what_looks_like_scans_after_the_end_of_an_image_does_not_count() -> None:
    data = encoded("JPEG")
    video = np.random.default_rng(0).bytes(1000).replace(b"\xff", b"") + b"\xff\xda" * 500
    assert not has_many_scans(np.frombuffer(data + video, dtype=np.uint8))
    thumbnail = b"\xff\xe1" + struct.pack(">H", 2 + 1000) + b"\xff\xda" * 500
    assert not has_many_scans(np.frombuffer(jpeg_with(thumbnail), dtype=np.uint8))


@pytest.mark.parametrize(("kind", "start"), [(b"zTXt", b"\0\0"), (b"iTXt", b"\0\1\0\0\0"), (b"iCCP", b"\0\0")])
def test_compressed_texts_of_a_png_are_not_read(kind: bytes, start: bytes) -> None:
    plain = np.frombuffer(encoded("PNG"), dtype=np.uint8)
    data = np.frombuffer(png_with(kind, start, 60), dtype=np.uint8)
    started = time.process_time()
    found = decode_bytes(data, (32, 48), (32, 48), name="image")
    # 420 MB of texts take 2 seconds.
    assert time.process_time() - started < 0.5
    np.testing.assert_array_equal(found, decode_bytes(plain, (32, 48), (32, 48), name="image"))
    np.testing.assert_array_equal(without_compressed_parts(data), plain)


def test_other_files_are_decoded_as_they_are() -> None:
    for kind in ("PNG", "JPEG", "WEBP", "BMP"):
        data = np.frombuffer(encoded(kind), dtype=np.uint8)
        assert without_compressed_parts(data) is data


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_an_image_of_too_many_pixels_is_not_decoded_whatever_size_a_table_gives(kind: str) -> None:
    if kind == "JPEG":
        data = bytearray(encoded("JPEG"))
        start = data.index(b"\xff\xc0") + 5
        data[start : start + 4] = struct.pack(">HH", 65_500, 65_500)
        assert simplejpeg.decode_jpeg_header(bytes(data))[:2] == (65_500, 65_500)
    else:
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0))
        data = bytearray(encoded("PNG"))
        data[8:33] = header
    with pytest.raises(UnreadableImageError, match="not a readable image"):
        decode_bytes(np.frombuffer(bytes(data), dtype=np.uint8), (32, 48), (32, 48), name="image")
