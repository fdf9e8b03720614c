"""Difference in AP against training frequency, one dot per class: which part of the tail gains.

Drawn for a wide page and for a phone (``narrow=True``: fewer inches, the same font size). Colours of the bins as in
:mod:`~retinaflow.reports.class_figures`; filled dots are the classes with a significant difference.
"""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke

from retinaflow.reports.figure_style import NO_BIN, name_points

NAMED = 12
"""Largest number of classes with a name: the significant ones first, then those that differ most."""


def difference_vs_frequency(table: pd.DataFrame, letter: str, *, narrow: bool = False) -> Figure:
    """The column ``{letter}_difference`` of the classes of a comparison over their training images (log)."""
    figure = Figure(figsize=(4.2, 4.2) if narrow else (9, 4.6), dpi=120)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.19, 0.13, 0.78, 0.76) if narrow else (0.09, 0.12, 0.89, 0.79))
    table = table[table[f"{letter}_difference"].notna()]
    difference = table[f"{letter}_difference"].to_numpy(dtype=np.float64)
    images = np.maximum(table["train_images"].to_numpy(dtype=np.float64), 0.5)
    sure = table[f"{letter}_sure"].to_numpy(dtype=bool)
    bins = table["bin"].fillna(0).to_numpy(dtype=np.int64)
    colors = np.array([_color(number, bins.max(initial=0)) for number in bins]).reshape(-1, 4)
    low, high = difference.min(initial=-0.04), difference.max(initial=0.04)
    margin = 0.07 * (high - low)
    axes.set(xscale="log", ylim=(low - margin, high + margin))
    axes.set(xlabel="training images", ylabel=f"AP of {letter} - AP of A")
    if len(images):
        axes.set_xlim(images.min() / 1.5, images.max() * 2)
    axes.grid(color="#E4E4E4", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.axhline(0, color="#333333", linewidth=1)
    size = 16 if len(table) > 100 else 40
    axes.scatter(images[~sure], difference[~sure], s=size, facecolors="none", edgecolors=colors[~sure], linewidths=1.1)
    axes.scatter(images[sure], difference[sure], s=size * 1.3, c=colors[sure], edgecolors="black", linewidths=0.5)
    _bin_means(axes, images, difference, bins)
    _legend(figure, bool(sure.any()))
    order = np.lexsort((-np.abs(difference), ~sure))[: NAMED // 2 if narrow else NAMED]
    name_points(axes, images, difference, table["class"].tolist(), order=order.tolist())
    return figure


def _color(number: int, most: int) -> tuple[float, ...]:
    if number <= 0:
        return tuple(mpl.colors.to_rgba(NO_BIN))
    return tuple(mpl.colormaps["viridis"](0.87 * (number - 1) / max(most - 1, 1)))


def _bin_means(axes: Axes, images: np.ndarray, difference: np.ndarray, bins: np.ndarray) -> None:
    outline = [withStroke(linewidth=5, foreground="white")]
    for number in np.unique(bins[bins > 0]):
        here = bins == number
        span = images[here].min() / 1.1, images[here].max() * 1.1
        mean = difference[here].mean()
        axes.plot(span, [mean, mean], color=_color(number, bins.max()), linewidth=3, path_effects=outline, zorder=0.9)


def _legend(figure: Figure, any_significant: bool) -> None:
    dot = {"marker": "o", "linestyle": "none", "markersize": 6, "markeredgecolor": "black"}
    handles = [
        Line2D([], [], **dot, markerfacecolor="none", label="a class"),  # type: ignore[arg-type]
        Line2D([], [], color="#31688E", linewidth=3, label="mean of a bin"),
    ]
    if any_significant:
        label = "significant"
        handles.insert(1, Line2D([], [], **dot, markerfacecolor="#31688E", label=label))  # type: ignore[arg-type]
    figure.legend(handles=handles, loc="upper center", ncols=3, frameon=False, fontsize=8.5, handletextpad=0.4)
