"""AP on a part of the ground truth: crowded objects, and small, medium and large ones.

A slice is a set of ordinary ground-truth boxes (group-of boxes play no role). A detection with a candidate match (IoU
at least the threshold with the ground-truth box that it overlaps most) counts in the slice of that box: as a true
positive when it is the first there, else as a false positive. A detection without one is a false positive

- in the size slice of its own area, as in COCO's evaluation;
- in the crowded slice, when its image has a crowded ground-truth box of its class.

Sizes are fractions of the image's area, since the annotations hold no pixels: small is below 1/300, large from 3/100,
which are COCO's 32 x 32 and 96 x 96 pixels on an image of 640 x 480. A ground-truth box is crowded when its IoU with
another ordinary one of its class is above 0.3. All of this is after expansion: two men in a crowd are crowded persons
too.

Cost: one pass over pairs of ground-truth boxes in one image and class, and per slice one over the candidate matches.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from retinaflow.boxes import areas, paired_iou
from retinaflow.metric.candidate_matches import GroundTruthByPair
from retinaflow.metric.challenge import average_precision
from retinaflow.metric.evaluator import Evaluator, Subset
from retinaflow.metric.matches import Kind

SMALL_BELOW = 1 / 300
LARGE_FROM = 3 / 100
CROWDED_ABOVE = 0.3
SLICES = ("small", "medium", "large", "crowded")


@dataclass(frozen=True)
class SliceScores:
    """Scores on one slice; arrays ``[K]``, NaN for a class without a ground truth in it."""

    name: str
    ap: NDArray[np.float64]
    recall: NDArray[np.float64]
    """Fraction of the slice's ground-truth boxes that were found at any score."""
    num_truths: NDArray[np.float64]


def slice_scores(evaluator: Evaluator, *, iou_threshold: float = 0.5) -> list[SliceScores]:
    """The scores on each of :data:`SLICES`."""
    return [
        _scores(name, evaluator, subset, iou_threshold=iou_threshold) for name, subset in subsets(evaluator).items()
    ]


def subsets(evaluator: Evaluator) -> dict[str, Subset]:
    """The slices by name, as sets of ordinary ground-truth boxes and of candidate matches."""
    ground_truth, candidates = evaluator.ground_truth, evaluator.ranked_candidates()
    gt_size, own_size = _size(areas(ground_truth.ordinary.boxes)), _size(candidates.area)
    found = {name: Subset(gt_size == number, own_size == number) for number, name in enumerate(SLICES[:3])}
    crowded = are_crowded(ground_truth)
    has_crowd = np.zeros(len(ground_truth.pairs), dtype=bool)
    has_crowd[np.searchsorted(ground_truth.pairs, ground_truth.ordinary.pair[crowded])] = True
    return {**found, SLICES[3]: Subset(crowded, has_crowd[candidates.pair_index])}


def are_crowded(ground_truth: GroundTruthByPair) -> NDArray[np.bool_]:
    """``[T]`` ordinary ground-truth boxes whose IoU with another one of their image and class is above 0.3."""
    boxes = ground_truth.ordinary.boxes
    pair_index = np.searchsorted(ground_truth.pairs, ground_truth.ordinary.pair)
    begin = ground_truth.ordinary_start[pair_index]
    counts = ground_truth.ordinary_start[pair_index + 1] - begin
    crowded = np.zeros(len(boxes), dtype=bool)
    # The k-th turn compares every ground-truth box with the k-th of its image and class.
    active, turn = np.flatnonzero(counts > 1), 0
    while len(active):
        other = begin[active] + turn
        near = paired_iou(boxes[active], boxes[other]) > CROWDED_ABOVE
        crowded[active[near & (other != active)]] = True
        turn += 1
        active = active[counts[active] > turn]
    return crowded


def _scores(name: str, evaluator: Evaluator, subset: Subset, *, iou_threshold: float) -> SliceScores:
    matches = evaluator.matches(iou_threshold=iou_threshold, group_of_weight=0.0, subset=subset)
    num_truths = matches.num_truths
    found = np.bincount(matches.class_index[matches.kind == Kind.TRUE_POSITIVE], minlength=len(num_truths))
    recall = np.divide(found, num_truths, out=np.full(len(num_truths), np.nan), where=num_truths > 0)
    return SliceScores(name, average_precision(matches), recall, num_truths)


def _size(area: NDArray[np.floating]) -> NDArray[np.int64]:
    """0 small, 1 medium, 2 large."""
    number: NDArray[np.int64] = np.digitize(area, [SMALL_BELOW, LARGE_FROM])
    return number
