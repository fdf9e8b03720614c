"""Figures of a search: best value so far, importance of parameters, values over parameters, trade-offs.

Each takes the trials as a table, one row per trial, columns as in ``trials.csv``: ``trial``, ``state``,
``keeps_floor``, the objective, the parameters (NaN where a trial had none). Objectives are maximised. Each returns a
``matplotlib.figure.Figure``; no global state, no display.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.tri import Triangulation

from retinaflow.reports.figure_style import OKABE_ITO

BLUE, RED, GREEN = OKABE_ITO[:3]
GREY = "#9A9A9A"
SLICES_IN_A_ROW = 4


def history(table: pd.DataFrame, column: str, *, name: str) -> Figure:
    """Every trial's value by its number, and the best so far among those above the floor; trials without a value
    (pruned, failed, lost) as ticks at the bottom."""
    figure = _figure(7.5, 4.2)
    axes = figure.subplots()
    complete = table[table["state"] == "complete"]
    above_floor, below_floor = complete[complete["keeps_floor"]], complete[~complete["keeps_floor"].astype(bool)]
    axes.scatter(above_floor["trial"], above_floor[column], s=26, color=BLUE, label="complete", zorder=3)
    if len(below_floor):
        axes.scatter(
            below_floor["trial"], below_floor[column], s=26, marker="x", color=RED, label="below the floor", zorder=3
        )
    if len(above_floor):
        axes.step(above_floor["trial"], above_floor[column].cummax(), where="post", color=GREEN, label="best so far")
    for state, color in (("pruned", GREY), ("failed", RED), ("lost", "black")):
        rows = table[table["state"] == ("fail" if state == "failed" else state)]
        if len(rows):
            axes.plot(
                rows["trial"],
                np.full(len(rows), 0.02),
                "|",
                color=color,
                markersize=11,
                transform=axes.get_xaxis_transform(),
                label=f"{state} ({len(rows)})",
            )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="trial", ylabel=name, title="Value by trial")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    return figure


def importance(weights: Mapping[str, float], *, name: str) -> Figure:
    """A bar per parameter, the most important on top; fractions that add up to 1."""
    figure = _figure(7.0, 1.3 + 0.32 * len(weights))
    axes = figure.subplots()
    names = list(weights)[::-1]
    bars = axes.barh(names, [weights[parameter] for parameter in names], color=BLUE)
    axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
    axes.set(xlabel="fraction of the importance (PED-ANOVA)", title=f"Importance for {name}")
    axes.margins(x=0.12)
    return figure


def slices(
    table: pd.DataFrame, column: str, parameters: Sequence[str], *, name: str, log: Collection[str] = ()
) -> Figure:
    """The objective over each parameter, one panel each, in the given order; later trials darker. ``log``: parameters
    with a logarithmic axis."""
    width = min(len(parameters), SLICES_IN_A_ROW)
    height = -(-len(parameters) // width)
    figure = _figure(2.9 * width + 0.8, 2.6 * height + 0.5)
    panels = figure.subplots(height, width, sharey=True, squeeze=False)
    for position, parameter in enumerate(parameters):
        axes = panels[position // width, position % width]
        rows = table[table[parameter].notna()]
        x = _positions(axes, rows[parameter])
        if parameter in log:
            axes.set_xscale("log")
        shade: dict[str, Any] = {"cmap": "Blues", "vmin": -len(table) / 2, "vmax": table["trial"].max()}
        axes.scatter(x, rows[column], c=rows["trial"], s=22, edgecolors=BLUE, lw=0.4, **shade)
        axes.set_xlabel(parameter)
        if position % width == 0:
            axes.set_ylabel(name)
    for position in range(len(parameters), width * height):
        panels[position // width, position % width].set_axis_off()
    figure.suptitle("Value by parameter (later trials darker)", fontsize=11)
    return figure


def contour(
    table: pd.DataFrame, column: str, parameters: tuple[str, str], *, name: str, log: Collection[str] = ()
) -> Figure:
    """The objective over two numeric parameters: trials as dots, filled in between where that is possible. ``log``:
    parameters of which the logarithm is drawn."""
    figure = _figure(6.4, 4.8)
    axes = figure.subplots()
    rows = table[table[list(parameters)].notna().all(axis=1)]
    numbers = [rows[parameter].to_numpy(dtype=np.float64) for parameter in parameters]
    x, y = (np.log10(n) if parameter in log else n for n, parameter in zip(numbers, parameters, strict=True))
    values = rows[column].to_numpy(dtype=np.float64)
    mesh = _triangles(x, y)
    limits = {"vmin": values.min(), "vmax": max(values.max(), values.min() + 1e-9)} if len(values) else {}
    if mesh is not None and np.ptp(values) > 0:
        axes.tricontourf(mesh, values, levels=12, cmap="viridis")
    dots = axes.scatter(x, y, c=values, cmap="viridis", edgecolors="white", s=42, zorder=3, **limits)
    # Trials at the edge of the filled part would be cut in half.
    axes.use_sticky_edges = False
    axes.margins(0.06)
    figure.colorbar(dots, ax=axes, label=name)
    for axis, parameter in zip("xy", parameters, strict=True):
        label = f"log10 {parameter}" if parameter in log else parameter
        axes.set(**{f"{axis}label": label})
    axes.set_title("Value over the two most important numbers")
    return figure


def pareto(table: pd.DataFrame, front: Sequence[int], *, names: Sequence[str]) -> Figure:
    """Both objectives of every complete trial; those on the front are joined and numbered."""
    figure = _figure(6.4, 4.8)
    axes = figure.subplots()
    best = table[table["trial"].isin(list(front))].sort_values("objective")
    axes.scatter(table["objective"], table["objective_2"], s=24, color=GREY, label="complete")
    axes.plot(best["objective"], best["objective_2"], "o-", color=RED, markersize=6, label="Pareto front")
    for row in best.itertuples():
        axes.annotate(str(row.trial), (row.objective, row.objective_2), xytext=(5, 5), textcoords="offset points")
    axes.set(xlabel=names[0], ylabel=names[1], title="Trade-off (trial numbers on the Pareto front)")
    axes.margins(0.1)
    axes.legend(fontsize=8)
    return figure


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _positions(axes: Axes, values: pd.Series) -> np.ndarray:
    """Positions on the x axis: numbers as they are, words side by side, sorted."""
    if pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values):
        return values.to_numpy(dtype=np.float64)
    words = sorted(values.astype(str).unique())
    axes.set_xticks(range(len(words)), words, rotation=20, ha="right", fontsize=8)
    axes.margins(x=0.15)
    return values.astype(str).map(words.index).to_numpy(dtype=np.float64)


def _triangles(x: np.ndarray, y: np.ndarray) -> Triangulation | None:
    """A mesh over the points, or None when they are too few or lie on a line."""
    points = np.unique(np.stack([x, y], axis=1), axis=0)
    if len(points) < 4 or np.linalg.matrix_rank(points - points.mean(axis=0)) < 2:
        return None
    return Triangulation(x, y)
