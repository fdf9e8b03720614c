"""Objects that one run finds and the other misses, and small images of them.

Found: a true positive with a score at or above the run's threshold for that class, the score at which F1 = 2 TP /
(detections + ground-truth boxes) is largest. Each run gets its own thresholds, since the scores of two trainings are on
different scales. Group-of boxes and classes that only the hierarchy implies are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.typing import NDArray

from retinaflow.boxes import iou
from retinaflow.comparison.stored_matches import StoredMatches
from retinaflow.metric.ground_truth import Annotations
from retinaflow.metric.matches import Kind

IMAGE_PIXELS = 300
JPEG_QUALITY = 78
SAME_OBJECT = 0.5
"""Smallest IoU at which a detection is of the same object."""
_GROUND_TRUTH, _FOUND = (86, 180, 233), (230, 159, 0)


@dataclass(frozen=True)
class FoundObject:
    """An object that one run finds and the other misses; boxes are normalised xyxy."""

    class_id: str
    image: int
    gt_box: NDArray[np.float64]
    found_box: NDArray[np.float64]
    score: float
    """Score of the run that finds it."""
    instead: str = ""
    """Class and score of the detection that the other run has instead, or empty."""


def best_thresholds(run: StoredMatches) -> NDArray[np.float64]:
    """``[K]`` the score of the largest F1 of each class; inf for a class without a true positive."""
    matches = run.matches
    result = np.full(len(matches.evaluated), np.inf)
    start = np.searchsorted(matches.class_index, np.arange(len(result) + 1))
    ground_truths = matches.num_truths
    for k in np.flatnonzero(np.diff(start)):
        rows = slice(start[k], start[k + 1])
        true_positives = np.cumsum(np.where(matches.kind[rows] == Kind.FALSE_POSITIVE, 0.0, matches.weight[rows]))
        f1 = 2 * true_positives / (np.arange(1, len(true_positives) + 1) + max(ground_truths[k], 1e-9))
        if true_positives[-1] > 0:
            result[k] = matches.score[rows][np.argmax(f1)]
    return result


def found_and_missed(
    finder: StoredMatches, other: StoredMatches, ground_truth: Annotations, *, class_ids: Sequence[str], limit: int
) -> list[FoundObject]:
    """Up to ``limit`` objects that ``finder`` finds and ``other`` misses, one per class and round.

    ``class_ids``: the classes to search, most interesting first. The highest score of a class comes first; no image is
    shown twice. ``ground_truth`` holds the images that both runs were evaluated on.
    """
    thresholds = best_thresholds(finder), best_thresholds(other)
    candidates = [
        found
        for mid in class_ids
        if mid in ground_truth.taxonomy.index_of and (found := _of_class(mid, finder, other, ground_truth, thresholds))
    ]
    chosen: list[FoundObject] = []
    while len(chosen) < limit and any(candidates):
        for found in candidates:
            while found:
                sample = found.pop(0)
                if len(chosen) < limit and all(sample.image != one.image for one in chosen):
                    chosen.append(replace(sample, instead=_instead(other, sample, ground_truth)))
                    break
    return chosen


def sample_image(pixels: NDArray[np.uint8], sample: FoundObject) -> bytes:
    """JPEG of the object and its surroundings: ground truth blue, detection orange. ``pixels [H, W, 3]`` RGB."""
    height, width = pixels.shape[:2]
    scale = np.array([width, height, width, height])
    ground_truth, found = sample.gt_box * scale, sample.found_box * scale
    x1, y1, x2, y2 = _window(ground_truth, width, height)
    zoom = IMAGE_PIXELS / max(x2 - x1, y2 - y1)
    size = max(round((x2 - x1) * zoom), 1), max(round((y2 - y1) * zoom), 1)
    method = cv2.INTER_AREA if zoom < 1 else cv2.INTER_CUBIC
    shown = cv2.resize(np.ascontiguousarray(pixels[y1:y2, x1:x2]), size, interpolation=method)
    for box, color, thick in ((ground_truth, _GROUND_TRUTH, 3), (found, _FOUND, 2)):
        corners = np.rint((box - [x1, y1, x1, y1]) * zoom).astype(int).tolist()
        for line, paint in ((thick + 2, (0, 0, 0)), (thick, color)):
            cv2.rectangle(shown, tuple(corners[:2]), tuple(corners[2:]), paint, line, cv2.LINE_AA)
    done, data = cv2.imencode(".jpg", cv2.cvtColor(shown, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    assert done
    return bytes(data)


Thresholds = tuple[NDArray[np.float64], NDArray[np.float64]]


def _of_class(
    mid: str, finder: StoredMatches, other: StoredMatches, ground_truth: Annotations, thresholds: Thresholds
) -> list[FoundObject]:
    """The objects of one class, highest score first."""
    by_finder, by_other = (_found(run, mid, at) for run, at in zip((finder, other), thresholds, strict=True))
    samples = []
    for image, rows in by_finder.items():
        boxes = _gt_boxes(ground_truth, image, mid)
        if len(boxes) == 0:
            continue
        found_by_other = set(_nearest(other.boxes[by_other.get(image, [])], boxes))
        for row, gt_row in zip(rows, _nearest(finder.boxes[rows], boxes), strict=True):
            if gt_row not in found_by_other:
                found = finder.boxes[row].astype(np.float64)
                samples.append(FoundObject(mid, image, boxes[gt_row], found, float(finder.matches.score[row])))
    return sorted(samples, key=lambda sample: -sample.score)


def _found(run: StoredMatches, mid: str, threshold: NDArray[np.float64]) -> dict[int, list[int]]:
    """Image -> rows of true positives of the class at or above its threshold."""
    k, matches = run.class_ids.index(mid), run.matches
    rows = np.arange(*np.searchsorted(matches.class_index, [k, k + 1]))
    rows = rows[(matches.kind[rows] == Kind.TRUE_POSITIVE) & (matches.score[rows] >= threshold[k])]
    result: dict[int, list[int]] = {}
    for row in rows:
        result.setdefault(int(matches.image_index[row]), []).append(int(row))
    return result


def _gt_boxes(ground_truth: Annotations, image: int, mid: str) -> NDArray[np.float64]:
    rows = slice(ground_truth.box_start[image], ground_truth.box_start[image + 1])
    own = (np.asarray(ground_truth.labels[rows]) == ground_truth.taxonomy.index_of[mid]) & ~np.asarray(
        ground_truth.is_group_of[rows]
    )
    boxes: NDArray[np.float64] = np.asarray(ground_truth.boxes[rows], dtype=np.float64)[own]
    return boxes


def _nearest(boxes: NDArray[np.floating], ground_truths: NDArray[np.float64]) -> list[int]:
    """Row of the ground truth that each box overlaps most."""
    if len(boxes) == 0:
        return []
    return [int(row) for row in iou(np.asarray(boxes, dtype=np.float64), ground_truths).argmax(axis=1)]


def _instead(run: StoredMatches, sample: FoundObject, ground_truth: Annotations) -> str:
    """The detection of the highest score on the object, of a class that has boxes of its own and is no ancestor."""
    rows = np.flatnonzero(run.matches.image_index == sample.image)
    rows = rows[iou(run.boxes[rows].astype(np.float64), sample.gt_box[None])[:, 0] >= SAME_OBJECT]
    taxonomy = ground_truth.taxonomy
    parents = taxonomy.ancestors(taxonomy.index_of[sample.class_id])
    own_boxes = set(np.setdiff1d(ground_truth.labels, parents).tolist())
    classes = [taxonomy.index_of.get(run.class_ids[k], -1) in own_boxes for k in run.matches.class_index[rows]]
    rows = rows[np.array(classes, dtype=bool)]
    if len(rows) == 0:
        return ""
    best = rows[np.argmax(run.matches.score[rows])]
    return f"{run.class_names[run.matches.class_index[best]]} {run.matches.score[best]:.2f}"


def _window(box: NDArray[np.float64], width: int, height: int) -> tuple[int, int, int, int]:
    """A square around the box, large enough to show its surroundings, moved and cut to lie in the image."""
    side = min(max(2.2 * max(box[2] - box[0], box[3] - box[1]), 0.45 * max(width, height)), max(width, height))
    ends = []
    for low, high, length in ((box[0], box[2], width), (box[1], box[3], height)):
        start = min(max((low + high - side) / 2, 0), max(length - side, 0))
        ends.append((int(start), max(int(min(start + side, length)), int(start) + 1)))
    return ends[0][0], ends[1][0], ends[0][1], ends[1][1]
