"""Which detections are right, wrong, absorbed or dropped: rules 3, 4 and 5 of the Open Images Challenge metric.

:func:`match` yields :class:`Matches`, everything that average precision needs, so that it can be asked again with other
image weights (bootstrap) without matching twice. Coordinates are used as given: float64, continuous, not clipped
(rule 9).

No loop over detections is needed: a detection looks only at its best truth and has no second choice, so the first
claimant of a truth wins. Cost: O(D log D + pairs of detection and truth in one image and class); memory is bounded by
looking at ``PAIRS_AT_ONCE`` pairs at a time.

Source: ``per_image_evaluation.py`` of the TensorFlow Object Detection API, with equal scores in a fixed order (rule 8).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from retinaflow.boxes import are_valid, areas
from retinaflow.detections import Detections
from retinaflow.scoring.matches import Dropped, Kind, Matches
from retinaflow.scoring.truth import Annotations, Truths, count_repeated, expand_boxes, verified_pairs

MAX_DETECTIONS = 10_000
"""Detections judged per image and class; those of lower score are dropped and counted."""

PAIRS_AT_ONCE = 1_000_000
"""Pairs of detection and truth whose overlap is computed in one piece (about 150 bytes each)."""


def match(
    detections: Detections,
    truth: Annotations,
    *,
    iou_threshold: float = 0.5,
    group_of_weight: float = 1.0,
    classes: NDArray[np.bool_] | None = None,
) -> Matches:
    """Rules 1 to 5: which detections are right, wrong, absorbed or dropped.

    ``detections.image_index`` counts images of ``truth``; -1 is an image without any annotation. Detections are not
    expanded to parent classes here. ``group_of_weight`` in [0, 1]: 1 is the Challenge, 0 the older Open Images V2
    rule. ``classes [K]`` bool: judge only these (default: all).

    Raises ValueError for settings out of range, classes or images outside the truth, and scores that are NaN.
    """
    num_classes = len(truth.taxonomy)
    judged = np.ones(num_classes, dtype=bool) if classes is None else np.asarray(classes)
    _check(detections, truth, judged, iou_threshold=iou_threshold, group_of_weight=group_of_weight)
    truths = expand_boxes(truth)
    verified = verified_pairs(truth, truths)
    truths = truths.take(judged[truths.pair % num_classes])
    kept, dropped = _keep(detections, verified, judged)
    right, absorbed_by = _judge(kept, truths, iou_threshold=iou_threshold)
    entry, entry_kind = _entries(kept, right, absorbed_by, with_group_of=group_of_weight > 0)

    image, class_index = np.divmod(kept.pair[entry], num_classes)
    rank = _string_rank(truth.image_ids)[image]
    order = np.lexsort((kept.row[entry], entry_kind == Kind.GROUP_OF, rank, -kept.score[entry], class_index))
    entry, entry_kind = entry[order], entry_kind[order]
    truth_image, truth_class, truth_count = _count_truths(truths, num_classes, group_of_weight)
    return Matches(
        image_index=image[order],
        class_index=class_index[order],
        score=kept.score[entry],
        kind=entry_kind,
        weight=np.where(entry_kind == Kind.GROUP_OF, group_of_weight, 1.0),
        detection_row=kept.row[entry],
        truth_image=truth_image,
        truth_class=truth_class,
        truth_count=truth_count,
        image_ids=np.asarray(truth.image_ids),
        judged=judged,
        dropped=dropped,
        absorbed=int((absorbed_by >= 0).sum()),
        verified_labels=len(truth.verified_class),
        repeated_truths=count_repeated(truths),
        iou_threshold=iou_threshold,
        group_of_weight=group_of_weight,
    )


@dataclass(frozen=True)
class _Kept:
    """Detections to judge, by pair, descending score, row: ``row``, ``pair``, ``score`` ``[D]``, ``boxes [D, 4]``."""

    row: NDArray[np.int64]
    pair: NDArray[np.int64]
    score: NDArray[np.float64]
    boxes: NDArray[np.float64]


def _keep(detections: Detections, verified: NDArray[np.int64], judged: NDArray[np.bool_]) -> tuple[_Kept, Dropped]:
    """Rule 3, and the limit of rule 4."""
    image, class_index = detections.image_index.astype(np.int64), detections.class_index
    pair = image * len(judged) + class_index
    boxes = np.asarray(detections.boxes, dtype=np.float64)
    passes = (image >= 0, judged[class_index], _contains(verified, pair), are_valid(boxes))
    remaining = np.ones(len(detections), dtype=bool)
    dropped = []
    for passed in passes:
        dropped.append(int((remaining & ~passed).sum()))
        remaining &= passed
    rows = np.flatnonzero(remaining)
    score = detections.score[rows].astype(np.float64)
    order = np.lexsort((-score, pair[rows]))
    rows, score = rows[order], score[order]
    within = np.arange(len(rows)) - np.searchsorted(pair[rows], pair[rows])
    inside = within < MAX_DETECTIONS
    rows, score = rows[inside], score[inside]
    unknown, not_judged, not_verified, invalid = dropped
    counts = Dropped(unknown, not_judged, not_verified, invalid, over_limit=int((~inside).sum()))
    return _Kept(rows, pair[rows], score, boxes[rows]), counts


def _judge(kept: _Kept, truths: Truths, *, iou_threshold: float) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Rule 4, both stages: which detections are true positives, and which group-of truth absorbed each (-1: none)."""
    right = np.zeros(len(kept.row), dtype=bool)
    overlap, nearest = _best_truth(kept.pair, kept.boxes, truths.take(~truths.is_group_of), union=True)
    claims = np.flatnonzero(overlap >= iou_threshold)
    # Rows run from high to low score inside an image and class, so the first row that names a truth gets it.
    _, first = np.unique(nearest[claims], return_index=True)
    right[claims[first]] = True

    others = np.flatnonzero(~right)
    overlap, nearest = _best_truth(kept.pair[others], kept.boxes[others], truths.take(truths.is_group_of), union=False)
    absorbed_by = np.full(len(kept.row), -1, dtype=np.int64)
    absorbed_by[others] = np.where(overlap >= iou_threshold, nearest, -1)
    return right, absorbed_by


