"""Which detections are right, wrong or absorbed: rules 4 and 5 of the Open Images Challenge metric, in the order of
rule 8.

In: claims (:mod:`retinaflow.metric.candidate_matches`), in any order. A ground truth goes to the first detection that claims it by
score, so what is needed is one fixed order of all detections; their sort by class, score, image and row is that of the
precision-recall curves too, and is the only one. Out: the entries that average precision needs, so that it
can be asked again with other image weights (bootstrap) without matching twice.

Cost: O(D log D); about 100 bytes per detection while it runs.

Source: ``per_image_evaluation.py`` of the TensorFlow Object Detection API, with equal scores in a fixed order (rule 8).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from retinaflow.metric.candidate_matches import Claims, GroundTruthByPair
from retinaflow.metric.matches import Kind

MAX_DETECTIONS = 10_000
"""Detections evaluated per image and class; those of lower score are dropped and counted."""


@dataclass(frozen=True)
class Outcome:
    """Entries of the precision-recall curves, ordered by class, then as rule 8 asks.

    ``claim [E]`` place of the detection among the claims, ``kind [E]`` a :class:`Kind`.
    """

    claim: NDArray[np.int64]
    kind: NDArray[np.int8]
    absorbed: int
    """Detections absorbed by group-of boxes."""


def ranked(claims: Claims, ground_truth: GroundTruthByPair, image_rank: NDArray[np.int64]) -> tuple[Claims, int]:
    """The claims by class, then as rule 8 asks: descending score, ImageID as a string, row; and how many were cut off.

    ``image_rank [I]`` is the place of each image among the sorted ImageIDs. At most ``MAX_DETECTIONS`` of an image and
    class are kept, those of highest score.
    """
    image, class_index = np.divmod(ground_truth.pairs, max(len(ground_truth.evaluated), 1))
    rank = image_rank[image][claims.slot]
    if not _ascends(rank, claims.row):
        claims = claims.take(np.lexsort((claims.row, rank)))
    # Both sorts keep the order of equals, so image and row decide among equal scores. Classes fit 16 bits, which numpy
    # sorts by counting; the slice of a class fits the cache.
    column = class_index.astype(np.min_scalar_type(len(ground_truth.evaluated)))[claims.slot]
    order = np.argsort(column, kind="stable")
    start = np.concatenate([[0], np.cumsum(np.bincount(column, minlength=len(ground_truth.evaluated)))])
    falling = -claims.score[order]
    for begin, end in pairwise(start):
        order[begin:end] = order[begin:end][np.argsort(falling[begin:end], kind="stable")]
    claims = claims.take(order)
    if np.bincount(claims.slot, minlength=1).max() <= MAX_DETECTIONS:
        return claims, 0
    inside = _place_in_group(claims.slot) < MAX_DETECTIONS
    return claims.take(inside), int(np.count_nonzero(~inside))


def settle(claims: Claims, ground_truth: GroundTruthByPair, *, iou_threshold: float, with_group_of: bool) -> Outcome:
    """Rule 4 for ranked claims: to whom each ground truth goes, what group-of boxes absorb, and what is left as wrong.

    ``with_group_of``: a group-of box that absorbed something makes an entry at the highest score it absorbed, if that
    is above 0.
    """
    # Stage 1: the first to claim a ground truth is right; later ones get no second choice.
    claimants = np.flatnonzero(claims.iou >= iou_threshold)
    right = np.zeros(len(claims), dtype=bool)
    right[claimants[_first_of_each(claims.nearest[claimants], len(ground_truth.ordinary))]] = True
    # Stage 2: what is not right may be absorbed.
    absorbed = np.flatnonzero((claims.ioa >= iou_threshold) & ~right)
    stays = np.ones(len(claims), dtype=bool)
    stays[absorbed] = False
    entry = np.flatnonzero(stays)
    kind = np.where(right[entry], Kind.TRUE_POSITIVE, Kind.FALSE_POSITIVE).astype(np.int8)
    if with_group_of and len(absorbed):
        highest = absorbed[_first_of_each(claims.group[absorbed], len(ground_truth.group_of))]
        highest = highest[claims.score[highest] > 0]
        # After all detections of its image that have the same score.
        place = np.searchsorted(entry, _end_of_equals(claims, highest), side="right")
        entry, kind = np.insert(entry, place, highest), np.insert(kind, place, np.int8(Kind.GROUP_OF))
    return Outcome(entry, kind, len(absorbed))


def _ascends(rank: NDArray[np.int64], row: NDArray[np.int64]) -> bool:
    """Whether rows are in order of (rank, row) already, as those of a file sorted by image are."""
    further = rank[1:] > rank[:-1]
    return bool((further | ((rank[1:] == rank[:-1]) & (row[1:] >= row[:-1]))).all())


def _first_of_each(group: NDArray[np.int32], count: int) -> NDArray[np.int64]:
    """Places, ascending, at which each number of ``group`` (below ``count``) stands for the first time."""
    first = np.full(count, len(group), dtype=np.int64)
    np.minimum.at(first, group, np.arange(len(group)))
    return np.sort(first[first < len(group)])


def _end_of_equals(claims: Claims, place: NDArray[np.int64]) -> NDArray[np.int64]:
    """Last place of the run of equal image, class and score around each place."""
    same = (claims.slot[1:] == claims.slot[:-1]) & (claims.score[1:] == claims.score[:-1])
    ends = np.append(np.flatnonzero(~same), len(claims) - 1)
    return ends[np.searchsorted(ends, place)]


def _place_in_group(group: NDArray[np.int32]) -> NDArray[np.int64]:
    """How many equal values stand before each value."""
    order = np.argsort(group, kind="stable")
    ordered = group[order]
    place = np.empty(len(group), dtype=np.int64)
    place[order] = np.arange(len(group)) - np.searchsorted(ordered, ordered)
    return place
