"""The page of sections: everything from data is escaped, numbers sort by their value, missing ones are empty."""

from __future__ import annotations

import re

import pandas as pd

from retinaflow.reports.page import Report


def test_names_from_data_are_text_on_the_page_and_never_markup() -> None:
    page = Report("<b>title", "a & b")
    page.section("<script>", "x < y")
    page.table(pd.DataFrame({"<i>class": ["<img src=x onerror=1>"], "n": [0.5], "none": [float("nan")]}))
    html = page.html()
    assert re.findall(r"<(?:img|b|i)\b", html) == []
    assert html.count("<script>") == 1
    assert "&lt;script&gt;" in html
    assert "a &amp; b" in html
    assert '<td data-v=""></td>' in html


def test_a_number_is_shown_in_short_and_sorted_in_full() -> None:
    page = Report("title", "")
    page.table(pd.DataFrame({"n": [12345.0, 0.123456]}))
    assert '<td data-v="12345.0">12,345</td>' in page.html()
    assert '<td data-v="0.123456">0.123</td>' in page.html()


def test_a_page_needs_nothing_but_itself() -> None:
    page = Report("title", "")
    page.section("one")
    assert re.findall(r'(?:src|href)="([^"]+)"', page.html()) == ["#s1"]
    assert not re.search(r"@import|url\(|<link", page.html())
