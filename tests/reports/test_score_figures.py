"""Pictures of scores: curves, the rarest classes, what errors cost; the same axes for two runs, at any size."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from scoring_scenes import Found, Scene, Truth
from simulated_population import QUALITIES, draw_runs
from test_class_figures import assert_margin_is_blank, fake_table

from retinaflow.metric.challenge import average_precision, match
from retinaflow.metric.error_analysis import ErrorAnalysis, analyse_errors
from retinaflow.reports.score_figures import (
    CURVES,
    RAREST,
    ROWS,
    error_costs,
    precision_recall,
    precision_recall_curve,
    rarest_classes,
    spread_classes,
)

HERE, FAR = (0.0, 0.0, 0.4, 0.4), (0.6, 0.6, 0.9, 0.9)
SIZES = [1, 3, 20, 500]


def scored_table(count: int, *, seed: int = 0, long: bool = False) -> pd.DataFrame:
    """A table per class with intervals; every seventh class has no ground truth."""
    table = fake_table(count, seed=seed)
    ground_truths = np.where(table["ap"].isna(), 0, np.arange(count) + 1.0)
    names = [f"A rather long class name {k}" if long else f"Class {k}" for k in range(count)]
    ids = [f"/m/{k}" for k in range(count)]
    return table.assign(
        num_truths=ground_truths, class_id=ids, ap_low=table["ap"] * 0.5, ap_high=table["ap"] ** 0.5, **{"class": names}
    )


def analysis_of(table: pd.DataFrame) -> ErrorAnalysis:
    """Errors of made-up prices for the classes of a table."""
    scene = Scene(1, (Truth("a", 0, HERE),))
    ground_truth, detections = scene.annotations(), scene.detections()
    one = analyse_errors(match(detections, ground_truth), detections, ground_truth)
    rows = one.table.iloc[np.r_[0, np.ones(int(table["ap"].notna().sum()), dtype=np.int64)]].reset_index(drop=True)
    known = table[table["ap"].notna()]
    ids, names = [None, *known["class_id"]], ["all classes", *known["class"]]
    return ErrorAnalysis(
        one.error,
        rows.assign(class_id=ids, missed=0.25, num_truths=[0, *known["num_truths"]], **{"class": names}),
        one.confusions,
    )


def axes_of(figure: Figure) -> list[tuple[object, ...]]:
    return [(axes.get_xlim(), axes.get_ylim(), axes.get_position().bounds) for axes in figure.axes]


@pytest.mark.parametrize("count", SIZES)
def test_nothing_is_cut_off_whatever_the_number_of_classes(count: int) -> None:
    table = scored_table(count, long=True)
    assert_margin_is_blank(rarest_classes(table))
    assert_margin_is_blank(error_costs(analysis_of(table), table))


def test_the_rarest_classes_with_truth_stand_on_top_with_their_intervals() -> None:
    table = scored_table(500)
    (axes,) = rarest_classes(table).axes
    shown = table[table["ap"].notna()].head(RAREST)
    np.testing.assert_allclose([bar.get_width() for bar in axes.patches], shown["ap"])
    name, images, ground_truths = shown.iloc[0][["class", "train_images", "num_truths"]]
    assert axes.get_yticklabels()[0].get_text() == f"{name}: {images:,}, {ground_truths:.0f}"
    segments = np.array([path.vertices for path in axes.collections[-1].get_paths()])
    np.testing.assert_allclose(segments[:, 0, 0], shown["ap_low"])
    np.testing.assert_allclose(segments[:, 1, 0], shown["ap_high"])
    assert axes.get_ylim()[0] > axes.get_ylim()[1]


@pytest.mark.parametrize("count", SIZES)
def test_pictures_of_two_runs_can_be_laid_side_by_side(count: int) -> None:
    first, second = scored_table(count, seed=0), scored_table(count, seed=1)
    assert axes_of(rarest_classes(first)) == axes_of(rarest_classes(second))
    pictures = [error_costs(analysis_of(table), table) for table in (first, second)]
    assert axes_of(pictures[0]) == axes_of(pictures[1])
    assert pictures[0].axes[0].get_xlim() == (0, 1)


def test_curves_enclose_the_ap_of_their_class_and_share_axes() -> None:
    first, second = draw_runs(np.random.default_rng(0), 300)
    ap = average_precision(first)
    for label in range(len(ap)):
        recall, precision = precision_recall_curve(first, label)
        # Steps: the precision at a corner holds from the recall before up to its own.
        assert (np.diff(recall) * precision[1:]).sum() == pytest.approx(ap[label])
        assert (np.diff(precision) <= 0).all()
    names, ids = [f"Class {k}" for k in range(len(ap))], [f"/m/{k}" for k in range(len(ap))]
    table = pd.DataFrame({"class": names, "class_id": ids, "ap": ap, "num_truths": first.num_truths})
    table["train_images"] = np.arange(len(ap)) + 1
    index_of = {mid: k for k, mid in enumerate(ids)}
    figures = [precision_recall(run, table, class_ids=["/m/5", "/m/0"], index_of=index_of) for run in (first, second)]
    assert axes_of(figures[0]) == axes_of(figures[1])
    assert_margin_is_blank(figures[0])
    (axes,) = figures[0].axes
    assert [text.get_text().split(":")[0] for text in axes.get_legend().get_texts()] == ["Class 0", "Class 5"]


def test_a_curve_by_hand() -> None:
    # Right, wrong, right of three ground-truth boxes: recall 1/3 at precision 1, then 2/3 at 2/3, then nothing.
    scene = Scene(
        1,
        (Truth("a", 0, HERE), Truth("a", 0, FAR), Truth("b", 0, HERE)),
        found=(Found("a", 0, 0.9, HERE), Found("b", 0, 0.8, FAR), Found("a", 0, 0.7, FAR)),
    )
    recall, precision = precision_recall_curve(match(scene.detections(), scene.annotations()), 0)
    np.testing.assert_allclose(recall, [0, 1 / 3, 2 / 3, 2 / 3])
    np.testing.assert_allclose(precision, [1, 1, 2 / 3, 0])
    empty = match(scene.detections().take(np.arange(0)), scene.annotations())
    assert [part.tolist() for part in precision_recall_curve(empty, 0)] == [[0, 0], [0, 0]]


def test_classes_for_curves_are_spread_over_the_frequencies() -> None:
    table = scored_table(500)
    chosen = spread_classes(table)
    known = table.loc[table["num_truths"] > 0, "class_id"].tolist()
    assert len(chosen) == CURVES
    assert (chosen[0], chosen[-1]) == (known[0], known[-1])
    assert spread_classes(scored_table(3)) == ["/m/1", "/m/2"]
    assert spread_classes(scored_table(1)) == []


def test_without_a_training_the_rarest_classes_are_those_of_fewest_truths() -> None:
    table = scored_table(8).assign(
        train_images=0, num_truths=[0.0, 9, 3, 5, 4, 6, 7, 0], ap=[np.nan, *[0.5] * 6, np.nan]
    )
    names = [label.get_text().split(":")[0] for label in rarest_classes(table).axes[0].get_yticklabels()]
    assert names == [f"Class {k}" for k in (2, 4, 3, 5, 6, 1)]
    assert spread_classes(table, 2) == ["/m/2", "/m/1"]


def test_a_class_that_is_not_in_the_table_is_named() -> None:
    run, _ = draw_runs(np.random.default_rng(0), 50)
    with pytest.raises(ValueError, match="must be in the table, but /m/zz is not"):
        precision_recall(run, scored_table(3), class_ids=["/m/zz"], index_of={})


@pytest.mark.parametrize(
    ("count", "bins", "rows"),
    [
        (3, True, ["Class 1", "Class 2"]),
        (500, True, None),
        (500, False, ["Class 499", "Class 498"]),
    ],
)
def test_errors_are_shown_by_class_or_by_bin_when_there_are_many(
    count: int, bins: bool, rows: list[str] | None
) -> None:
    table = scored_table(count)
    if not bins:
        table["bin"] = pd.Series([pd.NA] * count, dtype="Int64")
    figure = error_costs(analysis_of(table), table)
    names = [label.get_text() for label in figure.axes[1].get_yticklabels()]
    if rows is None:
        members = table.loc[table["ap"].notna(), "bin"].fillna(0).value_counts().sort_index()
        assert names == [f"bin {k} ({n})" if k else f"no bin ({n})" for k, n in members.items()]
    else:
        assert names[:2] == rows
        assert len(names) <= ROWS
    assert any(text.get_text() == "0.25" for text in figure.axes[1].texts)


def test_pictures_without_any_truth_are_pictures_too() -> None:
    scene = Scene(len(QUALITIES), (Truth("a", 0, HERE),))
    ground_truth, detections = scene.annotations(), scene.detections()
    nothing = match(detections, ground_truth, classes=np.zeros(len(QUALITIES), dtype=bool))
    table = scored_table(4).assign(ap=np.nan, num_truths=0.0)
    assert_margin_is_blank(rarest_classes(table))
    assert_margin_is_blank(error_costs(analyse_errors(nothing, detections, ground_truth), table))
    assert_margin_is_blank(precision_recall(nothing, table, class_ids=spread_classes(table), index_of={}))
