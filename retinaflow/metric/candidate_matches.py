"""What each detection could match, whatever the others do: rule 3 and the overlaps of rule 4 of the Challenge metric.

A detection can match only the ordinary ground-truth box and the group-of box that it overlaps most; it has no second
choice. So both are found for each detection alone, in any order, in batches and in several processes; only which
detection comes first at a ground-truth box needs all of them (:mod:`retinaflow.metric.matching_rules`). Candidate
matches do not depend on the IoU threshold either: one set of them serves all thresholds.

Coordinates are used as given: float64, continuous, not clipped (rule 9). Cost: O(log V + ground-truth boxes of its
image and class) per detection, in blocks of ``BLOCK`` detections, so that temporary arrays stay in the cache; the
result takes about 45 bytes per detection.

Source: ``per_image_evaluation.py`` of the TensorFlow Object Detection API.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from retinaflow.boxes import are_valid, areas, paired_ioa, paired_iou
from retinaflow.detections import Detections
from retinaflow.metric.ground_truth import Annotations, GroundTruths, expand_boxes, verified_pairs
from retinaflow.metric.matches import Dropped

BLOCK = 1 << 15
"""Detections that are compared with the ground truth at once."""


class GroundTruthByPair:
    """Expanded ground truth of the evaluated classes (rules 1 and 2), looked up by the V verified (image, class) pairs.

    ``pairs [V]`` int64 ascending; the ordinary ground-truth boxes of ``pairs[v]`` are the rows ``ordinary_start[v]`` to
    ``ordinary_start[v + 1]`` of ``ordinary``, its group-of ground-truth boxes those of ``group_of``.
    ``is_not_exhaustive [V]`` bool: objects of the class may be on the image without a box.
    """

    def __init__(self, ground_truth: Annotations, evaluated: NDArray[np.bool_]) -> None:
        expanded = expand_boxes(ground_truth)
        self.evaluated = evaluated
        self.num_images = len(ground_truth.image_ids)
        self.pairs = verified_pairs(ground_truth, expanded)
        self.is_not_exhaustive = np.isin(self.pairs, expanded.pair[expanded.is_not_exhaustive])
        self.ground_truths = (
            expanded.take(evaluated[expanded.pair % len(evaluated)]) if not evaluated.all() else expanded
        )
        self.ordinary = self.ground_truths.take(~self.ground_truths.is_group_of)
        self.group_of = self.ground_truths.take(self.ground_truths.is_group_of)
        self.ordinary_start = np.searchsorted(self.ordinary.pair, np.append(self.pairs, np.iinfo(np.int64).max))
        self.group_of_start = np.searchsorted(self.group_of.pair, np.append(self.pairs, np.iinfo(np.int64).max))

    def fingerprint(self) -> int:
        """CRC-32 of all that matches depend on; candidates of different ground truth must not be merged."""
        crc = zlib.crc32(f"{self.num_images} {self.evaluated.tolist()}".encode())
        boxes = self.ground_truths
        for array in (self.pairs, boxes.pair, boxes.boxes, boxes.is_group_of, self.is_not_exhaustive):
            crc = zlib.crc32(np.ascontiguousarray(array).tobytes(), crc)
        return crc


@dataclass(frozen=True)
class CandidateMatches:
    """The D detections that rule 3 accepts, as columns, in the order in which they were added."""

    row: NDArray[np.int64]
    """``[D]`` row of the detection."""
    pair_index: NDArray[np.int32]
    """``[D]`` index of its (image, class) among the verified pairs."""
    score: NDArray[np.float64]
    """``[D]`` its score."""
    area: NDArray[np.float64]
    """``[D]`` area of its box, as a fraction of the image."""
    iou: NDArray[np.float64]
    """``[D]`` largest IoU with an ordinary ground-truth box; -1 where there is none."""
    ordinary: NDArray[np.int32]
    """``[D]`` row of that box among the ordinary ones (the first among equals); -1 where there is none."""
    ioa: NDArray[np.float64]
    """``[D]`` largest intersection over its own area with a group-of box; -1 where there is none."""
    group_of: NDArray[np.int32]
    """``[D]`` row of that box among the group-of ones (the first among equals); -1 where there is none."""

    def __len__(self) -> int:
        return len(self.row)

    def take(self, rows: NDArray[np.generic]) -> CandidateMatches:
        """The rows chosen by an index or a boolean array, in that order."""
        return CandidateMatches(*(getattr(self, item.name)[rows] for item in fields(self)))

    @staticmethod
    def concatenate(parts: Sequence[CandidateMatches]) -> CandidateMatches:
        """All rows of all parts, in order."""
        if len(parts) == 1:
            return parts[0]
        if not parts:
            return _NONE
        columns = ([getattr(part, item.name) for part in parts] for item in fields(CandidateMatches))
        return CandidateMatches(*map(np.concatenate, columns))


_NONE = CandidateMatches(
    row=np.zeros(0, dtype=np.int64),
    pair_index=np.zeros(0, dtype=np.int32),
    score=np.zeros(0),
    area=np.zeros(0),
    iou=np.zeros(0),
    ordinary=np.zeros(0, dtype=np.int32),
    ioa=np.zeros(0),
    group_of=np.zeros(0, dtype=np.int32),
)


def candidate_matches(
    detections: Detections, rows: NDArray[np.int64], ground_truth: GroundTruthByPair
) -> tuple[CandidateMatches, Dropped]:
    """Rule 3 and the overlaps of rule 4; also counts what rule 3 drops.

    ``rows [D]``: rows of the detections in the predictions file. Image -1 is an image without any annotation.
    """
    parts, dropped = [], Dropped()
    for start in range(0, len(detections), BLOCK):
        block = slice(start, start + BLOCK)
        some = Detections(
            detections.image_index[block],
            detections.class_index[block],
            detections.score[block],
            detections.boxes[block],
        )
        candidates, dropped_here = _of_block(some, rows[block], ground_truth)
        parts.append(candidates)
        dropped += dropped_here
    return CandidateMatches.concatenate(parts), dropped


def _of_block(
    detections: Detections, rows: NDArray[np.int64], ground_truth: GroundTruthByPair
) -> tuple[CandidateMatches, Dropped]:
    image, class_index = detections.image_index.astype(np.int64), detections.class_index
    pair = image * len(ground_truth.evaluated) + class_index
    pair_index = np.searchsorted(ground_truth.pairs, pair)
    boxes = np.asarray(detections.boxes, dtype=np.float64)
    passes = {
        "unknown_image": image >= 0,
        "class_not_evaluated": ground_truth.evaluated[class_index],
        "not_verified": _is_at(ground_truth.pairs, pair_index, pair),
        "invalid_box": are_valid(boxes),
    }
    remaining = np.ones(len(detections), dtype=bool)
    dropped = {}
    for reason, passed in passes.items():
        before = np.count_nonzero(remaining)
        remaining &= passed
        dropped[reason] = int(before - np.count_nonzero(remaining))
    accepted = np.flatnonzero(remaining)
    pair_index, boxes = pair_index[accepted], boxes[accepted]
    iou, ordinary = _largest_overlap(boxes, pair_index, ground_truth.ordinary, ground_truth.ordinary_start, paired_iou)
    ioa, group_of = _largest_overlap(boxes, pair_index, ground_truth.group_of, ground_truth.group_of_start, paired_ioa)
    candidates = CandidateMatches(
        row=rows[accepted],
        pair_index=pair_index.astype(np.int32),
        score=detections.score[accepted].astype(np.float64),
        area=areas(boxes).astype(np.float64, copy=False),
        iou=iou,
        ordinary=ordinary,
        ioa=ioa,
        group_of=group_of,
    )
    return candidates, Dropped(**dropped)


def _largest_overlap(
    boxes: NDArray[np.float64],
    pair_index: NDArray[np.int64],
    ground_truths: GroundTruths,
    start: NDArray[np.int64],
    overlap_of: Callable[[NDArray[np.floating], NDArray[np.floating]], NDArray[np.floating]],
) -> tuple[NDArray[np.float64], NDArray[np.int32]]:
    """The largest overlap of each detection with a ground-truth box of its pair, and the row of that box.

    The first row among equals; without ground truth overlap -1, row -1. The k-th turn compares all detections whose
    pair has more than k boxes with the k-th of them.
    """
    begin = start[pair_index]
    counts = start[pair_index + 1] - begin
    largest, row = np.full(len(boxes), -1.0), np.full(len(boxes), -1, dtype=np.int32)
    active, turn = np.flatnonzero(counts), 0
    while len(active):
        other = begin[active] + turn
        overlap = overlap_of(boxes.take(active, axis=0), ground_truths.boxes.take(other, axis=0))
        larger = overlap > largest[active]
        winners = active[larger]
        largest[winners], row[winners] = overlap[larger], other[larger]
        turn += 1
        active = active[counts[active] > turn]
    return largest, row


def _is_at(ascending: NDArray[np.int64], index: NDArray[np.int64], wanted: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether each of ``wanted`` is the value at the index that ``searchsorted`` has given for it."""
    if len(ascending) == 0:
        return np.zeros(len(wanted), dtype=bool)
    return np.asarray(ascending[np.minimum(index, len(ascending) - 1)] == wanted)
