"""Figures: what is drawn, that axes stay the same between runs, and that nothing falls out of the picture."""

from __future__ import annotations

import io
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from retinaflow.reports.class_figures import ap_vs_frequency, class_frequency, exposure_curves
from retinaflow.reports.contact_sheet import DETECTION, GROUND_TRUTH, Panel, contact_sheet

COUNTS = [1, 3, 16, 500]


def fake_images(count: int) -> np.ndarray:
    return np.sort(np.random.default_rng(0).lognormal(7, 2, count).astype(np.int64))


def fake_bins(images: np.ndarray) -> np.ndarray:
    ranks = np.unique(np.log10(np.maximum(images, 1)).astype(np.int64), return_inverse=True)[1]
    return np.where(images > 0, ranks, -1)


def fake_table(count: int, *, seed: int = 0) -> pd.DataFrame:
    images = fake_images(count)
    bins = pd.Series(fake_bins(images) + 1, dtype="Int64")
    ap = np.random.default_rng(seed).random(count)
    ap[::7] = np.nan
    names = [f"Class {k}" for k in range(count)]
    return pd.DataFrame({"class": names, "ap": ap, "bin": bins.mask(bins == 0), "train_images": images})


def pixels(figure: Figure) -> np.ndarray:
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())


def assert_margin_is_blank(figure: Figure) -> None:
    """Nothing is cut off: text or lines that run out of the picture would leave their ink on its edge."""
    image = pixels(figure)
    for edge in (image[:2], image[-2:], image[:, :2], image[:, -2:]):
        assert (edge == 255).all()


@pytest.mark.parametrize("count", COUNTS)
def test_nothing_is_cut_off_in_the_pictures_whatever_the_number_of_classes(count: int) -> None:
    images = fake_images(count)
    assert_margin_is_blank(ap_vs_frequency(fake_table(count)))
    names = [f"A rather long class name {k}" for k in range(count)]
    edges = np.array([1.0, 100, 1e6])
    assert_margin_is_blank(class_frequency(images, edges=edges, bin_of_class=fake_bins(images), names=names))
    assert_margin_is_blank(exposure_curves({"instance-repeat-factor": images * 1.5}, images_per_class=images))


def test_pictures_of_two_runs_on_the_same_data_have_the_same_axes() -> None:
    first, second = fake_table(16, seed=0), fake_table(16, seed=1)
    second.loc[:8, "ap"] = np.nan
    limits = []
    for table in (first, second):
        figure = ap_vs_frequency(table)
        (axes,) = figure.axes
        limits.append((axes.get_xlim(), axes.get_ylim(), axes.get_position().bounds, tuple(figure.get_size_inches())))
    assert limits[0] == limits[1]
    assert limits[0][1][0] <= 0
    assert limits[0][1][1] >= 1


def test_every_class_with_truth_is_one_dot_at_its_images_and_ap() -> None:
    table = fake_table(500)
    (axes,) = ap_vs_frequency(table).axes
    dots = axes.collections[0].get_offsets()
    shown = table[table["ap"].notna() & (table["train_images"] > 0)]
    expected = shown[["train_images", "ap"]].to_numpy(dtype=float)
    assert len(dots) == table["ap"].notna().sum()
    np.testing.assert_allclose(np.asarray(dots)[-len(expected) :], expected)
    assert any("72 without ground truth" in text.get_text() for text in axes.texts)


def test_the_legend_tells_the_mean_of_each_bin() -> None:
    table = pd.DataFrame(
        {
            "class": ["A", "B", "C"],
            "ap": [0.1, 0.3, np.nan],
            "bin": pd.Series([1, 1, 2], dtype="Int64"),
            "train_images": [4, 5, 600],
        }
    )
    (axes,) = ap_vs_frequency(table).axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["bin 1: 0.200 (2)", "bin 2: no ground truth"]


def test_class_names_do_not_overlap_each_other() -> None:
    table = fake_table(25).assign(ap=np.linspace(0.2, 0.3, 25))
    figure = ap_vs_frequency(table)
    pixels(figure)
    named = [text for text in figure.axes[0].texts if text.get_text().startswith("Class")]
    assert len(named) >= 8
    for one, other in combinations(named, 2):
        assert not one.get_window_extent().overlaps(other.get_window_extent())


def test_a_table_without_truth_or_training_images_is_still_a_picture() -> None:
    empty = fake_table(3).assign(ap=np.nan, train_images=0, bin=pd.Series([pd.NA] * 3, dtype="Int64"))
    assert pixels(ap_vs_frequency(empty)).std() > 0
    none = np.zeros(2, dtype=np.int64)
    figure = class_frequency(none, edges=np.zeros(0), bin_of_class=none - 1, names=["a", "b"])
    assert pixels(figure).std() > 0
    assert pixels(exposure_curves({"uniform": none}, images_per_class=none)).std() > 0


