"""The report of ``compare``, clicked through in Chromium: one file that asks nothing of a network."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from browser_pages import NEEDS_BROWSER, browser, open_alone, page, screenshot
from PIL import Image
from simulated_runs import run, world

from retinaflow.comparison.comparison import Resampling, Side, compare_runs
from retinaflow.comparison.comparison_page import PageNotes, RunNote, SampleImage, comparison_page

__all__ = ["browser", "page"]
pytestmark = NEEDS_BROWSER
MISSED = "Birch 31"
_BUFFER = BytesIO()
Image.new("RGB", (300, 300), "teal").save(_BUFFER, "JPEG")
JPEG = _BUFFER.getvalue()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of 500 classes."""
    made = world(500, 1500, boxes_per_image=8)
    sides = [
        Side("A", "sampling=uniform", (run(made, 0.0, seed=1),)),
        Side("B", "sampling=binned", (run(made, np.linspace(1.0, 4.0, 500), seed=2),)),
    ]
    notes = PageNotes(
        "sampling=binned against sampling=uniform",
        [RunNote(side.letter, side.name, side.letter * 32, "0", None, "") for side in sides],
        pd.DataFrame([{"setting": "sampling", "A": "uniform", "B": "binned"}]),
        samples={("A", "B"): [SampleImage(MISSED, "A 0.90; B has nothing there. Image i1", JPEG)], ("B", "A"): []},
        remarks=[],
    )
    path = tmp_path_factory.mktemp("report") / "comparison.html"
    path.write_text(comparison_page(compare_runs(sides, Resampling(resamples=100)), notes), encoding="utf-8")
    return path


def test_the_report_is_sorted_and_searched_at_500_classes(page: Any, report: Path) -> None:
    trouble = open_alone(page, report)
    rows = page.locator("#classes tbody tr:visible")
    assert rows.count() == 500
    page.get_by_role("button", name="B - A").click()
    differences = page.locator("#classes tbody tr").evaluate_all(
        "rows => rows.map(row => parseFloat(row.cells[6].textContent)).filter(value => !isNaN(value))"
    )
    assert differences == sorted(differences, reverse=True)
    page.get_by_role("button", name="B - A").click()
    assert page.locator("#classes tbody tr").first.locator("td").nth(6).inner_text().startswith("-")
    page.get_by_label("search classes").fill("birch 3")
    assert {text.split("\t")[0] for text in rows.all_inner_texts()} >= {"Birch 3", "Birch 30"}
    assert page.locator("#count").inner_text() == f"{rows.count()} of 500"
    page.get_by_label("search classes").fill("")
    page.get_by_label("only significant differences").check()
    assert 0 < rows.count() < 500
    assert trouble == []


@pytest.mark.parametrize("width", [360, 390, 768, 1280])
def test_the_report_fits_every_width(page: Any, report: Path, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    assert open_alone(page, report) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    body = page.evaluate("parseFloat(getComputedStyle(document.body).fontSize)")
    assert body >= 15
    if width == 390:
        screenshot(page, "report_phone")


def test_the_report_prints_every_class(page: Any, report: Path) -> None:
    open_alone(page, report)
    page.emulate_media(media="print")
    assert page.locator("#classes tbody tr:visible").count() == 500
    assert not page.get_by_label("search classes").is_visible()
    assert page.pdf(format="A4").startswith(b"%PDF")


def test_from_a_class_one_gets_to_the_images_where_it_is_missed(page: Any, report: Path) -> None:
    trouble = open_alone(page, report)
    assert page.locator("#classes .missed").count() == 1
    page.get_by_label("search classes").fill(MISSED)
    page.locator("#classes .missed").click()
    figure = page.locator(".samples figure.chosen")
    assert figure.locator("b").inner_text() == MISSED
    box = figure.bounding_box()
    assert 0 <= box["y"] <= 900 - box["height"]
    assert trouble == []
