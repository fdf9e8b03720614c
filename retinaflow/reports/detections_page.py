"""Images with their boxes as one HTML page, to look through: a score slider, a class filter, and kinds of errors.

A true or false positive is one by the rules of the metric. A ground-truth box is found by the true positive of its
class that overlaps it most, from the score of that on; below it the box is missed. Detections that do not count, such
as those of classes that are not verified on an image, are grey. The page follows :mod:`~retinaflow.reports.page`:
images are JPEG in the page, boxes are drawn as SVG, and without its script it shows all of them. At most about 0.1 MB
for an image of 640 pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from retinaflow.boxes import iou
from retinaflow.data.images import UnreadableImageError, decode_sized
from retinaflow.data.index import AnnotationIndex
from retinaflow.detections import Detections
from retinaflow.metric.evaluator import Evaluator
from retinaflow.metric.matches import Kind, Matches
from retinaflow.metric.result import EvaluationResult
from retinaflow.reports.page import data_url, render
from retinaflow.reports.validation_images import images_of_classes
from retinaflow.runs.run import Run

PAGE = "detections.html"
LONGEST_SIDE = 640
"""Pixels of an image."""
MIN_SCORE = 0.05
"""Score at which the slider begins."""
MOST_BOXES = 60
"""Detections of an image, those of the highest scores."""
SCORE = 0.3
"""Score at which the slider stands at first, and boxes count as missed."""
JPEG_QUALITY = 80
_HIDDEN = ""
_NEVER = -1.0
"""Below every score: of a ground-truth box that no detection finds."""


@dataclass(frozen=True)
class PageBox:
    """A box: ``kind`` is gt, group, tp, fp or other; ``score`` of a gt is that of the detection that finds it."""

    kind: str
    class_index: int
    name: str
    score: float
    x: float
    y: float
    width: float
    height: float

    @property
    def area(self) -> float:
        """Square pixels."""
        return self.width * self.height


@dataclass(frozen=True)
class PageImage:
    """An image of the page: its id, its size in pixels, and its boxes, large ones first."""

    image_id: str
    url: str
    width: int
    height: int
    boxes: Sequence[PageBox]


@dataclass(frozen=True)
class KnownBoxes:
    """The ground truth of some images, and the detections on them matched with it, row by row of the detections."""

    index: AnnotationIndex
    labels: NDArray[np.integer]
    """``[N]`` class of each box of the index, as the detections count classes."""
    matches: Matches

    @staticmethod
    def of(ground_truth: AnnotationIndex, detections: Detections, images: AnnotationIndex) -> KnownBoxes:
        """Match detections on ``images`` with their ground truth, as far as there is any.

        The classes of the ground truth are some of those of ``images``, in any order.
        """
        index = ground_truth.take(np.flatnonzero(np.isin(ground_truth.image_ids, images.image_ids)))
        row_of = {image_id: row for row, image_id in enumerate(index.image_ids.tolist())}
        rows = np.array([row_of.get(image_id, -1) for image_id in images.image_ids.tolist()], dtype=np.int32)
        classes = np.array([index.taxonomy.index_of.get(mid, -1) for mid in images.taxonomy.ids], dtype=np.int32)
        labels = np.array([images.taxonomy.index_of[mid] for mid in index.taxonomy.ids])
        own = classes[detections.class_index]
        evaluator = Evaluator(index)
        evaluator.add(
            Detections(
                # A class that the ground truth does not have is like an image without any.
                np.where(own >= 0, rows[detections.image_index], -1).astype(np.int32),
                np.maximum(own, 0),
                detections.score,
                detections.boxes,
            )
        )
        return KnownBoxes(index, labels[np.asarray(index.labels)], evaluator.matches())


def images_with_errors(
    matches: Matches, index: AnnotationIndex, table: pd.DataFrame, *, count: int, score: float
) -> list[int]:
    """Images to look at: of each class in turn, rarest first, the one where most of its boxes are missed at a score.

    Filled up with images of the rarest classes. ``table``: one row per class, rarest first, with ``class_id``.
    """
    found = (matches.kind == Kind.TRUE_POSITIVE) & (matches.score >= score)
    missed = pd.Series(matches.gt_count, index=pd.MultiIndex.from_arrays([matches.gt_class, matches.gt_image]))
    pairs = pd.MultiIndex.from_arrays([matches.class_index[found], matches.image_index[found]])
    missed = missed.sub(pd.Series(1.0, index=pairs).groupby(level=[0, 1]).sum(), fill_value=0.0)
    missed = missed[missed > 0].sort_values(ascending=False, kind="stable")
    of_class: dict[int, list[int]] = {}
    for label, image in missed.index.tolist():
        of_class.setdefault(label, []).append(image)
    given = set(np.unique(index.labels).tolist())
    queues = [
        of_class[label]
        for mid in table["class_id"]
        if (label := index.taxonomy.index_of[mid]) in given and label in of_class
    ]
    chosen: list[int] = []
    while queues and len(chosen) < count:
        for queue in queues:
            image = next((image for image in queue if image not in chosen), None)
            if image is not None and len(chosen) < count:
                chosen.append(int(image))
            queue[:] = [other for other in queue if other not in chosen]
        queues = [queue for queue in queues if queue]
    others = (image for image in images_of_classes(index, table, count=count) if image not in chosen)
    return [*chosen, *list(others)[: count - len(chosen)]]


def detections_page(
    index: AnnotationIndex,
    images: Sequence[int],
    detections: Detections,
    known: KnownBoxes | None,
    *,
    title: str,
    score: float,
    hidden: Sequence[int] = (),
) -> str | None:
    """The page of some images of the index; ``score``: at which the slider stands at first; ``hidden``: classes whose
    detections are left off.

    Images that cannot be read are left out; None when no image is left.
    """
    kinds = _kinds(detections, known)
    kinds[np.isin(detections.class_index, np.asarray(hidden, dtype=int))] = _HIDDEN
    shown = [one for image in images if (one := _page_image(index, image, detections, kinds, known)) is not None]
    if not shown:
        return None
    names = index.taxonomy.labels
    counts = _boxes_per_class(shown)
    classes = sorted(counts, key=lambda label: (counts[label], names[label]))
    return render(
        PAGE,
        title=title,
        images=shown,
        classes=[(label, names[label]) for label in classes],
        has_ground_truth=known is not None,
        min_score=MIN_SCORE,
        score=score,
        count=len(index),
    )


def log_page(
    runs: Sequence[Run], evaluation: EvaluationResult, detections: Detections, index: AnnotationIndex, *, images: int
) -> None:
    """Log the page of an evaluation: :func:`images_with_errors` at the score of :data:`SCORE`."""
    matches = evaluation.scores.matches
    chosen = images_with_errors(matches, index, evaluation.table, count=images, score=SCORE)
    known = KnownBoxes(index, index.labels, matches)
    # A parent class that only the hierarchy implies would cover the detection of the child.
    implied = np.setdiff1d(np.nonzero(index.taxonomy.is_ancestor)[1], index.labels).tolist()
    title = "Detections and missed boxes"
    _log(runs, detections_page(index, chosen, detections, known, title=title, score=SCORE, hidden=implied))


def log_sample_page(
    runs: Sequence[Run],
    index: AnnotationIndex,
    detections: Detections,
    ground_truth: AnnotationIndex | None,
    *,
    score: float,
) -> None:
    """Log the page of all images of an index, with their ground truth if there is any."""
    known = None if ground_truth is None else KnownBoxes.of(ground_truth, detections, index)
    _log(runs, detections_page(index, range(len(index)), detections, known, title="Detections", score=score))


def _log(runs: Sequence[Run], page: str | None) -> None:
    if page is not None:
        for run in runs:
            run.log_text(page, PAGE)


def _boxes_per_class(images: Sequence[PageImage]) -> Mapping[int, int]:
    """Class -> its ground-truth boxes on the images; 0 for one that is only detected."""
    counts: dict[int, int] = {}
    for box in (box for image in images for box in image.boxes):
        counts[box.class_index] = counts.get(box.class_index, 0) + (box.kind == "gt")
    return counts


def _kinds(detections: Detections, known: KnownBoxes | None) -> NDArray[np.str_]:
    """``[N]`` tp, fp or other for each detection."""
    kinds = np.full(len(detections), "other", dtype="<U5")
    if known is not None:
        for kind, text in ((Kind.TRUE_POSITIVE, "tp"), (Kind.FALSE_POSITIVE, "fp")):
            kinds[known.matches.detection_row[known.matches.kind == kind]] = text
    return kinds


def _page_image(
    index: AnnotationIndex, image: int, detections: Detections, kinds: NDArray[np.str_], known: KnownBoxes | None
) -> PageImage | None:
    if index.sizes[image].min() == 0:
        return None  # Its file was not opened.
    try:
        pixels = decode_sized(index, image, longest=LONGEST_SIDE)
    except UnreadableImageError:
        return None
    size, buffer = pixels.shape[:2], BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=JPEG_QUALITY)
    own = np.flatnonzero((detections.image_index == image) & (kinds != _HIDDEN))
    own = own[np.argsort(-detections.score[own], kind="stable")]
    found = [row for row in own.tolist() if detections.score[row] >= MIN_SCORE][:MOST_BOXES]
    names = index.taxonomy.labels
    boxes = [
        _box(str(kinds[row]), int(label), names[label], float(detections.score[row]), detections.boxes[row], size)
        for row in found
        for label in [detections.class_index[row]]
    ]
    image_id = str(index.image_ids[image])
    if known is not None:
        boxes += _ground_truth(image_id, detections, own[kinds[own] == "tp"], known, size)
    url = data_url(buffer.getvalue(), "jpeg")
    return PageImage(image_id, url, size[1], size[0], sorted(boxes, key=lambda box: -box.area))


def _ground_truth(
    image_id: str,
    detections: Detections,
    true_positives: NDArray[np.integer],
    known: KnownBoxes,
    target: tuple[int, int],
) -> list[PageBox]:
    """The annotated boxes of an image; ``true_positives``: their rows of the detections, best score first."""
    index = known.index
    at = np.flatnonzero(index.image_ids == image_id)
    if len(at) == 0:
        return []
    rows = np.arange(int(index.box_start[at[0]]), int(index.box_start[at[0] + 1]))
    ordinary = rows[~np.asarray(index.is_group_of[rows], dtype=bool)]
    found = dict.fromkeys(ordinary.tolist(), _NEVER)
    for row in true_positives.tolist():
        free = [gt for gt in ordinary.tolist() if known.labels[gt] == detections.class_index[row]]
        free = [gt for gt in free if found[gt] == _NEVER]
        if free:
            overlap = iou(np.asarray(detections.boxes[[row]], dtype=float), np.asarray(index.boxes[free], dtype=float))
            # Less: it matches a box of a child class, which the metric counts for the parent too.
            if overlap.max() >= known.matches.iou_threshold:
                found[free[int(overlap[0].argmax())]] = float(detections.score[row])
    names = index.taxonomy.labels
    return [
        _box(
            "gt" if row in found else "group",
            int(label),
            names[index.labels[row]],
            found.get(row, 0.0),
            index.boxes[row],
            target,
        )
        for row in rows.tolist()
        for label in [known.labels[row]]
    ]


def _box(kind: str, label: int, name: str, score: float, box: NDArray[np.floating], target: tuple[int, int]) -> PageBox:
    height, width = target
    x1, y1, x2, y2 = (float(np.clip(edge, 0, 1)) for edge in box)
    x, y = x1 * width, y1 * height
    return PageBox(kind, label, name, score, x, y, x2 * width - x, y2 * height - y)
