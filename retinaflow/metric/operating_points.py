"""Precision and recall of each class where a detector is used: at a score threshold, and at that of its best F1.

AP rates the whole curve; whoever uses a detector picks one point of it. Precision = TP / (TP + FP), recall = TP /
ground-truth boxes, F1 = 2 TP / (TP + FP + ground-truth boxes), all by the entries of the metric: a found group-of box counts with its
weight, absorbed detections count neither way. Detections of equal score pass a threshold together.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from retinaflow.metric.matches import Kind, Matches


@dataclass(frozen=True)
class OperatingPoints:
    """One point of each curve: arrays ``[K]``, NaN where not defined (no ground truth, or no detection passes)."""

    threshold: NDArray[np.float64]
    """Detections of at least this score pass."""
    precision: NDArray[np.float64]
    """NaN where nothing passes."""
    recall: NDArray[np.float64]
    """NaN for a class without ground truth."""
    f1: NDArray[np.float64]
    """NaN for a class without ground truth."""


def at_threshold(matches: Matches, threshold: float) -> OperatingPoints:
    """The points of all classes at one score threshold.

    Example: scores 0.9 right, 0.8 wrong, 0.4 right, two ground-truth boxes: at 0.5 precision 1/2, recall 1/2, F1 1/2.
    """
    passing = matches.score >= threshold
    num_classes = len(matches.evaluated)
    right = np.bincount(matches.class_index[passing], _right(matches)[passing], minlength=num_classes)
    wrong = np.bincount(matches.class_index[passing], _wrong(matches)[passing], minlength=num_classes)
    return _points(np.full(num_classes, threshold), right, wrong, matches.num_truths)


def best_f1(matches: Matches) -> OperatingPoints:
    """The point of each class with the largest F1; the highest threshold among equals, NaN where F1 is never above 0.

    The score that the point was found at is the threshold. Chosen on the same images that it is measured on, it is
    optimistic: choose on one set, report on another.
    """
    num_classes, num_truths = len(matches.evaluated), matches.num_truths
    right, wrong = _right(matches), _wrong(matches)
    best_right, best_wrong = np.zeros(num_classes), np.zeros(num_classes)
    threshold = np.full(num_classes, np.nan)
    start = np.searchsorted(matches.class_index, np.arange(num_classes + 1))
    for c in np.flatnonzero((np.diff(start) > 0) & (num_truths > 0)):
        entries = slice(start[c], start[c + 1])
        found, missed_by = np.cumsum(right[entries]), np.cumsum(wrong[entries])
        scores = matches.score[entries]
        last = np.append(scores[1:] != scores[:-1], True)
        f1 = np.where(last, 2 * found / (found + missed_by + num_truths[c]), -1.0)
        place = int(np.argmax(f1))
        if f1[place] > 0:
            best_right[c], best_wrong[c], threshold[c] = found[place], missed_by[place], scores[place]
    points = _points(threshold, best_right, best_wrong, num_truths)
    unfound = np.isnan(threshold)
    return OperatingPoints(
        threshold, points.precision, np.where(unfound, np.nan, points.recall), np.where(unfound, np.nan, points.f1)
    )


def _points(
    threshold: NDArray[np.float64],
    right: NDArray[np.number],
    wrong: NDArray[np.number],
    num_truths: NDArray[np.float64],
) -> OperatingPoints:
    def ratio(part: NDArray[np.number], whole: NDArray[np.number]) -> NDArray[np.float64]:
        result = np.full(len(part), np.nan)
        np.divide(part, whole, out=result, where=whole > 0)
        return result

    f1 = np.where(num_truths > 0, ratio(2 * right, right + wrong + num_truths), np.nan)
    return OperatingPoints(threshold, ratio(right, right + wrong), ratio(right, num_truths), f1)


def _right(matches: Matches) -> NDArray[np.float64]:
    return np.where(matches.kind == Kind.FALSE_POSITIVE, 0.0, matches.weight)


def _wrong(matches: Matches) -> NDArray[np.float64]:
    return np.where(matches.kind == Kind.FALSE_POSITIVE, 1.0, 0.0)
