"""Figures about a set of annotations, for the page of ``explore``: readable for 3 classes and for 500.

Each function takes numbers and returns a ``matplotlib.figure.Figure`` for the caller to save; no global state, no
display. One colour (Okabe and Ito 2008), a second one for marks; heat maps go from white to dark, with the numbers
written in.
"""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from retinaflow.reports.figure_style import MAX_NAMES, OKABE_ITO, name_points, shortened

BLUE, ORANGE = OKABE_ITO[0], OKABE_ITO[1]
GREY = "#666666"
MOST_BOXES = 60
"""Images with more boxes are counted in the last bar."""


def tail(fractions: NDArray[np.floating]) -> Figure:
    """``fractions [K + 1]`` of all boxes in the rarest 0 to K classes, over the fraction of the classes."""
    figure, (axes,) = _axes(1, "How long the tail is")
    classes = np.linspace(0, 1, len(fractions))
    axes.plot(classes, fractions, color=BLUE, linewidth=2, marker="o" if len(fractions) <= 31 else None, markersize=4)
    axes.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1)
    axes.text(0.3, 0.34, "all classes equal", color=GREY, fontsize=8, rotation=22, ha="center", va="bottom")
    axes.set(
        xlim=(0, 1), ylim=(0, 1.02), xlabel="fraction of the classes, rarest first", ylabel="fraction of the boxes"
    )
    for part in (0.5, 0.9):
        held = float(np.interp(part, classes, fractions))
        axes.plot([part, part], [0, held], color=ORANGE, linewidth=1)
        axes.plot(part, held, color=ORANGE, marker="o", markersize=5)
        axes.annotate(
            f"the rarest {part:.0%} of the classes\nhold {held:.1%} of the boxes",
            (part, held),
            xytext=(-6, 6),
            textcoords="offset points",
            fontsize=8,
            ha="right",
            va="bottom",
        )
    return figure


def boxes_per_image(counts: NDArray[np.integer]) -> Figure:
    """How many images have how many boxes (``counts [I]``), the number of images on a log axis."""
    figure, (axes,) = _axes(1, "Boxes per image")
    counts = np.asarray(counts)
    number = np.bincount(np.minimum(counts, MOST_BOXES).astype(np.int64))
    axes.bar(np.arange(len(number)), number, width=1.0, color=BLUE, edgecolor="white", linewidth=0.3)
    axes.set(yscale="log" if number.max(initial=0) > 100 else "linear", xlabel="boxes", ylabel="images")
    for axis in (axes.xaxis, *([axes.yaxis] if axes.get_yscale() == "linear" else [])):
        axis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
    if counts.max(initial=0) > MOST_BOXES:
        axes.set_xlabel(f"boxes (the last bar: {MOST_BOXES} or more, at most {counts.max()})")
    if len(counts):
        _mark(axes, float(np.median(counts)), f"median {np.median(counts):g}")
    return figure


def box_sizes(pixels: NDArray[np.floating], bin_of_box: NDArray[np.integer], *, image_size: int) -> Figure:
    """Square roots of box areas ``[N]`` in pixels of the resized image: all together, and quartiles by bin ``[N]``."""
    figure, (left, right) = _axes(2, f"Box sizes (square root of the area) in images of {image_size} pixels")
    pixels = np.maximum(pixels, 0.5)
    low, high = (float(pixels.min()), float(pixels.max())) if len(pixels) else (1.0, float(image_size))
    left.hist(pixels, bins=_log_edges(low, high * 1.01, 50), color=BLUE)
    for side, name in ((32, "32"), (96, "96")):
        if low < side < high:
            _mark(left, side, f"{name} pixels")
    left.set(xscale="log", xlabel="pixels", ylabel="boxes")
    bins = np.unique(bin_of_box[bin_of_box >= 0])
    for number in bins:
        quartiles = np.percentile(pixels[bin_of_box == number], [10, 25, 50, 75, 90])
        right.plot(quartiles[[0, 4]], [number + 1] * 2, color=BLUE, linewidth=1.5)
        right.plot(quartiles[[1, 3]], [number + 1] * 2, color=BLUE, linewidth=9, solid_capstyle="butt")
        right.plot(quartiles[2], number + 1, marker="|", color="white", markersize=10, markeredgewidth=2)
    right.set(xscale="log", xlabel="pixels (10th, 25th, 50th, 75th, 90th percentile)", ylabel="bin, 1 the rarest")
    right.set_yticks(bins + 1)
    for axes in (left, right):
        axes.set_xticks([side for side in 2.0 ** np.arange(-1, 14) if low / 2 < side < high * 2])
        axes.set_xlim(low / 1.1, high * 1.1)
        axes.xaxis.set_major_formatter(mpl.ticker.FormatStrFormatter("%g"))
        axes.minorticks_off()
    return figure


def shapes(
    image_aspects: NDArray[np.floating],
    bucket_shapes: Sequence[tuple[int, int]],
    images_per_bucket: NDArray[np.integer],
    box_aspects: NDArray[np.floating],
) -> Figure:
    """Height / width of the images with their buckets, images in each bucket, and height / width of the boxes."""
    figure, (left, middle, right) = _axes(3, "Shapes (height / width)")
    _aspect_histogram(left, image_aspects, "images")
    for height, width in bucket_shapes:
        left.axvline(height / width, color=ORANGE, linewidth=1)
    left.set_title("images; orange: the buckets", fontsize=9)
    position = np.arange(len(bucket_shapes))
    middle.barh(position, images_per_bucket, color=ORANGE, height=0.7)
    middle.set_yticks(position, [f"{height} x {width}" for height, width in bucket_shapes], fontsize=8)
    middle.set_ylim(max(len(position), 4) - 0.5, -0.5)
    middle.set(xlabel="images")
    middle.set_title("buckets (height x width)", fontsize=9)
    _aspect_histogram(right, box_aspects, "boxes")
    for aspect in (0.5, 1.0, 2.0):
        right.axvline(aspect, color=ORANGE, linewidth=1)
    right.set_title("boxes; orange: the anchors", fontsize=9)
    return figure


