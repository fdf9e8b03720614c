"""Image files of an index: their paths, their sizes, and their pixels.

Sizes come from a given table, and where it lacks an image from the file header, without decoding
(:mod:`retinaflow.data.image_sizes`). JPEGs are decoded by libjpeg-turbo (simplejpeg), in full
size with its fast transforms; OpenCV decodes all other formats. Both ignore the EXIF orientation, because the
published boxes of Open Images refer to the stored pixels.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray

from retinaflow.data.decoding_limits import MAX_PIXELS, MAX_SCANS, has_many_scans, without_compressed_parts
from retinaflow.data.image_folders import LocatedFiles, locate_files
from retinaflow.data.image_headers import header_size, is_cut_jpeg, is_jpeg
from retinaflow.data.image_sizes import THREADS, SizeTable, read_sizes
from retinaflow.data.index import AnnotationIndex
from retinaflow.errors import DataError
from retinaflow.settings.data_settings import OnBadImage

_LEFT_OVER = 0.02
"""Fraction of a JPEG that may be left over after its last pixel without a report."""
_REDUCED = ((8, cv2.IMREAD_REDUCED_COLOR_8), (4, cv2.IMREAD_REDUCED_COLOR_4), (2, cv2.IMREAD_REDUCED_COLOR_2))
"""(factor, flag of OpenCV that decodes at 1 / factor of the size)."""


@dataclass(frozen=True)
class BadImage:
    """An image that cannot be used, and the reason."""

    image_id: str
    reason: str


def attach_files(
    index: AnnotationIndex,
    folders: Sequence[Path] | LocatedFiles,
    *,
    on_bad_image: OnBadImage = "stop",
    given: SizeTable | None = None,
    journal: Path | None = None,
) -> tuple[AnnotationIndex, list[BadImage]]:
    """The index with the file and size of every image; files are found by id in ``folders``, in their order, if they
    are not located already.

    Files whose size is in the table ``given`` are not opened; ``journal`` records the sizes from headers.
    ``on_bad_image="skip"`` leaves out images without a readable file and returns them; ``"stop"`` raises DataError with
    their number and the first one, as both do when no image remains.
    """
    found = folders if isinstance(folders, LocatedFiles) else locate_files(index.image_ids, folders)
    located = replace(index, files=found.files, images_folder=str(found.root), path=None)
    shown = " or ".join(str(folder) for folder in found.folders)
    return attach_sizes(
        located,
        shown,
        reasons=found.reasons,
        on_bad_image=on_bad_image,
        given=given,
        journal=journal,
    )


def attach_sizes(
    index: AnnotationIndex,
    searched: str,
    *,
    reasons: Mapping[int, str] = MappingProxyType({}),
    on_bad_image: OnBadImage = "stop",
    given: SizeTable | None = None,
    journal: Path | None = None,
) -> tuple[AnnotationIndex, list[BadImage]]:
    """As :func:`attach_files`, for an index with the paths of its files; empty: no file was found in ``searched``,
    and ``reasons`` may give why."""
    files, root = index.files, Path(index.images_folder)
    missing = np.flatnonzero(files == "").tolist()
    bad = [BadImage(str(index.image_ids[image]), reasons.get(image, "no file")) for image in missing]
    if bad and (on_bad_image == "stop" or len(bad) == len(index)):
        known = next((reasons[image] for image in missing if image in reasons), "")
        why = f" ({known})" if known else ""
        raise DataError(
            f"{len(index) - len(bad):,} of {len(index):,} images have a file under {searched}; "
            f"{bad[0].image_id} has none, for example{why}. Check images=, or give on_bad_image=skip to leave them out."
        )
    sizes = np.zeros((len(index), 2), dtype=np.int32) if given is None else given.look_up(index.image_ids)
    sizes[files == ""] = 0
    unreadable = _read_missing_sizes(sizes, files, root, journal=journal)
    bad += [BadImage(str(index.image_ids[image]), reason) for image, reason in unreadable]
    if unreadable and (on_bad_image == "stop" or len(bad) == len(index)):
        image, reason = unreadable[0]
        raise DataError(
            f"{len(unreadable):,} of {len(index):,} image files cannot be read; {root / files[image]}: {reason}. "
            "Replace the file, or give on_bad_image=skip to leave such images out."
        )
    complete = replace(index, sizes=sizes, path=None)
    return (complete.take(np.flatnonzero(sizes[:, 0] > 0)) if bad else complete), bad


def _read_missing_sizes(
    sizes: NDArray[np.int32], files: NDArray[np.str_], root: Path, *, journal: Path | None
) -> list[tuple[int, str]]:
    """Fill in the sizes that are 0 of images with a file. Returns the images that cannot be read, with the reason."""
    wanted = np.flatnonzero((files != "") & (sizes[:, 0] == 0)).tolist()
    found = read_sizes(root, files[wanted].tolist(), header_size, journal=journal)
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


class UnreadableImageError(DataError):
    """An image file that is missing, damaged, or no image; the message begins with its path."""


def decode(path: Path, size: tuple[int, int], target: tuple[int, int]) -> NDArray[np.uint8]:
    """RGB pixels ``[H, W, 3]`` of exactly ``target`` (height, width), from a file of ``size``.

    Raises UnreadableImageError, which names the file, also for one of another shape: it was replaced after its size was
    read, or the given size is wrong. Of an animated file the first image is decoded.
    """
    try:
        data = np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        raise UnreadableImageError(f"{path}: the image cannot be read: {error.strerror}") from None
    return decode_bytes(data, size, target, name=str(path))


def decode_sized(index: AnnotationIndex, image: int, *, longest: float, enlarge: bool = False) -> NDArray[np.uint8]:
    """RGB pixels of an image of the index to look at, its longer side ``longest`` pixels; where the image is smaller it
    stays as it is, unless to ``enlarge``. Raises UnreadableImageError."""
    height, width = (int(side) for side in index.sizes[image])
    scale = longest / max(height, width)
    scale = scale if enlarge else min(1.0, scale)
    target = max(round(height * scale), 1), max(round(width * scale), 1)
    return decode(index.file_of(image), (height, width), target)


def decode_bytes(
    data: NDArray[np.uint8], size: tuple[int, int] | None, target: tuple[int, int], *, name: str
) -> NDArray[np.uint8]:
    """As :func:`decode`, from the bytes of a file of ``size`` (None: any); ``name`` for errors."""
    if is_jpeg(data) and has_many_scans(data):
        raise UnreadableImageError(f"{name}: a JPEG may have {MAX_SCANS} scans, but has more")
    shrink = 1.0 if size is None else min(size[0] / target[0], size[1] / target[1])
    # OpenCV decodes other formats whole before it reduces them.
    reduced = _REDUCED if is_jpeg(data) else ()
    factor, flag = next(((factor, flag) for factor, flag in reduced if shrink >= factor), (1, cv2.IMREAD_COLOR))
    pixels = _jpeg(name, data, factor)
    if pixels is None:
        pixels = _pixels(name, without_compressed_parts(data), flag | cv2.IMREAD_IGNORE_ORIENTATION)
    height, width = pixels.shape[:2]
    if size is not None and not _has_shape((height, width), size):
        raise UnreadableImageError(
            f"{name}: the image is {width * factor} x {height * factor} pixels, but {size[1]} x {size[0]} is its size "
            "in size_table= or was when the data was read; correct that file or, if the image was replaced, touch its "
            "folder, so that the size is read anew"
        )
    if (height, width) != target:
        # After reduced decoding of a JPEG the factor is below 2, where linear interpolation skips no pixel; averaging
        # costs eight times as much.
        far = height >= 2 * target[0] or width >= 2 * target[1]
        taps = cv2.INTER_AREA if far else cv2.INTER_LINEAR
        pixels = np.asarray(cv2.resize(pixels, target[::-1], interpolation=taps), dtype=np.uint8)
    return pixels


def _has_shape(found: tuple[int, int], size: tuple[int, int]) -> bool:
    """Whether an image has the proportions of a size, up to a pixel: boxes fit a file that was scaled, or decoded at
    reduced size."""
    return abs(found[0] * size[1] - found[1] * size[0]) <= max(sum(found), sum(size))


def _jpeg(name: str, data: NDArray[np.uint8], factor: int) -> NDArray[np.uint8] | None:
    """RGB pixels of an ordinary JPEG at 1 / ``factor`` of its size; None for any other file.

    In full size the fast transforms are used; at reduced size the pixels are those of OpenCV, which does not notice
    damage. Raises UnreadableImageError for a JPEG of which pixels are missing.
    """
    if not is_jpeg(data) or is_cut_jpeg(data):
        return None
    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(data)
        if height * width > MAX_PIXELS:
            # OpenCV has the same limit, and refuses the file.
            return None
        if factor == 1:
            return np.asarray(simplejpeg.decode_jpeg(data, "RGB", fastdct=True, fastupsample=True))
        least = {"min_height": -(-height // factor), "min_width": -(-width // factor)}
        return np.asarray(simplejpeg.decode_jpeg(data, "RGB", **least))
    except ValueError as error:
        if _is_damage(str(error), len(data)):
            raise UnreadableImageError(f"{name}: the JPEG is damaged: {error}") from None
        # CMYK, 12 bits, or a harmless warning of libjpeg: OpenCV decodes the file, or gives the reason why it cannot.
        return None


def _is_damage(warning: str, size: int) -> bool:
    """Whether a warning of libjpeg means that pixels are missing: data ends early, or much of it is left over."""
    left_over = re.search(r"(\d+) extraneous bytes", warning)
    return "premature end" in warning or bool(left_over and int(left_over[1]) > _LEFT_OVER * size)


def _pixels(path: str, data: NDArray[np.uint8], flags: int) -> NDArray[np.uint8]:
    """RGB pixels of the bytes of an image file."""
    if is_jpeg(data) and is_cut_jpeg(data):
        raise UnreadableImageError(f"{path}: the JPEG is cut short")
    try:
        pixels = cv2.imdecode(data, flags) if len(data) else None
    except cv2.error as error:
        raise UnreadableImageError(f"{path}: not a readable image: {error.err or error}") from None
    if pixels is None:
        raise UnreadableImageError(f"{path}: not a readable image")
    return np.asarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB), dtype=np.uint8)
