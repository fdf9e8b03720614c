"""SourceSet -> DetectionSet: verified against the image files, clipped, with an error for every broken rule.

A box that reaches out of its image is clipped, and such boxes are counted. A box without width or height, one wholly
outside of its image, and one given twice break a rule: they stop the reading, or are dropped and listed.

A declared size may differ from the size of the file in two ways. With its sides exchanged it is the size of the image
as EXIF rotates it, and the boxes are rotated back. With the same aspect ratio it is the size of an image that was
scaled after its boxes were drawn. Any other difference breaks a rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from tqdm import tqdm

from retinaflow.data.formats.as_written import as_read, has_area, is_first
from retinaflow.data.formats.detection_set import CORNERS, FLAGS, DetectionSet
from retinaflow.data.formats.ids import image_ids
from retinaflow.data.formats.orientation import SWAPPED, Header, read_header, to_stored
from retinaflow.data.formats.source import SourceImage, SourceSet, note, report_alike
from retinaflow.data.image_folders import SUFFIXES
from retinaflow.data.image_sizes import THREADS
from retinaflow.data.tables import SHOWN, RowError, RowErrors, row_hashes
from retinaflow.errors import DataError
from retinaflow.progress import report
from retinaflow.settings.conversion_settings import ConvertConfig, Layout, Orientation
from retinaflow.settings.data_settings import OnBadImage

_SAME_SHAPE = 0.01
"""Greatest relative difference of the two scales at which a size counts as that of the scaled image."""
_FAR, _FEW = 0.02, 5
"""Fraction of the image by which most boxes reach out where their unit is another; fewer boxes prove nothing."""
_BLOCK = 1 << 17
"""Boxes that are checked at a time."""
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
    config: ConvertConfig, source: SourceSet, errors: RowErrors, *, target: Layout = "openimages"
) -> DetectionSet:
    """The images and boxes of a source that break no rule, with ids.

    Raises DataError for images without a readable file (with ``on_bad_image="skip"`` they are listed in ``errors``),
    and for boxes that break a rule unless ``errors`` drops them.
    """
    errors.settle()
    exhaustive = not source.federated if config.exhaustive == "auto" else config.exhaustive
    headers = _read_headers(source.images)
    counts = np.bincount(source.boxes.image, minlength=len(source.images))
    bad = _bad_images(source.images, headers, counts, config.on_bad_image)
    frames = _frames(source, headers, errors, config.orientation)
    usable = np.array([frame is not None for frame in frames], dtype=bool)
    boxes = _boxes(source, frames, errors, target)
    errors.settle()
    # After settle(): a setting of its own decides about images.
    errors.add(bad)
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
    incomplete = _pairs(() if exhaustive else source.incomplete)
    if exhaustive and source.incomplete:
        report(f"exhaustive=true: {len(source.incomplete):,} classes that are listed as not exhaustive are exhaustive")
    whole = DetectionSet(source.classes.taxonomy(), images, boxes, labels, exhaustive, incomplete)
    _report_shared_files(source.images)
    report_alike(whole.taxonomy.names)
    return whole if usable.all() else whole.take(usable)


def _with_count(text: str, boxes: int) -> str:
    """A text, with the number of boxes that are left out with their image."""
    return f"{text}, with {boxes} boxes" if boxes else text


def _report_shared_files(images: Sequence[SourceImage]) -> None:
    """Report files in several splits: evaluating on training images would give too good results."""
    split: dict[Path, str] = {}
    shared = [image.file for image in images if image.file and split.setdefault(image.file, image.split) != image.split]
    if shared:
        report(f"{len(shared):,} image files are in more than one split, {shared[0]} for example")


def _bad_images(
    images: Sequence[SourceImage],
    headers: Sequence[Header | str],
    counts: NDArray[np.int64],
    on_bad_image: OnBadImage,
) -> list[RowError]:
    """The images to leave out. Raises DataError when they are not to be left out, or when none remains."""
    rows = zip(images, headers, counts.tolist(), strict=True)
    bad = [(image, header, count) for image, header, count in rows if isinstance(header, str)]
    if bad and (on_bad_image == "stop" or len(bad) == len(headers)):
        image, reason, _ = bad[0]
        raise DataError(
            f"{len(bad):,} of {len(headers):,} images have no readable file; {image.file or image.name}: {reason}. "
            "Check images=, or give on_bad_image=skip to leave them out."
        )
    rule = "an image must have a readable file"
    return [RowError(image.name, 0, rule, _with_count(reason, count)) for image, reason, count in bad]


def _frames(
    source: SourceSet,
    headers: Sequence[Header | str],
    errors: RowErrors,
    orientation: Orientation,
) -> list[_Frame | None]:
    """What the boxes of each image refer to; None for an image that is left out."""
    frames: list[_Frame | None] = []
    rotated = scaled = unclear = 0
    counts = np.bincount(source.boxes.image, minlength=len(source.images)).tolist()
    for image, header, count in zip(source.images, headers, counts, strict=True):
        frame = None if isinstance(header, str) else _frame_of(image, header, source.unit, orientation)
        if frame is None and not isinstance(header, str):
            rule = "the declared size must be that of the file, scaled or rotated by EXIF"
            value = f"{_text(image.size)} for a file of {header.width} x {header.height}"
            note(errors, image.name, rule, _with_count(value, count))
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


def _read_headers(images: Sequence[SourceImage]) -> list[Header | str]:
    def header_of(image: SourceImage) -> Header | str:
        if image.file is None:
            return "no file"
        if image.file.suffix.lower() not in SUFFIXES:
            return f"the file must be one of {', '.join(SUFFIXES)}"
        return read_header(image.file)

    with ThreadPoolExecutor(THREADS) as threads:
        progress = tqdm(
            threads.map(header_of, images), total=len(images), desc="image headers", disable=None, leave=False
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


def _boxes(source: SourceSet, frames: Sequence[_Frame | None], errors: RowErrors, target: Layout) -> pd.DataFrame:
    """The boxes that break no rule, also as ``target`` writes them, in [0, 1] of the stored image."""
    boxes, frame_of = source.boxes, _FrameColumns.of(frames)
    clipped, reach = np.empty((len(boxes), 4)), np.zeros(len(boxes), dtype=np.float32)
    good, hashes = np.zeros(len(boxes), dtype=bool), np.zeros(len(boxes), dtype=np.uint64)
    for start in range(0, len(boxes), _BLOCK):
        rows = np.arange(start, min(start + _BLOCK, len(boxes)))
        rows = rows[frame_of.usable[boxes.image[rows]]]
        clipped[rows], reach[rows], good[rows], hashes[rows] = _checked(source, rows, frame_of, errors, target)
    _refuse_most_outside(source, np.flatnonzero(frame_of.usable[boxes.image]), reach, errors)
    over = np.flatnonzero(good & (reach > _ROUNDING))
    _report_clipped(over, reach[over], source)
    # Few boxes have an equal hash; only those are compared.
    alike = np.flatnonzero(good)[pd.Series(hashes[good]).duplicated(keep=False).to_numpy()]
    image = boxes.image[alike]
    written = as_read(clipped[alike], frame_of.stored[image], frame_of.exif[image], target)
    again = alike[~is_first(image, boxes.class_index[alike], written)]
    _note(source, again, f"a box must be given once, also as it is written ({target})", errors)
    good[again] = False
    kept = np.flatnonzero(good)
    kept = kept[np.argsort(boxes.image[kept], kind="stable")]
    frame = pd.DataFrame(
        {"image": boxes.image[kept].astype(np.int64), "class": boxes.class_index[kept].astype(np.int64)}
    )
    for side, name in enumerate(CORNERS):
        frame[name] = clipped[kept, side]
    for bit, name in enumerate(FLAGS):
        frame[name] = (boxes.flags[kept] >> bit & 1).astype(bool)
    return frame


class _FrameColumns(NamedTuple):
    """What the boxes of I images refer to, as columns; 1 where an image is left out."""

    usable: NDArray[np.bool_]
    size: NDArray[np.float64]
    """``[I, 2]`` width, height that divide pixels."""
    turn: NDArray[np.int64]
    """EXIF orientation to undo."""
    stored: NDArray[np.float64]
    """``[I, 2]`` width, height of the file as stored."""
    exif: NDArray[np.int64]
    """EXIF orientation of the file."""

    @staticmethod
    def of(frames: Sequence[_Frame | None]) -> _FrameColumns:
        return _FrameColumns(
            np.array([frame is not None for frame in frames], dtype=bool),
            np.array([frame.size[::-1] if frame else (1, 1) for frame in frames], dtype=np.float64).reshape(-1, 2),
            np.array([frame.orientation if frame else 1 for frame in frames], dtype=np.int64),
            np.array([(f.header.width, f.header.height) if f else (1, 1) for f in frames], np.float64).reshape(-1, 2),
            np.array([frame.header.orientation if frame else 1 for frame in frames], dtype=np.int64),
        )


def _checked(
    source: SourceSet, rows: NDArray[np.int64], frame_of: _FrameColumns, errors: RowErrors, target: Layout
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_], NDArray[np.uint64]]:
    """Of some boxes: corners in [0, 1] of the stored image, how far they reached out, whether they break no rule, and a
    hash of what is written."""
    image, classes, corners = source.boxes.image[rows], source.boxes.class_index[rows], source.boxes.corners[rows]
    size = frame_of.size[image]
    fractions = corners / np.concatenate([size, size], axis=1) if source.unit == "pixel" else corners
    finite = np.asarray(np.isfinite(corners).all(axis=1))
    clipped: NDArray[np.float64] = np.clip(fractions, 0, 1)
    reach: NDArray[np.float64] = np.abs(clipped - fractions).max(axis=1, initial=0)
    inside, turn = has_area(clipped), frame_of.turn[image]
    for orientation in np.unique(turn[turn > 1]):
        clipped[turn == orientation] = to_stored(clipped[turn == orientation], int(orientation))
    written = as_read(np.where(finite[:, None], clipped, 0), frame_of.stored[image], frame_of.exif[image], target)
    good = np.ones(len(rows), dtype=bool)
    for valid, rule in (
        (finite, "a coordinate must be a finite number"),
        (has_area(corners), "a box must have a width and a height above 0"),
        (inside, "a box must lie in its image"),
        (has_area(written), f"a box must have a width and a height above 0 as it is written ({target})"),
    ):
        _note(source, rows[good & ~valid], rule, errors)
        good &= valid
    return clipped, reach, good, row_hashes([image, classes, *written.T])


def _note(source: SourceSet, rows: NDArray[np.int64], rule: str, errors: RowErrors) -> None:
    # Where errors stop the reading the first ones are enough.
    listed = rows[:SHOWN] if errors.on_bad_row == "stop" else rows
    for row in listed.tolist():
        box = source.boxes[row]
        note(errors, box.where, rule, _shown(box.corners, source.unit), line=box.line)
    errors.count += len(rows) - len(listed)


def _refuse_most_outside(
    source: SourceSet, rows: NDArray[np.int64], reach: NDArray[np.floating], errors: RowErrors
) -> None:
    """Raise DataError where most boxes leave their images: not single boxes but their unit or form is other."""
    far = reach[rows] > _FAR
    if len(rows) < _FEW or far.sum() <= len(rows) / 2 or errors.on_bad_row == "drop":
        return
    box = source.boxes[int(rows[far][0])]
    where = f"{box.where} line {box.line}" if box.line else box.where
    raise DataError(
        f"most boxes leave their images ({int(far.sum()):,} of {len(rows):,}), so their numbers mean something else: "
        f"{where}: {_shown(box.corners, source.unit)}. Check box_unit= (pixel or fraction), coco_bbox= (size or "
        "corners) and that the images are those of these files, or give on_bad_row=drop to clip the boxes all the same"
    )


def _report_clipped(rows: NDArray[np.int64], reach: NDArray[np.floating], source: SourceSet) -> None:
    if len(rows):
        report(
            f"{len(rows):,} boxes reached out of their image, by {reach.max():.2%} of it at most, and were clipped, "
            f"{source.boxes[int(rows[0])].where} for example"
        )


def _shown(corners: tuple[float, ...], unit: str) -> str:
    sides = ", ".join(f"{name}={value:.15g}" for name, value in zip(CORNERS, corners, strict=True))
    return f"{sides} ({'pixels' if unit == 'pixel' else 'fractions of the image'})"


def _labels(source: SourceSet | None, boxes: pd.DataFrame) -> pd.DataFrame:
    """Boxed classes are present; the classes that a federated source lists as absent are absent."""
    image, classes = (boxes[name].to_numpy(dtype=np.int64) for name in ("image", "class"))
    count = int(classes.max(initial=0)) + 1
    pairs = np.unique(image * count + classes)
    present = pd.DataFrame({"image": pairs // count, "class": pairs % count, "present": True})
    absent = _pairs(source.absent if source else ()).assign(present=False)
    labels = pd.concat([present, absent], ignore_index=True).drop_duplicates(["image", "class"])
    return labels.sort_values(["image", "class"], ignore_index=True)


def _pairs(pairs: Sequence[tuple[int, int]]) -> pd.DataFrame:
    """(image, class) pairs as a frame, each once."""
    rows = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return pd.DataFrame(rows, columns=["image", "class"]).drop_duplicates(ignore_index=True)
