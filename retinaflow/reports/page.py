"""HTML pages that need nothing but themselves: no network, no other file, readable on a phone and on paper.

All pages extend one template, ``page.html``, which has the style and the script that sorts tables. Everything that
comes from data or a user (class names, run names, settings) is escaped by the template engine. Tables and texts are
written as HTML, so a page can be read and printed without its script; images are embedded as data.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from retinaflow.runs.run import FIGURE_DPI, Run


def render(template: str, *, filters: Mapping[str, Callable[..., Any]] | None = None, **values: object) -> str:
    """A page as text, from a template of this folder, with further filters."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(filters or {})
    return environment.get_template(template).render(**values)


def figure_url(figure: Figure, *, dpi: int = FIGURE_DPI, photographs: bool = False) -> str:
    """A figure as an address that holds its data: PNG, or JPEG for ``photographs``, which take a tenth of the bytes."""
    buffer, kind = BytesIO(), "jpeg" if photographs else "png"
    figure.savefig(buffer, dpi=dpi, format=kind, pil_kwargs={"quality": 82} if photographs else {"optimize": True})
    return data_url(buffer.getvalue(), kind)


def data_url(data: bytes, kind: str) -> str:
    """The bytes of an image file (``png``, ``jpeg``) as an address."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


class Report:
    """A page of sections, built from top to bottom; its figures and tables become files of their own in ``targets``."""

    def __init__(self, title: str, subtitle: str, targets: Sequence[Run] = ()) -> None:
        self.title, self.subtitle, self.targets = title, subtitle, targets
        self._parts: list[dict[str, object]] = []

    def section(self, title: str, text: str = "") -> None:
        """Begin a section with a line of explanation."""
        self._parts.append({"kind": "section", "title": title})
        self.text(text)

    def text(self, text: str) -> None:
        """A paragraph; nothing for an empty text."""
        if text:
            self._parts.append({"kind": "text", "text": text})

    def facts(self, facts: Sequence[tuple[str, str]]) -> None:
        """Numbers that matter most, side by side: (value, what it counts)."""
        self._parts.append({"kind": "facts", "facts": facts})

    def figure(self, figure: Figure, name: str, *, photographs: bool = False) -> None:
        """A figure on the page and as the file ``name``."""
        self._parts.append({"kind": "figure", "url": figure_url(figure, photographs=photographs)})
        for target in self.targets:
            target.log_figure(figure, name)

    def table(self, table: pd.DataFrame, *, tall: bool = False) -> None:
        """A table whose columns sort when clicked; ``tall``: in a frame of its own that scrolls."""
        numeric = [pd.api.types.is_numeric_dtype(table[name]) for name in table]
        rows = [
            [_number(value) if is_number else (str(value), None) for value, is_number in zip(row, numeric, strict=True)]
            for row in table.itertuples(index=False, name=None)
        ]
        heads = [(str(name).replace("_", " "), is_number) for name, is_number in zip(table, numeric, strict=True)]
        self._parts.append({"kind": "table", "heads": heads, "rows": rows, "tall": tall})

    def csv(self, table: pd.DataFrame, name: str) -> None:
        """A table as a file; it is not shown on the page."""
        for target in self.targets:
            target.log_csv(table, name)

    def html(self) -> str:
        """The whole page."""
        return render("sections.html", title=self.title, subtitle=self.subtitle, parts=self._parts)


def _number(value: object) -> tuple[str, str]:
    """(text to show, value to sort by), both empty where the value is missing."""
    if pd.isna(value):  # type: ignore[call-overload]
        return "", ""
    number = float(str(value))
    return f"{number:,.0f}" if number.is_integer() else f"{number:,.3g}", str(number)
