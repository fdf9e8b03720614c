"""How much AP each kind of error costs a detector: every error gets a kind, and each kind the AP gained by fixing it.

The idea of TIDE, under the rules of the Open Images Challenge metric. The kinds of a false positive, the first that
fits (its *own* boxes are those of its class or of a class below it in the hierarchy; IoU with the best box of each):

- duplicate: own IoU >= t, but a detection of a higher score found the box. Fixed by removing it.
- localisation: ``NEAR`` <= own IoU < t. Fixed by moving it onto the box.
- confusion: IoU >= t with a box of another class. Fixed by giving it that class.
- group-of: ``NEAR`` <= fraction inside an own group-of box < t. Fixed by removing it.
- both (confusion and localisation): ``NEAR`` <= IoU < t with a box of another class. Fixed by removing it.
- background: none of these. Fixed by removing it.

(t is the IoU threshold of the matches.) A fixed detection counts as a true positive only if no detection of a higher
score finds the same box; it replaces the true positive of a lower score. The kinds of a ground-truth box:

- missed: an ordinary box that nothing found and no localisation or confusion error points to. Fixed by removing the
  box. A class of which every box was missed then has nothing to find, and AP 1.
- group-of: a group-of box that absorbed nothing (a miss when ``group_of_weight`` > 0). Fixed likewise.

Costs do not add up to 1 - AP: each is the gain of fixing one kind and leaving all others, and precision couples them.
``false_positives`` and ``false_negatives`` are the gains of having none at all.

``unverified`` is of another sort: what AP *would lose* if detections of classes that are unverified on their image,
which the metric leaves out, were all false positives. A high value means that AP depends on which labels were verified.

Time: about 4 s for a million detections, and 150 MB.

Source: Bolya, Foley, Hays and Hoffman, TIDE: A General Toolbox for Identifying Object Detection Errors (ECCV 2020).
What differs: duplicates come first (in a hierarchy one object has boxes of several classes, and a second detection of
a found one is no confusion), group-of and unverified labels are new, and each class has a cost of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from retinaflow.boxes import are_valid
from retinaflow.detections import Detections
from retinaflow.metric.challenge import average_precision, mean_of_classes
from retinaflow.metric.ground_truth import Annotations, expand_boxes, verified_pairs
from retinaflow.metric.matches import Kind, Matches
from retinaflow.metric.nearest_ground_truth import Nearest, nearest_ground_truths

NEAR = 0.1
"""Smallest overlap at which a false positive is related to a box; below it is background (TIDE's value)."""

ALL_CLASSES = "all classes"
CONFUSED_WITH = 3
"""Number of confused classes that are listed for each class."""

BoolArray = NDArray[np.bool_]
FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


class ErrorKind(IntEnum):
    """The kind of a false positive; ``NONE`` for true positives and group-of entries."""

    NONE = 0
    DUPLICATE = 1
    LOCALISATION = 2
    CONFUSION = 3
    GROUP_OF = 4
    BOTH = 5
    BACKGROUND = 6


COSTS = ("localisation", "confusion", "both", "duplicate", "background", "missed", "group_of")
"""Columns with the AP that each kind of error costs; they exclude each other."""


@dataclass(frozen=True)
class ErrorAnalysis:
    """Kinds and costs of the errors, from :func:`analyse_errors`."""

    error: NDArray[np.int8]
    """``[E]`` an :class:`ErrorKind` for each entry of the matches."""
    table: pd.DataFrame
    """First the row ``all classes`` (means of costs, sums of counts), then one row per class with ground truth.

    In class order: ``class, ap``, the :data:`COSTS`, ``false_positives, false_negatives, unverified`` (all in AP),
    ``confused_with`` (the class whose boxes cost it most), ``num_truths``, a count ``num_*`` of each, ``class_id``.
    """
    confusions: pd.DataFrame
    """The ``CONFUSED_WITH`` classes with whose boxes each class is confused most often, costliest first.

    ``class, confused_with, detections, ap, class_id, confused_with_id``; ``ap`` is gained by the class without those
    detections.
    """


def analyse_errors(matches: Matches, detections: Detections, ground_truth: Annotations) -> ErrorAnalysis:
    """Kinds and costs of the errors of ``matches``, which were made of ``detections`` and ``ground_truth``.

    Raises ValueError when they were not made of each other.
    """
    _check(matches, detections, ground_truth)
    near = nearest_ground_truths(matches, detections, ground_truth)
    error = _errors(matches, near)
    costs, counts = _costs(matches, near, error, ground_truth)
    lost, unverified = _unverified(matches, detections, ground_truth)
    costs |= {"unverified": lost}
    counts |= {"unverified": unverified}
    confusions = _confusions(matches, near, error, ground_truth)
    return ErrorAnalysis(error, _table(matches, costs, counts, confusions, ground_truth), confusions)


def _errors(matches: Matches, near: Nearest) -> NDArray[np.int8]:
    """The kind of each entry, the first that fits."""
    t = matches.iou_threshold
    kinds = (
        (near.own >= t, ErrorKind.DUPLICATE),
        (near.own >= NEAR, ErrorKind.LOCALISATION),
        (near.other >= t, ErrorKind.CONFUSION),
        (near.own_group_of >= NEAR, ErrorKind.GROUP_OF),
        (near.other >= NEAR, ErrorKind.BOTH),
    )
    error = np.select([fits for fits, _ in kinds], [int(kind) for _, kind in kinds], int(ErrorKind.BACKGROUND))
    return np.where(matches.kind == Kind.FALSE_POSITIVE, error, int(ErrorKind.NONE)).astype(np.int8)


def _costs(
    matches: Matches, near: Nearest, error: NDArray[np.int8], ground_truth: Annotations
) -> tuple[dict[str, FloatArray], dict[str, IntArray]]:
    """The AP ``[K]`` that each kind costs each class, and the number of errors."""
    num_classes = len(matches.evaluated)
    here = average_precision(matches)
    is_false = matches.kind == Kind.FALSE_POSITIVE
    moved = error == ErrorKind.LOCALISATION
    renamed = error == ErrorKind.CONFUSION
    found = matches.kind == Kind.TRUE_POSITIVE
    # Row -1 is no box, also where there are no boxes at all.
    class_of_other = np.append(np.asarray(ground_truth.labels, dtype=np.int64), -1)[near.other_row]
    # A box and one of its classes, as one number: the same box is ground truth of all ancestors of its class too.
    own_copy = near.own_row * num_classes + matches.class_index
    other_copy = near.other_row * num_classes + class_of_other
    pointed_at = np.unique(np.concatenate([own_copy[found | moved], other_copy[renamed]]))

    ground_truths = expand_boxes(ground_truth)
    gt_class = ground_truths.pair % num_classes
    ordinary = np.bincount(gt_class[~ground_truths.is_group_of], minlength=num_classes)
    group_of = np.bincount(gt_class[ground_truths.is_group_of], minlength=num_classes)
    hit = np.bincount(matches.class_index[matches.kind == Kind.GROUP_OF], minlength=num_classes)
    missed = np.where(matches.evaluated, ordinary - np.bincount(pointed_at % num_classes, minlength=num_classes), 0)
    unhit = np.where(matches.evaluated & (matches.group_of_weight > 0), group_of - hit, 0)

    def without(kind: ErrorKind) -> Matches:
        return _entries(matches, error != kind)

    without_errors = {
        "localisation": average_precision(_fixed(matches, moved, own_copy, matches.class_index, own_copy)),
        "confusion": average_precision(_fixed(matches, renamed, other_copy, class_of_other, own_copy)),
        "both": average_precision(without(ErrorKind.BOTH)),
        "duplicate": average_precision(without(ErrorKind.DUPLICATE)),
        "background": average_precision(without(ErrorKind.BACKGROUND)),
        "missed": _with_fewer_boxes(matches, missed),
        "group_of": _with_fewer_boxes(without(ErrorKind.GROUP_OF), unhit * matches.group_of_weight),
        "false_positives": average_precision(_entries(matches, ~is_false)),
        "false_negatives": _with_fewer_boxes(matches, matches.num_truths - _hits(matches)),
    }
    counts = _counts(matches, error)
    counts |= {"missed": missed, "group_of": unhit + counts["group_of"]}
    return {name: ap - here for name, ap in without_errors.items()}, counts


def _counts(matches: Matches, error: NDArray[np.int8]) -> dict[str, IntArray]:
    """``[K]`` false positives of each kind."""
    kinds = (
        ErrorKind.LOCALISATION,
        ErrorKind.CONFUSION,
        ErrorKind.BOTH,
        ErrorKind.DUPLICATE,
        ErrorKind.BACKGROUND,
        ErrorKind.GROUP_OF,
    )
    found = {kind: matches.class_index[error == kind] for kind in kinds}
    return {
        kind.name.lower(): np.bincount(rows, minlength=len(matches.evaluated)).astype(np.int64)
        for kind, rows in found.items()
    }


def _hits(matches: Matches) -> FloatArray:
    """``[K]`` weight of the true positives and found group-of boxes of each class."""
    is_hit = matches.kind != Kind.FALSE_POSITIVE
    hits = np.bincount(matches.class_index[is_hit], matches.weight[is_hit], minlength=len(matches.evaluated))
    return hits.astype(np.float64)


def _entries(matches: Matches, keep: BoolArray) -> Matches:
    """The matches with some entries only."""
    columns = ("image_index", "class_index", "score", "kind", "weight", "detection_row")
    return replace(matches, **{name: getattr(matches, name)[keep] for name in columns})


def _fixed(matches: Matches, chosen: BoolArray, copy: IntArray, new_class: IntArray, own_copy: IntArray) -> Matches:
    """The matches in which each ``chosen`` false positive finds the box ``copy`` of the class ``new_class``.

    ``own_copy``: the box that each true positive found. Of several that find one box the highest score remains.
    """
    finds = chosen | (matches.kind == Kind.TRUE_POSITIVE)
    target = np.where(chosen, copy, own_copy)
    class_index = np.where(chosen, new_class, matches.class_index)
    # Entries are sorted by score inside a class only, and a renamed one comes from another class.
    order = np.lexsort((np.arange(len(finds)), -matches.score, class_index))
    candidates = order[finds[order]]
    _, first = np.unique(target[candidates], return_index=True)
    keep = ~finds
    keep[candidates[first]] = True
    keep &= matches.evaluated[class_index]
    kind = np.where(chosen, np.int8(Kind.TRUE_POSITIVE), matches.kind).astype(np.int8)
    changed = replace(matches, class_index=class_index, kind=kind)
    order = order[keep[order]]
    columns = ("image_index", "class_index", "score", "kind", "weight", "detection_row")
    return replace(changed, **{name: getattr(changed, name)[order] for name in columns})


def _with_fewer_boxes(matches: Matches, fewer: FloatArray | IntArray) -> FloatArray:
    """AP ``[K]`` when each class has ``fewer [K]`` ground-truth boxes to find.

    1 where none are left, NaN where there were none.
    """
    before = matches.num_truths
    ap = average_precision(matches)
    left = before - fewer
    result = np.where(before > 0, 1.0, np.nan)
    # AP is an area divided by the number of ground-truth boxes.
    np.divide(ap * before, left, out=result, where=(before > 0) & (left > 1e-9))
    return result


def _unverified(matches: Matches, detections: Detections, ground_truth: Annotations) -> tuple[FloatArray, IntArray]:
    """AP ``[K]`` lost if detections of unverified classes were false positives, and the number of these detections."""
    num_classes = len(matches.evaluated)
    image, class_index = detections.image_index.astype(np.int64), detections.class_index.astype(np.int64)
    verified = verified_pairs(ground_truth, expand_boxes(ground_truth))
    pair = image * num_classes + class_index
    row = np.flatnonzero(
        (image >= 0) & matches.evaluated[class_index] & are_valid(detections.boxes) & ~np.isin(pair, verified)
    )
    columns: dict[str, NDArray[Any]] = {
        "image_index": image[row],
        "class_index": class_index[row],
        "score": detections.score[row].astype(np.float64),
        "kind": np.full(len(row), Kind.FALSE_POSITIVE, dtype=np.int8),
        "weight": np.ones(len(row)),
        "detection_row": row,
    }
    joined = {name: np.concatenate([getattr(matches, name), added]) for name, added in columns.items()}
    order = np.lexsort((-joined["score"], joined["class_index"]))
    changes: dict[str, Any] = {name: column[order] for name, column in joined.items()}
    stricter = replace(matches, **changes)
    lost = average_precision(matches) - average_precision(stricter)
    return lost, np.bincount(class_index[row], minlength=num_classes).astype(np.int64)


def _confusions(matches: Matches, near: Nearest, error: NDArray[np.int8], ground_truth: Annotations) -> pd.DataFrame:
    """The classes that each class is confused with, those that cost it most."""
    num_classes = len(matches.evaluated)
    renamed = np.flatnonzero(error == ErrorKind.CONFUSION)
    other = np.asarray(ground_truth.labels, dtype=np.int64)[near.other_row[renamed]]
    pair, pair_of, count = np.unique(
        matches.class_index[renamed] * num_classes + other, return_inverse=True, return_counts=True
    )
    here = average_precision(matches)
    class_index, other_class = np.divmod(pair, num_classes)
    pairs = pd.DataFrame({"class_index": class_index, "other": other_class, "detections": count})
    pairs["rank"] = pairs.groupby("class_index")["detections"].rank(method="first", ascending=False)
    pairs["ap"] = np.nan
    for rank in range(1, CONFUSED_WITH + 1):
        chosen = (pairs["rank"] == rank).to_numpy()
        keep = np.ones(len(error), dtype=bool)
        keep[renamed[chosen[pair_of]]] = False
        gained = average_precision(_entries(matches, keep)) - here
        pairs.loc[chosen, "ap"] = gained[class_index[chosen]]
    listed = pairs[pairs["ap"].notna()].sort_values(
        ["class_index", "ap", "detections", "other"], ascending=[True, False, False, True]
    )
    names, ids = np.array(ground_truth.taxonomy.labels, dtype=object), np.array(ground_truth.taxonomy.ids, dtype=object)
    return pd.DataFrame(
        {
            "class": names[listed["class_index"].to_numpy(dtype=np.int64)],
            "confused_with": names[listed["other"].to_numpy(dtype=np.int64)],
            "detections": listed["detections"].to_numpy(),
            "ap": listed["ap"].to_numpy(),
            "class_id": ids[listed["class_index"].to_numpy(dtype=np.int64)],
            "confused_with_id": ids[listed["other"].to_numpy(dtype=np.int64)],
        }
    )


def _table(
    matches: Matches,
    costs: dict[str, FloatArray],
    counts: dict[str, IntArray],
    confusions: pd.DataFrame,
    ground_truth: Annotations,
) -> pd.DataFrame:
    """The row of all classes, then the classes with ground truth."""
    ap, num_truths = average_precision(matches), matches.num_truths
    ids = np.array(ground_truth.taxonomy.ids, dtype=object)
    costliest = confusions.drop_duplicates("class_id").set_index("class_id")["confused_with"]
    columns: dict[str, object] = {"class": list(ground_truth.taxonomy.labels), "ap": ap}
    columns |= {name: costs[name] for name in (*COSTS, "false_positives", "false_negatives", "unverified")}
    columns |= {"confused_with": pd.Series(ids).map(costliest), "num_truths": num_truths}
    columns |= {f"num_{name}": np.asarray(count).astype(np.int64) for name, count in counts.items()}
    table = pd.DataFrame({**columns, "class_id": ids})[~np.isnan(ap)]
    total: dict[str, object] = {"class": ALL_CLASSES, "confused_with": None, "class_id": None}
    for name in table.columns.difference(list(total), sort=False):
        values = table[name].to_numpy(dtype=np.float64)
        total[name] = values.sum() if name.startswith("num_") else mean_of_classes(values)
    # Column by column, so that types stay as they are where no class has ground truth.
    first = pd.DataFrame({name: pd.Series([total[name]]).astype(table[name].dtype) for name in table.columns})
    return pd.concat([first, table], ignore_index=True) if len(table) else first


def _check(matches: Matches, detections: Detections, ground_truth: Annotations) -> None:
    if not np.array_equal(matches.image_ids, np.asarray(ground_truth.image_ids)):
        raise ValueError(
            "the matches must be of the images of the ground truth, but they are of "
            f"{len(matches.image_ids)} images and the ground truth is of {len(ground_truth.image_ids)} others"
        )
    rows = matches.detection_row
    fits = len(rows) == 0 or int(rows.max()) < len(detections)
    if not (fits and np.array_equal(detections.image_index[rows], matches.image_index)):
        raise ValueError("the matches must be made of the detections, but their rows belong to other images")
