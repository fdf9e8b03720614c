"""SourceSet -> DetectionSet: verified against the image files, clipped, with an error for every broken rule.

A box that reaches out of its image is clipped, and such boxes are counted. A box without width or height, one wholly
outside of its image, and one given twice break a rule: they stop the reading, or are dropped and listed.

A declared size may differ from the size of the file in two ways. With its sides exchanged it is the size of the image
as EXIF rotates it, and the boxes are rotated back. With the same aspect ratio it is the size of an image that was
scaled after its boxes were drawn. Any other difference breaks a rule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pandas as pd
from tqdm import tqdm

from retinaflow.data.formats.detection_set import CORNERS, FLAGS, DetectionSet
from retinaflow.data.formats.ids import image_ids
from retinaflow.data.formats.orientation import SWAPPED, Header, read_header, to_stored
from retinaflow.data.formats.source import SourceImage, SourceSet, note
from retinaflow.data.image_sizes import THREADS
from retinaflow.data.images import SUFFIXES
from retinaflow.data.tables import RowError, RowErrors
from retinaflow.errors import DataError
from retinaflow.settings.conversion_settings import Orientation
from retinaflow.settings.data_settings import OnBadImage

_SAME_SHAPE = 0.01
"""Greatest relative difference of the two scales at which a size counts as that of the scaled image."""
_ROUNDING = 1e-6
"""Fraction of the image by which a box may reach out of it unreported: the last digit of files with six digits."""


@dataclass(frozen=True)
class _Frame:
    """What the boxes of an image refer to: the (height, width) that divides pixels, and the EXIF orientation to
    undo."""

    header: Header
    size: tuple[int, int]
    orientation: int


def check(
    source: SourceSet,
    errors: RowErrors,
    *,
    exhaustive: bool,
    on_bad_image: OnBadImage = "stop",
    orientation: Orientation = "auto",
    report: Callable[[str], None] = lambda line: None,
    quiet: bool = True,
) -> DetectionSet:
    """The images and boxes of a source that break no rule, with ids.

    Raises DataError for images without a readable file (with ``on_bad_image="skip"`` they are listed in ``errors``),
    and for boxes that break a rule unless ``errors`` drops them.
    """
    headers = _read_headers(source.images, quiet=quiet)
    bad = _bad_images(source.images, headers, on_bad_image)
    frames = _frames(source, headers, errors, orientation, report)
    usable = np.array([frame is not None for frame in frames], dtype=bool)
    boxes = _boxes(source, frames, errors, report)
    errors.settle()
    # After settle(): a setting of its own decides about images.
    errors.found += bad
    names = [image.name for image in source.images]
    images = pd.DataFrame(
        {
            "image_id": image_ids(names),
            "split": [image.split for image in source.images],
            "file": [image.file for image in source.images],
            "height": [frame.header.height if frame else 0 for frame in frames],
            "width": [frame.header.width if frame else 0 for frame in frames],
            "orientation": [frame.header.orientation if frame else 1 for frame in frames],
        }
    )
    labels = _labels(source, boxes) if not exhaustive else _labels(None, boxes)
    whole = DetectionSet(source.classes.taxonomy(), images, boxes, labels, exhaustive)
    return whole.take(usable)


def _bad_images(
    images: Sequence[SourceImage], headers: Sequence[Header | str], on_bad_image: OnBadImage
) -> list[RowError]:
    """The images to leave out. Raises DataError when they are not to be left out, or when none remains."""
    bad = [(image, header) for image, header in zip(images, headers, strict=True) if isinstance(header, str)]
    if bad and (on_bad_image == "stop" or len(bad) == len(headers)):
        image, reason = bad[0]
        raise DataError(
            f"{len(bad):,} of {len(headers):,} images have no readable file; {image.file or image.name}: {reason}. "
            "Check images=, or give on_bad_image=skip to leave them out."
        )
    return [RowError(image.name, 0, "an image must have a readable file", reason) for image, reason in bad]


def _frames(
    source: SourceSet,
    headers: Sequence[Header | str],
    errors: RowErrors,
    orientation: Orientation,
    report: Callable[[str], None],
) -> list[_Frame | None]:
    """What the boxes of each image refer to; None for an image that is left out."""
    frames: list[_Frame | None] = []
    rotated = scaled = unclear = 0
    for image, header in zip(source.images, headers, strict=True):
        frame = None if isinstance(header, str) else _frame_of(image, header, source.unit, orientation)
        if frame is None and not isinstance(header, str):
            rule = "the declared size must be that of the file, scaled or rotated by EXIF"
            note(errors, image.name, rule, f"{_text(image.size)} for a file of {header.width} x {header.height}")
        elif frame is not None:
            rotated += frame.orientation > 1
            scaled += image.size is not None and sorted(frame.size) != sorted(frame.header[:2])
            unclear += orientation == "auto" and frame.orientation == 1 < frame.header.orientation
        frames.append(frame)
    if rotated:
        report(f"{rotated:,} images are rotated by EXIF: their boxes were rotated to the stored pixels")
    if unclear:
        report(
            f"{unclear:,} images have an EXIF orientation, and their boxes count as drawn on the stored pixels; give "
            "orientation=turned if they were drawn on the rotated image"
        )
    if scaled:
        report(f"{scaled:,} files have another size than declared, with the same aspect ratio: their boxes were scaled")
    return frames


def _read_headers(images: Sequence[SourceImage], *, quiet: bool) -> list[Header | str]:
    def header_of(image: SourceImage) -> Header | str:
        if image.file is None:
            return "no file"
        if image.file.suffix.lower() not in SUFFIXES:
            return f"the file must be one of {', '.join(SUFFIXES)}"
        return read_header(image.file)

    with ThreadPoolExecutor(THREADS) as threads:
        progress = tqdm(
            threads.map(header_of, images), total=len(images), desc="image headers", disable=quiet, leave=False
        )
        return list(progress)


def _frame_of(image: SourceImage, header: Header, unit: str, orientation: Orientation) -> _Frame | None:
    stored = (header.height, header.width)
    shown = (header.width, header.height) if header.orientation in SWAPPED else stored
    # Tools that write fractions of the image work on the rotated image, which image libraries return.
    turn = orientation == "turned" or (orientation == "auto" and unit == "fraction")
    if unit == "fraction" or image.size is None:
        return _Frame(header, shown if turn else stored, header.orientation if turn else 1)
    if orientation == "auto" and shown != stored and _same_shape(image.size, shown):
        turn = not _same_shape(image.size, stored)
    if not _same_shape(image.size, shown if turn else stored):
        return None
    return _Frame(header, image.size, header.orientation if turn else 1)


def _same_shape(size: tuple[int, int], other: tuple[int, int]) -> bool:
    scales = size[0] / other[0], size[1] / other[1]
    # Rounding to whole pixels changes each side by up to half a pixel.
    slack = _SAME_SHAPE + 0.5 / min(*size, *other)
    return abs(scales[0] - scales[1]) <= slack * max(scales)


def _text(size: tuple[int, int] | None) -> str:
    return f"{size[1]} x {size[0]}" if size else "none"


def _boxes(
    source: SourceSet, frames: Sequence[_Frame | None], errors: RowErrors, report: Callable[[str], None]
) -> pd.DataFrame:
    """The boxes that break no rule, in [0, 1] of the stored image."""
    rows = [box for box in source.boxes if frames[box[0]] is not None]
    image = np.array([box[0] for box in rows], dtype=np.int64)
    corners = np.array([box[2] for box in rows], dtype=np.float64).reshape(-1, 4)
    sizes = np.array([frame.size if frame else (1, 1) for frame in frames], dtype=np.float64).reshape(-1, 2)
    unit = sizes[image][:, [1, 0, 1, 0]]
    fractions = corners / unit if source.unit == "pixel" else corners
    clipped = np.clip(fractions, 0, 1)
    reach = np.abs(clipped - fractions)
    finite = np.isfinite(corners).all(axis=1)
    has_area = (corners[:, 0] < corners[:, 2]) & (corners[:, 1] < corners[:, 3])
    inside = (clipped[:, 0] < clipped[:, 2]) & (clipped[:, 1] < clipped[:, 3])
    turns = np.array([frame.orientation if frame else 1 for frame in frames], dtype=np.int64)[image]
    for orientation in np.unique(turns[turns > 1]):
        clipped[turns == orientation] = to_stored(clipped[turns == orientation], int(orientation))
    frame = pd.DataFrame({"image": image, "class": np.array([box[1] for box in rows], dtype=np.int64)})
    frame[list(CORNERS)] = clipped
    first = ~frame.duplicated().to_numpy() | ~(finite & has_area & inside)
    for valid, rule in (
        (finite, "a coordinate must be a finite number"),
        (~finite | has_area, "a box must have a width and a height above 0"),
        (~finite | ~has_area | inside, "a box must lie in its image"),
        (first, "a box must be given once"),
    ):
        for row in np.flatnonzero(~valid):
            note(errors, rows[row][4], rule, _shown(rows[row][2], source.unit), line=rows[row][5])
    good = finite & has_area & inside & first
    over = good & (reach > _ROUNDING).any(axis=1)
    if over.any():
        most = float((reach * unit)[over].max()) if source.unit == "pixel" else float(reach[over].max())
        far = f"{most:.4g} pixels" if source.unit == "pixel" else f"{most:.2%} of the image"
        report(f"{int(over.sum()):,} boxes reached out of their image, by {far} at most, and were clipped to it")
    flags = np.array([box[3] for box in rows], dtype=bool).reshape(-1, len(FLAGS))
    frame[list(FLAGS)] = flags
    return frame[good].sort_values("image", kind="stable", ignore_index=True)


def _shown(corners: tuple[float, ...], unit: str) -> str:
    sides = ", ".join(f"{name}={value:g}" for name, value in zip(CORNERS, corners, strict=True))
    return f"{sides} ({'pixels' if unit == 'pixel' else 'fractions of the image'})"


def _labels(source: SourceSet | None, boxes: pd.DataFrame) -> pd.DataFrame:
    """Boxed classes are present; the classes that a federated source lists as absent are absent."""
    present = boxes[["image", "class"]].drop_duplicates().assign(present=True)
    pairs = np.array(source.absent if source else [], dtype=np.int64).reshape(-1, 2)
    absent = pd.DataFrame(pairs, columns=["image", "class"]).drop_duplicates().assign(present=False)
    labels = pd.concat([present, absent], ignore_index=True).drop_duplicates(["image", "class"])
    return labels.sort_values(["image", "class"], ignore_index=True)
