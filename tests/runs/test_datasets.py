"""Sets of images as inputs of runs: which name and digest they have, what they count, and which runs share them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow.tracking import MlflowClient

from retinaflow.commands import binning, explore
from retinaflow.data.training_data import load_training_data
from retinaflow.inference.image_selection import wanted_images
from retinaflow.runs.datasets import evaluated_dataset, explored_dataset, predicted_dataset, training_datasets
from retinaflow.runs.run import FolderRun
from retinaflow.settings.commands import BinningConfig, EvaluateConfig, ExploreConfig, PredictConfig, TrainConfig
from retinaflow.settings.resolve import resolve


def _inputs(run_id: str) -> dict[str, tuple[str, str]]:
    """Context -> name and digest, as the store has them."""
    found = MlflowClient().get_run(run_id).inputs.dataset_inputs
    return {one.tags[0].value: (one.dataset.name, one.dataset.digest) for one in found}


def test_a_set_counts_its_images_boxes_and_classes(tiny_dataset: Callable[..., Path]) -> None:
    config = resolve(TrainConfig, {"data": str(tiny_dataset("birds")), "workers": "0"})
    train, validation = training_datasets(config.model_dump(), load_training_data(config))
    assert (train.name, train.context) == ("birds/train", "training")
    assert (validation.name, validation.context) == ("birds/validation", "validation")
    assert train.source == str(Path(config.data).resolve())
    # Of 12 images 6 have a car, 7 a tree, 2 a bus, and one the parent of cars.
    assert train.profile == {
        "images": 12,
        "boxes": 16,
        "classes": 5,
        "classes_with_boxes": 4,
        "rarest_class": {"name": "Vehicle", "boxes": 1},
        "most_frequent_class": {"name": "Tree", "boxes": 7},
    }
    assert validation.profile["images"] == 6


def test_a_set_without_boxes_has_no_rarest_class(tiny_dataset: Callable[..., Path]) -> None:
    data = load_training_data(resolve(TrainConfig, {"data": str(tiny_dataset())}))
    config = resolve(PredictConfig, {"images": str(Path(data.train.images_folder)), "output": "out"})
    images = wanted_images(config, data.train.taxonomy, {}).index
    found = predicted_dataset(config, images, {})
    assert (found.name, found.context) == ("tiny/images", "prediction")
    assert found.profile == {"images": 18, "boxes": 0, "classes": 5, "classes_with_boxes": 0}


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({}, "tiny/validation"),
        ({"eval_ids": "held out.txt"}, "tiny/held out"),
        ({"eval_split": "test"}, "tiny/test"),
        ({"eval_boxes": ("other/first.csv", "other/second.csv")}, "other/first+second"),
    ],
    ids=["split", "list of ids", "another split", "files"],
)
def test_an_evaluated_set_is_named_after_what_was_given(
    settings: dict[str, Any], name: str, tiny_dataset: Callable[..., Path]
) -> None:
    config = resolve(TrainConfig, {"data": str(tiny_dataset())})
    index = load_training_data(config).evaluated
    assert evaluated_dataset({**config.model_dump(), **settings}, index).name == name


def test_the_name_is_that_of_the_folder_however_it_is_written(
    tiny_dataset: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_dataset("birds")
    index = load_training_data(resolve(TrainConfig, {"data": str(folder)})).evaluated
    monkeypatch.chdir(folder)
    for data in (str(folder), ".", "../birds", "images/.."):
        config = resolve(EvaluateConfig, {"data": data, "eval_split": "validation"})
        assert evaluated_dataset(config.model_dump(), index).name == "birds/validation", data
    assert explored_dataset(resolve(ExploreConfig, {"data": "."}).model_dump(), index).name == "birds/train"


def test_a_folder_has_the_same_in_a_file(tiny_dataset: Callable[..., Path], tmp_path: Path) -> None:
    config = resolve(TrainConfig, {"data": str(tiny_dataset())})
    FolderRun(tmp_path / "run").log_datasets(training_datasets(config.model_dump(), load_training_data(config)))
    document = json.loads((tmp_path / "run" / "datasets.json").read_text())
    assert [(one["name"], one["context"]) for one in document] == [
        ("tiny/train", "training"),
        ("tiny/validation", "validation"),
    ]


@pytest.mark.slow
def test_runs_of_the_same_data_are_found_by_it(workshop: Any) -> None:
    data = str(workshop.data)
    binning.run(resolve(BinningConfig, {"data": data, "experiment": "datasets"}))
    explore.run(resolve(ExploreConfig, {"data": data, "experiment": "datasets", "samples": 0}))
    for name, commands in (("train", ["binning", "explore"]), ("validation", ["binning"])):
        found = mlflow.search_runs(
            experiment_names=["datasets"],
            filter_string=f"datasets.name = '{workshop.data.name}/{name}'",
            output_format="list",
        )
        assert sorted(run.data.tags["retinaflow.command"] for run in found) == commands
    profile = json.loads(found[0].inputs.dataset_inputs[1].dataset.profile)
    assert profile["images"] in (6, 12)


@pytest.mark.slow
def test_an_evaluation_on_the_validation_images_has_the_dataset_of_the_training(
    trained: Any, evaluated: Path, workshop: Any
) -> None:
    training = _inputs(trained.run_id)
    assert training["training"][0] == f"{workshop.data.name}/train"
    [run] = mlflow.search_runs(
        search_all_experiments=True,
        filter_string=f"params.output = '{evaluated}'",
        output_format="list",
    )
    assert _inputs(run.info.run_id) == {"evaluation": training["validation"]}
