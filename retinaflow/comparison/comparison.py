"""Settings compared with the first of them: over all classes, over groups of classes, and class by class.

A :class:`Side` is one setting: a run, or several that differ in their seed and are averaged. :func:`compare_runs`
evaluates all sides on the classes that they share, with the same images in every resample of the bootstrap, and returns
two tables. Columns carry the letter of their side: A is the first side, the others are compared with it.

Several seeds are averaged class by class: the runs of a side are put side by side as if each class existed once per
run, so that :mod:`~retinaflow.statistics.bootstrap` takes the same images for all of them. The spread over seeds, and
the rule for a significant difference, are in :mod:`~retinaflow.statistics.significance`.

Cost: that of the bootstrap, resamples x entries of all runs, twice (intervals and differences).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import lcm
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from retinaflow.comparison.stored_matches import StoredMatches, TrainingCounts
from retinaflow.errors import SettingError
from retinaflow.metric.challenge import average_precision
from retinaflow.metric.matches import Matches
from retinaflow.metric.per_class import class_groups
from retinaflow.statistics.bootstrap import bootstrap_intervals, paired_differences
from retinaflow.statistics.intervals import Interval
from retinaflow.statistics.significance import benjamini_hochberg, p_values, seed_spread, widen

LETTERS = "ABCDEFGH"
FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Side:
    """One setting: its letter, its name, and its runs."""

    letter: str
    name: str
    runs: tuple[StoredMatches, ...]


@dataclass(frozen=True)
class Resampling:
    """The bootstrap: number of resamples, confidence of the intervals, random seed."""

    resamples: int = 1000
    confidence: float = 0.95
    seed: int = 0


@dataclass(frozen=True)
class Comparison:
    """The tables, and how they were computed. ``left_out``: names of the classes that not all sides have."""

    sides: tuple[Side, ...]
    groups: pd.DataFrame
    """One row per group of classes, bins first, ``mAP`` last: group, classes, then per side X ``X, X_low, X_high``, and
    per later side ``X_difference, X_difference_low, X_difference_high, X_share_above_zero``."""
    classes: pd.DataFrame
    """One row per shared class, rarest first: class, class_id, bin, train_images, train_boxes, num_truths,
    eval_images (images with ground truth), then as above, and per later side ``X_p, X_p_adjusted, X_sure``."""
    left_out: tuple[str, ...]
    num_images: int
    ground_truth_digest: str
    resampling: Resampling

    def group(self, name: str) -> dict[str, float]:
        """The numbers of a group of classes, by column; empty when none of its classes has ground truth."""
        rows = self.groups[self.groups["group"] == name].drop(columns="group").to_dict("records")
        return {str(column): float(value) for column, value in rows[0].items()} if rows else {}


def compare_runs(sides: Sequence[Side], resampling: Resampling | None = None) -> Comparison:
    """Compare every side with the first.

    Raises SettingError for fewer than two sides, sides without a shared class, and runs evaluated on different data.
    """
    if not 2 <= len(sides) <= len(LETTERS):
        raise SettingError(f"2 to {len(LETTERS)} settings can be compared, but got {len(sides)}")
    resampling = resampling or Resampling()
    runs = [run for side in sides for run in side.runs]
    ids = shared_classes(runs)
    digest = shared_digest(sides, ids)
    matches = {side.letter: [with_classes(run.matches, run.rows_of(ids)) for run in side.runs] for side in sides}
    counts = training_counts(runs, ids)
    members = class_groups(counts.images, counts.bin_of_class, class_ids=ids)
    groups = {"mAP": np.arange(len(ids)), **{name: np.flatnonzero(chosen) for name, chosen in members.items()}}
    rows = groups | {f"class {k}": np.array([k]) for k in range(len(ids))}
    first = matches[sides[0].letter]
    columns: dict[str, NDArray[np.generic]] = {}
    for side in sides:
        columns |= _score_columns(side.letter, matches[side.letter], rows, resampling)
    images_with_ground_truth = _images_with_ground_truth(first[0], rows)
    for side in sides[1:]:
        columns |= _difference_columns(
            side.letter, first, matches[side.letter], rows, images_with_ground_truth, resampling
        )
    table = pd.DataFrame(columns, index=list(rows))
    everything = {mid: name for run in runs for mid, name in zip(run.class_ids, run.class_names, strict=True)}
    return Comparison(
        tuple(sides),
        _group_table(table, groups, sides, first[0]),
        _with_marks(
            _class_table(table, ids, everything, counts, first[0], images_with_ground_truth[len(groups) :]),
            [side.letter for side in sides[1:]],
            confidence=resampling.confidence,
        ),
        left_out=tuple(name for mid, name in everything.items() if mid not in set(ids)),
        num_images=len(first[0].image_ids),
        ground_truth_digest=digest,
        resampling=resampling,
    )


def shared_classes(runs: Sequence[StoredMatches]) -> list[str]:
    """Ids of the classes that every run evaluated, in the order of the first run. Raises SettingError for none."""
    evaluated = [{mid for mid, yes in zip(run.class_ids, run.matches.evaluated, strict=True) if yes} for run in runs]
    shared = [mid for mid in runs[0].class_ids if all(mid in ids for ids in evaluated)]
    if not shared:
        raise SettingError("the runs must share at least one class, but their class lists have none in common")
    return shared


def shared_digest(sides: Sequence[Side], ids: Sequence[str]) -> str:
    """The digest of what all runs were evaluated on, over the classes ``ids``.

    Raises SettingError, with the digests, unless the images, the ground truth and the rules are the same for all.
    """
    found: dict[str, str] = {}
    rules: dict[str, str] = {}
    for side in sides:
        for number, run in enumerate(side.runs, start=1):
            name = side.letter if len(side.runs) == 1 else f"{side.letter}{number}"
            classes = tuple(run.ground_truth.classes[row] for row in run.rows_of(ids))
            digest = replace(run.ground_truth, classes=classes).of_all
            found[name] = f"{len(run.matches.image_ids):,} images {run.ground_truth.images}, ground truth {digest}"
            rules[name] = f"group_of_weight={run.matches.group_of_weight:g}, IoU {run.matches.iou_threshold:g}"
    for values, what, next_step in (
        (found, "on the same data", "evaluate them on the same data with evaluate"),
        (rules, "by the same rules", "evaluate them with the same settings with evaluate"),
    ):
        if len(set(values.values())) > 1:
            shown = "; ".join(f"{name}: {value}" for name, value in values.items())
            raise SettingError(f"only runs evaluated {what} can be compared, but got {shown}; {next_step}")
    return digest


def training_counts(runs: Sequence[StoredMatches], ids: Sequence[str]) -> TrainingCounts:
    """Counts and bins of some classes in the first run that has any (an evaluated file of predictions has none)."""
    run = next((run for run in runs if run.training.images.any()), runs[0])
    rows = run.rows_of(ids)
    return TrainingCounts(*(column[rows] for column in vars(run.training).values()))


def with_runs_as_classes(runs: Sequence[Matches]) -> Matches:
    """Matches in which class k of run i is class i * K + k; all runs have the same images."""
    offsets = np.arange(len(runs)) * len(runs[0].evaluated)
    names = ("image_index", "score", "kind", "weight", "detection_row", "gt_image", "gt_count", "evaluated")
    columns: dict[str, Any] = {name: np.concatenate([getattr(run, name) for run in runs]) for name in names}
    for name in ("class_index", "gt_class"):
        columns[name] = np.concatenate([getattr(run, name) + o for run, o in zip(runs, offsets, strict=True)])
    return replace(runs[0], **columns)


def with_classes(matches: Matches, classes: NDArray[np.integer]) -> Matches:
    """Some classes only; class ``classes[k]`` becomes class k."""
    new_index = np.full(len(matches.evaluated), -1, dtype=np.int64)
    new_index[classes] = np.arange(len(classes))
    columns: dict[str, Any] = {"evaluated": matches.evaluated[classes]}
    for owner, names in (
        ("class_index", ("image_index", "class_index", "score", "kind", "weight", "detection_row")),
        ("gt_class", ("gt_image", "gt_class", "gt_count")),
    ):
        new = new_index[getattr(matches, owner)]
        rows = np.flatnonzero(new >= 0)
        rows = rows[np.argsort(new[rows], kind="stable")]
        columns |= {name: getattr(matches, name)[rows] for name in names} | {owner: new[rows]}
    return replace(matches, **columns)


Rows = Mapping[str, NDArray[np.int64]]
"""Name of each row of the tables -> its classes, ascending. A mask for each class would take K x K."""


def _means(runs: Sequence[Matches], rows: Rows) -> FloatArray:
    """``[runs, N]`` mean AP of each run over the classes of each row that have ground truth; NaN where none has."""
    members = np.concatenate(list(rows.values()))
    row = np.repeat(np.arange(len(rows)), [len(classes) for classes in rows.values()])
    ap = np.stack([average_precision(run)[members] for run in runs])
    known = ~np.isnan(ap)
    count = np.stack([np.bincount(row, one, minlength=len(rows)) for one in known])
    total = np.stack([np.bincount(row, one, minlength=len(rows)) for one in np.where(known, ap, 0.0)])
    result = np.full(count.shape, np.nan)
    np.divide(total, count, out=result, where=count > 0)
    return result


def _repeated(rows: Rows, runs: Sequence[Matches]) -> dict[str, NDArray[np.int64]]:
    """The classes of each row in the matches of :func:`with_runs_as_classes`."""
    first = np.arange(len(runs)) * len(runs[0].evaluated)
    return {name: (first[:, None] + members).ravel() for name, members in rows.items()}


def _ends(found: Mapping[str, Interval], rows: Rows) -> tuple[FloatArray, FloatArray, FloatArray]:
    values = np.array([[found[name].estimate, found[name].low, found[name].high] for name in rows])
    return values[:, 0], values[:, 1], values[:, 2]


def _score_columns(
    letter: str, runs: Sequence[Matches], rows: Rows, resampling: Resampling
) -> dict[str, NDArray[np.generic]]:
    found = bootstrap_intervals(with_runs_as_classes(runs), groups=_repeated(rows, runs), **vars(resampling)).groups
    estimate, low, high = _ends(found, rows)
    low, high = widen(estimate, low, high, seed_spread(_means(runs, rows)), confidence=resampling.confidence)
    return {letter: estimate, f"{letter}_low": np.maximum(low, 0), f"{letter}_high": np.minimum(high, 1)}


def _difference_columns(
    letter: str,
    first: Sequence[Matches],
    second: Sequence[Matches],
    rows: Rows,
    num_images: NDArray[np.int64],
    resampling: Resampling,
) -> dict[str, NDArray[np.generic]]:
    """Second minus first. Sides with different numbers of seeds are repeated to their least common multiple."""
    times = lcm(len(first), len(second))
    before, after = [*first] * (times // len(first)), [*second] * (times // len(second))
    found = paired_differences(
        with_runs_as_classes(before),
        with_runs_as_classes(after),
        groups=_repeated(rows, before),
        **vars(resampling),
    ).groups
    estimate, low, high = _ends(found, rows)
    seeds, confidence = seed_spread(_means(first, rows), _means(second, rows)), resampling.confidence
    p = p_values(estimate, low, high, seeds, num_images=num_images, confidence=confidence)
    low, high = widen(estimate, low, high, seeds, confidence=confidence)
    return {
        f"{letter}_difference": estimate,
        f"{letter}_difference_low": np.maximum(low, -1),
        f"{letter}_difference_high": np.minimum(high, 1),
        f"{letter}_share_above_zero": np.array([found[name].fraction_above_zero for name in rows]),
        f"{letter}_p": p,
    }


def _images_with_ground_truth(matches: Matches, rows: Rows) -> NDArray[np.int64]:
    """``[N]`` images that hold ground truth of a class of each row."""
    order = np.argsort(matches.gt_class, kind="stable")
    starts = np.searchsorted(matches.gt_class[order], np.arange(len(matches.evaluated) + 1))
    of_class = np.split(matches.gt_image[order], starts[1:-1])
    nothing = np.zeros(0, dtype=np.int64)
    result = [len(np.unique(np.concatenate([nothing, *(of_class[k] for k in row)]))) for row in rows.values()]
    return np.array(result, dtype=np.int64)


def _group_table(table: pd.DataFrame, groups: Rows, sides: Sequence[Side], matches: Matches) -> pd.DataFrame:
    has_ground_truth = matches.num_truths > 0
    names = sorted((name for name in groups if has_ground_truth[groups[name]].any()), key=_bins_first)
    result = table.loc[names].reset_index(names="group")
    result.insert(1, "classes", [int(has_ground_truth[groups[name]].sum()) for name in names])
    return result.drop(columns=[f"{side.letter}_p" for side in sides[1:]])


def _bins_first(name: str) -> tuple[int, int, str]:
    number = name.removeprefix("mAP_bin_")
    return (0, int(number), "") if number != name else (2 if name == "mAP" else 1, 0, _THIRDS.get(name, name))


_THIRDS = {"mAP_rare": "1", "mAP_common": "2", "mAP_frequent": "3"}


def _class_table(
    table: pd.DataFrame,
    ids: Sequence[str],
    names: Mapping[str, str],
    counts: TrainingCounts,
    matches: Matches,
    num_images: NDArray[np.int64],
) -> pd.DataFrame:
    bins = pd.Series(counts.bin_of_class.astype(np.int64) + 1, dtype="Int64")
    known = pd.DataFrame(
        {
            "class": [names[mid] for mid in ids],
            "class_id": list(ids),
            "bin": bins.mask(bins == 0),
            "train_images": counts.images,
            "train_boxes": counts.boxes,
            "num_truths": matches.num_truths,
            "eval_images": num_images,
        }
    )
    scores = table.loc[[f"class {k}" for k in range(len(ids))]].reset_index(drop=True)
    result = pd.concat([known, scores], axis=1)
    return result.sort_values(["train_images", "class_id"], kind="stable", ignore_index=True)


def _with_marks(table: pd.DataFrame, letters: Sequence[str], *, confidence: float) -> pd.DataFrame:
    """The table with adjusted p-values and the mark ``X_sure``; the classes of all comparisons are one family."""
    p = np.concatenate([table[f"{letter}_p"].to_numpy(dtype=np.float64) for letter in letters])
    for letter, adjusted in zip(letters, np.split(benjamini_hochberg(p), len(letters)), strict=True):
        low, high = table[f"{letter}_difference_low"], table[f"{letter}_difference_high"]
        # A marked class whose interval contains 0 would be a contradiction.
        sure = (adjusted <= 1 - confidence) & ((low > 0) | (high < 0))
        table = table.assign(**{f"{letter}_p_adjusted": adjusted, f"{letter}_sure": sure})
    return table
