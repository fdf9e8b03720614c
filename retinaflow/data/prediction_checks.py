"""What in a file of predictions cannot count, so that a low or zero score is explained: a line with a count and an
example for each reason, and an error where the file as a whole cannot belong to the images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import PurePath

import numpy as np
from numpy.typing import NDArray

from retinaflow.data.image_folders import OTHER_SUFFIXES, SUFFIXES
from retinaflow.data.index import AnnotationIndex
from retinaflow.detections import Detections
from retinaflow.errors import DataError, shown

_FAR = 0.5
"""Fraction of the image's side by which a box must reach out of it to be reported; detectors need not clip."""


def check_predictions(
    detections: Detections,
    index: AnnotationIndex,
    *,
    name: str,
    where: Callable[[int], str],
    image_id: Callable[[int], str],
    report: Callable[[str], None],
) -> None:
    """Report what cannot count. ``where`` and ``image_id`` of a row: its line in the file and its image.

    Raises DataError when no detection is of an image of the index, and when most coordinates exceed 1.
    """
    total = len(detections)
    if total == 0:
        report(f"{name}: the file holds no detection")
        return
    _check_images(detections, index, name, where, image_id, report)
    boxes = np.asarray(detections.boxes, dtype=np.float64)
    outside = np.asarray((np.abs(boxes - 0.5) > 0.5 + _FAR).any(axis=1))
    shown = f"XMin={boxes[outside][0, 0]:g}, YMin={boxes[outside][0, 1]:g}" if outside.any() else ""
    shown += f", XMax={boxes[outside][0, 2]:g}, YMax={boxes[outside][0, 3]:g}" if outside.any() else ""
    if (boxes > 1).mean() > 0.5 or outside.mean() > 0.5:
        row = int(np.flatnonzero((boxes > 1).any(axis=1) | outside)[0])
        shown = ", ".join(f"{side:g}" for side in boxes[row])
        raise DataError(
            f"{name}: most coordinates lie outside of [0, 1], {shown} for example ({where(row)}): are they in pixels? "
            "XMin and XMax must be fractions of the image's width, YMin and YMax of its height"
        )
    _line(outside, f"reach far out of their image and cannot match ({shown})", name, where, report)
    no_area = np.asarray((boxes[:, 0] >= boxes[:, 2]) | (boxes[:, 1] >= boxes[:, 3]))
    hint = ": are XMax and YMax a width and a height?" if no_area.mean() > 0.1 else ""
    _line(no_area, f"have no width or height and do not count{hint}", name, where, report)
    score = np.asarray(detections.score)
    odd = np.asarray((score < 0) | (score > 1))
    example = f"{score[odd][0]:g}" if odd.any() else ""
    _line(odd, f"have a score outside of [0, 1] ({example}); AP depends on their order only", name, where, report)


def _line(
    rows: NDArray[np.bool_], text: str, name: str, where: Callable[[int], str], report: Callable[[str], None]
) -> None:
    if rows.any():
        row = int(np.flatnonzero(rows)[0])
        report(f"{name}: {np.count_nonzero(rows):,} of {len(rows):,} detections {text}; {where(row)} for example")


def _check_images(
    detections: Detections,
    index: AnnotationIndex,
    name: str,
    where: Callable[[int], str],
    image_id: Callable[[int], str],
    report: Callable[[str], None],
) -> None:
    unknown = np.asarray(detections.image_index) < 0
    if not unknown.any():
        return
    row = int(np.flatnonzero(unknown)[0])
    example = f"{shown(image_id(row), quotes=False)} ({where(row)})"
    if unknown.all():
        known = ", ".join(map(str, index.image_ids[:3]))
        raise DataError(
            f"{name}: no detection is of an evaluated image: the first is of {example}, but the {len(index):,} "
            f"evaluated images are {known} and so on{_id_hint(image_id(row), index)}"
        )
    report(
        f"{name}: {np.count_nonzero(unknown):,} of {len(unknown):,} detections are of images that are not evaluated "
        f"and do not count, {example} for example{_id_hint(image_id(row), index)}"
    )


def _id_hint(image_id: str, index: AnnotationIndex) -> str:
    """How an id would have to be written to be that of an image of the index; empty if nothing similar is known."""
    path = PurePath(image_id.replace("\\", "/"))
    plain = path.stem if path.suffix.lower() in (*SUFFIXES, *OTHER_SUFFIXES) else path.name
    known = set(map(str, index.image_ids))
    if plain != image_id and plain in known:
        return f"; an id is the file name without folder and suffix ({plain})"
    other = next((word for word in known if word.casefold() == plain.casefold()), None)
    return f"; did you mean {other}?" if other else ""
