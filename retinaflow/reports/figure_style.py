"""What all figures of classes have in common: size, margins, colours, axes, fonts.

All are 9 x 5 inches. Colour-blind people can distinguish the colours: bins go through viridis from dark (rarest) to
light, strategies and other kinds through the palette of Okabe and Ito (2008).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, fontManager
from matplotlib.ft2font import FT2Font
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox
from numpy.typing import NDArray

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
NO_BIN = "#7F7F7F"
MAX_NAMES = 30
"""Largest number of classes that are named in a figure."""

Color = tuple[float, float, float, float]


# Fonts for class names in any script: matplotlib's own, then installed ones that have more letters

_OWN = "DejaVu Sans"
_OTHERS = (
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans CJK KR", "Source Han Sans SC", "WenQuanYi Micro Hei"),
    *("WenQuanYi Zen Hei", "Microsoft YaHei", "SimHei", "Yu Gothic", "Meiryo", "Malgun Gothic", "PingFang SC"),
    *("PingFang HK", "Hiragino Sans", "Apple SD Gothic Neo", "Nanum Gothic", "Arial Unicode MS", "Nirmala UI"),
    *("Noto Sans", "Noto Sans Devanagari", "Noto Sans Thai", "Noto Sans Bengali", "Noto Sans Tamil"),
)
"""Families of Linux, Windows and macOS for scripts that DejaVu Sans lacks."""


@lru_cache
def font_families() -> tuple[str, ...]:
    """The installed font families, in the order in which they are searched for a letter."""
    installed = set(fontManager.get_font_names())
    return (_OWN, *(name for name in _OTHERS if name in installed))


def use_installed_fonts() -> None:
    """Let figures use :func:`font_families` from now on, unless a family was chosen before."""
    if mpl.rcParams["font.family"] == mpl.rcParamsDefault["font.family"]:
        mpl.rcParams["font.family"] = list(font_families())
        # Many have no bold letters; these warnings would only fill the log.
        logging.getLogger("matplotlib.font_manager").addFilter(lambda record: "font weight" not in record.getMessage())


@lru_cache(maxsize=4096)
def font_file(text: str) -> Path:
    """The first font file that has every letter of a text; matplotlib's own if none has."""
    files = [Path(findfont(FontProperties(family=[name]))) for name in font_families()]
    wanted = {ord(letter) for letter in text if not letter.isspace()}
    return next((file for file in files if wanted <= _letters(file)), files[0])


@lru_cache
def _letters(file: Path) -> frozenset[int]:
    return frozenset(FT2Font(str(file)).get_charmap())


use_installed_fonts()


# Figures


def class_figure(title: str, *, right: float, bottom: float = 0.12) -> tuple[Figure, Axes]:
    """A figure of fixed size (9 x 5 inches) and margins, with one pair of axes."""
    figure = Figure(figsize=(9, 5), dpi=120)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.09, bottom, right - 0.09, 0.91 - bottom))
    axes.set_title(title, fontsize=11)
    axes.grid(color="#DDDDDD", linewidth=0.6, zorder=0)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def legend(axes: Axes, handles: Sequence[object], title: str) -> None:
    """A legend to the right of the axes, in smaller letters when it is long."""
    small = 7 if len(handles) > 16 else 8
    axes.legend(
        handles=handles,
        title=title,
        title_fontsize=8,
        fontsize=small,
        loc="upper left",
        bbox_to_anchor=(1.01, 1.0),
        frameon=False,
        borderaxespad=0,
    )


def bin_colors(count: int) -> list[Color]:
    """From dark (rarest) to light; without the palest end of the map, which is hard to see on white."""
    return [tuple(color) for color in mpl.colormaps["viridis"](np.linspace(0.0, 0.87, max(count, 1)))[:count]]


def bin_color(colors: Sequence[Color], number: int) -> Color | str:
    """The colour of a bin counted from 0; grey for -1, no bin."""
    return colors[number] if number >= 0 else NO_BIN


def decades(values: NDArray[np.floating]) -> tuple[float, float]:
    """The whole powers of ten (at least one decade) around what is above 0."""
    positive = values[values > 0]
    if len(positive) == 0:
        return 1.0, 10.0
    low = np.floor(np.log10(positive.min()))
    high = max(np.ceil(np.log10(positive.max() * 1.05)), low + 1)
    return float(10.0**low), float(10.0**high)


def shortened(name: str, length: int = 24) -> str:
    """The name as text of a figure, cut with an ellipsis where it is longer than ``length``.

    Dollar signs are escaped: matplotlib would read ``US$ or CA$`` as a formula.
    """
    text = name if len(name) <= length else f"{name[: length - 1]}…"
    return text.replace("$", r"\$")


def name_points(
    axes: Axes, x: NDArray[np.floating], y: NDArray[np.floating], names: Sequence[str], *, order: Sequence[int] = ()
) -> None:
    """Write each name at the first free position around its point; leave it out where there is none.

    ``order``: the points to name, the most important first; empty: all. Free is what no name, point or horizontal line
    covers.
    """
    frame = axes.get_window_extent()
    points = axes.transData.transform(np.column_stack([x, y])) if len(x) else np.zeros((0, 2))
    others = [Bbox.from_bounds(px - 5, py - 5, 10, 10) for px, py in points]
    flat = [line for line in axes.get_lines() if np.ptp(np.asarray(line.get_ydata(), dtype=np.float64)) == 0]
    taken = [line.get_window_extent().padded(1) for line in flat]
    sides = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))
    offsets = [(dx * distance, dy * distance) for distance in (5, 12) for dx, dy in sides]
    for number in order if len(order) else range(len(names)):
        for dx, dy in offsets:
            text = axes.annotate(
                shortened(names[number]),
                (x[number], y[number]),
                xytext=(dx, dy),
                textcoords="offset points",
                fontsize=7.5,
                ha="left" if dx > 0 else "right" if dx < 0 else "center",
                va="bottom" if dy > 0 else "top" if dy < 0 else "center",
                path_effects=[withStroke(linewidth=2, foreground="white")],
            )
            box = text.get_window_extent()
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            if inside and not any(box.overlaps(one) for one in [*taken, *others[:number], *others[number + 1 :]]):
                taken.append(box)
                break
            text.remove()
