"""The metric of the Open Images Challenge 2018 and 2019: average precision per class, and its mean.

The rules, in their order, and where they are: 1 expansion of the ground truth and 2 verified classes
(:mod:`~retinaflow.metric.ground_truth`), 3 accepted detections (:mod:`~retinaflow.metric.candidate_matches`), 4
matching and 8 the order of equal scores (:mod:`~retinaflow.metric.matching_rules`), 5 counts of ground truth
(:mod:`~retinaflow.metric.evaluator`), 6 average precision and 7 its mean (here). A score is a pure function of its
inputs. Cost: ``benchmarks/challenge_metric.py``.

Source: ``oid_challenge_evaluation`` of the TensorFlow Object Detection API.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from retinaflow.detections import Detections
from retinaflow.metric.evaluator import Evaluator
from retinaflow.metric.ground_truth import Annotations
from retinaflow.metric.matches import Dropped, Kind, Matches

__all__ = [
    "Annotations",
    "COCO_THRESHOLDS",
    "Dropped",
    "Evaluator",
    "Kind",
    "Matches",
    "Scores",
    "average_precision",
    "challenge_scores",
    "match",
    "mean_of_classes",
]

COCO_THRESHOLDS = tuple(percent / 100 for percent in range(50, 100, 5))
"""0.5, 0.55 to 0.95: the IoU thresholds over which COCO takes the mean."""


@dataclass(frozen=True)
class Scores:
    """``ap [K]`` in [0, 1], NaN for a class without ground truth or not evaluated; ``num_truths [K]``; the matches."""

    ap: NDArray[np.float64]
    num_truths: NDArray[np.float64]
    matches: Matches

    @property
    def mean_ap(self) -> float:
        """Mean over the classes with ground truth; NaN when there is none (rule 7)."""
        return mean_of_classes(self.ap)

    @property
    def num_classes_in_mean(self) -> int:
        return int(np.isfinite(self.ap).sum())

    @property
    def dropped(self) -> Dropped:
        return self.matches.dropped

    @property
    def not_a_challenge_score(self) -> tuple[str, ...]:
        """Reasons why these numbers are no Challenge score; empty when they are one."""
        matches = self.matches
        reasons = (
            (matches.verified_labels == 0, "no image-level labels were used (this shifts AP by several points)"),
            (matches.iou_threshold != 0.5, f"iou_threshold is {matches.iou_threshold:g}, not 0.5"),
            (matches.group_of_weight != 1, f"group_of_weight is {matches.group_of_weight:g}, not 1"),
            (
                not matches.evaluated.all(),
                f"only {matches.evaluated.sum()} of {len(matches.evaluated)} classes were evaluated",
            ),
            (
                matches.dropped.not_exhaustive > 0,
                f"{matches.dropped.not_exhaustive:,} detections of classes that are not exhaustive on their image "
                "(IsNotExhaustive) are ignored",
            ),
        )
        return tuple(text for applies, text in reasons if applies)


def challenge_scores(
    detections: Detections,
    ground_truth: Annotations,
    *,
    iou_threshold: float = 0.5,
    group_of_weight: float = 1.0,
    classes: NDArray[np.bool_] | None = None,
) -> Scores:
    """Average precision of every class; arguments and errors as in :func:`match`.

    Example: one ground-truth box, a false positive of score 0.9, a true positive of 0.8: precision 1/2 at recall 1,
    so AP is 0.5.
    """
    return score(
        match(detections, ground_truth, iou_threshold=iou_threshold, group_of_weight=group_of_weight, classes=classes)
    )


def match(
    detections: Detections,
    ground_truth: Annotations,
    *,
    iou_threshold: float = 0.5,
    group_of_weight: float = 1.0,
    classes: NDArray[np.bool_] | None = None,
) -> Matches:
    """Rules 1 to 5 and 8 for all detections at once; :class:`Evaluator` takes them batch by batch.

    Arguments and errors as in :class:`Evaluator`, :meth:`Evaluator.add` and :meth:`Evaluator.matches`.
    """
    evaluator = Evaluator(ground_truth, classes=classes)
    evaluator.add(detections)
    return evaluator.matches(iou_threshold=iou_threshold, group_of_weight=group_of_weight)


def score(matches: Matches) -> Scores:
    """Rules 6 and 7."""
    return Scores(average_precision(matches), matches.num_truths, matches)


def ap_by_threshold(
    evaluator: Evaluator, iou_thresholds: Sequence[float], *, group_of_weight: float = 1.0
) -> NDArray[np.float64]:
    """``[T, K]`` AP of every class at each IoU threshold, by the Challenge's rules; overlaps are computed once.

    The threshold holds for the IoU with ordinary boxes and for the intersection over detection area with group-of
    boxes alike, as in the organisers' code. With :data:`COCO_THRESHOLDS`, the mean over the rows is the COCO-style AP
    per class.
    """
    rows = [
        average_precision(evaluator.matches(iou_threshold=threshold, group_of_weight=group_of_weight))
        for threshold in iou_thresholds
    ]
    return np.stack(rows) if rows else np.zeros((0, len(evaluator.ground_truth.evaluated)))


def average_precision(matches: Matches, *, image_weights: NDArray[np.integer] | None = None) -> NDArray[np.float64]:
    """Rule 6: ``[K]`` area under the precision-recall curve of each class, NaN for a class without ground truth.

    ``image_weights [I]``: how many times each image counts (default once); with ``[R, I]``, R weightings at once,
    the result is ``[R, K]``. An image that counts n times has each of its entries n times in a row.
    Raises ValueError when the weights do not fit the images.
    """
    num_images, num_classes = len(matches.image_ids), len(matches.evaluated)
    weights = None if image_weights is None else np.asarray(image_weights)
    if weights is not None and (weights.shape[-1:] != (num_images,) or weights.ndim > 2):
        raise ValueError(f"image_weights must be [{num_images}] or [R, {num_images}], but got {list(weights.shape)}")
    rows = np.ones((1, 1), dtype=np.int64) if weights is None else np.atleast_2d(weights)
    true_positives = np.where(matches.kind == Kind.FALSE_POSITIVE, 0.0, matches.weight)
    false_positives = np.where(matches.kind == Kind.FALSE_POSITIVE, 1.0, 0.0)
    entry_start = np.searchsorted(matches.class_index, np.arange(num_classes + 1))
    gt_start = np.searchsorted(matches.gt_class, np.arange(num_classes + 1))
    result = np.full((len(rows), num_classes), np.nan)
    for c in np.flatnonzero(np.diff(gt_start)):
        entries = slice(entry_start[c], entry_start[c + 1])
        ground_truths = slice(gt_start[c], gt_start[c + 1])
        if weights is None:
            num_truths = matches.gt_count[ground_truths].sum(keepdims=True)
            result[:, c] = _area(true_positives[None, entries], false_positives[None, entries], num_truths)
        else:
            times = rows[:, matches.image_index[entries]].astype(np.float64)
            num_truths = rows[:, matches.gt_image[ground_truths]] @ matches.gt_count[ground_truths]
            result[:, c] = _area(times * true_positives[entries], times * false_positives[entries], num_truths)
    return result[0] if weights is None or weights.ndim == 1 else result


def _area(
    true_positives: NDArray[np.float64], false_positives: NDArray[np.float64], num_truths: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Exact area under the curve with precision made non-increasing: ``[R, n], [R, n], [R] -> [R]``.

    NaN where there is no ground truth.
    """
    found = np.cumsum(true_positives, axis=1)
    counted = found + np.cumsum(false_positives, axis=1)
    precision = np.divide(found, counted, out=np.zeros_like(found), where=counted > 0)
    envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    area = (true_positives * envelope).sum(axis=1)
    result = np.full(len(area), np.nan)
    np.divide(area, num_truths, out=result, where=num_truths > 0)
    return result


def mean_of_classes(ap: NDArray[np.float64], classes: NDArray[np.bool_] | None = None) -> float:
    """Rule 7: mean of ``ap [K]`` over the (chosen) classes that are not NaN; NaN when there are none."""
    chosen = ap if classes is None else ap[classes]
    known = chosen[~np.isnan(chosen)]
    return float(known.mean()) if len(known) else float("nan")