def test_the_frequency_picture_shows_bars_rarest_first_and_counts_each_bin() -> None:
    figure = class_frequency(
        np.array([100, 3, 0, 40]),
        edges=np.array([1.0, 10, 1000]),
        bin_of_class=np.array([1, 0, -1, 1]),
        names=["Car", "Torch", "Unseen", "Dog"],
    )
    (axes,) = figure.axes
    tops = [bar.get_y() + bar.get_height() for bar in axes.containers[0].patches]
    assert tops[1:] == [3, 40, 100]
    assert axes.containers[0].patches[0].get_height() == 0
    assert [label.get_text() for label in axes.get_xticklabels()] == ["Unseen", "Torch", "Dog", "Car"]
    assert [text.get_text() for text in axes.texts] == ["no bin\n1", "bin 1\n1", "bin 2\n2"]


def test_exposure_curves_run_from_rare_to_frequent_and_skip_classes_without_draws() -> None:
    images = np.array([100, 10, 0, 50])
    figure = exposure_curves({"uniform": images, "other": np.array([20.0, 20, 0, 0])}, images_per_class=images)
    uniform, other = figure.axes[0].lines[1:]
    assert uniform.get_xdata().tolist() == [10, 50, 100]
    assert uniform.get_ydata().tolist() == [10, 50, 100]
    np.testing.assert_array_equal(other.get_ydata(), [20, np.nan, 20])


def photo(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), 128, dtype=np.uint8)


def test_a_panel_draws_truth_and_detections_in_their_places_and_colours() -> None:
    # 100 high, 200 wide: x is scaled by the width, y by the height.
    panel = Panel(
        photo(100, 200),
        gt_boxes=np.array([[0.1, 0.2, 0.3, 0.6], [0.5, 0.5, 1.0, 1.0]]),
        gt_labels=["Car", "Crowd"],
        gt_group_of=[False, True],
        detection_boxes=np.array([[0.1, 0.2, 0.3, 0.5]]),
        detection_labels=["Car"],
        detection_scores=[0.876],
    )
    (axes,) = contact_sheet([panel]).axes
    drawn = [(patch.get_bbox().bounds, patch.get_linestyle()) for patch in axes.patches if isinstance(patch, Rectangle)]
    assert drawn[0] == (pytest.approx((20, 20, 40, 40)), "-")
    assert drawn[1] == (pytest.approx((100, 50, 100, 50)), "--")
    assert drawn[2] == (pytest.approx((20, 20, 40, 30)), "-")
    assert [(text.get_text(), text.get_color()) for text in axes.texts] == [
        ("Car", GROUND_TRUTH),
        ("Crowd", GROUND_TRUTH),
        ("Car 0.88", DETECTION),
    ]


def test_no_text_of_a_sheet_leaves_its_image_even_for_boxes_at_the_border() -> None:
    corners = np.array([[0, 0, 0.05, 0.05], [0.9, 0, 1, 0.04], [0.95, 0.9, 1, 1], [-0.1, 0.4, 1.1, 0.45]])
    labels = ["Football helmet"] * 4
    panel = Panel(photo(300, 200), "title", corners, labels, (), corners, labels, np.full(4, 0.5))
    figure = contact_sheet([panel] * 2, title="Worst images")
    assert_margin_is_blank(figure)
    for axes in figure.axes:
        frame = axes.get_window_extent()
        for text in axes.texts:
            box = text.get_window_extent()
            assert frame.x0 <= box.x0 + 1, text
            assert box.x1 <= frame.x1 + 1, text
            assert frame.y0 <= box.y0 + 1, text
            assert box.y1 <= frame.y1 + 1, text


@pytest.mark.parametrize(
    ("panels", "columns", "shape"), [(1, 4, (1, 1)), (5, 4, (4, 2)), (4, 2, (2, 2)), (3, 1, (1, 3))]
)
def test_panels_fill_rows_of_the_asked_number_of_columns(panels: int, columns: int, shape: tuple[int, int]) -> None:
    figure = contact_sheet([Panel(photo(20, 20), f"{k}") for k in range(panels)], columns=columns)
    corners = [axes.get_position().p0 for axes in figure.axes]
    assert len(figure.axes) == panels
    assert (len({round(x, 6) for x, _ in corners}), len({round(y, 6) for _, y in corners})) == shape


def test_a_sheet_of_truth_alone_explains_only_what_it_shows() -> None:
    panel = Panel(photo(50, 50), gt_boxes=np.array([[0.1, 0.1, 0.9, 0.9]]), gt_labels=["Cat"])
    (legend,) = contact_sheet([panel]).legends
    assert [text.get_text() for text in legend.get_texts()] == ["ground truth"]


def test_a_sheet_without_panels_is_an_empty_picture_that_can_be_saved() -> None:
    target = io.BytesIO()
    contact_sheet([]).savefig(target, format="png")
    assert target.getvalue().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image": np.zeros((4, 4), np.uint8)}, r"uint8 \[H, W, 3\], but got uint8 \[4, 4\]"),
        ({"image": np.zeros((4, 4, 3))}, r"but got float64 \[4, 4, 3\]"),
        ({"gt_labels": ["Car"]}, r"gt_labels needs one value per box \(0\), but has 1"),
        ({"detection_boxes": np.zeros((2, 4))}, r"detection_labels needs one value per box \(2\), but has 0"),
    ],
)
def test_a_panel_whose_parts_do_not_fit_is_an_error(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Panel(**{"image": photo(4, 4), **arguments})


def test_columns_below_one_are_an_error() -> None:
    with pytest.raises(ValueError, match="`columns >= 1` must hold, but got 0"):
        contact_sheet([], columns=0)
