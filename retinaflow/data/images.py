"""Image files of an index: where they are, how large they are, and their pixels.

Sizes come from a given table or from the file headers (no pixel is decoded), see :mod:`retinaflow.data.image_sizes`;
what a table lacks is read from the headers. JPEGs are decoded by libjpeg-turbo with its fast transforms (simplejpeg),
at reduced size and all else by OpenCV. EXIF rotation is ignored in both, as the published boxes of Open Images refer to
the stored pixels.
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

from retinaflow.data.image_sizes import THREADS, SizeTable, read_sizes
from retinaflow.data.index import AnnotationIndex
from retinaflow.errors import DataError, SettingError
from retinaflow.settings.groups import OnBadImage

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
_JPEG_START, _JPEG_END = b"\xff\xd8", b"\xff\xd9"
_SCAN = 0xDA
_TAIL = 4096
"""Bytes at the end of a JPEG among which its end marker is looked for first; cameras append thumbnails and padding."""
_REDUCED = ((8, cv2.IMREAD_REDUCED_COLOR_8), (4, cv2.IMREAD_REDUCED_COLOR_4), (2, cv2.IMREAD_REDUCED_COLOR_2))
"""How OpenCV decodes at 1 / factor of the size."""


@dataclass(frozen=True)
class BadImage:
    """An image that cannot be used, and why."""

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
    """The index with the file and size of every image; files are looked up by id in ``folders``, the first hit counts.

    Sizes in the table ``given`` are believed, and those files not opened; ``journal`` keeps what is read from headers.
    ``on_bad_image="skip"`` leaves out images without a readable file and returns them; ``"stop"`` raises
    FileNotFoundError (no file) or ValueError (unreadable), naming how many and the first. So it does when none is left.
    """
    root = Path(os.path.commonpath([folder.resolve() for folder in folders])) if folders else Path()
    found = files_by_stem(folders, root)
    files = np.array([found.get(str(image_id), "") for image_id in index.image_ids], dtype=np.str_)
    located = replace(index, files=files, images_folder=str(root), path=None)
    shown = " or ".join(str(folder) for folder in folders)
    return attach_sizes(located, shown, on_bad_image=on_bad_image, given=given, journal=journal, quiet=quiet)


def attach_sizes(
    index: AnnotationIndex,
    place: str,
    *,
    on_bad_image: OnBadImage = "stop",
    given: SizeTable | None = None,
    journal: Path | None = None,
    quiet: bool = False,
) -> tuple[AnnotationIndex, list[BadImage]]:
    """As :func:`attach_files`, for an index that knows its files (empty: none was found in ``place``)."""
    files, root = index.files, Path(index.images_folder)
    bad = [BadImage(str(index.image_ids[image]), "no file") for image in np.flatnonzero(files == "")]
    if bad and (on_bad_image == "stop" or len(bad) == len(index)):
        raise DataError(
            f"{len(index) - len(bad):,} of {len(index):,} images have a file under {place}; missing is "
            f"{bad[0].image_id}, for example. Is images= right? Give on_bad_image=skip to go on without them."
        )
    sizes = np.zeros((len(index), 2), dtype=np.int32) if given is None else given.look_up(index.image_ids)
    sizes[files == ""] = 0
    unreadable = _read_missing_sizes(sizes, files, root, journal=journal, quiet=quiet)
    bad += [BadImage(str(index.image_ids[image]), reason) for image, reason in unreadable]
    if unreadable and (on_bad_image == "stop" or len(bad) == len(index)):
        image, reason = unreadable[0]
        raise DataError(
            f"{len(unreadable):,} of {len(index):,} image files cannot be read; {root / files[image]}: {reason}. "
            "Replace the file, or give on_bad_image=skip to go on without them."
        )
    complete = replace(index, sizes=sizes, path=None)
    return (complete.take(np.flatnonzero(sizes[:, 0] > 0)) if bad else complete), bad


def files_by_stem(folders: Iterable[Path], root: Path) -> dict[str, str]:
    """Name without suffix -> path under ``root`` of the image files in some folders; the first folder's counts."""
    found: dict[str, str] = {}
    for folder in folders:
        if not folder.is_dir():
            raise SettingError(f"images={folder}: no such folder")
        prefix = os.path.relpath(folder.resolve(), root)
        # Sorted, so that the first hit is always the same.
        for name in sorted(entry.name for entry in os.scandir(folder)):
            stem, dot, suffix = name.rpartition(".")
            if f"{dot}{suffix.lower()}" in SUFFIXES:
                found.setdefault(stem, name if prefix == "." else f"{prefix}/{name}")
    return found


