"""Figures about scores: precision-recall curves, the rarest classes with intervals, what errors cost, reliability.

Each function returns a ``matplotlib.figure.Figure`` for the caller to save; no global state, no display. Sizes,
margins, classes and axes (0 to 1) depend on the classes and their counts only, never on the scores, so that figures of
two runs on the same data can be laid side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from retinaflow.metric.error_analysis import COSTS, ErrorAnalysis
from retinaflow.metric.matches import Kind, Matches
from retinaflow.reports.figure_style import (
    OKABE_ITO,
    bin_color,
    bin_colors,
    class_figure,
    legend,
    shortened,
)

CURVES = 8
"""Curves in one figure; more cannot be distinguished."""
RAREST = 20
ROWS = 20
"""Largest number of classes with a row of their own in the figure of errors; more are averaged by bin."""
COST_NAMES = {name: name.replace("_", "-") for name in COSTS}
DARKEST_COST = 0.5
"""AP at which a cell of the figure of errors has the darkest colour."""


def spread_classes(table: pd.DataFrame, count: int = CURVES) -> list[str]:
    """Class ids of up to ``count`` classes with ground truth, evenly from the rarest to the most frequent.

    ``table`` as of :func:`retinaflow.metric.per_class.per_class_table`.
    """
    table = _rarest_first(table)
    known = table.loc[table["num_truths"] > 0, "class_id"].tolist()
    positions = np.unique(np.linspace(0, len(known) - 1, min(count, len(known))).round().astype(np.int64))
    return [known[position] for position in positions]


def precision_recall(
    matches: Matches,
    table: pd.DataFrame,
    *,
    class_ids: Sequence[str],
    index_of: dict[str, int],
) -> Figure:
    """The precision-recall curves of some classes, in the order of ``table``, rarest dark and most frequent light.

    AP is the area under these curves: precision is made non-increasing, and is 0 beyond the recall that was reached.
    ``class_ids``: which (:func:`spread_classes`); ``index_of``: class id -> class index of the matches.
    Raises ValueError for a class that is not in the table.
    """
    unknown = [mid for mid in class_ids if mid not in set(table["class_id"])]
    if unknown:
        raise ValueError(f"every class must be in the table, but {', '.join(unknown[:5])} is not")
    figure, axes = class_figure("Precision and recall", right=0.70)
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.02, 1.02), xlabel="recall", ylabel="precision")
    chosen = _rarest_first(table[table["class_id"].isin(set(class_ids))])
    handles = []
    for number, (color, row) in enumerate(zip(bin_colors(len(chosen)), chosen.itertuples(index=False), strict=True)):
        recall, precision = precision_recall_curve(matches, index_of[str(row.class_id)])
        line: dict[str, Any] = {"color": color, "linestyle": ("-", (0, (5, 1.5)))[number % 2], "linewidth": 2.0}
        axes.step(recall, precision, where="pre", **line)
        text = f"{shortened(str(row[0]), 20)}: {row.ap:.3f} ({row.num_truths:.0f})"
        handles.append(Line2D([], [], label=text, **line))
    legend(axes, handles, "rarest first: AP (ground-truth boxes)")
    return figure


def precision_recall_curve(matches: Matches, class_index: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """``recall [n], precision [n]`` of one class, corner by corner: the precision of a step holds up to its recall.

    From recall 0 to the recall that was reached, then down to precision 0. Empty for a class without ground truth.
    """
    wanted = matches.num_truths[class_index]
    if wanted == 0:
        return np.zeros(0), np.zeros(0)
    start, stop = np.searchsorted(matches.class_index, [class_index, class_index + 1])
    is_true = matches.kind[start:stop] != Kind.FALSE_POSITIVE
    tp = np.where(is_true, matches.weight[start:stop], 0.0)
    found = np.cumsum(tp)
    precision = found / np.maximum(found + np.cumsum(~is_true), 1e-12)
    hull = np.maximum.accumulate(precision[::-1])[::-1][is_true]
    recall = found[is_true] / wanted
    first = hull[:1] if len(hull) else np.zeros(1)
    end = recall[-1:] if len(recall) else np.zeros(1)
    return np.concatenate([[0.0], recall, end]), np.concatenate([first, hull, [0.0]])


def rarest_classes(table: pd.DataFrame) -> Figure:
    """A bar of AP for each of the rarest classes with ground truth, rarest on top, in bin colours.

    ``table`` as of :func:`retinaflow.metric.per_class.per_class_table`; columns ``ap_low`` and ``ap_high``, where there
    are any, are drawn as intervals. Beside each name: training images and evaluated ground-truth boxes.
    """
    figure, axes = class_figure("AP of the rarest classes", right=0.86)
    axes.set_position((0.34, 0.1, 0.52, 0.81))
    table = _rarest_first(table)
    bins = table["bin"].fillna(0).to_numpy(dtype=np.int64) - 1
    colors = bin_colors(int(bins.max(initial=-1)) + 1)
    with_ground_truth = np.isfinite(table["ap"].to_numpy(dtype=np.float64))
    shown = table[with_ground_truth].head(RAREST)
    shown_bins = bins[with_ground_truth][:RAREST]
    position = np.arange(len(shown))
    axes.barh(position, shown["ap"], height=0.7, color=[bin_color(colors, number) for number in shown_bins], zorder=2)
    if {"ap_low", "ap_high"} <= set(table.columns):
        for color, width in (("white", 3.6), ("#222222", 1.4)):
            axes.hlines(position, shown["ap_low"], shown["ap_high"], color=color, linewidth=width, zorder=3)
            for end in ("ap_low", "ap_high"):
                axes.plot(shown[end], position, "|", color=color, markersize=4 + width, markeredgewidth=width, zorder=3)
    axes.grid(visible=False, axis="y")
    # Few classes stand at the top with bars of the usual size.
    axes.set(xlim=(0, 1), ylim=(max(len(shown), 8) - 0.4, -0.6), xlabel="AP")
    names = [
        f"{shortened(str(row[0]))}: {row.train_images:,}, {row.num_truths:,.0f}"
        for row in shown.itertuples(index=False)
    ]
    axes.set_yticks(position, names, fontsize=8)
    above: dict[str, Any] = {
        "transform": axes.transAxes,
        "ha": "right",
        "va": "bottom",
        "fontsize": 8,
        "color": "#666666",
    }
    axes.text(-0.01, 1.0, "class: training images, ground-truth boxes", **above)
    axes.tick_params(axis="y", length=0)
    present = sorted(set(shown_bins.tolist()))
    handles = [
        Line2D(
            [], [], color=bin_color(colors, n), marker="s", linestyle="", label=f"bin {n + 1}" if n >= 0 else "no bin"
        )
        for n in present
    ]
    legend(axes, handles, "")
    return figure


def error_costs(analysis: ErrorAnalysis, table: pd.DataFrame) -> Figure:
    """Left the AP that each kind costs over all classes (0 to 1), right where: by class, or by bin when there are many.

    ``table`` as of :func:`retinaflow.metric.per_class.per_class_table`, of the same scores. Costs do not add up to
    what is missing from 1 (:mod:`~retinaflow.metric.error_analysis`).
    """
    figure, axes = class_figure("", right=0.44)
    axes.set_position((0.12, 0.21, 0.27, 0.67))
    total = analysis.table.iloc[0]
    position = np.arange(len(COSTS))
    costs = total[list(COSTS)].to_numpy(dtype=np.float64)
    axes.barh(position, np.nan_to_num(costs), height=0.7, color=OKABE_ITO, zorder=2)
    for row, cost in enumerate(costs):
        axes.text(max(np.nan_to_num(cost), 0) + 0.02, row, f"{cost:.3f}", va="center", fontsize=8)
    axes.set_yticks(position, [COST_NAMES[name] for name in COSTS], fontsize=8)
    axes.set(xlim=(0, 1), ylim=(len(COSTS) - 0.5, -0.5), xlabel="AP gained by fixing it, mean of classes")
    axes.grid(visible=False, axis="y")
    axes.set_title(f"all classes: mAP {total['ap']:.3f}", fontsize=9)
    figure.suptitle("AP lost to each kind of error", fontsize=11, y=0.975)
    _cost_map(figure.add_axes((0.60, 0.21, 0.38, 0.67)), *_cost_rows(analysis.table, table))
    return figure


def _rarest_first(table: pd.DataFrame) -> pd.DataFrame:
    """The table as it is, by training images; by ground-truth boxes where nothing is known of a training."""
    if (table["train_images"] > 0).any():
        return table
    return table.sort_values(["num_truths", "class_id"], ignore_index=True)


def _cost_rows(errors: pd.DataFrame, table: pd.DataFrame) -> tuple[list[str], NDArray[np.float64], str]:
    """(names, costs ``[rows, kinds]``, what the rows are): classes rarest first, or the means of bins."""
    joined = _rarest_first(table)[["class", "class_id", "bin", "train_images"]].merge(
        errors.drop(columns="class").iloc[1:], on="class_id", how="inner"
    )
    columns = list(COSTS)
    if len(joined) > ROWS and joined["bin"].notna().any():
        means = joined.groupby(joined["bin"].fillna(0))[columns].mean()
        sizes = joined["bin"].fillna(0).value_counts()
        names = [f"bin {number} ({sizes[number]})" if number else f"no bin ({sizes[0]})" for number in means.index]
        return names, means.to_numpy(dtype=np.float64), "by bin, 1 the rarest (classes)"
    what = "by class, rarest first"
    if len(joined) > ROWS:
        joined = joined.sort_values(["num_truths", "class_id"], ascending=[False, True], ignore_index=True)
        what = f"the {ROWS} classes with the most ground-truth boxes"
    shown = joined.head(ROWS)
    return [shortened(name, 22) for name in shown["class"]], shown[columns].to_numpy(dtype=np.float64), what


def _cost_map(axes: Axes, names: list[str], costs: NDArray[np.float64], what: str) -> None:
    """Costs as numbers on a colour from white (0) to dark (``DARKEST_COST`` and more)."""
    axes.set_title(what, fontsize=9)
    if len(names):
        axes.imshow(costs, aspect="auto", cmap="Oranges", vmin=0, vmax=DARKEST_COST)
    for row, column in np.ndindex(costs.shape):
        cost = costs[row, column]
        if np.isfinite(cost) and abs(cost) >= 0.005:
            color = "white" if cost > 0.6 * DARKEST_COST else "black"
            axes.text(column, row, f"{cost:.2f}", ha="center", va="center", fontsize=7, color=color)
    kinds = [COST_NAMES[name] for name in COSTS]
    axes.set_xticks(np.arange(len(COSTS)), kinds, rotation=45, ha="right", rotation_mode="anchor", fontsize=8)
    axes.set_yticks(np.arange(len(names)), names, fontsize=8)
    axes.set(xlim=(-0.5, len(COSTS) - 0.5), ylim=(max(len(names), 3) - 0.5, -0.5))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


_TENTHS = 10


def reliability(before: NDArray[np.floating], after: NDArray[np.floating], is_true: NDArray[np.bool_]) -> Figure:
    """Precision in tenths of the score, before and after calibration; calibrated scores lie on the diagonal.

    ``before [N]``, ``after [N]`` in [0, 1], ``is_true [N]``: whether a true positive. The area of a dot follows the
    number of its detections.
    """
    figure, axes = class_figure("Precision by score, all models and classes", right=0.78)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="score", ylabel="precision")
    axes.plot([0, 1], [0, 1], color="#7F7F7F", linewidth=1, linestyle="--")
    handles = [
        _curve(axes, score, is_true, color, label)
        for score, color, label in ((before, OKABE_ITO[1], "as detected"), (after, OKABE_ITO[0], "calibrated"))
    ]
    legend(axes, handles, f"{len(is_true):,} evaluated detections")
    return figure


def _curve(axes: Axes, score: NDArray[np.floating], is_true: NDArray[np.bool_], color: str, label: str) -> object:
    step = np.clip((np.asarray(score) * _TENTHS).astype(np.int64), 0, _TENTHS - 1)
    count = np.bincount(step, minlength=_TENTHS)
    filled = count > 0
    mean = np.bincount(step, score, _TENTHS)[filled] / count[filled]
    precision = np.bincount(step, is_true, _TENTHS)[filled] / count[filled]
    axes.scatter(
        mean, precision, s=20 + 280 * count[filled] / max(count.max(), 1), color=color, alpha=0.45, linewidth=0
    )
    (line,) = axes.plot(mean, precision, color=color, marker="o", markersize=4, label=label)
    return line
