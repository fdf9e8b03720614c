"""Pictures of a search: what is drawn of which trials, and the cases with hardly anything to draw."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from retinaflow.reports.search_figures import contour, history, importance, pareto, slices


def trials(number: int, *, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    gamma = rng.uniform(0.5, 4, number)
    balance = np.where(np.arange(number) % 3 == 0, np.nan, rng.uniform(0, 1, number))
    return pd.DataFrame(
        {
            "trial": np.arange(number),
            "state": "complete",
            "keeps_floor": True,
            "objective": 0.3 - 0.02 * (gamma - 2) ** 2 + rng.normal(0, 0.01, number),
            "objective_2": rng.uniform(0.1, 0.2, number),
            "sampling": np.where(np.isnan(balance), "uniform", "binned"),
            "balance": balance,
            "focal_gamma": gamma,
            "lr": 10 ** rng.uniform(-4, -2, number),
        }
    )


def drawn(figure: Figure) -> np.ndarray:
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())  # type: ignore[attr-defined]


def test_the_best_so_far_never_falls_and_leaves_out_what_misses_the_floor() -> None:
    table = trials(6)
    table["objective"] = [0.1, 0.9, 0.2, 0.15, 0.4, 0.3]
    table.loc[1, "keeps_floor"] = False
    axes = history(table, "objective", name="val/mAP").axes[0]
    (line,) = [line for line in axes.lines if line.get_label() == "best so far"]
    np.testing.assert_allclose(np.asarray(line.get_ydata(), dtype=float), [0.1, 0.2, 0.2, 0.4, 0.4])


def test_trials_without_a_value_are_counted_by_state() -> None:
    table = trials(6)
    table.loc[1:3, "state"], table.loc[4, "state"] = "pruned", "fail"
    table.loc[1:4, "objective"] = np.nan
    labels = history(table, "objective", name="val/mAP").axes[0].get_legend_handles_labels()[1]
    assert {"pruned (3)", "failed (1)"} <= set(labels)


def test_a_slice_shows_only_the_trials_that_had_the_parameter() -> None:
    table = trials(9)
    figure = slices(table, "objective", ["balance", "sampling", "lr"], name="val/mAP", log=["lr"])
    counts = [len(axes.collections[0].get_offsets()) for axes in figure.axes]
    assert counts == [6, 9, 9]
    assert [axes.get_xscale() for axes in figure.axes] == ["linear", "linear", "log"]


def test_the_most_important_parameter_is_the_top_bar() -> None:
    axes = importance({"focal_gamma": 0.7, "balance": 0.3}, name="val/mAP").axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["balance", "focal_gamma"]


def test_the_front_is_numbered() -> None:
    axes = pareto(trials(8), [2, 5], names=("val/mAP", "val/mAP_rare")).axes[0]
    assert {text.get_text() for text in axes.texts} == {"2", "5"}


@pytest.mark.parametrize("number", [1, 3, 40])
def test_few_trials_can_be_drawn_too(number: int) -> None:
    table = trials(number)
    for figure in (
        history(table, "objective", name="val/mAP"),
        slices(table, "objective", ["focal_gamma", "sampling"], name="val/mAP"),
        contour(table, "objective", ("focal_gamma", "lr"), name="val/mAP", log=["lr"]),
        pareto(table, [0], names=("val/mAP", "val/mAP_rare")),
    ):
        assert drawn(figure).std() > 0
