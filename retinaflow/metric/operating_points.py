"""Precision and recall of each class at one score threshold: a given one, or that of the largest F1.

AP summarises the whole curve; a detector in use works at one point of it. Precision = TP / (TP + FP), recall = TP /
ground-truth boxes, F1 = 2 TP / (TP + FP + ground-truth boxes), all by the entries of the metric: a found group-of box
counts with its weight, absorbed detections do not count. Detections of equal score pass a threshold together.
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

    Example: scores 0.9 (true positive), 0.8 (false positive), 0.4 (true positive), two ground-truth boxes: at 0.5
    precision, recall and F1 are 1/2.
    """
    passing = matches.score >= threshold
    num_classes = len(matches.evaluated)
    tp = np.bincount(matches.class_index[passing], _true_positives(matches)[passing], minlength=num_classes)
    fp = np.bincount(matches.class_index[passing], _false_positives(matches)[passing], minlength=num_classes)
    return _points(np.full(num_classes, threshold), tp, fp, matches.num_truths)


def best_f1(matches: Matches) -> OperatingPoints:
    """The point of each class with the largest F1; the highest threshold among equals, NaN where F1 is never above 0.

    The threshold is the lowest score that passes. F1 on the images that the threshold was chosen on is optimistic:
    choose it on one set, report on another.
    """
    num_classes, num_truths = len(matches.evaluated), matches.num_truths
    tp, fp = _true_positives(matches), _false_positives(matches)
    best_tp, best_fp = np.zeros(num_classes), np.zeros(num_classes)
    threshold = np.full(num_classes, np.nan)
    start = np.searchsorted(matches.class_index, np.arange(num_classes + 1))
    for c in np.flatnonzero((np.diff(start) > 0) & (num_truths > 0)):
        entries = slice(start[c], start[c + 1])
        tp_above, fp_above = np.cumsum(tp[entries]), np.cumsum(fp[entries])
        scores = matches.score[entries]
        last = np.append(scores[1:] != scores[:-1], True)
        f1 = np.where(last, 2 * tp_above / (tp_above + fp_above + num_truths[c]), -1.0)
        at = int(np.argmax(f1))
        if f1[at] > 0:
            best_tp[c], best_fp[c], threshold[c] = tp_above[at], fp_above[at], scores[at]
    points = _points(threshold, best_tp, best_fp, num_truths)
    unfound = np.isnan(threshold)
    return OperatingPoints(
        threshold, points.precision, np.where(unfound, np.nan, points.recall), np.where(unfound, np.nan, points.f1)
    )


def _points(
    threshold: NDArray[np.float64],
    tp: NDArray[np.number],
    fp: NDArray[np.number],
    num_truths: NDArray[np.float64],
) -> OperatingPoints:
    def ratio(part: NDArray[np.number], whole: NDArray[np.number]) -> NDArray[np.float64]:
        result = np.full(len(part), np.nan)
        np.divide(part, whole, out=result, where=whole > 0)
        return result

    f1 = np.where(num_truths > 0, ratio(2 * tp, tp + fp + num_truths), np.nan)
    return OperatingPoints(threshold, ratio(tp, tp + fp), ratio(tp, num_truths), f1)


def _true_positives(matches: Matches) -> NDArray[np.float64]:
    return np.where(matches.kind == Kind.FALSE_POSITIVE, 0.0, matches.weight)


def _false_positives(matches: Matches) -> NDArray[np.float64]:
    return np.where(matches.kind == Kind.FALSE_POSITIVE, 1.0, 0.0)
