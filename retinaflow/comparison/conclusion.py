"""A comparison in sentences: which setting to use, for which classes, and how certain that is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from retinaflow.comparison.comparison import Comparison, Side

GROUP_NAMES = {
    "mAP": "all classes",
    "mAP_rare": "rare third",
    "mAP_common": "common third",
    "mAP_frequent": "frequent third",
}
MOST_NAMED = 6


@dataclass(frozen=True)
class Conclusion:
    """``headline``: which setting to use; ``sentences``: the numbers behind it, and their limits."""

    headline: str
    sentences: tuple[str, ...]

    def __str__(self) -> str:
        return " ".join([self.headline, *self.sentences])


def group_name(group: str) -> str:
    """``mAP_rare`` as "rare third", ``mAP_bin_2`` as "bin 2"."""
    return GROUP_NAMES.get(group, group.removeprefix("mAP_").replace("_", " "))


def conclusion(comparison: Comparison, side: Side) -> Conclusion:
    """The conclusion about a side against the first one."""
    letter, table = side.letter, comparison.classes
    groups = {name: comparison.group(name) for name in comparison.groups["group"]}
    if "mAP" not in groups:
        return Conclusion("No class has ground truth: there is nothing to compare.", ())
    whole = groups["mAP"]
    significant = {name: sign for name, row in groups.items() if (sign := _sign(row, letter)) != 0}
    better, worse = (_significant_classes(table, letter, sign) for sign in (1, -1))
    percent = f"{comparison.resampling.confidence:.0%}"
    sentences = [
        f"mAP goes from {whole['A']:.3f} (A) to {whole[letter]:.3f} ({letter}), "
        f"{_with_interval(whole, letter)} at {percent} confidence; "
        + ("significant." if "mAP" in significant else "the interval contains 0, so this can be chance."),
        *_thirds(groups, letter),
        _classes(better, worse, int(table[f"{letter}_p"].notna().sum())),
        _seeds(comparison.sides[0], side),
    ]
    return Conclusion(_headline(letter, significant, better, worse), tuple(sentences))


def _headline(letter: str, significant: dict[str, int], better: Sequence[str], worse: Sequence[str]) -> str:
    thirds = {name: sign for name, sign in significant.items() if name in GROUP_NAMES and name != "mAP"}
    gains = [group_name(name) for name, sign in thirds.items() if sign > 0]
    losses = [group_name(name) for name, sign in thirds.items() if sign < 0]
    if significant.get("mAP", 0) > 0:
        price = _listed((losses and [f"the {name}" for name in losses]) or worse)
        return f"Use {letter}." if not price else f"Use {letter}; it costs {price}."
    if significant.get("mAP", 0) < 0:
        gain = _listed((gains and [f"the {name}" for name in gains]) or better)
        return "Keep A." if not gain else f"Keep A, unless {gain} matter most: there {letter} is better."
    if gains and losses:
        return f"It depends: {letter} for the {_listed(gains)}, A for the {_listed(losses)}; equal on average."
    if gains or losses:
        return f"{letter if gains else 'A'} for the {_listed(gains or losses)}; no significant difference on average."
    if better and worse:
        return f"It depends on the class: {letter} for {_listed(better)}, A for {_listed(worse)}."
    if better or worse:
        return f"{letter if better else 'A'} for {_listed(better or worse)}; no other significant difference."
    return f"No significant difference between A and {letter} on these images."


def _sign(row: Mapping[str, float], letter: str) -> int:
    """1 or -1 when the interval lies wholly above or below 0, else 0."""
    return int(row[f"{letter}_difference_low"] > 0) - int(row[f"{letter}_difference_high"] < 0)


def _significant_classes(table: pd.DataFrame, letter: str, sign: int) -> list[str]:
    """Names of the marked classes of one sign, those that differ most first."""
    difference = table[f"{letter}_difference"] * sign
    chosen = table[table[f"{letter}_sure"].astype(bool) & (difference > 0)]
    order = difference[chosen.index].sort_values(ascending=False).index
    return [str(name) for name in chosen.loc[order, "class"]]


def _with_interval(row: Mapping[str, float], letter: str) -> str:
    low, high = row[f"{letter}_difference_low"], row[f"{letter}_difference_high"]
    return f"{row[f'{letter}_difference']:+.3f} ({low:+.3f} to {high:+.3f})"


def _thirds(groups: Mapping[str, Mapping[str, float]], letter: str) -> list[str]:
    parts = [
        f"{group_name(name)} {_with_interval(groups[name], letter)}" for name in list(GROUP_NAMES)[1:] if name in groups
    ]
    return [f"By training images: {', '.join(parts)}."] if parts else []


def _classes(better: Sequence[str], worse: Sequence[str], tested: int) -> str:
    if not better and not worse:
        return f"Of {tested} classes none differs significantly."
    parts = [
        f"{what} on {len(names)} ({_listed(names)})" for what, names in (("better", better), ("worse", worse)) if names
    ]
    return f"Of {tested} classes it is significantly {' and '.join(parts)}."


def _seeds(first: Side, second: Side) -> str:
    counts = len(first.runs), len(second.runs)
    few = "; more seeds would narrow them" if sum(counts) < 6 else ""
    if min(counts) > 1:
        return (
            f"The intervals hold for trainings with other seeds too ({counts[0]} and {counts[1]} were compared{few})."
        )
    if max(counts) > 1:
        single, other = (first, second) if counts[0] == 1 else (second, first)
        return (
            f"{single.letter} is one training and is assumed to vary over seeds as {other.letter} does "
            f"({max(counts)} trainings{few})."
        )
    return "One training each: the intervals hold for these two models, and another seed may reverse small differences."


def _listed(names: Sequence[str]) -> str:
    shown = list(names[:MOST_NAMED])
    more = len(names) - len(shown)
    if more:
        return f"{', '.join(shown)} and {more} more"
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)


def extremes(table: pd.DataFrame, letter: str, sign: int, count: int) -> pd.DataFrame:
    """The classes most helped (``sign`` 1) or hurt (-1): the marked ones first, then by difference."""
    difference = table[f"{letter}_difference"].to_numpy(dtype=np.float64) * sign
    rows = np.flatnonzero(difference > 0)
    order = np.lexsort((-difference[rows], ~table[f"{letter}_sure"].to_numpy(dtype=bool)[rows]))
    return table.iloc[rows[order][:count]]
