"""What in a file of predictions cannot count, so that a low or zero score is explained: a line with a count and an
example for each reason, and an error where the file as a whole cannot belong to the images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePath

import numpy as np
from numpy.typing import NDArray

from retinaflow.data.image_folders import OTHER_SUFFIXES, SUFFIXES
from retinaflow.data.index import AnnotationIndex
from retinaflow.detections import Detections
from retinaflow.errors import DataError, shown
from retinaflow.progress import report

_FAR = 0.5
"""Fraction of the image's side by which a box must reach out of it to be reported; detectors need not clip."""


@dataclass(frozen=True)
class PredictionFile:
    """How rows of a file of predictions are named in messages. ``where``: line of a row; ``image_id``: its image."""

    name: str
    where: Callable[[int], str]
    image_id: Callable[[int], str]

    def line(self, rows: NDArray[np.bool_], text: str) -> None:
        """Print how many rows ``[N]`` something is true of, with the first as an example."""
        if rows.any():
            row = int(np.flatnonzero(rows)[0])
            report(
                f"{self.name}: {np.count_nonzero(rows):,} of {len(rows):,} detections {text}; {self.where(row)} for "
                "example"
            )


def check_predictions(detections: Detections, index: AnnotationIndex, file: PredictionFile) -> None:
    """Report what cannot count.

    Raises DataError when no detection is of an image of the index, and when most coordinates exceed 1.
    """
    if len(detections) == 0:
        report(f"{file.name}: the file holds no detection")
        return
    _check_images(detections, index, file)
    # Of other images, boxes in pixels have no fractions.
    is_known = np.asarray(detections.image_index) >= 0
    boxes = np.asarray(detections.boxes, dtype=np.float64)
    outside = is_known & np.asarray((np.abs(boxes - 0.5) > 0.5 + _FAR).any(axis=1))
    if (boxes[is_known] > 1).mean() > 0.5 or outside[is_known].mean() > 0.5:
        row = int(np.flatnonzero(is_known & (boxes > 1).any(axis=1) | outside)[0])
        sides = ", ".join(f"{side:g}" for side in boxes[row])
        raise DataError(
            f"{file.name}: most coordinates lie outside of [0, 1], {sides} for example ({file.where(row)}): are they "
            "in pixels? XMin and XMax must be fractions of the image's width, YMin and YMax of its height"
        )
    if outside.any():
        corners = zip(("XMin", "YMin", "XMax", "YMax"), boxes[outside][0], strict=True)
        sides = ", ".join(f"{name}={side:g}" for name, side in corners)
        file.line(outside, f"reach far out of their image and cannot match ({sides})")
    no_area = is_known & ((boxes[:, 0] >= boxes[:, 2]) | (boxes[:, 1] >= boxes[:, 3]))
    hint = ": are XMax and YMax a width and a height?" if no_area[is_known].mean() > 0.1 else ""
    file.line(no_area, f"have no width or height and do not count{hint}")
    score = np.asarray(detections.score)
    odd = np.asarray((score < 0) | (score > 1))
    if odd.any():
        file.line(odd, f"have a score outside of [0, 1] ({score[odd][0]:g}); AP depends on their order only")


def _check_images(detections: Detections, index: AnnotationIndex, file: PredictionFile) -> None:
    unknown = np.asarray(detections.image_index) < 0
    if not unknown.any():
        return
    row = int(np.flatnonzero(unknown)[0])
    image_id = file.image_id(row)
    example = f"{shown(image_id, quotes=False)} ({file.where(row)})"
    if unknown.all():
        known = ", ".join(map(str, index.image_ids[:3]))
        raise DataError(
            f"{file.name}: no detection is of an evaluated image: the first is of {example}, but the {len(index):,} "
            f"evaluated images are {known} and so on{_id_hint(image_id, index)}"
        )
    report(
        f"{file.name}: {np.count_nonzero(unknown):,} of {len(unknown):,} detections are of images that are not "
        f"evaluated and do not count, {example} for example{_id_hint(image_id, index)}"
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
