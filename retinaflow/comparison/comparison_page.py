"""A comparison of runs as one HTML page: the answer in sentences, then settings, groups, figures, samples, classes.

The page follows :mod:`~retinaflow.reports.page`: it needs nothing but itself, and its script only sorts and searches.
About 300 bytes per class and 20 kB per sample image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from retinaflow.comparison.comparison import Comparison, Side
from retinaflow.comparison.conclusion import conclusion, extremes, group_name
from retinaflow.comparison.difference_figure import difference_vs_frequency
from retinaflow.reports.page import data_url, figure_url, render

MOST_LISTED = 8
FIGURE_DPI = 110


@dataclass(frozen=True)
class RunNote:
    """One run on the page."""

    letter: str
    name: str
    run_id: str
    seed: str
    link: str | None
    """Address of the run's page, or None when there is no server."""
    about: str
    """When it was made and from which code."""


@dataclass(frozen=True)
class SampleImage:
    """An object that one side finds and the other misses: its image and its text."""

    class_name: str
    text: str
    jpeg: bytes


@dataclass(frozen=True)
class PageNotes:
    """What the page shows besides the numbers."""

    title: str
    runs: Sequence[RunNote]
    settings: pd.DataFrame
    """Settings that differ: ``setting``, then a column per letter."""
    samples: Mapping[tuple[str, str], Sequence[SampleImage]]
    """(letter that finds, letter that misses) -> their images."""
    remarks: Sequence[str]
    """What the reader must know: classes left out, why there are no sample images."""


def comparison_page(comparison: Comparison, notes: PageNotes) -> str:
    """The page as text."""
    later = comparison.sides[1:]
    order = comparison.groups.set_index("group", drop=False)
    first = [name for name in ("mAP", "mAP_rare", "mAP_common", "mAP_frequent") if name in order.index]
    groups = order.loc[[*first, *(name for name in order.index if name not in first)]]
    return render(
        "comparison.html",
        filters={"ap": _ap, "signed": _signed, "group": group_name, "glyph": _glyph, "p": _p},
        comparison=comparison,
        notes=notes,
        later=later,
        many=len(later) > 1,
        conclusions={side.letter: conclusion(comparison, side) for side in later},
        figures={side.letter: _figures(comparison.classes, side) for side in later},
        helped={side.letter: _records(extremes(comparison.classes, side.letter, 1, MOST_LISTED)) for side in later},
        hurt={side.letter: _records(extremes(comparison.classes, side.letter, -1, MOST_LISTED)) for side in later},
        groups=_records(groups),
        classes=_records(comparison.classes),
        reach={"groups": _reach(groups, later), "classes": _reach(comparison.classes, later)},
        settings=notes.settings.to_dict("records"),
        samples=[
            (finder, other, [(image, data_url(image.jpeg, "jpeg")) for image in images])
            for (finder, other), images in notes.samples.items()
        ],
        sampled={image.class_name for images in notes.samples.values() for image in images},
    )


def _records(table: pd.DataFrame) -> list[dict[str, object]]:
    return [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]


def _figures(table: pd.DataFrame, side: Side) -> dict[str, str]:
    return {
        name: figure_url(difference_vs_frequency(table, side.letter, narrow=narrow), dpi=FIGURE_DPI)
        for name, narrow in {"wide": False, "narrow": True}.items()
    }


def _ap(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:.3f}"


def _signed(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:+.3f}"


def _p(value: float) -> str:
    return "" if np.isnan(value) else f"p {value:.2g}"


def _reach(table: pd.DataFrame, sides: Sequence[Side]) -> float:
    """The largest end of an interval that is drawn to the edge; rarer, wider ones are cut off."""
    ends = [table[f"{side.letter}_difference_{end}"].abs() for side in sides for end in ("low", "high")]
    values = pd.concat(ends).dropna()
    return float(max(values.quantile(0.95), 0.02)) if len(values) else 1.0


def _glyph(row: Mapping[str, float], letter: str, reach: float) -> str:
    """Path data of an interval on a line from -50 to 50, with the estimate as a short bar."""
    names = (f"{letter}_difference", f"{letter}_difference_low", f"{letter}_difference_high")
    if np.isnan([row[name] for name in names]).any():
        return ""
    at, low, high = (round(float(np.clip(row[name] / reach, -1, 1)) * 50) for name in names)
    return f"M{low} 6H{high}M{at} 2v8"
