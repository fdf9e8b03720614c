"""A sheet of images with their boxes: ground truth in blue (dashed for group-of), detections in orange with scores.

Works with ground truth alone (to check a data set) and with both (to check a detector). Text has a dark outline, so
that it can be read on any photo; the two colours are from the palette of Okabe and Ito (2008), which colour-blind
people can distinguish. The caller saves the figure; no global state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.patheffects import AbstractPathEffect, withStroke
from numpy.typing import NDArray

from retinaflow.reports.figure_style import shortened

GROUND_TRUTH = "#56B4E9"
DETECTION = "#E69F00"
PANEL_INCHES = 3.2
TITLE_INCHES = 0.3
GAP = 0.12
"""Inches between images."""
WIDEST = 2.5
LETTERS_PER_INCH = 11
DPI = 110
TWO_LINES = 32
"""Pixels of the sheet that two lines of text need."""

LineStyle = Literal["-", "--"]


def _no_boxes() -> NDArray[np.floating]:
    return np.zeros((0, 4))


@dataclass(frozen=True)
class Panel:
    """One image of the sheet; boxes are normalised xyxy ``[N, 4]``, each with its label text.

    Raises ValueError when the image is not uint8 RGB or texts, flags and scores do not fit their boxes.
    """

    image: NDArray[np.uint8]
    """``[H, W, 3]`` RGB."""
    title: str = ""
    gt_boxes: NDArray[np.floating] = field(default_factory=_no_boxes)
    gt_labels: Sequence[str] = ()
    gt_group_of: Sequence[bool] | NDArray[np.bool_] = ()
    """One flag per ground truth box, or empty: none is group-of."""
    detection_boxes: NDArray[np.floating] = field(default_factory=_no_boxes)
    detection_labels: Sequence[str] = ()
    detection_scores: Sequence[float] | NDArray[np.floating] = ()

    def __post_init__(self) -> None:
        if self.image.ndim != 3 or self.image.shape[2] != 3 or self.image.dtype != np.uint8:
            raise ValueError(f"a panel needs uint8 [H, W, 3], but got {self.image.dtype} {list(self.image.shape)}")
        ground_truths, detections = len(self.gt_boxes), len(self.detection_boxes)
        wanted = {
            "gt_labels": (len(self.gt_labels), (ground_truths,)),
            "gt_group_of": (len(self.gt_group_of), (0, ground_truths)),
            "detection_labels": (len(self.detection_labels), (detections,)),
            "detection_scores": (len(self.detection_scores), (detections,)),
        }
        for name, (length, allowed) in wanted.items():
            if length not in allowed:
                raise ValueError(f"{name} needs one value per box ({allowed[-1]}), but has {length}")


def contact_sheet(panels: Sequence[Panel], *, columns: int = 4, title: str | None = None) -> Figure:
    """The panels row by row, ``columns`` to a row; the images of a row are of one height and fill its width.

    A last row that is not full has the height of a full one. Images more than ``WIDEST`` times as wide as high, or
    as high as wide, are smaller than their cell.

    Raises ValueError when ``columns`` is below 1.
    """
    if columns < 1:
        raise ValueError(f"`columns >= 1` must hold, but got {columns}")
    columns = max(1, min(columns, len(panels)))
    width = max(columns, 2) * PANEL_INCHES
    rows = [panels[first : first + columns] for first in range(0, len(panels), columns)]
    heights = _row_heights(rows, columns)
    head = 0.75 if title else 0.4
    height = sum(heights) + TITLE_INCHES * len(rows) + head
    figure = Figure(figsize=(width, height), dpi=DPI)
    FigureCanvasAgg(figure)
    if title:
        figure.text(0.5, 1 - 0.25 / height, title, ha="center", va="center", fontsize=13)
    _key(figure, panels, y=1 - (head - 0.2) / height)
    bottom = height - head
    for row, row_height in zip(rows, heights, strict=True):
        bottom -= row_height + TITLE_INCHES
        left = (width - columns * PANEL_INCHES) / 2
        for panel in row:
            cell = row_height * _cell_aspect(panel)
            inside = (left + GAP / 2, bottom + GAP / 2, cell - GAP, row_height - GAP)
            axes = figure.add_axes(tuple(np.array(inside) / (width, height, width, height)))
            _draw(axes, panel)
            left += cell
    return figure


def _row_heights(rows: Sequence[Sequence[Panel]], columns: int) -> list[float]:
    """Inches at which the cells of each row fill its width; an unfinished row gets the height of a full one."""
    return [columns * PANEL_INCHES / (sum(map(_cell_aspect, row)) * columns / len(row)) for row in rows]


def _cell_aspect(panel: Panel) -> float:
    """Width by height of the cell: that of the image, within limits."""
    height, width = panel.image.shape[:2]
    return float(min(max(width / height, 1 / WIDEST), WIDEST))


def _key(figure: Figure, panels: Sequence[Panel], *, y: float) -> None:
    """The legend of the colours and lines that occur."""
    kinds: tuple[tuple[bool, str, LineStyle, str], ...] = (
        (any(len(panel.gt_boxes) for panel in panels), GROUND_TRUTH, "-", "ground truth"),
        (any(any(panel.gt_group_of) for panel in panels), GROUND_TRUTH, "--", "ground truth, group-of"),
        (any(len(panel.detection_boxes) for panel in panels), DETECTION, "-", "detection, score"),
    )
    handles = [
        Line2D([], [], color=color, linestyle=style, linewidth=2.5, label=label)
        for occurs, color, style, label in kinds
        if occurs
    ]
    if handles:
        figure.legend(handles=handles, loc="center", bbox_to_anchor=(0.5, y), ncols=3, frameon=False, fontsize=9)


def _draw(axes: Axes, panel: Panel) -> None:
    height, width = panel.image.shape[:2]
    axes.imshow(
        panel.image, extent=(0, width, height, 0), interpolation="lanczos" if max(height, width) > 400 else None
    )
    axes.set(xlim=(0, width), ylim=(height, 0), anchor="N")
    axes.set_axis_off()
    axes.set_title(shortened(panel.title, max(8, int(axes.get_window_extent().width / DPI * 14))), fontsize=8, pad=3)
    axes.apply_aspect()
    scale = np.array([width, height, width, height])
    flags = panel.gt_group_of if len(panel.gt_group_of) else [False] * len(panel.gt_boxes)
    room = int(axes.get_window_extent().width / DPI * LETTERS_PER_INCH)
    for box, label, group_of in zip(panel.gt_boxes, panel.gt_labels, flags, strict=True):
        style: LineStyle = "--" if group_of else "-"
        _box(axes, box * scale, shortened(label, min(22, room)), color=GROUND_TRUTH, style=style, above=True)
    found = zip(panel.detection_boxes, panel.detection_labels, panel.detection_scores, strict=True)
    for box, label, score in found:
        text = f"{shortened(label, min(18, room - 5))} {score:.2f}"
        _box(axes, box * scale, text, color=DETECTION, style="-", above=False)


def _box(axes: Axes, box: NDArray[np.floating], label: str, *, color: str, style: LineStyle, above: bool) -> None:
    """A box in pixels of the image with its text: in the top left corner (``above``, ground truth) or the bottom left.

    Ground truth and detection of one object nearly coincide; texts at opposite corners do not cover each other. In a
    box too low for two texts they are written outside of it. All text stays inside the image.
    """
    x1, y1, x2, y2 = (float(value) for value in box)
    dark: list[AbstractPathEffect] = [withStroke(linewidth=3.2, foreground="black", alpha=0.65)]
    outline = Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=color, linestyle=style, linewidth=1.6)
    outline.set_path_effects(dark)
    axes.add_patch(outline)
    frame = axes.get_window_extent()
    on_screen = axes.transData.transform([(x1, y1), (x1, y2)])[:, 1]
    outside = abs(on_screen[0] - on_screen[1]) < TWO_LINES
    text = axes.annotate(
        label,
        (x1, y1 if above else y2),
        xytext=(3, -3 if above != outside else 3),
        textcoords="offset points",
        annotation_clip=False,
        va="top" if above != outside else "bottom",
        fontsize=7.5,
        color=color,
        fontweight="bold",
        path_effects=[withStroke(linewidth=2.2, foreground="black")],
    )
    extent = text.get_window_extent()
    shift = [
        max(0.0, frame.x0 + 4 - extent.x0) or min(0.0, frame.x1 - 4 - extent.x1),
        max(0.0, frame.y0 + 2 - extent.y0) or min(0.0, frame.y1 - 2 - extent.y1),
    ]
    x, y = text.xyann
    text.xyann = (x + shift[0] * 72 / DPI, y + shift[1] * 72 / DPI)
