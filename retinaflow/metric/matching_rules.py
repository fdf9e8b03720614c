"""Which detections are true positives, false positives or absorbed: rules 4 and 8 of the Challenge metric.

In: candidate matches (:mod:`retinaflow.metric.candidate_matches`), in any order. A ground-truth box goes to its
candidate of the highest score, so one fixed order of all detections is needed (rule 8). That sort by class, score,
image and row is also the order of the precision-recall curves, and is the only sort. Out: the entries of those curves;
average precision can be computed from them with other image weights (bootstrap) without matching again.

Cost: O(D log D); about 100 bytes per detection while it runs.

Source: ``per_image_evaluation.py`` of the TensorFlow Object Detection API, with equal scores in a fixed order (rule 8).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from retinaflow.metric.candidate_matches import CandidateMatches, GroundTruthByPair
from retinaflow.metric.matches import Kind

MAX_DETECTIONS = 10_000
"""Detections evaluated per image and class; those of lower score are dropped and counted."""


@dataclass(frozen=True)
class Matching:
    """Entries of the precision-recall curves, ordered by class, then by rule 8.

    ``candidate [E]``: index of the detection among the candidates; ``kind [E]``: a :class:`Kind`.
    """

    candidate: NDArray[np.int64]
    kind: NDArray[np.int8]
    absorbed: int
    """Detections absorbed by group-of boxes."""
    not_exhaustive: int
    """Other unmatched detections of classes that are not exhaustive on their image."""


def ranked(
    candidates: CandidateMatches, ground_truth: GroundTruthByPair, image_rank: NDArray[np.int64]
) -> tuple[CandidateMatches, int]:
    """The candidates by class, then by rule 8: descending score, ImageID as a string, row; and how many are left out.

    ``image_rank [I]``: the index of each image among the sorted ImageIDs. Of an image and class at most
    ``MAX_DETECTIONS`` remain, those of highest score.
    """
    image, class_index = np.divmod(ground_truth.pairs, max(len(ground_truth.evaluated), 1))
    rank = image_rank[image][candidates.pair_index]
    if not _ascends(rank, candidates.row):
        candidates = candidates.take(np.lexsort((candidates.row, rank)))
    # Both sorts are stable, so image and row decide among equal scores. Class indices fit 16 bits, which numpy sorts by
    # counting; the slice of one class fits the cache.
    column = class_index.astype(np.min_scalar_type(len(ground_truth.evaluated)))[candidates.pair_index]
    order = np.argsort(column, kind="stable")
    start = np.concatenate([[0], np.cumsum(np.bincount(column, minlength=len(ground_truth.evaluated)))])
    negative_score = -candidates.score[order]
    for begin, end in pairwise(start):
        order[begin:end] = order[begin:end][np.argsort(negative_score[begin:end], kind="stable")]
    candidates = candidates.take(order)
    if np.bincount(candidates.pair_index, minlength=1).max() <= MAX_DETECTIONS:
        return candidates, 0
    inside = _position_in_group(candidates.pair_index) < MAX_DETECTIONS
    return candidates.take(inside), int(np.count_nonzero(~inside))


def match_ranked(
    candidates: CandidateMatches, ground_truth: GroundTruthByPair, *, iou_threshold: float, with_group_of: bool
) -> Matching:
    """Rule 4 for ranked candidates: true positives, detections absorbed by group-of boxes, and false positives, except
    those of classes that are not exhaustive on their image.

    ``with_group_of``: a group-of box that absorbed a detection makes an entry at the highest score that it absorbed,
    if that is above 0.
    """
    # Stage 1: the first candidate of a ground-truth box is its true positive; later ones get no second choice.
    over_threshold = np.flatnonzero(candidates.iou >= iou_threshold)
    is_true = np.zeros(len(candidates), dtype=bool)
    is_true[over_threshold[_first_of_each(candidates.ordinary[over_threshold], len(ground_truth.ordinary))]] = True
    # Stage 2: a detection that is no true positive may be absorbed.
    absorbed = np.flatnonzero((candidates.ioa >= iou_threshold) & ~is_true)
    remains = np.ones(len(candidates), dtype=bool)
    remains[absorbed] = False
    # An object without a box may be what was found.
    ignored = ground_truth.is_not_exhaustive[candidates.pair_index] & ~is_true & remains
    remains &= ~ignored
    entry = np.flatnonzero(remains)
    kind = np.where(is_true[entry], Kind.TRUE_POSITIVE, Kind.FALSE_POSITIVE).astype(np.int8)
    if with_group_of and len(absorbed):
        highest = absorbed[_first_of_each(candidates.group_of[absorbed], len(ground_truth.group_of))]
        highest = highest[candidates.score[highest] > 0]
        # After all detections of its image that have the same score.
        at = np.searchsorted(entry, _end_of_equals(candidates, highest), side="right")
        entry, kind = np.insert(entry, at, highest), np.insert(kind, at, np.int8(Kind.GROUP_OF))
    return Matching(entry, kind, len(absorbed), int(np.count_nonzero(ignored)))


def _ascends(rank: NDArray[np.int64], row: NDArray[np.int64]) -> bool:
    """Whether rows are in order of (rank, row) already, as those of a file sorted by image are."""
    further = rank[1:] > rank[:-1]
    return bool((further | ((rank[1:] == rank[:-1]) & (row[1:] >= row[:-1]))).all())


def _first_of_each(group: NDArray[np.int32], count: int) -> NDArray[np.int64]:
    """Indices, ascending, of the first occurrence of each number of ``group`` (all below ``count``)."""
    first = np.full(count, len(group), dtype=np.int64)
    np.minimum.at(first, group, np.arange(len(group)))
    return np.sort(first[first < len(group)])


def _end_of_equals(candidates: CandidateMatches, at: NDArray[np.int64]) -> NDArray[np.int64]:
    """Last index of the run of equal image, class and score around each index ``at``."""
    same = (candidates.pair_index[1:] == candidates.pair_index[:-1]) & (candidates.score[1:] == candidates.score[:-1])
    ends = np.append(np.flatnonzero(~same), len(candidates) - 1)
    return ends[np.searchsorted(ends, at)]


def _position_in_group(group: NDArray[np.int32]) -> NDArray[np.int64]:
    """How many equal values come before each value."""
    order = np.argsort(group, kind="stable")
    ordered = group[order]
    position = np.empty(len(group), dtype=np.int64)
    position[order] = np.arange(len(group)) - np.searchsorted(ordered, ordered)
    return position
