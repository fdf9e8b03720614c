"""Figures about classes: AP against frequency, the class frequencies with their bins, and exposure by strategy.

Each function returns a ``matplotlib.figure.Figure`` for the caller to save (``figure.savefig(path)``); no global
state, no display. Sizes, margins and axis limits depend only on the classes and their training counts, never on the
scores, so that figures of two runs on the same data can be laid side by side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.transforms import blended_transform_factory
from numpy.typing import NDArray

from retinaflow.reports.figure_style import (
    MAX_NAMES,
    OKABE_ITO,
    bin_color,
    bin_colors,
    class_figure,
    decades,
    legend,
    name_points,
    shortened,
)


def ap_vs_frequency(table: pd.DataFrame) -> Figure:
    """One dot per class with ground truth: AP (0 to 1) over training images (log), in bin colours, with bin means.

    ``table``: that of :func:`retinaflow.metric.per_class.per_class_table`. Classes without training images are in a
    grey strip on the left; those without ground truth are counted in a note. Up to ``MAX_NAMES`` classes are named.
    Columns ``ap_low`` and ``ap_high``, where there are any, are drawn as intervals.
    """
    figure, axes = class_figure("AP by training images", right=0.80)
    images = table["train_images"].to_numpy(dtype=np.float64)
    ap = table["ap"].to_numpy(dtype=np.float64)
    bins = table["bin"].fillna(0).to_numpy(dtype=np.int64) - 1
    left, right = decades(images)
    untrained_x = left / 1.25
    x = np.where(images > 0, images, untrained_x)
    colors = bin_colors(int(bins.max(initial=-1)) + 1)
    axes.axvspan(left / 1.6, left, color="#EEEEEE", zorder=0)
    axes.text(untrained_x, 0.5, "no training image", rotation=90, ha="center", va="center", fontsize=7, color="#666666")
    axes.set(xscale="log", xlim=(left / 1.6, right), ylim=(-0.02, 1.02), xlabel="training images", ylabel="AP")
    axes.set_yticks(np.linspace(0, 1, 6))
    small = len(table) > 100
    dot_color = [bin_color(colors, number) for number in bins]
    shown = np.isfinite(ap)
    if shown.any():
        dots = [color for color, show in zip(dot_color, shown, strict=True) if show]
        axes.scatter(x[shown], ap[shown], s=16 if small else 42, c=dots, edgecolors="white", linewidths=0.5, zorder=3)
        if {"ap_low", "ap_high"} <= set(table.columns):
            ends = table.loc[shown, ["ap_low", "ap_high"]].to_numpy(dtype=np.float64)
            axes.vlines(x[shown], ends[:, 0], ends[:, 1], colors=dots, linewidth=0.6 if small else 1.3, alpha=0.45)
    handles = []
    for number, color in enumerate(colors):
        members = (bins == number) & shown
        label = f"bin {number + 1}: no ground truth"
        if members.any():
            mean = float(ap[members].mean())
            label = f"bin {number + 1}: {mean:.3f} ({members.sum()})"
            low, high = images[bins == number].min(), images[bins == number].max()
            outline = [withStroke(linewidth=4.5, foreground="white")]
            span = [low / 1.06, high * 1.06]
            axes.plot(span, [mean, mean], color=color, linewidth=2.5, path_effects=outline, zorder=4 if small else 2)
        handles.append(Line2D([], [], color=color, marker="o", linewidth=2.5, label=label))
    legend(axes, handles, "mean AP (classes)")
    if (~shown).any():
        axes.text(1.03, 0.0, f"{(~shown).sum()} without ground truth,\nnot shown", transform=axes.transAxes, fontsize=8)
    if len(table) <= MAX_NAMES:
        name_points(axes, x[shown], ap[shown], table["class"][shown].tolist())
    return figure


def class_frequency(
    images_per_class: NDArray[np.integer],
    *,
    edges: NDArray[np.floating],
    bin_of_class: NDArray[np.integer],
    names: Sequence[str],
) -> Figure:
    """Classes rarest first over their training images (log), the bins shaded, each with its count of classes.

    ``images_per_class [K]``; ``edges [B + 1]`` in training images, drawn as lines; ``bin_of_class [K]``, 0 the rarest,
    -1 none; ``names [K]``. Classes without training images are on the left without a bar.
    """
    images, bins = np.asarray(images_per_class, dtype=np.float64), np.asarray(bin_of_class)
    named = len(images) <= MAX_NAMES
    # Names are written at 45 degrees, so the longest one decides the space below.
    longest = max((len(shortened(name)) for name in names), default=0)
    figure, axes = class_figure(
        "Training images per class", right=0.97, bottom=0.06 + 0.0098 * longest if named else 0.12
    )
    order = np.lexsort((np.asarray(names, dtype=np.str_), images))
    images, bins = images[order], bins[order]
    colors = bin_colors(int(bins.max(initial=-1)) + 1)
    floor, top = decades(images)
    floor /= 2
    position = np.arange(len(images))
    heights = np.maximum(images - floor, 0)
    bar_colors = [bin_color(colors, number) for number in bins]
    axes.bar(position, heights, bottom=floor, width=0.8 if named else 1.0, color=bar_colors, zorder=2)
    axes.set(
        yscale="log",
        ylim=(floor, top * (top / floor) ** 0.3),
        xlim=(-0.5, max(len(images), 1) - 0.5),
        ylabel="training images",
    )
    for number in [-1, *range(len(colors))]:
        members = position[bins == number]
        if len(members):
            color = bin_color(colors, number)
            axes.axvspan(members.min() - 0.5, members.max() + 0.5, color=color, alpha=0.15, zorder=0, linewidth=0)
    _name_bins(axes, bins)
    for edge in np.asarray(edges, dtype=np.float64)[1:-1]:
        axes.axhline(edge, color="#555555", linewidth=0.7, linestyle=":", zorder=1)
    if named:
        axes.set_xticks(position, [shortened(names[k]) for k in order], rotation=45, ha="right", fontsize=8)
    else:
        axes.set_xlabel(f"{len(images)} classes, rarest first (dotted: edges of the bins)")
    return figure


def exposure_curves(
    expected_samples: Mapping[str, NDArray[np.floating]],
    *,
    images_per_class: NDArray[np.integer],
) -> Figure:
    """Expected samples of each class in an epoch (log) over its training images (log), one line per strategy.

    ``expected_samples``: strategy -> ``[K]``; ``images_per_class [K]``. The flatter a line, the better balanced the
    strategy; the dashed diagonal is one sample per image. Classes without training images or samples are left out.
    """
    figure, axes = class_figure("Expected samples per epoch", right=0.76)
    images = np.asarray(images_per_class, dtype=np.float64)
    order = np.argsort(images, kind="stable")
    order = order[images[order] > 0]
    limits = decades(images)
    axes.set(xscale="log", yscale="log", xlim=limits, xlabel="training images", ylabel="expected samples")
    markers = "osD^vPX"
    every = max(1, len(order) // 15)
    count = max(1, len(expected_samples))
    positive = [some[some > 0] for some in (np.asarray(samples)[order] for samples in expected_samples.values())]
    axes.set_ylim(decades(np.concatenate([*positive, images])))
    axes.plot(limits, limits, color="#999999", linestyle="--", linewidth=1, label="1 per image", zorder=1)
    for number, (strategy, samples) in enumerate(expected_samples.items()):
        values = np.asarray(samples, dtype=np.float64)[order]
        axes.plot(
            images[order],
            np.where(values > 0, values, np.nan),
            color=OKABE_ITO[number % len(OKABE_ITO)],
            marker=markers[number % len(markers)],
            # Where strategies coincide, shifted markers and thinner lines leave the lines below visible.
            markevery=(number * every // count, every),
            markersize=8 - 4 * number / count,
            linewidth=3.4 - 2.4 * number / count,
            label=shortened(strategy),
        )
    legend(axes, axes.get_legend_handles_labels()[0], "strategy")
    return figure


def _name_bins(axes: Axes, bins: NDArray[np.integer]) -> None:
    """Name and count of classes above each bin, on the first of three levels where it overlaps no other text."""
    strip = blended_transform_factory(axes.transData, axes.transAxes)
    half_width = 0.03 * len(bins)
    ends = [-np.inf] * 3
    for number in np.unique(bins):
        position = np.flatnonzero(bins == number)
        centre = float(np.clip(position.mean(), half_width - 0.5, len(bins) - 0.5 - half_width))
        level = next((level for level, end in enumerate(ends) if centre - half_width >= end), 2)
        ends[level] = centre + half_width
        text = f"{f'bin {number + 1}' if number >= 0 else 'no bin'}\n{len(position)}"
        axes.text(centre, 0.985 - 0.085 * level, text, transform=strip, ha="center", va="top", fontsize=8)