def _read_missing_sizes(
    sizes: NDArray[np.int32], files: NDArray[np.str_], root: Path, *, journal: Path | None, quiet: bool
) -> list[tuple[int, str]]:
    """Fill in the sizes that are 0 of the images with a file; those that cannot be read, and why."""
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
    """Bytes and time of change in ns ``[I, 2]`` of the image files: a file that was replaced has others. 0: no file."""

    def state(image: int) -> tuple[int, int]:
        try:
            status = index.file_of(image).stat()
        except OSError:
            return 0, 0
        return status.st_size, status.st_mtime_ns

    # By threads: on a network's file system each answer takes its time.
    with ThreadPoolExecutor(THREADS) as threads:
        found = list(threads.map(state, range(len(index))))
    return np.array(found, dtype=np.int64).reshape(-1, 2)


def header_size(path: Path) -> tuple[int, int] | str:
    """(height, width) of the stored pixels from the head of an image file, or what is wrong with it."""
    try:
        with Image.open(path) as image:
            size = image.height, image.width
            is_jpeg = image.format in ("JPEG", "MPO")
        # OpenCV fills the missing rows of a cut JPEG with grey and says nothing.
        with path.open("rb") as file:
            file.seek(max(path.stat().st_size - _TAIL, 0))
            is_cut = is_jpeg and _JPEG_END not in file.read() and _is_cut(np.fromfile(path, dtype=np.uint8))
        return "the JPEG is cut short" if is_cut else size
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, ValueError) as error:
        return "not an image file" if isinstance(error, UnidentifiedImageError) else str(error)


class UnreadableImageError(DataError):
    """An image file is missing, damaged, or no image; the message begins with its path."""


def decode(path: Path, size: tuple[int, int], target: tuple[int, int]) -> NDArray[np.uint8]:
    """RGB pixels ``[H, W, 3]`` of exactly ``target`` (height, width), from a file of ``size``.

    Raises UnreadableImageError, a ValueError that names the file. Of an animated file the first picture counts.
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
    shrink = min(size[0] / target[0], size[1] / target[1])
    # Of other formats OpenCV decodes all, and then skips pixels.
    reduced = _REDUCED if _is_jpeg(data) else ()
    flag = next((flag for factor, flag in reduced if shrink >= factor), cv2.IMREAD_COLOR)
    pixels = _whole_jpeg(data) if flag == cv2.IMREAD_COLOR else None
    if pixels is None:
        pixels = _pixels(name, data, flag | cv2.IMREAD_IGNORE_ORIENTATION)
    height, width = pixels.shape[:2]
    if (height, width) != target:
        # Reduced decoding leaves a factor below 2 of a JPEG, where two taps skip no pixel; averaging costs eight times
        # as much.
        far = height >= 2 * target[0] or width >= 2 * target[1]
        taps = cv2.INTER_AREA if far else cv2.INTER_LINEAR
        pixels = np.asarray(cv2.resize(pixels, target[::-1], interpolation=taps), dtype=np.uint8)
    return pixels


def _whole_jpeg(data: NDArray[np.uint8]) -> NDArray[np.uint8] | None:
    """RGB pixels of a sound, ordinary JPEG in full size, faster than OpenCV decodes it; None for all else."""
    if not _is_jpeg(data) or _is_cut(data):
        return None
    try:
        return np.asarray(simplejpeg.decode_jpeg(data, "RGB", fastdct=True, fastupsample=True))
    except ValueError:
        # CMYK, 12 bits, or a file that libjpeg warns of: OpenCV reads what can be read, or says what is wrong.
        return None


def _is_jpeg(data: NDArray[np.uint8]) -> bool:
    return data[:2].tobytes() == _JPEG_START


def _is_cut(data: NDArray[np.uint8]) -> bool:
    """Whether a JPEG's end marker is missing: neither among its last bytes nor, as phones append whole films, after the
    start of its pixels (before it, a thumbnail has an end of its own)."""
    return _JPEG_END not in data[-_TAIL:].tobytes() and _JPEG_END not in data[_start_of_scan(data) :].tobytes()


def _start_of_scan(data: NDArray[np.uint8]) -> int:
    """Where the pixels of a JPEG begin: its segments, each of a marker and a length, are passed over."""
    place = 2
    while place + 4 <= len(data) and data[place] == 0xFF and data[place + 1] != _SCAN:
        is_fill = data[place + 1] == 0xFF
        place += 1 if is_fill else 2 + int(data[place + 2]) * 256 + int(data[place + 3])
    return place


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
