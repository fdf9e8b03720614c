"""The page to look through: which boxes are true and false positives and missed, on which images, and its script."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from browser_pages import NEEDS_BROWSER, browser, open_alone, page, screenshot

from retinaflow.data.index import FLAGS, AnnotationIndex
from retinaflow.data.training_data import load_training_data
from retinaflow.detections import Detections
from retinaflow.metric.challenge import Evaluator
from retinaflow.metric.matches import Matches
from retinaflow.reports.detections_page import KnownBoxes, detections_page, images_with_errors
from retinaflow.settings.commands import TrainConfig
from retinaflow.settings.resolve import resolve
from retinaflow.taxonomy import Taxonomy

__all__ = ["browser", "page"]
BUS_IMAGE = 5
"""The only validation image with a bus."""
NASTY = "</script><img src=x onerror=alert(1)>"


@pytest.fixture
def index(tiny_dataset: Callable[..., Path]) -> AnnotationIndex:
    return load_training_data(resolve(TrainConfig, {"data": str(tiny_dataset())})).evaluated


def _box(index: AnnotationIndex, image: int, mid: str) -> Any:
    rows = range(int(index.box_start[image]), int(index.box_start[image + 1]))
    return next(index.boxes[row] for row in rows if index.taxonomy.ids[index.labels[row]] == mid)


def _found(index: AnnotationIndex) -> Detections:
    """On the image of the bus: the bus at 0.6, and another bus where there is none at 0.8."""
    bus = index.taxonomy.index_of["/m/0bus"]
    boxes = np.array([_box(index, BUS_IMAGE, "/m/0bus"), [0.01, 0.01, 0.05, 0.05]], dtype=float)
    images = np.full(2, BUS_IMAGE, dtype=np.int32)
    return Detections(images, np.full(2, bus, dtype=np.int32), np.array([0.6, 0.8]), boxes)


def _matches(index: AnnotationIndex, found: Detections) -> Matches:
    evaluator = Evaluator(index)
    evaluator.add(found)
    return evaluator.matches()


def _groups(text: str) -> list[tuple[str, str]]:
    """Kind and score of the boxes of a page."""
    parts = text.split('data-k="')[1:]
    return sorted((part.split('"')[0], part.split('data-s="')[1].split('"')[0]) for part in parts)


def _written(index: AnnotationIndex, found: Detections, known: KnownBoxes | None) -> str:
    text = detections_page(index, [BUS_IMAGE], found, known, title="Boxes", score=0.5)
    assert text is not None
    return text


def test_a_box_is_found_from_the_score_of_its_true_positive_on(index: AnnotationIndex) -> None:
    found = _found(index)
    boxes = _groups(_written(index, found, KnownBoxes(index, index.labels, _matches(index, found))))
    assert ("tp", "0.6000") in boxes
    assert ("fp", "0.8000") in boxes
    # The bus is found by the true positive; whatever else the image has is never found.
    scores = [score for kind, score in boxes if kind == "gt"]
    assert scores.count("0.6000") == 1
    assert set(scores) <= {"0.6000", "-1.0000"}


def test_ground_truth_of_another_order_of_images_and_classes_gives_the_same_boxes(index: AnnotationIndex) -> None:
    found = _found(index)
    expected = _groups(_written(index, found, KnownBoxes(index, index.labels, _matches(index, found))))
    classes = np.array([index.taxonomy.index_of[mid] for mid in reversed(index.taxonomy.ids)])
    turned = index.with_classes(classes)
    one = index.take(np.array([BUS_IMAGE]))
    moved = _on_image(found, 0)
    text = detections_page(one, [0], moved, KnownBoxes.of(turned, moved, one), title="Boxes", score=0.5)
    assert text is not None
    assert _groups(text) == expected


def _on_image(found: Detections, image: int) -> Detections:
    """The detections on another image."""
    return Detections(np.full(len(found), image, dtype=np.int32), found.class_index, found.score, found.boxes)


def test_the_slider_begins_at_the_lowest_score_of_a_page_with_group_of_boxes_too(index: AnnotationIndex) -> None:
    # Group-of boxes have no score of their own.
    grouped = replace(index, flags=np.full_like(index.flags, 1 << FLAGS.index("IsGroupOf")))
    found = _found(grouped)
    text = _written(grouped, found, KnownBoxes(grouped, grouped.labels, _matches(grouped, found)))
    assert "group" in dict(_groups(text))
    assert 'id="score" min="0.05"' in text


def test_without_ground_truth_nothing_is_true_or_false(index: AnnotationIndex) -> None:
    text = _written(index, _found(index), None)
    assert _groups(text) == [("other", "0.6000"), ("other", "0.8000")]
    assert "false positives" not in text.split("<script>")[0]


@pytest.mark.parametrize("name", ["without a file", "not opened"])
def test_an_image_that_cannot_be_read_is_left_out(name: str, index: AnnotationIndex) -> None:
    changed = replace(index, files=np.array(["none.jpg"] * len(index)))
    if name == "not opened":
        changed = replace(index, sizes=np.zeros_like(index.sizes))
    assert detections_page(changed, [BUS_IMAGE], _found(index), None, title="Boxes", score=0.5) is None


def test_names_are_text(index: AnnotationIndex) -> None:
    names = tuple(NASTY for _ in index.taxonomy.ids)
    nasty = replace(index, taxonomy=Taxonomy(index.taxonomy.ids, names, index.taxonomy.hierarchy))
    assert NASTY not in _written(nasty, _found(index), None)


@pytest.mark.parametrize(
    ("score", "bus_first"), [(0.9, True), (0.3, False)], ids=["the bus is missed", "the bus is found"]
)
def test_images_with_missed_boxes_of_the_rarest_classes_come_first(
    score: float, bus_first: bool, index: AnnotationIndex
) -> None:
    table = pd.DataFrame({"class_id": ["/m/0bus", "/m/0car", "/m/0tree"]})
    chosen = images_with_errors(_matches(index, _found(index)), index, table, count=4, score=score)
    assert len(chosen) == len(set(chosen)) == 4
    assert (chosen[0] == BUS_IMAGE) == bus_first


class TestInTheBrowser:
    """Slider, class filter and kinds change what is shown."""

    pytestmark = NEEDS_BROWSER

    def test_slider_and_filters_change_what_is_shown(self, page: Any, index: AnnotationIndex, tmp_path: Path) -> None:
        found = _found(index)
        known = KnownBoxes(index, index.labels, _matches(index, found))
        text = detections_page(index, [BUS_IMAGE, 0], found, known, title="Boxes", score=0.5)
        path = tmp_path / "detections.html"
        path.write_text(str(text), encoding="utf-8")
        trouble = open_alone(page, path)
        bus = index.taxonomy.index_of["/m/0bus"]

        def shown() -> Mapping[str, int]:
            names = page.locator(".images figure:not([hidden]) g").evaluate_all(
                "all => all.filter(one => one.style.display !== 'none').map(one => one.getAttribute('class'))"
            )
            return {name: names.count(name) for name in set(names)}

        def slide(score: float) -> None:
            page.locator("#score").evaluate(
                "(slider, value) => { slider.value = value; slider.dispatchEvent(new Event('input')) }", str(score)
            )

        everything = shown()
        assert (everything["tp"], everything["fp"], everything["found"]) == (1, 1, 1)
        page.select_option("#class", str(bus))
        assert shown() == {"tp": 1, "fp": 1, "found": 1}
        assert page.locator(".images figure:visible").count() == 1
        slide(0.7)
        assert shown() == {"fp": 1, "missed": 1}
        assert (
            page.locator("#count").inner_text() == "1 images; 0 true positives, 1 false positives, 1 of 1 boxes missed"
        )
        page.select_option("#show", "missed")
        assert shown() == {"missed": 1}
        slide(0.5)
        assert page.locator(".images figure:visible").count() == 0
        page.select_option("#show", "fp")
        assert shown() == {"fp": 1, "found": 1}
        screenshot(page, "detections_page")
        page.locator(f"#classes tr[data-c='{bus}'] button").click()
        assert page.locator("#class").input_value() == ""
        page.set_viewport_size({"width": 360, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        assert trouble == []
