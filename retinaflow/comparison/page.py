"""A comparison as one HTML page: no network, no other file, readable on a phone and on paper.

The tables are written as HTML, so that the page can be read and printed without its script; the script (in
``comparison.html``, without a library) only sorts and searches. Everything that comes from data or a user (class names,
run names, settings) is escaped by the template engine. About 300 bytes per class and 20 kB per sample picture.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from retinaflow.comparison.comparison import Comparison, Side
from retinaflow.comparison.difference_figure import difference_vs_frequency
from retinaflow.comparison.wording import extremes, group_name, verdict

MOST_LISTED = 8
FIGURE_DPI = 110


@dataclass(frozen=True)
class RunNote:
    """What the page says of one run."""

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
    """A picture of an object that one side finds and the other misses, with its text."""

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
    """(letter that finds, letter that misses) -> pictures."""
    remarks: Sequence[str]
    """What the reader must know: classes left out, why there are no pictures."""


def comparison_page(comparison: Comparison, notes: PageNotes) -> str:
    """The page as text."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(ap=_ap, signed=_signed, group=group_name, glyph=_glyph, p=_p)
    later = comparison.sides[1:]
    order = comparison.groups.set_index("group", drop=False)
    first = [name for name in ("mAP", "mAP_rare", "mAP_common", "mAP_frequent") if name in order.index]
    groups = order.loc[[*first, *(name for name in order.index if name not in first)]]
    return environment.get_template("page.html").render(
        comparison=comparison,
        notes=notes,
        later=later,
        many=len(later) > 1,
        verdicts={side.letter: verdict(comparison, side) for side in later},
        pictures={side.letter: _pictures(comparison.classes, side) for side in later},
        helped={side.letter: _records(extremes(comparison.classes, side.letter, 1, MOST_LISTED)) for side in later},
        hurt={side.letter: _records(extremes(comparison.classes, side.letter, -1, MOST_LISTED)) for side in later},
        groups=_records(groups),
        classes=_records(comparison.classes),
        reach={"groups": _reach(groups, later), "classes": _reach(comparison.classes, later)},
        settings=notes.settings.to_dict("records"),
        samples=[
            (finder, other, [(picture, _data_url(picture.jpeg, "jpeg")) for picture in pictures])
            for (finder, other), pictures in notes.samples.items()
        ],
    )


def _records(table: pd.DataFrame) -> list[dict[str, object]]:
    return [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]


def _pictures(table: pd.DataFrame, side: Side) -> dict[str, str]:
    drawn = {"wide": False, "narrow": True}
    return {name: _png(difference_vs_frequency(table, side.letter, narrow=narrow)) for name, narrow in drawn.items()}


def _png(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=FIGURE_DPI, pil_kwargs={"optimize": True})
    return _data_url(buffer.getvalue(), "png")


def _data_url(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


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
