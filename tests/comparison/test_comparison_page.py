"""The page: complete without a network, escaped, small at 500 classes; its picture and its samples."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

import cv2
import numpy as np
import pandas as pd
import pytest
from simulated_runs import run, world

from retinaflow.comparison.comparison import Comparison, Resampling, Side, compare_runs
from retinaflow.comparison.comparison_page import PageNotes, RunNote, SampleImage, comparison_page
from retinaflow.comparison.difference_figure import difference_vs_frequency
from retinaflow.comparison.found_and_missed import FoundObject, best_thresholds, found_and_missed, sample_image
from retinaflow.comparison.stored_matches import StoredMatches
from retinaflow.metric.matches import Kind

MADE = world(7, 60)
FIRST, SECOND = run(MADE, 0.0, seed=1), run(MADE, 1.0, seed=2)
NASTY = '<script>alert("x")</script> & Co'


def _compared(first: StoredMatches = FIRST, second: StoredMatches = SECOND) -> Comparison:
    return compare_runs([Side("A", "lr=0.001", (first,)), Side("B", "lr=0.01", (second,))], Resampling(resamples=100))


def _notes(**changes: object) -> PageNotes:
    notes = PageNotes(
        title="lr=0.01 against lr=0.001",
        runs=[
            RunNote("A", "first", "a" * 32, "0", None, ""),
            RunNote("B", "second", "b" * 32, "0", "http://h/#/b", ""),
        ],
        settings=pd.DataFrame([{"setting": "lr", "A": "0.001", "B": "0.01"}]),
        samples={},
        remarks=[],
    )
    return replace(notes, **changes)  # type: ignore[arg-type]


class _Links(HTMLParser):
    """Every address and every tag of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]


def test_the_page_needs_nothing_but_itself() -> None:
    page = comparison_page(_compared(), _notes())
    links = _Links(page)
    assert "link" not in links.tags
    assert {address for address in links.addresses if not address.startswith("data:")} == {"http://h/#/b"}
    assert not re.search(r"@import|url\(", page)


def test_the_page_answers_first_and_names_settings_runs_and_every_class() -> None:
    page = comparison_page(_compared(), _notes(remarks=["Left out: Nothing."]))
    answer, settings, classes = (page.index(text) for text in ("mAP goes from", "setting that differs", "Every class"))
    assert answer < settings < classes
    assert "a" * 32 in page
    assert "Left out: Nothing." in page
    for name in FIRST.class_names:
        assert f">{name}<" in page[classes:]


def test_names_of_users_are_escaped() -> None:
    names = (NASTY, *FIRST.class_names[1:])
    kept = [replace(one, class_names=names) for one in (FIRST, SECOND)]
    sample = SampleImage(NASTY, NASTY, b"jpeg")
    notes = _notes(title=NASTY, remarks=[NASTY], samples={("B", "A"): [sample]})
    page = comparison_page(_compared(*kept), replace(notes, runs=[RunNote("A", NASTY, NASTY, NASTY, None, NASTY)]))
    assert NASTY not in page
    assert page.count("&lt;script&gt;alert(&#34;x&#34;)&lt;/script&gt; &amp; Co") >= 8
    assert _Links(page).tags.count("script") == 1


def test_five_hundred_classes_stay_light() -> None:
    made = world(500, 500, boxes_per_image=8)
    found = _compared(run(made, 0.0, seed=1), run(made, 0.5, seed=2))
    page = comparison_page(found, _notes())
    assert len(page.encode()) < 600_000
    assert page.count('<tr><td class="t">') >= 500


@pytest.mark.parametrize("narrow", [False, True], ids=["wide", "narrow"])
def test_the_picture_is_drawn_for_any_number_of_classes(narrow: bool) -> None:
    table = _compared().classes
    for rows in (table, table.iloc[:1], table.iloc[:0], table.assign(train_images=0, bin=pd.NA)):
        figure = difference_vs_frequency(rows, "B", narrow=narrow)
        figure.savefig("/dev/null", format="png")
        assert figure.get_size_inches()[0] == (4.2 if narrow else 9)


# What one finds and the other misses


def test_the_working_point_is_the_score_of_the_largest_f1() -> None:
    points = best_thresholds(FIRST)
    matches = FIRST.matches
    for k in range(3):
        rows = matches.class_index == k
        score, right = matches.score[rows], matches.kind[rows] == Kind.TRUE_POSITIVE
        ground_truths = matches.num_truths[k]
        by_hand = {s: 2 * right[score >= s].sum() / ((score >= s).sum() + ground_truths) for s in score}
        assert by_hand[points[k]] == pytest.approx(max(by_hand.values()))


def test_samples_are_found_by_one_and_missed_by_the_other() -> None:
    samples = found_and_missed(SECOND, FIRST, MADE.annotations, class_ids=FIRST.class_ids, limit=10)
    assert len(samples) == 10
    assert len({sample.image for sample in samples}) == 10
    # A class a round: the first seven are of seven classes.
    assert len({sample.class_id for sample in samples[:7]}) == 7
    for sample in samples:
        k = FIRST.class_ids.index(sample.class_id)
        for kept, finds in ((SECOND, True), (FIRST, False)):
            matches = kept.matches
            rows = (matches.class_index == k) & (matches.image_index == sample.image)
            rows &= (matches.kind == Kind.TRUE_POSITIVE) & (matches.score >= best_thresholds(kept)[k])
            near = np.abs(kept.boxes[rows] - sample.gt_box).max(axis=1) < 0.01
            assert near.any() == finds


def test_a_run_misses_nothing_that_it_finds_itself() -> None:
    assert found_and_missed(FIRST, FIRST, MADE.annotations, class_ids=FIRST.class_ids, limit=5) == []


def test_what_the_other_says_instead_is_told() -> None:
    samples = found_and_missed(SECOND, FIRST, MADE.annotations, class_ids=FIRST.class_ids, limit=60)
    told = [sample.instead for sample in samples if sample.instead]
    assert told
    assert all(re.fullmatch(r"\w+ \d+ [01]\.\d\d", text) for text in told)


@pytest.mark.parametrize("shape", [(40, 600), (600, 40), (30, 30), (900, 700)])
def test_a_sample_picture_is_small_and_shows_the_object(shape: tuple[int, int]) -> None:
    pixels = np.full((*shape, 3), 200, dtype=np.uint8)
    box = np.array([0.7, 0.1, 1.0, 0.4])
    data = sample_image(pixels, FoundObject("/m/0", 0, box, box, 0.5))
    shown = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    assert shown is not None
    assert max(shown.shape[:2]) == 300
    assert len(data) < 30_000
    # Orange of the detection, as BGR.
    assert (np.abs(shown.astype(int) - [0, 159, 230]).max(axis=2) < 60).any()
