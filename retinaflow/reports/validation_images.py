"""The same few validation images after every evaluation, so that ``mlflow ui`` shows what changes from epoch to epoch.

Each of the rarest classes has an image. Which one depends on the data alone, not on the detections: runs of the same
data are compared image by image. Those of step 0 have the ground truth alone. Ground truth is blue, detections are
orange, as in ``detections.png``.
"""

from __future__ import annotations

import re
import unicodedata

import numpy as np
import pandas as pd

from retinaflow.boxes import iou
from retinaflow.data.images import UnreadableImageError, decode_sized
from retinaflow.data.index import AnnotationIndex
from retinaflow.detections import Detections
from retinaflow.reports.box_images import DrawnBox, Pixels, drawn
from retinaflow.reports.contact_sheet import DETECTION, GROUND_TRUTH
from retinaflow.runs.run import Run

COUNT = 8
LONGEST_SIDE = 384
"""Pixels of an image; as PNG it has about 0.2 MB."""
MIN_SCORE = 0.3
MOST_BOXES = 25
OVERLAP = 0.6
"""Of detections that overlap more, the best is drawn."""


def images_of_classes(index: AnnotationIndex, table: pd.DataFrame, *, count: int) -> dict[int, str]:
    """Image -> id of the class that it was chosen for: one of each class in turn, rarest class first.

    ``table``: one row per class, rarest first, with ``class_id``.
    """
    chosen: dict[int, str] = {}
    labels = np.asarray(index.labels)
    for _ in range(count):
        for mid in table["class_id"]:
            if len(chosen) == count:
                return chosen
            holders = index.box_image[labels == index.taxonomy.index_of[mid]]
            fresh = [int(image) for image in np.unique(holders) if int(image) not in chosen]
            if fresh:
                chosen[fresh[len(fresh) // 2]] = mid
    return chosen


def log_validation_images(
    run: Run, detections: Detections, index: AnnotationIndex, table: pd.DataFrame, *, step: int
) -> None:
    """Log the images with their ground truth and detections; keys are ``validation/1 CLASS`` and on, rarest first.

    An image that cannot be read is left out: whether that stops the run was settled when it was evaluated.
    """
    # A parent class that only the hierarchy implies would hide which child was found.
    detections = detections.take(np.isin(detections.class_index, index.labels) & (detections.score > MIN_SCORE))
    chosen = images_of_classes(index, table, count=COUNT)
    for number, (image, mid) in enumerate(chosen.items(), start=1):
        name = plain_name(index.taxonomy.labels[index.taxonomy.index_of[mid]]) or plain_name(mid)
        pixels = _image(image, detections, index)
        if pixels is not None:
            run.log_image(pixels, key=f"validation/{number} {name}".strip(), step=step)


def plain_name(text: str) -> str:
    """The name of a class in the letters, digits, spaces, dots and dashes that a key may have, at most 100 (a file name
    has 255 with step and time); empty without any."""
    ascii_only = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return " ".join(re.sub(r"[^A-Za-z0-9._-]+", " ", ascii_only).split())[:100].strip()


def clearest(found: Detections) -> Detections:
    """The best detections, at most :data:`MOST_BOXES`, of overlapping ones one, so that the image stays readable."""
    chosen: list[int] = []
    for row in np.argsort(-found.score, kind="stable"):
        if len(chosen) < MOST_BOXES and (iou(found.boxes[[row]], found.boxes[chosen]) < OVERLAP).all():
            chosen.append(int(row))
    return found.take(np.array(chosen, dtype=np.int64))


def _image(image: int, detections: Detections, index: AnnotationIndex) -> Pixels | None:
    try:
        pixels = decode_sized(index, image, longest=LONGEST_SIDE, enlarge=True)
    except UnreadableImageError:
        return None
    ids, names = index.taxonomy.ids, index.taxonomy.labels
    rows = range(int(index.box_start[image]), int(index.box_start[image + 1]))
    found = clearest(detections.take(detections.image_index == image))
    blue, orange = _rgb(GROUND_TRUTH), _rgb(DETECTION)
    boxes = [
        DrawnBox(tuple(index.boxes[row].tolist()), ids[label], names[label], own_color=blue)
        for row in rows
        for label in [int(index.labels[row])]
    ]
    boxes += [
        DrawnBox(tuple(box), ids[label], names[label], float(score), own_color=orange)
        for box, label, score in zip(
            found.boxes.tolist(), found.class_index.tolist(), found.score.tolist(), strict=True
        )
    ]
    return drawn(pixels, boxes, title=str(index.image_ids[image]))


def _rgb(color: str) -> tuple[int, int, int]:
    red, green, blue = bytes.fromhex(color.removeprefix("#"))
    return red, green, blue
