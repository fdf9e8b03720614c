"""Image files of an index: their paths, their sizes, and their pixels.

Sizes come from a given table, and where it lacks an image from the file header, without decoding
(:mod:`retinaflow.data.image_sizes`). JPEGs are decoded in full size by libjpeg-turbo with its fast transforms
(simplejpeg); OpenCV decodes JPEGs at reduced size and all other formats. Both ignore the EXIF orientation, because the
published boxes of Open Images refer to the stored pixels.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from retinaflow.data.decoding_limits import (
    MAX_PIXELS,
    MAX_SCANS,
    has_many_scans,
    open_header,
    start_of_scan,
    without_compressed_parts,
)
from retinaflow.data.image_sizes import THREADS, SizeTable, read_sizes
from retinaflow.data.index import AnnotationIndex
from retinaflow.errors import DataError, SettingError
from retinaflow.settings.data_settings import OnBadImage

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
LEFT_OUT_SUFFIXES = (".tif", ".tiff", ".gif", ".heic", ".heif", ".avif", ".jp2", ".jxl", ".dng", ".dcm")
"""Image files of other types: they are not read, and counted."""
_JPEG_START, _JPEG_END = b"\xff\xd8", b"\xff\xd9"
_TAIL = 4096
"""Bytes at the end of a JPEG that are searched for its end marker first; cameras append thumbnails and padding."""
_REDUCED = ((8, cv2.IMREAD_REDUCED_COLOR_8), (4, cv2.IMREAD_REDUCED_COLOR_4), (2, cv2.IMREAD_REDUCED_COLOR_2))
"""(factor, flag of OpenCV that decodes at 1 / factor of the size)."""


@dataclass(frozen=True)
class BadImage:
    """An image that cannot be used, and the reason."""

    image_id: str
    reason: str


def attach_files(
    index: AnnotationIndex,
    folders: Sequence[Path],
    *,
    on_bad_image: OnBadImage = "stop",
    given: SizeTable | None = None,
    journal: Path | None = None,
    quiet: bool = False,
) -> tuple[AnnotationIndex, list[BadImage]]:
    """The index with the file and size of every image; files are found by id in ``folders``, in their order.

    Files whose size is in the table ``given`` are not opened; ``journal`` records the sizes from headers.
    ``on_bad_image="skip"`` leaves out images without a readable file and returns them; ``"stop"`` raises DataError with
    their number and the first one, as both do when no image remains.
    """
    root = Path(os.path.commonpath([folder.resolve() for folder in folders])) if folders else Path()
    found = files_by_stem(folders, root)
    files = np.array([found.get(str(image_id), "") for image_id in index.image_ids], dtype=np.str_)
    located = replace(index, files=files, images_folder=str(root), path=None)
    shown = " or ".join(str(folder) for folder in folders)
    return attach_sizes(located, shown, on_bad_image=on_bad_image, given=given, journal=journal, quiet=quiet)


def attach_sizes(
    index: AnnotationIndex,
    searched: str,
    *,
    on_bad_image: OnBadImage = "stop",
    given: SizeTable | None = None,
    journal: Path | None = None,
    quiet: bool = False,
) -> tuple[AnnotationIndex, list[BadImage]]:
    """As :func:`attach_files`, for an index with the paths of its files; empty: no file was found in ``searched``."""
    files, root = index.files, Path(index.images_folder)
    bad = [BadImage(str(index.image_ids[image]), "no file") for image in np.flatnonzero(files == "")]
    if bad and (on_bad_image == "stop" or len(bad) == len(index)):
        raise DataError(
            f"{len(index) - len(bad):,} of {len(index):,} images have a file under {searched}; "
            f"{bad[0].image_id} has none, for example. Check images=, or give on_bad_image=skip to leave them out."
        )
    sizes = np.zeros((len(index), 2), dtype=np.int32) if given is None else given.look_up(index.image_ids)
    sizes[files == ""] = 0
    unreadable = _read_missing_sizes(sizes, files, root, journal=journal, quiet=quiet)
    bad += [BadImage(str(index.image_ids[image]), reason) for image, reason in unreadable]
    if unreadable and (on_bad_image == "stop" or len(bad) == len(index)):
        image, reason = unreadable[0]
        raise DataError(
            f"{len(unreadable):,} of {len(index):,} image files cannot be read; {root / files[image]}: {reason}. "
            "Replace the file, or give on_bad_image=skip to leave such images out."
        )
    complete = replace(index, sizes=sizes, path=None)
    return (complete.take(np.flatnonzero(sizes[:, 0] > 0)) if bad else complete), bad


def files_by_stem(folders: Iterable[Path], root: Path) -> dict[str, str]:
    """Name without suffix -> path under ``root`` of the image files in some folders; the first folder comes first."""
    found: dict[str, str] = {}
    for folder in folders:
        if not folder.is_dir():
            raise SettingError(f"images={folder}: no such folder")
        prefix = os.path.relpath(folder.resolve(), root)
        # Sorted, so that the first match is always the same.
        for name in sorted(entry.name for entry in os.scandir(folder)):
            stem, dot, suffix = name.rpartition(".")
            if f"{dot}{suffix.lower()}" in SUFFIXES:
                found.setdefault(stem, name if prefix == "." else f"{prefix}/{name}")
    return found


def _read_missing_sizes(
    sizes: NDArray[np.int32], files: NDArray[np.str_], root: Path, *, journal: Path | None, quiet: bool
) -> list[tuple[int, str]]:
    """Fill in the sizes that are 0 of images with a file. Returns the images that cannot be read, with the reason."""
    wanted = np.flatnonzero((files != "") & (sizes[:, 0] == 0)).tolist()
    found = read_sizes(root, files[wanted].tolist(), header_size, journal=journal, quiet=quiet)
    unreadable = []
    for image, result in zip(wanted, found, strict=True):
        if isinstance(result, str):
            unreadable.append((image, result))
        else:
            sizes[image] = result
    return unreadable


def file_states(index: AnnotationIndex) -> NDArray[np.int64]:
    """Bytes and time of change in ns ``[I, 2]`` of the image files, by which a replaced file is recognised; 0: no
    file."""

    def state(image: int) -> tuple[int, int]:
        try:
            status = index.file_of(image).stat()
        except OSError:
            return 0, 0
        return status.st_size, status.st_mtime_ns

    # By threads, because each call is slow on a network file system.
    with ThreadPoolExecutor(THREADS) as threads:
        found = list(threads.map(state, range(len(index))))
    return np.array(found, dtype=np.int64).reshape(-1, 2)


def header_size(path: Path) -> tuple[int, int] | str:
    """(height, width) of the stored pixels from the header of an image file, or the reason why it cannot be used."""
    try:
        with path.open("rb") as file, open_header(file) as image:
            size = image.height, image.width
            is_jpeg = image.format in ("JPEG", "MPO")
        # OpenCV fills the missing rows of a cut JPEG with grey, without an error.
        with path.open("rb") as file:
            file.seek(max(path.stat().st_size - _TAIL, 0))
            is_cut = is_jpeg and _JPEG_END not in file.read() and _is_cut(np.fromfile(path, dtype=np.uint8))
        return "the JPEG is cut short" if is_cut else size
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, ValueError) as error:
        return "not an image file" if isinstance(error, UnidentifiedImageError) else str(error)


class UnreadableImageError(DataError):
    """An image file that is missing, damaged, or no image; the message begins with its path."""


def decode(path: Path, size: tuple[int, int], target: tuple[int, int]) -> NDArray[np.uint8]:
    """RGB pixels ``[H, W, 3]`` of exactly ``target`` (height, width), from a file of ``size``.

    Raises UnreadableImageError, which names the file. Of an animated file the first image is decoded.
    """
    try:
        data = np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        raise UnreadableImageError(f"{path}: the image cannot be read: {error.strerror}") from None
    return decode_bytes(data, size, target, name=str(path))


def decode_bytes(
    data: NDArray[np.uint8], size: tuple[int, int], target: tuple[int, int], *, name: str
) -> NDArray[np.uint8]:
    """As :func:`decode`, from the bytes of a file; ``name`` for errors."""
    if _is_jpeg(data) and has_many_scans(data):
        raise UnreadableImageError(f"{name}: a JPEG may have {MAX_SCANS} scans, but has more")
    shrink = min(size[0] / target[0], size[1] / target[1])
    # OpenCV decodes other formats whole before it reduces them.
    reduced = _REDUCED if _is_jpeg(data) else ()
    flag = next((flag for factor, flag in reduced if shrink >= factor), cv2.IMREAD_COLOR)
    pixels = _whole_jpeg(data) if flag == cv2.IMREAD_COLOR else None
    if pixels is None:
        pixels = _pixels(name, without_compressed_parts(data), flag | cv2.IMREAD_IGNORE_ORIENTATION)
    height, width = pixels.shape[:2]
    if (height, width) != target:
        # After reduced decoding of a JPEG the factor is below 2, where linear interpolation skips no pixel; averaging
        # costs eight times as much.
        far = height >= 2 * target[0] or width >= 2 * target[1]
        taps = cv2.INTER_AREA if far else cv2.INTER_LINEAR
        pixels = np.asarray(cv2.resize(pixels, target[::-1], interpolation=taps), dtype=np.uint8)
    return pixels


def _whole_jpeg(data: NDArray[np.uint8]) -> NDArray[np.uint8] | None:
    """RGB pixels of an intact, ordinary JPEG in full size, faster than by OpenCV; None for any other file."""
    if not _is_jpeg(data) or _is_cut(data):
        return None
    try:
        height, width = simplejpeg.decode_jpeg_header(data)[:2]
        # OpenCV knows the limit, and refuses the file.
        if height * width > MAX_PIXELS:
            return None
        return np.asarray(simplejpeg.decode_jpeg(data, "RGB", fastdct=True, fastupsample=True))
    except ValueError:
        # CMYK, 12 bits, or a warning of libjpeg: OpenCV decodes the file, or gives the reason why it cannot.
        return None


def _is_jpeg(data: NDArray[np.uint8]) -> bool:
    return data[:2].tobytes() == _JPEG_START


def _is_cut(data: NDArray[np.uint8]) -> bool:
    """Whether a JPEG lacks its end marker in its last bytes and, because phones append whole videos, also after the
    start of its pixels (before that, a thumbnail may have an end marker of its own)."""
    return _JPEG_END not in data[-_TAIL:].tobytes() and _JPEG_END not in data[start_of_scan(data) :].tobytes()


def _pixels(path: str, data: NDArray[np.uint8], flags: int) -> NDArray[np.uint8]:
    """RGB pixels of the bytes of an image file."""
    if _is_jpeg(data) and _is_cut(data):
        raise UnreadableImageError(f"{path}: the JPEG is cut short")
    try:
        pixels = cv2.imdecode(data, flags) if len(data) else None
    except cv2.error as error:
        raise UnreadableImageError(f"{path}: not a readable image: {error.err or error}") from None
    if pixels is None:
        raise UnreadableImageError(f"{path}: not a readable image")
    return np.asarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB), dtype=np.uint8)
