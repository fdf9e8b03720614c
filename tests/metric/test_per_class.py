"""The per-class table and the tracked aggregates."""

from __future__ import annotations

import io

import numpy as np
import pandas as pd
import pytest
from scoring_scenes import Found, Scene, Truth

from retinaflow.metric.challenge import Scores, challenge_scores
from retinaflow.metric.per_class import COLUMNS, class_groups, per_class_table, summary
from retinaflow.taxonomy import Taxonomy

BOX = (0.0, 0.0, 0.4, 0.4)
TAXONOMY = Taxonomy(("/m/d", "/m/c", "/m/b", "/m/a"), ("Bench", "Car", "Bench", "Dog"))


def scores() -> Scores:
    """AP 0 for class 0, 1 for class 1, none for classes 2 and 3."""
    scene = Scene(4, (Truth("i", 0, BOX), Truth("i", 1, BOX)), found=(Found("i", 1, 0.9, BOX),))
    return challenge_scores(scene.detections(), scene.annotations())


def table(**changes: list[int]) -> pd.DataFrame:
    columns = {"bin_of_class": [1, 0, 0, -1], "images_per_class": [90, 5, 5, 0], "boxes_per_class": [200, 6, 7, 0]}
    arrays = {name: np.array(values) for name, values in {**columns, **changes}.items()}
    return per_class_table(scores(), taxonomy=TAXONOMY, **arrays)


def test_rows_run_from_rarest_to_most_frequent_and_equal_counts_by_class_id() -> None:
    result = table()
    assert tuple(result.columns) == COLUMNS == (
        "class", "ap", "class_id", "bin", "train_images", "train_boxes", "num_truths",
    )  # fmt: skip
    assert result["class_id"].tolist() == ["/m/a", "/m/b", "/m/c", "/m/d"]
    assert result["train_images"].tolist() == [0, 5, 5, 90]
    assert result["train_boxes"].tolist() == [0, 7, 6, 200]
    np.testing.assert_array_equal(result["ap"], [np.nan, np.nan, 1.0, 0.0])
    assert result["num_truths"].tolist() == [0, 0, 1, 1]


def test_a_name_that_two_classes_share_is_told_apart_by_the_id() -> None:
    assert table()["class"].tolist() == ["Dog", "Bench (/m/b)", "Car", "Bench (/m/d)"]


def test_bins_count_from_one_and_a_class_without_bin_has_none() -> None:
    bins = table()["bin"]
    assert bins.dtype == "Int64"
    assert bins.isna().tolist() == [True, False, False, False]
    assert bins.dropna().tolist() == [1, 1, 2]


def test_the_summary_of_a_table_read_back_from_csv_is_the_same() -> None:
    text = table().to_csv(index=False)
    assert summary(pd.read_csv(io.StringIO(text))) == summary(table())


def test_an_array_that_does_not_fit_the_classes_is_named() -> None:
    with pytest.raises(ValueError, match=r"boxes_per_class must have one value for each of 4 classes, got \(3,\)"):
        table(boxes_per_class=[1, 2, 3])


def test_the_summary_holds_the_mean_the_thirds_and_the_bins() -> None:
    # By images: class 2 (/m/b, no ground truth), class 1 (AP 1), class 0 (AP 0); class 3 has no training image. Rare
    # third: class 2, without ground truth, so left out. Bin 1: classes 1 and 2, of which only class 1 has ground truth.
    assert summary(table()) == {
        "val/mAP": 0.5,
        "val/mAP_common": 1.0,
        "val/mAP_frequent": 0.0,
        "val/mAP_bin_1": 1.0,
        "val/mAP_bin_2": 0.0,
    }
    assert set(summary(table(), prefix="best/")) >= {"best/mAP", "best/mAP_bin_1"}


def test_a_table_without_any_truth_has_an_empty_summary() -> None:
    assert summary(table().assign(ap=np.nan)) == {}


@pytest.mark.parametrize(
    ("count", "sizes"),
    [(0, (0, 0, 0)), (1, (1, 0, 0)), (2, (1, 1, 0)), (3, (1, 1, 1)), (7, (3, 2, 2)), (8, (3, 3, 2)), (9, (3, 3, 3))],
)
def test_thirds_give_the_rarer_ones_what_is_left_over(count: int, sizes: tuple[int, int, int]) -> None:
    images = np.arange(1, count + 1)[::-1]
    groups = class_groups(images, np.full(count, -1), class_ids=[f"/m/{k}" for k in range(count)])
    assert tuple(groups) == ("mAP_rare", "mAP_common", "mAP_frequent")
    assert tuple(int(members.sum()) for members in groups.values()) == sizes
    # Images fall with the class index, so the rarest third lies at the end.
    assert groups["mAP_rare"].tolist() == [False] * (count - sizes[0]) + [True] * sizes[0]


def test_every_class_with_training_images_is_in_exactly_one_third_and_one_bin() -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 30, 50)
    bins = np.where(images > 0, images // 10, -1)
    groups = class_groups(images, bins, class_ids=[f"/m/{k}" for k in range(50)])
    thirds = np.sum([groups[name] for name in ("mAP_rare", "mAP_common", "mAP_frequent")], axis=0)
    in_bins = np.sum([members for name, members in groups.items() if "bin" in name], axis=0)
    np.testing.assert_array_equal(thirds, images > 0)
    np.testing.assert_array_equal(in_bins, images > 0)
    assert images[groups["mAP_rare"]].max() <= images[groups["mAP_common"]].min()
