"""For each detection the ground-truth box that it overlaps most: of its own class, a group-of box, of another class.

All pairs of a detection and a box of its image are compared, ``PAIRS_AT_ONCE`` at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from retinaflow.boxes import paired_ioa, paired_iou
from retinaflow.detections import Detections
from retinaflow.metric.ground_truth import Annotations
from retinaflow.metric.matches import Kind, Matches

PAIRS_AT_ONCE = 1_000_000
"""Pairs of a detection and a box that are compared at once (about 200 bytes each)."""

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Nearest:
    """For each entry ``[E]``: the largest overlap with a box of each sort and the row of that box (-1: none)."""

    own: FloatArray
    own_row: IntArray
    own_group_of: FloatArray
    """Fraction of the detection inside the group-of box."""
    other: FloatArray
    other_row: IntArray


def nearest_ground_truths(matches: Matches, detections: Detections, ground_truth: Annotations) -> Nearest:
    """The largest overlaps of all entries; group-of entries have none."""
    num_entries = len(matches.score)
    found = {name: np.full(num_entries, -1.0) for name in ("own", "own_group_of", "other")}
    rows = {name: np.full(num_entries, -1, dtype=np.int64) for name in found}
    boxes = np.asarray(detections.boxes, dtype=np.float64)
    gt_boxes = np.asarray(ground_truth.boxes, dtype=np.float64)
    labels, group_of = np.asarray(ground_truth.labels), np.asarray(ground_truth.is_group_of, dtype=bool)
    is_own = ground_truth.taxonomy.is_ancestor | np.eye(len(ground_truth.taxonomy), dtype=bool)
    asked = np.flatnonzero(matches.kind != Kind.GROUP_OF)
    for entry, row in _pairs(asked, matches.image_index, np.asarray(ground_truth.box_start)):
        own = is_own[labels[row], matches.class_index[entry]]
        sorts = {"own": own & ~group_of[row], "own_group_of": own & group_of[row], "other": ~own & ~group_of[row]}
        for name, chosen in sorts.items():
            some_entries, some_rows = entry[chosen], row[chosen]
            overlap_of = paired_ioa if name == "own_group_of" else paired_iou
            overlap = overlap_of(boxes[matches.detection_row[some_entries]], gt_boxes[some_rows])
            best_entry, best_row, best = _largest(some_entries, some_rows, overlap)
            found[name][best_entry], rows[name][best_entry] = best, best_row
    return Nearest(found["own"], rows["own"], found["own_group_of"], found["other"], rows["other"])


def _pairs(entries: IntArray, image_of: IntArray, box_start: IntArray) -> Iterator[tuple[IntArray, IntArray]]:
    """(entry, row of a box of its image) of all pairs, in pieces that keep the pairs of an entry together."""
    counts = box_start[image_of[entries] + 1] - box_start[image_of[entries]]
    piece = np.cumsum(counts) // PAIRS_AT_ONCE
    for some in np.split(np.arange(len(entries)), np.flatnonzero(np.diff(piece)) + 1):
        start = np.cumsum(counts[some]) - counts[some]
        within = np.arange(int(counts[some].sum())) - np.repeat(start, counts[some])
        entry = np.repeat(entries[some], counts[some])
        yield entry, box_start[image_of[entry]] + within


def _largest(
    entry: IntArray, row: IntArray, overlap: NDArray[np.floating]
) -> tuple[IntArray, IntArray, NDArray[np.floating]]:
    """For each entry (equal entries are adjacent) its largest overlap and the first row that has it."""
    if len(entry) == 0:
        return entry, row, overlap
    start = np.flatnonzero(np.r_[True, entry[1:] != entry[:-1]])
    best = np.maximum.reduceat(overlap, start)
    run = np.repeat(np.arange(len(start)), np.diff(np.r_[start, len(entry)]))
    at_best = np.flatnonzero(overlap == best[run])
    first = at_best[np.searchsorted(run[at_best], np.arange(len(start)))]
    return entry[start], row[first], best