def _entries(
    kept: _Kept, right: NDArray[np.bool_], absorbed_by: NDArray[np.int64], *, with_group_of: bool
) -> tuple[NDArray[np.int64], NDArray[np.int8]]:
    """Rule 4, the outcome: (position in ``kept``, kind) of the entries, absorbed detections left out."""
    own = np.flatnonzero(absorbed_by < 0)
    kind = np.where(right[own], Kind.TRUE_POSITIVE, Kind.FALSE_POSITIVE).astype(np.int8)
    if not with_group_of:
        return own, kind
    absorbed = np.flatnonzero(absorbed_by >= 0)
    _, first = np.unique(absorbed_by[absorbed], return_index=True)
    highest = absorbed[first]
    highest = highest[kept.score[highest] > 0]
    return np.concatenate([own, highest]), np.concatenate([kind, np.full(len(highest), Kind.GROUP_OF, np.int8)])


def _best_truth(
    pair: NDArray[np.int64], boxes: NDArray[np.float64], truths: Truths, *, union: bool
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The largest overlap of each detection with a truth of its pair, and the row of that truth (first among equals).

    Overlap is IoU (``union=True``) or intersection over the area of the detection. No truth: overlap -1, row -1.
    """
    begin = np.searchsorted(truths.pair, pair)
    counts = np.searchsorted(truths.pair, pair, side="right") - begin
    best, nearest = np.full(len(pair), -1.0), np.full(len(pair), -1, dtype=np.int64)
    rows = np.flatnonzero(counts)
    piece = np.cumsum(counts[rows]) // PAIRS_AT_ONCE
    for some in np.split(rows, np.flatnonzero(np.diff(piece)) + 1):
        if len(some) == 0:
            continue
        start = np.cumsum(counts[some]) - counts[some]
        owner = np.repeat(np.arange(len(some)), counts[some])
        candidate = np.arange(len(owner)) + (begin[some] - start)[owner]
        overlap = _overlaps(boxes[some[owner]], truths.boxes[candidate], union=union)
        best[some] = np.maximum.reduceat(overlap, start)
        at_best = np.flatnonzero(overlap == best[some][owner])
        nearest[some] = candidate[at_best[np.searchsorted(owner[at_best], np.arange(len(some)))]]
    return best, nearest


def _overlaps(boxes: NDArray[np.float64], truths: NDArray[np.float64], *, union: bool) -> NDArray[np.float64]:
    """Row by row IoU or, without ``union``, intersection over the area of ``boxes``: ``[P, 4], [P, 4] -> [P]``."""
    sides = np.minimum(boxes[:, 2:], truths[:, 2:]) - np.maximum(boxes[:, :2], truths[:, :2])
    np.clip(sides, 0, None, out=sides)
    shared: NDArray[np.float64] = sides[:, 0] * sides[:, 1]
    whole = areas(boxes) + areas(truths) - shared if union else areas(boxes)
    result = np.zeros_like(shared)
    np.divide(shared, whole, out=result, where=whole > 0)
    return result


def _count_truths(
    truths: Truths, num_classes: int, group_of_weight: float
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Rule 5 per image and class: (image, class ascending, count)."""
    pairs, row = np.unique(truths.pair, return_inverse=True)
    weight = np.where(truths.is_group_of, group_of_weight, 1.0)
    count = np.bincount(row, weight, minlength=len(pairs)).astype(np.float64)
    image, class_index = np.divmod(pairs, num_classes)
    order = np.argsort(class_index, kind="stable")
    return image[order], class_index[order], count[order]


def _contains(ascending: NDArray[np.int64], wanted: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether each of ``wanted`` is in the sorted array."""
    at = np.searchsorted(ascending, wanted)
    found = at < len(ascending)
    found[found] = ascending[at[found]] == wanted[found]
    return found


def _string_rank(image_ids: NDArray[np.str_]) -> NDArray[np.int64]:
    """Place of each image when ImageIDs are sorted as strings."""
    rank = np.empty(len(image_ids), dtype=np.int64)
    rank[np.argsort(image_ids, kind="stable")] = np.arange(len(image_ids))
    return rank


def _check(
    detections: Detections,
    truth: Annotations,
    judged: NDArray[np.bool_],
    *,
    iou_threshold: float,
    group_of_weight: float,
) -> None:
    num_images, num_classes = len(truth.image_ids), len(truth.taxonomy)
    if not 0 < iou_threshold <= 1:
        raise ValueError(f"`0 < iou_threshold <= 1` must hold, but got {iou_threshold}")
    if not 0 <= group_of_weight <= 1:
        raise ValueError(f"`0 <= group_of_weight <= 1` must hold, but got {group_of_weight}")
    if judged.shape != (num_classes,) or judged.dtype != np.bool_:
        raise ValueError(f"classes must be bool [{num_classes}], but got {judged.dtype} {list(judged.shape)}")
    bounds = (("image", detections.image_index, -1, num_images), ("class", detections.class_index, 0, num_classes))
    for what, column, low, high in bounds:
        outside = np.flatnonzero((column < low) | (column >= high))
        if len(outside):
            raise ValueError(
                f"`{low} <= {what} index < {high}` must hold for every detection, "
                f"but row {outside[0]} has {int(column[outside[0]])}"
            )
    if np.isnan(detections.score).any():
        raise ValueError(f"scores must be numbers, but row {np.flatnonzero(np.isnan(detections.score))[0]} has NaN")
