"""A self-contained HTML page of sections, pictures and tables: no script from elsewhere, no request, opens from disk.

Pictures are embedded as data. Every text that comes from data (class names, ids) is escaped.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from io import BytesIO

import pandas as pd
from matplotlib.figure import Figure

from retinaflow.runs.run import FIGURE_DPI, Run


@dataclass
class Page:
    """Collects sections; :meth:`html` gives the document."""

    title: str
    subtitle: str
    _parts: list[str] = field(default_factory=list)
    _sections: list[str] = field(default_factory=list)

    def section(self, title: str, text: str = "") -> None:
        """Begin a section with a line of explanation."""
        self._sections.append(title)
        self._parts.append(f'<h2 id="s{len(self._sections)}">{escape(title)}</h2>')
        self.text(text)

    def text(self, text: str) -> None:
        """A paragraph; nothing for an empty text."""
        if text:
            self._parts.append(f"<p>{escape(text)}</p>")

    def figures(self, facts: Sequence[tuple[str, str]]) -> None:
        """Key figures side by side: (value, what it counts)."""
        cards = "".join(f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>" for value, name in facts)
        self._parts.append(f'<div class="facts">{cards}</div>')

    def picture(self, figure: Figure, *, photographs: bool = False) -> None:
        """A figure, as PNG; one of ``photographs`` as JPEG, a tenth of the size."""
        buffer, kind = BytesIO(), "jpeg" if photographs else "png"
        figure.savefig(buffer, dpi=FIGURE_DPI, format=kind, pil_kwargs={"quality": 82} if photographs else {})
        data = base64.b64encode(buffer.getvalue()).decode()
        self._parts.append(f'<img alt="" src="data:image/{kind};base64,{data}">')

    def table(self, table: pd.DataFrame, *, tall: bool = False) -> None:
        """A table whose columns sort when clicked; ``tall``: in a frame of its own that scrolls."""
        numeric = [pd.api.types.is_numeric_dtype(table[name]) for name in table]
        head = "".join(f"<th>{escape(str(name)).replace('_', ' ')}</th>" for name in table)
        rows = (
            "<tr>" + "".join(_cell(value, right) for value, right in zip(row, numeric, strict=True)) + "</tr>"
            for row in table.itertuples(index=False, name=None)
        )
        body = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
        self._parts.append(f'<div class="{"tall" if tall else "wide"}">{body}</div>')

    def html(self) -> str:
        """The whole document."""
        links = "".join(f'<a href="#s{n}">{escape(title)}</a>' for n, title in enumerate(self._sections, 1))
        head = f'<meta charset="utf-8"><title>{escape(self.title)}</title><style>{_STYLE}</style>'
        body = f"<h1>{escape(self.title)}</h1><p>{escape(self.subtitle)}</p><nav>{links}</nav>{''.join(self._parts)}"
        return f'<!doctype html><html lang="en"><head>{head}</head><body>{body}<script>{_SORT}</script></body></html>\n'


class Report:
    """The page, and where its pictures and tables go as files of their own."""

    def __init__(self, page: Page, targets: Sequence[Run]) -> None:
        self.page, self.targets = page, targets

    def picture(self, figure: Figure, name: str, *, photographs: bool = False) -> None:
        """A picture on the page and as a file."""
        self.page.picture(figure, photographs=photographs)
        for target in self.targets:
            target.log_figure(figure, name)

    def csv(self, table: pd.DataFrame, name: str) -> None:
        """A table as a file; what of it is on the page is another matter."""
        for target in self.targets:
            target.log_csv(table, name)


def _cell(value: object, right: bool) -> str:
    if not right:
        return f"<td>{escape(str(value))}</td>"
    missing = pd.isna(value)  # type: ignore[call-overload]
    number = float("nan") if missing else float(str(value))
    text = "" if missing else f"{number:,.0f}" if number.is_integer() else f"{number:,.3g}"
    return f'<td class="n" data-v="{"" if missing else number!s}">{text}</td>'


_STYLE = """
body{font:15px/1.5 system-ui,"Liberation Sans",Arial,sans-serif;color:#222;
max-width:1020px;margin:2em auto;padding:0 1em}
h1{margin-bottom:0}h2{margin-top:2em;border-bottom:1px solid #ddd;padding-bottom:.2em}
nav{margin:1em 0}nav a{display:inline-block;margin-right:1.1em;color:#0072B2}
img{max-width:100%;display:block;margin:.6em 0}
.facts{display:flex;flex-wrap:wrap;gap:.6em;margin:1em 0}
.facts div{background:#f2f5f8;border-radius:6px;padding:.5em .9em;min-width:6.5em}
.facts b{display:block;font-size:1.35em}.facts span{color:#555;font-size:.85em}
.wide{overflow-x:auto}.tall{overflow:auto;max-height:32em;border:1px solid #ddd}
table{border-collapse:collapse;font-size:13px}td,th{padding:.18em .6em;text-align:left;white-space:nowrap}
th{white-space:normal;vertical-align:bottom;background:#f2f5f8;
position:sticky;top:0;cursor:pointer}tr:nth-child(even) td{background:#fafafa}
td.n{text-align:right;font-variant-numeric:tabular-nums}
"""
_SORT = """
document.querySelectorAll('th').forEach(th=>th.addEventListener('click',()=>{
 const body=th.closest('table').tBodies[0],n=th.cellIndex,down=th.dataset.down==='1'?-1:1;
 th.dataset.down=down===1?'1':'';
 const key=r=>{const c=r.cells[n];return c.dataset.v===undefined?c.textContent:c.dataset.v===''?-Infinity:+c.dataset.v};
 [...body.rows].sort((a,b)=>{const x=key(a),y=key(b);return (x<y?-1:x>y?1:0)*down}).forEach(r=>body.append(r))}));
"""