def cooccurrence(fraction: NDArray[np.floating], rows: Sequence[str], columns: Sequence[str], *, title: str) -> Figure:
    """``fraction [R, C]`` of the images with the class of the row that also have the class of the column, in %."""
    cell = 0.36
    left = 0.35 + 0.075 * max(map(len, map(shortened, rows)), default=0)
    head = 0.65 + 0.065 * max(map(len, map(shortened, columns)), default=0)
    width, height = left + cell * len(columns) + 1.0, head + cell * len(rows) + 0.1
    width = max(width, 0.3 + 0.09 * len(title))
    figure = Figure(figsize=(width, height), dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((left / width, 0.1 / height, cell * len(columns) / width, cell * len(rows) / height))
    figure.text(0.1 / width, 1 - 0.2 / height, title, fontsize=11, va="center")
    axes.imshow(fraction, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(np.arange(len(columns)), [shortened(name) for name in columns], rotation=55, ha="left", fontsize=8)
    axes.xaxis.tick_top()
    axes.set_yticks(np.arange(len(rows)), [shortened(name) for name in rows], fontsize=8)
    axes.tick_params(length=0)
    for (row, column), value in np.ndenumerate(fraction):
        if value >= 0.005:
            color = "white" if value > 0.55 else "#333333"
            axes.text(column, row, f"{value:.0%}"[:-1], ha="center", va="center", fontsize=7, color=color)
    return figure


def label_coverage(
    present: NDArray[np.integer], absent: NDArray[np.integer], bin_of_class: NDArray[np.integer], names: Sequence[str]
) -> Figure:
    """One dot per class ``[K]``: images on which it is verified absent over those on which it is verified present."""
    figure, (axes,) = _axes(1, "Image-level labels per class")
    x, y = np.maximum(np.asarray(present, float), 0.5), np.maximum(np.asarray(absent, float), 0.5)
    colours = mpl.colormaps["viridis"](
        np.clip(bin_of_class / max(int(np.max(bin_of_class, initial=0)), 1), 0, 1) * 0.87
    )
    axes.scatter(x, y, s=14 if len(x) > 100 else 36, c=colours, edgecolors="white", linewidths=0.4, zorder=3)
    top = max(float(x.max(initial=10)), float(y.max(initial=10))) * 1.8
    axes.plot([0.5, top], [0.5, top], color=GREY, linestyle="--", linewidth=1)
    axes.set(xscale="log", yscale="log", xlim=(0.4, top), ylim=(0.4, top))
    axes.set(xlabel="images verified present (0: at the left edge)", ylabel="images verified absent (0: at the bottom)")
    if len(names) <= 12:
        name_points(axes, x, y, names)
    return figure


def group_of(fraction: NDArray[np.floating], boxes: NDArray[np.integer], names: Sequence[str]) -> Figure:
    """The classes with the largest fraction of group-of boxes, with the number of such boxes."""
    figure, (axes,) = _axes(1, "Fraction of group-of boxes")
    order = [k for k in np.argsort(-np.nan_to_num(fraction), kind="stable")[:MAX_NAMES] if fraction[k] > 0]
    position = np.arange(len(order))
    axes.bar(position, fraction[order], color=BLUE, width=0.7)
    axes.set_xticks(position, [shortened(names[k]) for k in order], rotation=55, ha="right", fontsize=8)
    axes.set(ylim=(0, 1), ylabel="fraction of the boxes", xlim=(-0.6, max(len(order), 8) - 0.4))
    for at, k in enumerate(order):
        axes.text(at, fraction[k] + 0.01, f"{round(fraction[k] * boxes[k]):,}", ha="center", va="bottom", fontsize=7)
    return figure


def _axes(count: int, title: str) -> tuple[Figure, list[Axes]]:
    """A figure of fixed size (9 inches wide) with ``count`` pairs of axes side by side."""
    figure = Figure(figsize=(9, 4 if count == 1 else 3.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    found = [figure.add_subplot(1, count, position + 1) for position in range(count)]
    for axes in found:
        axes.grid(color="#DDDDDD", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    return figure, found


def _mark(axes: Axes, x: float, text: str) -> None:
    axes.axvline(x, color=ORANGE, linewidth=1.2)
    axes.text(x, 1.0, f" {text}", transform=axes.get_xaxis_transform(), color=ORANGE, fontsize=8, va="top")


def _aspect_histogram(axes: Axes, aspects: NDArray[np.floating], of: str) -> None:
    known = np.clip(aspects[np.isfinite(aspects)], 1 / 8, 8)
    axes.hist(known, bins=_log_edges(1 / 8, 8.01, 49), color=BLUE)
    axes.set(xscale="log", xlabel="height / width", ylabel=of)
    axes.set_xticks([1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8], ["1/8", "1/4", "1/2", "1", "2", "4", "8"])
    axes.xaxis.set_minor_formatter(mpl.ticker.NullFormatter())


def _log_edges(low: float, high: float, count: int) -> list[float]:
    return [float(edge) for edge in np.geomspace(low, max(high, low * 1.01), count)]
