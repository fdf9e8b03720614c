"""Defaults that fit the data: which setting is chosen by what, that a given one stays, and where the rules apply."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retinaflow.data.index import AnnotationIndex
from retinaflow.data.training_data import load_training_data
from retinaflow.search.study import _Setup
from retinaflow.search.study import read_space as space_of
from retinaflow.settings.commands import ExploreConfig, SearchConfig, TrainConfig
from retinaflow.settings.resolve import resolve
from retinaflow.training.fit_to_data import RULES, fit_to_data


@pytest.fixture
def folder(tiny_dataset: Callable[..., Path]) -> Path:
    return tiny_dataset()


def config(folder: Path, **given: Any) -> TrainConfig:
    return resolve(TrainConfig, {"data": str(folder), **given})


def index_of(folder: Path, **changes: Any) -> AnnotationIndex:
    return replace(load_training_data(config(folder)).train, **changes)


def with_sizes(folder: Path, *sizes: tuple[int, int]) -> AnnotationIndex:
    """The training images with other sizes (height, width), repeated."""
    index = index_of(folder)
    return replace(index, sizes=np.resize(np.array(sizes, dtype=np.int32), (len(index), 2)))


def with_side(folder: Path, side: float) -> AnnotationIndex:
    """The training images, all 512 x 512, each box a square of ``side`` pixels in its place."""
    index = index_of(folder)
    centre = (np.asarray(index.boxes)[:, :2] + np.asarray(index.boxes)[:, 2:]) / 2
    centre = np.clip(centre, side / 1024, 1 - side / 1024)
    boxes = np.concatenate([centre - side / 1024, centre + side / 1024], axis=1).astype(np.asarray(index.boxes).dtype)
    return replace(index, boxes=boxes, sizes=np.full((len(index), 2), 512, dtype=np.int32))


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([(224, 224)], 224),
        ([(300, 300)], 288),
        # Area counts, not the longer side: sqrt(480 * 640) = 554.
        ([(480, 640), (640, 480)], 512),
        ([(20, 20)], 32),
        # The median is 192 x 256, of area 222 x 222.
        ([(192, 256), (192, 256), (4000, 6000)], 224),
    ],
)
def test_the_image_size_is_that_of_the_median_image(
    folder: Path, sizes: list[tuple[int, int]], expected: int, capsys: pytest.CaptureFixture[str]
) -> None:
    fitted = fit_to_data(config(folder), with_sizes(folder, *sizes))
    assert fitted.image_size == expected
    assert f"image_size={expected}: the median image has the area of" in capsys.readouterr().out


def test_small_boxes_get_small_anchors_and_large_ones_those_of_torchvision(folder: Path) -> None:
    # At scale s the smallest anchors have a side of 8 s pixels: 12 for 1.5, 32 for 4.
    assert fit_to_data(config(folder), with_side(folder, 10)).anchor_scale == 1.5
    assert fit_to_data(config(folder), with_side(folder, 200)).anchor_scale == 4.0


@pytest.mark.parametrize("weights", ["coco", "coco_v2", "detector.pth"])
def test_a_published_detector_keeps_its_anchors(folder: Path, weights: str) -> None:
    own = config(folder, weights=weights, backbone="resnet50")
    assert fit_to_data(own, with_side(folder, 12)).anchor_scale == 4.0


def test_epochs_are_more_for_few_images_and_evaluations_few(folder: Path) -> None:
    index = index_of(folder)
    few, many = fit_to_data(config(folder), index), fit_to_data(config(folder, epoch_length=1000), index)
    # 12 images would need 2,000 epochs for 24,000 images; 100 are the most, evaluated after every 9th.
    assert (few.epochs, few.eval_every) == (100, 9)
    assert (many.epochs, many.eval_every) == (24, 2)
    assert fit_to_data(config(folder, epoch_length=10_000), index).epochs == 12


SHORT = {"batch_size": 4, "lr": 1e-3, "augment": 0.2, "focal_gamma": 1.0, "balance_start": 0.0, "head_depth": 2}
LONG = {"batch_size": 8, "lr": 3e-4, "augment": 0.5, "focal_gamma": 2.0, "balance_start": 0.5, "head_depth": 4}


@pytest.mark.parametrize(("epochs", "expected"), [(99, SHORT), (100, LONG)])
def test_a_training_that_sees_few_images_is_short(folder: Path, epochs: int, expected: dict[str, float]) -> None:
    # 1,000 images an epoch; 100,000 are no longer few.
    fitted = fit_to_data(config(folder, epoch_length=1000, epochs=epochs), index_of(folder))
    assert {name: getattr(fitted, name) for name in expected} == expected


def test_a_given_setting_stays_beside_those_of_a_short_training(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fitted = fit_to_data(config(folder, epochs=4, lr=0.01, augment=0.5), index_of(folder))
    assert (fitted.lr, fitted.augment, fitted.rare_augment, fitted.batch_size) == (0.01, 0.5, 0.4, 4)
    line = next(line for line in capsys.readouterr().out.splitlines() if "short training" in line)
    assert "batch_size=4" in line
    assert "lr=" not in line
    assert " augment=" not in line
    assert "48 images are seen, less than 100,000" in line


def test_the_learning_rate_of_sgd_follows_from_the_batch_size_that_was_chosen(folder: Path) -> None:
    # 0.01 for 16 images, and 4 are chosen.
    assert fit_to_data(config(folder, optimizer="sgd"), index_of(folder)).lr == pytest.approx(0.0025)


@pytest.mark.parametrize(
    ("weights", "backbone", "channels"),
    [
        ("coco", "resnet50", 256),
        ("detector.pth", "resnet50", 256),
        ("imagenet", "resnet50", 128),
        ("net.pth", "resnet18", 128),
    ],
)
def test_a_detector_keeps_its_heads_in_a_short_training(
    folder: Path, weights: str, backbone: str, channels: int
) -> None:
    fitted = fit_to_data(config(folder, weights=weights, backbone=backbone), index_of(folder))
    assert fitted.fpn_channels == channels


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ("binned", "focal", 0.0)),
        ({"weights": "imagenet"}, ("class-aware", "equalized-focal", 0.5)),
        ({"weights": "net.pth"}, ("class-aware", "equalized-focal", 0.5)),
        ({"weights": "imagenet", "sampling": "binned"}, ("binned", "equalized-focal", 0.5)),
        ({"weights": "imagenet", "sampling": "uniform"}, ("uniform", "focal", 0.0)),
        # The equalized loss needs an exponent to raise.
        ({"weights": "imagenet", "focal_gamma": 0}, ("class-aware", "focal", 0.5)),
        ({"weights": "imagenet", "epochs": 100, "epoch_length": 1000}, ("binned", "focal", 0.0)),
    ],
    ids=str,
)
def test_a_short_training_from_pretrained_weights_is_balanced_in_another_way(
    folder: Path, given: dict[str, Any], expected: tuple[str, str, float]
) -> None:
    fitted = fit_to_data(config(folder, **given), index_of(folder))
    assert (fitted.sampling, fitted.loss, fitted.copy_paste) == expected


def test_what_is_given_stays_also_when_it_equals_the_default(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    defaults = TrainConfig()
    given = {name: getattr(defaults, name) for name in TrainConfig.model_fields if TrainConfig.auto_of(name)}
    own, index = config(folder, **given), with_side(folder, 12)
    capsys.readouterr()
    assert fit_to_data(own, index) is own
    assert capsys.readouterr().out == ""


def test_auto_is_not_given(folder: Path) -> None:
    assert fit_to_data(config(folder, image_size="auto"), with_sizes(folder, (224, 224))).image_size == 224


def test_what_was_chosen_is_not_chosen_again(folder: Path) -> None:
    fitted = fit_to_data(config(folder), with_side(folder, 12))
    assert fit_to_data(fitted, with_side(folder, 200)) is fitted


def test_the_settings_that_were_fitted_stay_as_they_were(folder: Path) -> None:
    given, index = config(folder), with_side(folder, 12)
    assert fit_to_data(given, index) == fit_to_data(given, index)
    assert given.model_fields_set == {"data"}


def test_the_demo_set_keeps_its_minutes(folder: Path) -> None:
    own = TrainConfig()
    assert fit_to_data(own, index_of(folder)) is own


def test_explore_takes_the_same_rules(folder: Path) -> None:
    index = with_side(folder, 12)
    trained = fit_to_data(config(folder), index)
    explored = fit_to_data(resolve(ExploreConfig, {"data": str(folder)}), index)
    assert (explored.image_size, explored.anchor_scale) == (trained.image_size, trained.anchor_scale)


def test_images_of_unknown_size_are_not_measured(folder: Path) -> None:
    index = index_of(folder)
    unknown = replace(index, sizes=np.zeros((len(index), 2), dtype=np.int32))
    explored = resolve(ExploreConfig, {"data": str(folder)})
    assert fit_to_data(explored, unknown) is explored


def test_the_trials_of_a_search_start_from_the_fitted_defaults(folder: Path, tmp_path: Path) -> None:
    search = resolve(SearchConfig, {"data": str(folder), "epoch_length": "1000", "output": str(tmp_path)})
    base = _Setup.read(search, space_of(search)).space.base
    alone = fit_to_data(config(folder, epoch_length=1000), index_of(folder))
    names = ("image_size", "anchor_scale", "epochs")
    assert [getattr(base, name) for name in names] == [getattr(alone, name) for name in names]
    # The pruner compares trials after every epoch.
    assert base.eval_every == 1


def test_every_rule_is_of_a_setting_that_may_be_auto() -> None:
    assert all(TrainConfig.auto_of(name) for name in RULES)


def test_the_table_of_the_documents_has_the_settings_of_a_short_training(folder: Path) -> None:
    section = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8").split("## Defaults")[1]
    rows = re.findall(r"^\| (`.+) \|$", section.split("\n## ")[0], re.MULTILINE)
    fitted = fit_to_data(config(folder), index_of(folder))
    for names, *_, values in (row.replace("`", "").split(" | ") for row in rows):
        found = [getattr(fitted, name) for name in names.split(", ")]
        assert [f"{value:g}" if isinstance(value, float) else str(value) for value in found] == values.split(", ")
