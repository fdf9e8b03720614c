"""Figures about data: drawn for no, few and many classes without a warning, and saying what they should."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.figure import Figure

from retinaflow.reports import data_figures


def texts(figure: Figure) -> list[str]:
    figure.canvas.draw()
    return [text.get_text() for axes in figure.axes for text in axes.texts]


@pytest.mark.parametrize("classes", [1, 3, 500])
def test_every_figure_is_drawn_for_few_and_for_many_classes(classes: int) -> None:
    rng = np.random.default_rng(0)
    names = [f"class number {k} of a long name" for k in range(classes)]
    counts = rng.integers(0, 10**6, classes)
    bins = rng.integers(-1, 7, classes)
    shown = min(classes, 20)
    for figure in (
        data_figures.tail(np.linspace(0, 1, classes + 1)),
        data_figures.boxes_per_image(rng.integers(0, 700 if classes == 500 else 9, 1000)),
        data_figures.box_sizes(rng.random(1000) * 500, rng.integers(0, 7, 1000), image_size=512),
        data_figures.shapes(rng.random(50) + 0.5, [(448, 576)] * min(classes, 7), counts[:7], rng.random(50) + 0.5),
        data_figures.cooccurrence(rng.random((shown, shown)), names[:shown], names[:shown], title="Together"),
        data_figures.label_coverage(counts, counts[::-1], bins, names),
        data_figures.group_of(rng.random(classes), counts, names),
    ):
        figure.canvas.draw()


def test_figures_of_nothing_are_empty_and_no_error() -> None:
    none, no_ints = np.zeros(0), np.zeros(0, dtype=np.int64)
    for figure in (
        data_figures.tail(np.zeros(1)),
        data_figures.boxes_per_image(no_ints),
        data_figures.box_sizes(none, no_ints, image_size=64),
        data_figures.group_of(none, no_ints, []),
    ):
        figure.canvas.draw()


def test_the_tail_says_what_the_rarest_half_holds() -> None:
    # Boxes 1, 1, 2, 6: the rarest half holds 2 of 10.
    assert "the rarest 50% of the classes\nhold 20.0% of the boxes" in texts(
        data_figures.tail(np.array([0, 0.1, 0.2, 0.4, 1.0]))
    )


def test_cells_hold_per_cent_and_nothing_below_a_half() -> None:
    found = texts(data_figures.cooccurrence(np.array([[1, 0.25], [0.004, 1]]), ["a", "b"], ["a", "b"], title="t"))
    assert found == ["100", "25", "100"]


def test_the_bars_of_group_of_carry_the_number_of_boxes() -> None:
    assert texts(data_figures.group_of(np.array([0.0, 0.5, np.nan]), np.array([5, 8, 0]), ["a", "b", "c"])) == ["4"]
