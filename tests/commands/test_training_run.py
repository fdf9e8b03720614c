"""What ``train`` leaves in a real MLflow store, and what can be done with it afterwards."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from retinaflow.commands import train
from retinaflow.commands.train import TrainResult
from retinaflow.data.training_data import load_training_data
from retinaflow.inference.checkpoint import load_checkpoint
from retinaflow.runs.store import last_run

ROOT = Path(__file__).resolve().parents[2]
AT_THE_ROOT = {
    "per_class_ap.csv",
    "ap_vs_frequency.png",
    "bins.json",
    "exposure.csv",
    "exposure_summary.csv",
    "exposure.png",
    "config.json",
    "metrics.json",
    "detections.png",
    "class_frequency.png",
    "precision_recall.png",
    "rarest_classes.png",
    "error_analysis.csv",
    "error_analysis.png",
    "confusions.csv",
}


def _run(trained: TrainResult) -> Run:
    return MlflowClient().get_run(trained.run_id)


def _artifact(trained: TrainResult, name: str) -> Path:
    return Path(mlflow.artifacts.download_artifacts(run_id=trained.run_id, artifact_path=name))


def test_a_training_is_one_finished_run(trained: TrainResult) -> None:
    run = _run(trained)
    assert run.info.status == "FINISHED"
    client = MlflowClient()
    experiment = client.get_experiment_by_name("retinaflow")
    assert experiment is not None
    assert run.info.experiment_id == experiment.experiment_id


def test_its_parameters_are_the_settings_that_were_used(trained: TrainResult, workshop: Any) -> None:
    params = _run(trained).data.params
    assert set(params) == set(workshop.settings().model_dump())
    assert {name for name, value in params.items() if value == "auto"} == {"hierarchy"}
    used = {"epochs": "2", "lr": "0.001", "head_norm": "group", "eval_every": "1", "train_splits": "train"}
    assert {name: params[name] for name in used} == used
    assert json.loads(_artifact(trained, "config.json").read_text())["epochs"] == 2


def test_its_curves_have_a_point_for_every_epoch(trained: TrainResult) -> None:
    client = MlflowClient()
    # Twelve images in batches of four: three steps an epoch.
    for name in ("train/loss", "train/loss_class", "train/loss_box", "train/lr", "train/images_per_second", "val/mAP"):
        points = client.get_metric_history(trained.run_id, name)
        assert [point.step for point in points] == [3, 6], name
        assert all(np.isfinite(point.value) for point in points), name
    loss, parts = (
        [point.value for point in client.get_metric_history(trained.run_id, "train/loss")],
        [
            [point.value for point in client.get_metric_history(trained.run_id, f"train/loss_{part}")]
            for part in ("class", "box")
        ],
    )
    assert loss == pytest.approx(np.sum(parts, axis=0).tolist())


def test_it_has_a_few_aggregates_and_no_metric_per_class(trained: TrainResult) -> None:
    metrics = _run(trained).data.metrics
    for group in ("mAP", "mAP_rare", "mAP_common", "mAP_frequent", "mAP_bin_1"):
        assert 0 <= metrics[f"val/{group}"] <= 1
        assert 0 <= metrics[f"best/{group}"] <= 1
    assert len([name for name in metrics if not name.startswith("rare/")]) < 35
    assert metrics["best/mAP"] == max(
        point.value for point in MlflowClient().get_metric_history(trained.run_id, "val/mAP")
    )


def test_it_says_on_what_data_and_with_which_code_it_was_made(trained: TrainResult, workshop: Any) -> None:
    tags = _run(trained).data.tags
    assert tags["retinaflow.data_digest"] == load_training_data(workshop.settings()).digest
    assert tags["retinaflow.command"] == "train"
    assert (tags["retinaflow.device"], tags["retinaflow.precision"])[1] == "float32"
    asked = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if asked.returncode == 0:
        assert tags["retinaflow.commit"] == asked.stdout.strip()
        assert tags["retinaflow.dirty"] in ("true", "false")


def test_tables_and_pictures_lie_at_the_root_where_mlflow_compares_them(trained: TrainResult) -> None:
    client = MlflowClient()
    found = {item.path for item in client.list_artifacts(trained.run_id)}
    assert found >= AT_THE_ROOT | {"checkpoints", "per_class_ap.json"}
    assert {item.path for item in client.list_artifacts(trained.run_id, "checkpoints")} == {
        "checkpoints/best.pt",
        "checkpoints/last.pt",
    }
    for name in AT_THE_ROOT:
        data = _artifact(trained, name).read_bytes()
        assert data.startswith(b"\x89PNG") if name.endswith(".png") else len(data) > 10


def test_the_table_per_class_starts_with_class_and_ap_and_the_rarest_class(trained: TrainResult) -> None:
    table = pd.read_csv(_artifact(trained, "per_class_ap.csv"))
    assert list(table.columns[:2]) == ["class", "ap"]
    assert set(table["class"]) == {"Car", "Vehicle", "Tree", "Plant", "Bus"}
    assert table["train_images"].is_monotonic_increasing
    assert table["class"][0] == "Bus"
    assert table["ap"].mean() == pytest.approx(_run(trained).data.metrics["best/mAP"], abs=1e-12)
    shown = json.loads(_artifact(trained, "per_class_ap.json").read_text())
    assert shown["columns"][:2] == ["class", "ap"]
    assert len(shown["data"]) == len(table)


def test_its_checkpoints_are_for_use_and_for_going_on(trained: TrainResult) -> None:
    best, last = (load_checkpoint(_artifact(trained, f"checkpoints/{name}.pt")) for name in ("best", "last"))
    assert best.progress is None
    assert last.progress is not None
    assert last.epoch == 2
    assert last.progress["best"] == _run(trained).data.metrics["best/mAP"]


# Evaluating it again


def test_judging_a_run_again_gives_its_score_and_the_same_files(trained: TrainResult, evaluated: Path) -> None:
    expected = _run(trained).data.metrics["best/mAP"]
    document = json.loads((evaluated / "metrics.json").read_text())
    assert document["mAP"] == pytest.approx(expected, abs=1e-12)
    ours, theirs = (
        pd.read_csv(path) for path in (evaluated / "per_class_ap.csv", _artifact(trained, "per_class_ap.csv"))
    )
    pd.testing.assert_frame_equal(ours, theirs, check_exact=False, atol=1e-9)
    (run,) = mlflow.search_runs(
        filter_string=f"params.output = '{evaluated}'", experiment_names=["retinaflow"], output_format="list"
    )
    assert run.info.status == "FINISHED"
    assert run.data.metrics["val/mAP"] == pytest.approx(expected, abs=1e-12)
    assert run.data.tags["retinaflow.evaluated"] == trained.run_id


@pytest.mark.parametrize("source", ["models:/tiny-detector/1", "file"])
def test_a_model_and_a_file_are_evaluated_as_in_training(trained: TrainResult, workshop: Any, source: str) -> None:
    from_run = str(trained.checkpoint) if source == "file" else source
    expected = _run(trained).data.metrics["best/mAP"]
    assert _evaluated_map(workshop, from_run=from_run) == pytest.approx(expected, abs=1e-12)


def test_without_a_name_the_last_training_is_evaluated(trained: TrainResult, workshop: Any) -> None:
    # Runs of other tests in this store end later; a run that is ended again is the last one.
    MlflowClient().set_terminated(trained.run_id)
    assert last_run("train") == trained.run_id
    assert _evaluated_map(workshop) == pytest.approx(_run(trained).data.metrics["best/mAP"], abs=1e-12)


def _evaluated_map(workshop: Any, **given: str) -> float:
    output = workshop.folder / "again"
    assert workshop.cli("evaluate", **given, output=output, track="false", bootstrap=0) == 0
    return float(json.loads((output / "metrics.json").read_text())["mAP"])


def test_a_model_can_be_evaluated_on_named_data(trained: TrainResult, workshop: Any) -> None:
    output = workshop.folder / "named"
    given = {"from_run": trained.checkpoint, "data": workshop.data, "output": output, "track": "false"}
    assert workshop.cli("evaluate", **given, bootstrap=10) == 0
    document = json.loads((output / "metrics.json").read_text())
    assert document["mAP"] == pytest.approx(_run(trained).data.metrics["best/mAP"], abs=1e-12)
    low, high = document["intervals"]["mAP"]
    assert low <= high
    assert {"ap_low", "ap_high"} <= set(pd.read_csv(output / "per_class_ap.csv").columns)


WRONG = {
    "run id": ("evaluate", {"from_run": "0" * 32}, f"run {'0' * 32} has no checkpoints/best.pt in sqlite:"),
    "model": ("evaluate", {"from_run": "models:/nobody/1"}, "from_run=models:/nobody/1: no such model in sqlite:"),
    "file": ("evaluate", {"from_run": "nowhere.pt"}, "nowhere.pt: no such checkpoint file"),
    "damaged file": ("evaluate", {"from_run": "damaged.pt"}, "damaged.pt: not a readable checkpoint"),
    "split of data=trained": (
        "evaluate",
        {"eval_split": "test"},
        "data must be given for eval_split to apply, but got data=trained, eval_split=test",
    ),
    "how the data are labelled": (
        "evaluate",
        {"exhaustive": "true"},
        "data must be given for exhaustive to apply, but got data=trained, exhaustive=true",
    ),
    "run to resume": ("train", {"resume": "0" * 32}, f"run {'0' * 32} has no checkpoints in sqlite:"),
    "file to resume": ("train", {"resume": "nowhere.pt"}, "resume=nowhere.pt: no such checkpoint file"),
    "checkpoint of weights only to resume": (
        "train",
        {"resume": "best"},
        "best.pt holds weights only and cannot be resumed; pass last.pt",
    ),
}


@pytest.mark.parametrize("fault", WRONG)
def test_what_is_not_there_is_named(
    fault: str, trained: TrainResult, workshop: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    command, given, message = WRONG[fault]
    Path("damaged.pt").write_bytes(trained.checkpoint.read_bytes()[:1000])
    given = {"from_run": trained.checkpoint, **given} if command == "evaluate" else dict(given)
    if given.get("resume") == "best":
        given["resume"] = trained.checkpoint
    data = {"data": workshop.data} if command == "train" else {}
    assert workshop.cli(command, **data, **given, track="false") == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert message in shown


def test_the_weights_fit_the_metrics_they_are_logged_with(trained: TrainResult) -> None:
    """best.pt is the file beside the run, not a later one."""
    local, logged = (load_checkpoint(path) for path in (trained.checkpoint, _artifact(trained, "checkpoints/best.pt")))
    assert all(torch.equal(local.state[name], logged.state[name]) for name in local.state)


@pytest.mark.parametrize("on_bad_image", ["stop", "skip"])
def test_an_image_that_becomes_unreadable_in_mid_epoch_stops_the_training_or_is_skipped_and_listed(
    on_bad_image: str, workshop: Any, tiny_dataset: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, output = tiny_dataset(f"fading_{on_bad_image}"), workshop.folder / f"fading_{on_bad_image}"
    given = {"data": str(folder), "on_bad_image": on_bad_image, "track": False, "output": str(output), "epochs": 1}
    # Uniform draws show every image once.
    config = workshop.settings(**given, sampling="uniform")
    data = load_training_data(config)
    for name in ("train003", "validation001"):
        (folder / "images" / f"{name}.jpg").write_bytes(b"no image any more")
    if on_bad_image == "stop":
        with pytest.raises(ValueError, match=r"train003\.jpg: not a readable image; replace the file, or give on_bad"):
            train.run(config, data=data)
        return
    train.run(config, data=data)
    dropped = pd.read_csv(next(output.rglob("dropped.csv")))
    assert sorted(dropped["file"]) == ["train003", "validation001"]
    assert "2 images became unreadable and were skipped" in capsys.readouterr().out
