"""The ground truth that the Challenge metric evaluates with: rules 1 and 2.

In: raw annotations, as published. Out: boxes copied to every ancestor class (:func:`expand_boxes`) and the set of
verified classes of every image (:func:`verified_pairs`). An (image, class) pair is one int64, ``image * K + class``,
so that sets of pairs are sorted arrays and membership is a binary search.

Cost: time and memory linear in the expanded rows (about 2.5 per published box with the 500 classes), plus sorting.
Source: the organisers' ``oid_hierarchical_labels_expansion.py`` (TensorFlow Object Detection API).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from retinaflow.taxonomy import Taxonomy


class Annotations(Protocol):
    """What the metric reads of an annotation index: I images, N boxes, M image-level labels, raw (not expanded).

    ``boxes`` and ``labels`` (class indices) of image i are the rows ``box_start[i]:box_start[i + 1]`` in published
    order; its image-level labels are the rows ``label_start[i]:label_start[i + 1]``. Boxes are normalised xyxy.
    ``sizes`` are (height, width) in pixels, 0 where they are not known; the rules of COCO alone read them.
    """

    @property
    def image_ids(self) -> NDArray[np.str_]: ...
    @property
    def sizes(self) -> NDArray[np.integer]: ...
    @property
    def box_start(self) -> NDArray[np.int64]: ...
    @property
    def boxes(self) -> NDArray[np.floating]: ...
    @property
    def labels(self) -> NDArray[np.int32]: ...
    @property
    def is_group_of(self) -> NDArray[np.bool_]: ...
    @property
    def is_not_exhaustive(self) -> NDArray[np.bool_]: ...
    @property
    def label_start(self) -> NDArray[np.int64]: ...
    @property
    def verified_class(self) -> NDArray[np.int32]: ...
    @property
    def verified_present(self) -> NDArray[np.bool_]: ...
    @property
    def taxonomy(self) -> Taxonomy: ...


@dataclass(frozen=True)
class GroundTruths:
    """Expanded ground truth boxes, ascending by pair, in published order inside a pair.

    ``pair [T]`` int64 (image * K + class), ``boxes [T, 4]`` float64 normalised xyxy, ``is_group_of [T]`` and
    ``is_not_exhaustive [T]`` (other objects of the class may be on the image without a box) bool.
    """

    pair: NDArray[np.int64]
    boxes: NDArray[np.float64]
    is_group_of: NDArray[np.bool_]
    is_not_exhaustive: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.pair)

    def take(self, rows: NDArray[np.bool_]) -> GroundTruths:
        """The rows where ``rows [T]`` is True."""
        return GroundTruths(self.pair[rows], self.boxes[rows], self.is_group_of[rows], self.is_not_exhaustive[rows])


def expand_boxes(ground_truth: Annotations) -> GroundTruths:
    """Rule 1 for boxes: each row stays and is copied to every ancestor class, flags included.

    Nothing is made unique: a box given under child and parent gives the parent two ground-truth boxes
    (:func:`count_repeated`).

    Example: with Vehicle > Car, one Car box becomes a Car box and a Vehicle box.
    Raises ValueError for a class outside the taxonomy and for coordinates that are not finite.
    """
    num_classes = len(ground_truth.taxonomy)
    _check_classes(ground_truth.labels, num_classes, "box")
    boxes = np.asarray(ground_truth.boxes, dtype=np.float64)
    if not np.isfinite(boxes).all():
        bad = int(np.flatnonzero(~np.isfinite(boxes).all(axis=1))[0])
        raise ValueError(f"ground truth boxes must be finite, but box row {bad} is {boxes[bad].tolist()}")
    itself_and_up = ground_truth.taxonomy.is_ancestor | np.eye(num_classes, dtype=bool)
    row, to_class = _follow(np.asarray(ground_truth.labels), itself_and_up)
    pair = _owner(ground_truth.box_start)[row] * num_classes + to_class
    order = np.argsort(pair, kind="stable")
    row = row[order]
    is_group_of, is_not_exhaustive = (
        np.asarray(flag, dtype=bool)[row] for flag in (ground_truth.is_group_of, ground_truth.is_not_exhaustive)
    )
    return GroundTruths(pair[order], boxes[row], is_group_of, is_not_exhaustive)


def verified_pairs(ground_truth: Annotations, expanded: GroundTruths) -> NDArray[np.int64]:
    """Rule 2: the pairs ``[V]`` (ascending, unique) in which a detection is evaluated.

    Those with an image-level label of either sign, where a present label also verifies all ancestors and an absent
    one all descendants, and those with an (expanded) box.
    """
    num_classes = len(ground_truth.taxonomy)
    _check_classes(ground_truth.verified_class, num_classes, "image-level label")
    labels, present = np.asarray(ground_truth.verified_class), np.asarray(ground_truth.verified_present, dtype=bool)
    image = _owner(ground_truth.label_start)
    itself, up = np.eye(num_classes, dtype=bool), ground_truth.taxonomy.is_ancestor
    found = [expanded.pair]
    for rows, relation in ((np.flatnonzero(present), up), (np.flatnonzero(~present), up.T)):
        row, to_class = _follow(labels[rows], relation | itself)
        found.append(image[rows][row] * num_classes + to_class)
    # Sorting beats np.unique here: its hash table takes ten times as long for millions of integers.
    pairs: NDArray[np.int64] = np.sort(np.concatenate(found))
    new = np.ones(len(pairs), dtype=bool)
    new[1:] = pairs[1:] != pairs[:-1]
    unique: NDArray[np.int64] = pairs[new]
    return unique


def count_repeated(ground_truths: GroundTruths) -> int:
    """How many ground-truth boxes repeat the class and box of another one on the same image: an error in the data.

    The usual cause is one box published under a class and under its parent; the parent then counts it twice.
    """
    # A repeated box shares its pair and its first coordinate; only rows that do are sorted by all coordinates.
    near = np.flatnonzero(_in_runs(ground_truths.pair))
    near = near[np.argsort(ground_truths.boxes[near, 0], kind="stable")]
    near = near[np.argsort(ground_truths.pair[near], kind="stable")]
    near = near[_in_runs(ground_truths.pair[near], ground_truths.boxes[near, 0])]
    columns = np.column_stack([ground_truths.pair[near].astype(np.float64), ground_truths.boxes[near]])
    ordered = columns[np.lexsort(columns.T)]
    return int((ordered[1:] == ordered[:-1]).all(axis=1).sum())


def _in_runs(*columns: NDArray[np.generic]) -> NDArray[np.bool_]:
    """Rows that are equal to the row before or after, in all columns."""
    same = np.ones(max(len(columns[0]) - 1, 0), dtype=bool)
    for column in columns:
        same &= column[1:] == column[:-1]
    result = np.zeros(len(columns[0]), dtype=bool)
    result[1:] |= same
    result[:-1] |= same
    return result


def _owner(start: NDArray[np.int64]) -> NDArray[np.int64]:
    """Image index of each row, from the offsets ``start [I + 1]``."""
    lengths = np.asarray(start[1:] - start[:-1], dtype=np.int64)
    return np.repeat(np.arange(len(lengths), dtype=np.int64), lengths)


def _follow(labels: NDArray[np.integer], relation: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For rows of class c, one output row per class related to c: (input row ascending, class)."""
    from_class, to_class = np.nonzero(relation)
    start = np.searchsorted(from_class, np.arange(len(relation) + 1))
    counts = np.diff(start)[labels]
    row = np.repeat(np.arange(len(labels)), counts)
    within = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    return row, to_class[start[labels][row] + within]


def _check_classes(labels: NDArray[np.integer], num_classes: int, what: str) -> None:
    outside = (labels < 0) | (labels >= num_classes)
    if outside.any():
        row = int(np.flatnonzero(outside)[0])
        raise ValueError(
            f"`0 <= class < {num_classes}` must hold for every {what}, but row {row} has class {int(labels[row])}"
        )
