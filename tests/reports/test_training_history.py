"""What a training logs after each evaluation: AP per class over time, curves of rare classes, the same images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from retinaflow.data.training_data import load_training_data
from retinaflow.detections import Detections
from retinaflow.reports.training_history import history_table, log_history, rare_metrics
from retinaflow.reports.validation_images import images_of_classes, log_validation_images, plain_name
from retinaflow.runs.run import FolderRun
from retinaflow.settings.commands import TrainConfig
from retinaflow.settings.resolve import resolve

TABLE = pd.DataFrame(
    {
        "class": ["Bus", "Vehicle", "Car", "Tree", "Plant"],
        "ap": [0.1, np.nan, 0.3, 0.4, 0.5],
        "class_id": ["/m/0bus", "/m/0vehicle", "/m/0car", "/m/0tree", "/m/0plant"],
        "train_images": [2, 5, 6, 7, 0],
    }
)
"""Rarest first; Plant has no training image."""


def test_the_history_has_a_row_per_class_rarest_first_and_a_column_per_evaluation(
    tiny_dataset: Callable[..., Path],
) -> None:
    index = load_training_data(resolve(TrainConfig, {"data": str(tiny_dataset())})).evaluated
    # In class order: Car, Vehicle, Tree, Plant, Bus.
    history = {4: [0.3, float("nan"), 0.4, 0.5, 0.1], 2: [0.2, float("nan"), 0.2, 0.0, 0.05]}
    table = history_table(history, TABLE, index)
    assert list(table) == ["class", "train_images", "epoch_2", "epoch_4", "class_id"]
    assert table["class"].tolist() == TABLE["class"].tolist()
    np.testing.assert_equal(table["epoch_2"].to_numpy(), [0.05, np.nan, 0.2, 0.2, 0.0])
    np.testing.assert_equal(table["epoch_4"].to_numpy(), [0.1, np.nan, 0.3, 0.4, 0.5])


def test_curves_are_those_of_the_rarest_classes_that_can_be_measured() -> None:
    assert rare_metrics(TABLE) == {"rare/Bus": 0.1, "rare/Car": 0.3, "rare/Tree": 0.4}
    many = pd.DataFrame(
        {"class": list("abcdefg"), "ap": 0.5, "class_id": list("tuvwxyz"), "train_images": np.arange(1, 8)}
    )
    assert list(rare_metrics(many)) == [f"rare/{letter}" for letter in "abcde"]


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("Ski (Sports & Games)", "rare/Ski Sports Games"),
        ("Café", "rare/Cafe"),
        ("salt/pepper", "rare/salt pepper"),
        ("狗", "rare/m 0dog"),
    ],
    ids=["brackets", "accent", "slash", "no ASCII letter"],
)
def test_a_curve_has_a_name_that_mlflow_takes(label: str, expected: str) -> None:
    table = pd.DataFrame({"class": [label], "ap": [0.5], "class_id": ["/m/0dog"], "train_images": [3]})
    assert rare_metrics(table) == {expected: 0.5}


def test_two_classes_of_one_plain_name_have_two_curves() -> None:
    table = pd.DataFrame({"class": ["a/b", "a b"], "ap": [0.1, 0.2], "class_id": ["x", "y"], "train_images": [1, 2]})
    assert rare_metrics(table) == {"rare/a b": 0.1, "rare/a b y": 0.2}


def test_images_are_chosen_by_the_data_alone_rarest_class_first(tiny_dataset: Callable[..., Path]) -> None:
    index = load_training_data(resolve(TrainConfig, {"data": str(tiny_dataset())})).evaluated
    chosen = images_of_classes(index, TABLE, count=8)
    # Validation image 5 has the only bus; image 4 has no boxes.
    assert next(iter(chosen.items())) == (5, "/m/0bus")
    assert set(chosen) == {0, 1, 2, 3, 5}
    assert images_of_classes(index, TABLE.assign(ap=0.9), count=8) == chosen


def test_the_same_images_are_logged_with_every_evaluation(tiny_dataset: Callable[..., Path], tmp_path: Path) -> None:
    index = load_training_data(resolve(TrainConfig, {"data": str(tiny_dataset())})).evaluated
    run = FolderRun(tmp_path / "run")
    found = Detections(
        np.array([5], dtype=np.int32), np.array([4], dtype=np.int32), np.array([0.9]), np.array([[0.1, 0.1, 0.6, 0.6]])
    )
    log_validation_images(run, Detections.empty(), index, TABLE, step=3)
    log_validation_images(run, found, index, TABLE, step=6)
    files = sorted((tmp_path / "run" / "images").rglob("*.png"))
    assert len(files) == 10
    first, second = (tmp_path / "run" / "images" / "validation" / "1 Bus" / f"step_{step:06d}.png" for step in (3, 6))
    with Image.open(first) as before, Image.open(second) as after:
        assert max(before.size) >= 384
        assert np.asarray(before).tobytes() != np.asarray(after).tobytes()


def test_a_history_in_a_folder_is_replaced_and_its_curve_continued(
    tiny_dataset: Callable[..., Path], tmp_path: Path
) -> None:
    index = load_training_data(resolve(TrainConfig, {"data": str(tiny_dataset())})).evaluated
    run, history = FolderRun(tmp_path / "run"), {}
    for epoch, step in ((1, 3), (2, 6)):
        history[epoch] = [0.1 * epoch] * 5
        log_history(run, history, TABLE, index, step=step)
    assert list(pd.read_csv(tmp_path / "run" / "per_class_history.csv"))[2:4] == ["epoch_1", "epoch_2"]
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("rare/Bus") == 2


def test_a_plain_name_is_short_enough_for_a_file_name() -> None:
    assert plain_name("very long " * 50) == ("very long " * 50)[:100].strip()


def test_a_plain_name_is_empty_without_letters() -> None:
    assert plain_name("***") == ""
