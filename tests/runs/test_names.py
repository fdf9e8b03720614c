"""How a run is called and described where nobody has named it, and which kind its experiment has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow.tracking import MlflowClient
from mlflow.tracking.fluent import _get_experiment_id
from mlflow.utils.name_utils import _generate_random_name

from retinaflow.runs.datasets import DatasetInput
from retinaflow.runs.names import description, is_generated, run_name
from retinaflow.runs.start import start_run
from retinaflow.settings.commands import EvaluateConfig, TrainConfig
from retinaflow.settings.data_settings import TrackingSettings
from retinaflow.settings.resolve import resolve

VALIDATION = DatasetInput("birds/validation", "0123456789abcdef", "/birds", {"images": 1200, "boxes": 3400}, "x")
TRAIN = DatasetInput("birds/train", "f" * 16, "/birds", {"images": 5, "boxes": 6, "classes": 7}, "x")


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({}, "defaults"),
        ({"sampling": "uniform", "focal_gamma": 1.5}, "uniform, focal_gamma 1.5"),
        ({"sampling": "binned", "track": "false", "output": "elsewhere", "workers": "0"}, "defaults"),
        ({"image_size": "auto", "seed": 3}, "seed 3"),
        ({"vertical_flip": "true", "seed": 3}, "vertical_flip, seed 3"),
        ({"weights": "/far/away/mine.pth"}, "weights mine.pth"),
    ],
    ids=["nothing given", "differ", "as the defaults, or without effect", "auto", "seed last", "path"],
)
def test_a_training_is_called_after_what_differs_from_the_defaults(given: dict[str, Any], name: str) -> None:
    assert run_name("train", resolve(TrainConfig, given)) == name


def test_what_is_chosen_by_the_data_is_compared_with_the_default_of_that_data() -> None:
    demo = resolve(TrainConfig, {"data": "demo"}).image_size
    assert run_name("train", resolve(TrainConfig, {"data": "demo", "image_size": demo})) == "defaults"
    assert run_name("train", resolve(TrainConfig, {"data": "demo", "image_size": 2 * demo})) == f"image_size {2 * demo}"


def test_a_name_stays_short() -> None:
    given = {"lr": 0.01, "focal_gamma": 3.0, "balance": 0.1, "augment": 0.9, "num_bins": 3, "epochs": 5, "seed": 1}
    name = run_name("train", resolve(TrainConfig, given))
    assert name.endswith(", 1 more, seed 1")
    assert len(name.split(", ")) == 7


def test_other_commands_are_called_by_their_name_first() -> None:
    assert run_name("evaluate", resolve(EvaluateConfig, {"from_run": "abc"})) == "evaluate"
    assert run_name("evaluate", resolve(EvaluateConfig, {"iou_thresholds": "coco"})) == "evaluate iou_thresholds coco"


def test_a_description_has_map_thirds_data_and_the_next_command() -> None:
    metrics = {"val/mAP": 0.41234, "val/mAP_rare": 0.3, "val/mAP_common": 0.4, "val/mAP_frequent": 0.5}
    text = description(metrics, VALIDATION, trained=TRAIN, num_bins=7, lines=("`evaluate --from_run abc`",))
    assert text == (
        "**mAP 0.4123**; rare 0.3000, common 0.4000, frequent 0.5000; 7 frequency bins\n\n"
        "Trained on birds/train (5 images, 6 boxes, 7 classes), evaluated on birds/validation (1,200 images, 3,400 "
        "boxes).\n\n`evaluate --from_run abc`"
    )
    assert description({}, VALIDATION).startswith("**mAP cannot be measured**\n\nEvaluated on")


def test_names_that_mlflow_makes_up_are_recognised() -> None:
    assert all(is_generated(_generate_random_name()) for _ in range(50))
    for name in ("mine", "uniform, seed 3", "my-run-18", "honorable-fly-x", "a-b-c-1"):
        assert not is_generated(name), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("made", "found"), [("honorable-fly-18", "uniform"), ("my own", "my own")], ids=["made up", "--run-name"]
)
def test_a_run_of_mlflow_run_gets_the_name_unless_somebody_gave_it_one(
    made: str, found: str, workshop: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    del workshop
    client = MlflowClient()
    # In the experiment that another test may have set for this process.
    run_id = client.create_run(_get_experiment_id(), run_name=made).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
    with start_run("binning", TrackingSettings(experiment=None, output=Path("out")), default_name="uniform"):
        pass
    assert client.get_run(run_id).info.run_name == found


@pytest.mark.slow
def test_the_environment_names_a_run_before_its_settings_do(workshop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    del workshop
    for name, variable, found in ((None, None, "uniform"), (None, "by variable", "by variable"), ("own", "v", "own")):
        if variable:
            monkeypatch.setenv("MLFLOW_RUN_NAME", variable)
        settings = TrackingSettings(experiment="names", output=Path("out"))
        with start_run("binning", settings, name=name, default_name="uniform") as run:
            pass
        assert MlflowClient().get_run(run.run_id).info.run_name == found


@pytest.mark.slow
def test_an_experiment_has_the_kind_of_trainings_unless_somebody_chose_one(workshop: Any) -> None:
    del workshop
    client = MlflowClient()
    chosen = client.create_experiment("chosen", tags={"mlflow.experimentKind": "genai_development"})
    for name in ("fresh", "chosen"):
        with start_run("binning", TrackingSettings(experiment=name, output=Path("out"))):
            pass
    assert client.get_experiment_by_name("fresh").tags["mlflow.experimentKind"] == "custom_model_development"
    assert client.get_experiment(chosen).tags["mlflow.experimentKind"] == "genai_development"


@pytest.mark.slow
def test_a_description_of_ours_is_renewed_and_that_of_a_person_stays(workshop: Any) -> None:
    del workshop
    client = MlflowClient()
    with start_run("binning", TrackingSettings(experiment="words", output=Path("out"))) as run:
        run.set_description("mAP 0.1")
        run.set_description("mAP 0.2")
    assert client.get_run(run.run_id).data.tags["mlflow.note.content"] == "mAP 0.2"
    client.set_tag(run.run_id, "mlflow.note.content", "my words")
    with start_run("binning", TrackingSettings(experiment="words", output=Path("out")), resume=run.run_id) as again:
        again.set_description("mAP 0.3")
    assert client.get_run(run.run_id).data.tags["mlflow.note.content"] == "my words"
    assert mlflow.active_run() is None
