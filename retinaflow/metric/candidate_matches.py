"""What each detection claims, whatever the others do: rule 3 and the overlaps of rule 4 of the Challenge metric.

A detection looks only at its best ordinary ground truth and its best group-of ground truth and has no second choice, so both can be
found one by one, in any order, in batches and in several processes; only who came first to a ground truth needs all of them
(:mod:`retinaflow.metric.matching`). The claim does not depend on the IoU threshold either: one set of claims serves
all thresholds.

Coordinates are used as given: float64, continuous, not clipped (rule 9). Cost: O(log V + ground-truth boxes of its image and class)
per detection, in blocks of ``BLOCK`` detections, so that temporary arrays stay in the cache; about 45 bytes are kept.

Source: ``per_image_evaluation.py`` of the TensorFlow Object Detection API.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from retinaflow.boxes import are_valid, areas
from retinaflow.detections import Detections
from retinaflow.metric.ground_truth import Annotations, GroundTruths, expand_boxes, verified_pairs

BLOCK = 1 << 15
"""Detections looked at in one piece."""


class GroundTruthByPair:
    """Expanded ground truth of the evaluated classes (rules 1 and 2), looked up by the V verified (image, class) pairs.

    ``pairs [V]`` int64 ascending; the ordinary ground-truth boxes of ``pairs[v]`` are the rows ``ordinary_start[v]`` to
    ``ordinary_start[v + 1]`` of ``ordinary``, its group-of ground-truth boxes those of ``group_of``.
    """

    def __init__(self, ground_truth: Annotations, evaluated: NDArray[np.bool_]) -> None:
        expanded = expand_boxes(ground_truth)
        self.evaluated = evaluated
        self.num_images = len(ground_truth.image_ids)
        self.pairs = verified_pairs(ground_truth, expanded)
        self.ground_truths = (
            expanded.take(evaluated[expanded.pair % len(evaluated)]) if not evaluated.all() else expanded
        )
        self.ordinary = self.ground_truths.take(~self.ground_truths.is_group_of)
        self.group_of = self.ground_truths.take(self.ground_truths.is_group_of)
        self.ordinary_start = np.searchsorted(self.ordinary.pair, np.append(self.pairs, np.iinfo(np.int64).max))
        self.group_of_start = np.searchsorted(self.group_of.pair, np.append(self.pairs, np.iinfo(np.int64).max))

    def fingerprint(self) -> int:
        """CRC-32 of everything that claims depend on; claims of different ground truth must not be merged."""
        crc = zlib.crc32(f"{self.num_images} {self.evaluated.tolist()}".encode())
        for array in (self.pairs, self.ground_truths.pair, self.ground_truths.boxes, self.ground_truths.is_group_of):
            crc = zlib.crc32(np.ascontiguousarray(array).tobytes(), crc)
        return crc


@dataclass(frozen=True)
class Claims:
    """The D detections that rule 3 keeps, as columns, in the order in which they were looked at."""

    row: NDArray[np.int64]
    """``[D]`` row of the detection."""
    slot: NDArray[np.int32]
    """``[D]`` place of its (image, class) in the verified pairs."""
    score: NDArray[np.float64]
    """``[D]`` its score."""
    area: NDArray[np.float64]
    """``[D]`` area of its box: its share of the image."""
    iou: NDArray[np.float64]
    """``[D]`` largest IoU with an ordinary ground truth; -1 where there is none."""
    nearest: NDArray[np.int32]
    """``[D]`` row of that ground truth (the first among equals); -1 where there is none."""
    ioa: NDArray[np.float64]
    """``[D]`` largest intersection over its own area with a group-of ground truth; -1 where there is none."""
    group: NDArray[np.int32]
    """``[D]`` row of that ground truth (the first among equals); -1 where there is none."""

    def __len__(self) -> int:
        return len(self.row)

    def take(self, rows: NDArray[np.generic]) -> Claims:
        """The claims chosen by an index or a boolean array, in that order."""
        return Claims(*(getattr(self, item.name)[rows] for item in fields(self)))

    @staticmethod
    def concatenate(parts: Sequence[Claims]) -> Claims:
        """All claims of all parts, in order."""
        if len(parts) == 1:
            return parts[0]
        if not parts:
            return _NO_CLAIMS
        return Claims(*(np.concatenate([getattr(part, item.name) for part in parts]) for item in fields(Claims)))


_NO_CLAIMS = Claims(
    row=np.zeros(0, dtype=np.int64),
    slot=np.zeros(0, dtype=np.int32),
    score=np.zeros(0),
    area=np.zeros(0),
    iou=np.zeros(0),
    nearest=np.zeros(0, dtype=np.int32),
    ioa=np.zeros(0),
    group=np.zeros(0, dtype=np.int32),
)


@dataclass(frozen=True)
class Refused:
    """Detections that rule 3 drops, each counted once, for the first reason that applies."""

    unknown_image: int = 0
    class_not_evaluated: int = 0
    not_verified: int = 0
    invalid_box: int = 0

    def __add__(self, other: Refused) -> Refused:
        return Refused(*(getattr(self, item.name) + getattr(other, item.name) for item in fields(self)))


def make_claims(
    detections: Detections, rows: NDArray[np.int64], ground_truth: GroundTruthByPair
) -> tuple[Claims, Refused]:
    """The claims of detections whose rows of the predictions file are ``rows [D]``; image -1 is an unknown image."""
    parts, refused = [], Refused()
    for start in range(0, len(detections), BLOCK):
        block = slice(start, start + BLOCK)
        some = Detections(
            detections.image_index[block],
            detections.class_index[block],
            detections.score[block],
            detections.boxes[block],
        )
        claims, dropped = _claims_of_block(some, rows[block], ground_truth)
        parts.append(claims)
        refused += dropped
    return Claims.concatenate(parts), refused


def _claims_of_block(
    detections: Detections, rows: NDArray[np.int64], ground_truth: GroundTruthByPair
) -> tuple[Claims, Refused]:
    """Rule 3, then stages 1 and 2 of rule 4 as far as one detection alone decides them."""
    image, class_index = detections.image_index.astype(np.int64), detections.class_index
    pair = image * len(ground_truth.evaluated) + class_index
    slot = np.searchsorted(ground_truth.pairs, pair)
    boxes = np.asarray(detections.boxes, dtype=np.float64)
    passes = (image >= 0, ground_truth.evaluated[class_index], _is_at(ground_truth.pairs, slot, pair), are_valid(boxes))
    remaining = np.ones(len(detections), dtype=bool)
    dropped = []
    for passed in passes:
        before = np.count_nonzero(remaining)
        remaining &= passed
        dropped.append(int(before - np.count_nonzero(remaining)))
    kept = np.flatnonzero(remaining)
    slot, boxes = slot[kept], boxes[kept]
    area: NDArray[np.float64] = areas(boxes).astype(np.float64, copy=False)
    iou, nearest = _best_ground_truth(boxes, area, slot, ground_truth.ordinary, ground_truth.ordinary_start, union=True)
    ioa, group = _best_ground_truth(boxes, area, slot, ground_truth.group_of, ground_truth.group_of_start, union=False)
    score = detections.score[kept].astype(np.float64)
    return Claims(rows[kept], slot.astype(np.int32), score, area, iou, nearest, ioa, group), Refused(*dropped)


def _best_ground_truth(
    boxes: NDArray[np.float64],
    area: NDArray[np.float64],
    slot: NDArray[np.int64],
    ground_truths: GroundTruths,
    start: NDArray[np.int64],
    *,
    union: bool,
) -> tuple[NDArray[np.float64], NDArray[np.int32]]:
    """The largest overlap of each detection with a ground truth of its pair, and the row of that ground truth (first among equals).

    Overlap is IoU (``union=True``) or intersection over the area of the detection. No ground truth: overlap -1, row -1. The
    k-th turn compares all detections whose pair has more than k ground-truth boxes with the k-th of them.
    """
    begin = start[slot]
    counts = start[slot + 1] - begin
    best, nearest = np.full(len(boxes), -1.0), np.full(len(boxes), -1, dtype=np.int32)
    active, turn = np.flatnonzero(counts), 0
    while len(active):
        candidate = begin[active] + turn
        overlap = overlaps(
            boxes.take(active, axis=0), area[active], ground_truths.boxes.take(candidate, axis=0), union=union
        )
        better = overlap > best[active]
        winners = active[better]
        best[winners], nearest[winners] = overlap[better], candidate[better]
        turn += 1
        active = active[counts[active] > turn]
    return best, nearest


def overlaps(
    boxes: NDArray[np.float64], area: NDArray[np.float64], ground_truths: NDArray[np.float64], *, union: bool
) -> NDArray[np.float64]:
    """Row by row IoU or, without ``union``, intersection over ``area`` of ``boxes``: ``[P, 4], [P], [P, 4] -> [P]``."""
    width = np.minimum(boxes[:, 2], ground_truths[:, 2]) - np.maximum(boxes[:, 0], ground_truths[:, 0])
    height = np.minimum(boxes[:, 3], ground_truths[:, 3]) - np.maximum(boxes[:, 1], ground_truths[:, 1])
    shared: NDArray[np.float64] = np.maximum(width, 0) * np.maximum(height, 0)
    whole = area + areas(ground_truths) - shared if union else area
    result = np.zeros_like(shared)
    np.divide(shared, whole, out=result, where=whole > 0)
    return result


def _is_at(ascending: NDArray[np.int64], place: NDArray[np.int64], wanted: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether each of ``wanted`` is what stands at the place that a search has found."""
    if len(ascending) == 0:
        return np.zeros(len(wanted), dtype=bool)
    return np.asarray(ascending[np.minimum(place, len(ascending) - 1)] == wanted)
