"""``main``, ``binning`` and ``train`` as people start them: runs, stops, resumes and failures in a real store."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from retinaflow.commands import binning, main, train
from retinaflow.commands.train import TrainResult
from retinaflow.data.training_data import load_training_data
from retinaflow.errors import DataError, Interrupted, WorkerError
from retinaflow.inference.checkpoint import load_checkpoint
from retinaflow.settings.commands import BinningConfig, MainConfig, TrainConfig
from retinaflow.settings.resolve import resolve

ROOT = Path(__file__).resolve().parents[2]
SMALL_FLAGS = {"image_size": 64, "num_buckets": 1, "batch_size": 4, "fpn_channels": 64, "head_depth": 1, "epochs": 1}
WILD = {"lr": "1e30", "warmup": 0, "clip": "1e30", "precision": "float32"}
"""A training by these fails at its second step."""


def _runs(command: str) -> list[Run]:
    """Runs of a command, newest first."""
    return mlflow.search_runs(
        filter_string=f"tags.`retinaflow.command` = '{command}'",
        experiment_names=["retinaflow"],
        order_by=["attributes.start_time DESC"],
        output_format="list",
    )


def _children(parent: Run) -> list[Run]:
    return mlflow.search_runs(
        filter_string=f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'",
        search_all_experiments=True,
        output_format="list",
    )


def _names(run_id: str) -> set[str]:
    return {item.path for item in MlflowClient().list_artifacts(run_id)}


# binning


def test_binning_logs_bins_and_exposure_as_one_finished_run(workshop: Any) -> None:
    binning.run(resolve(BinningConfig, {"data": str(workshop.data), "num_bins": 2}))
    run = _runs("binning")[0]
    assert run.info.status == "FINISHED"
    assert run.data.params["num_bins"] == "2"
    assert _names(run.info.run_id) >= {"bins.json", "class_frequency.png", "exposure.csv", "exposure_summary.csv"}
    document = mlflow.artifacts.load_dict(f"runs:/{run.info.run_id}/bins.json")
    assert document["num_bins"] == 2
    assert sum(row["train_boxes"] for row in document["classes"]) >= 16
    path = mlflow.artifacts.download_artifacts(run_id=run.info.run_id, artifact_path="exposure.csv")
    exposure = pd.read_csv(path)
    assert exposure["class"][0] == "Bus"
    # Uniform drawing of twelve images an epoch shows every class as often as it has images.
    np.testing.assert_allclose(exposure["uniform_expected"], exposure["train_images"])


def test_binning_needs_no_images_and_says_what_a_group_would_be_trained_on(
    workshop: Any, tiny_dataset: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    del workshop
    data = tiny_dataset("without_images")
    shutil.rmtree(data / "images")
    settings = {"data": str(data), "class_group": "Bus", "track": False, "output": "groups"}
    binning.run(resolve(BinningConfig, settings))
    said = capsys.readouterr().out
    # Of twelve images the 6th and the 12th have a bus; no image is labelled as without one.
    assert "no folder of images" in said
    assert "class_group=Bus: 1 classes; 2 images with boxes of the group; background 0 of 0 verified absent" in said
    (found,) = Path("groups").rglob("group_images.json")
    assert json.loads(found.read_text(encoding="utf-8"))["others_in_all"] == 10
    with pytest.raises(DataError, match="holds no folder images"):
        load_training_data(resolve(TrainConfig, settings))


# What is trained on


def test_a_table_of_image_sizes_stands_for_the_headers(workshop: Any) -> None:
    Path("sizes.csv").write_text("ImageID,Width,Height\ntrain000,300,200\n", encoding="utf-8")
    data = load_training_data(workshop.settings(size_table="sizes.csv"))
    assert data.train.sizes[:2].tolist() == [[200, 300], [96, 64]]


def test_images_of_eval_ids_are_evaluated_on_and_not_trained_on(workshop: Any) -> None:
    Path("ids.txt").write_text("ImageID\ntrain001\ntrain005\nelsewhere\n")
    data = load_training_data(workshop.settings(eval_ids="ids.txt"))
    assert set(data.evaluated.image_ids) == {"train001", "train005"}
    assert set(data.train.image_ids) == {f"train{n:03d}" for n in range(12)} - {"train001", "train005"}


def test_with_one_bucket_every_batch_has_the_median_shape(workshop: Any, trained: TrainResult) -> None:
    del workshop
    assert load_checkpoint(trained.checkpoint).buckets.shapes == ((64, 64),)


@pytest.mark.slow
def test_a_group_of_two_names_trains_and_judges_two_classes(workshop: Any) -> None:
    output = workshop.folder / "pair"
    result = train.run(workshop.settings(class_group="Car,Tree", epochs=1, track="false", output=str(output)))
    checkpoint = load_checkpoint(result.checkpoint)
    assert checkpoint.taxonomy.names == ("Car", "Tree")
    assert len(checkpoint.taxonomy) == 2
    table = pd.read_csv(output / "train" / "per_class_ap.csv")
    assert set(table["class"]) == {"Car", "Tree"}


@pytest.mark.parametrize("parents", ["learn", "expand", "ignore"])
def test_parents_count_their_childrens_images_unless_they_are_ignored(workshop: Any, parents: str) -> None:
    data = load_training_data(workshop.settings(parents=parents))
    images = dict(zip(data.train.taxonomy.names, data.bins.images_per_class.tolist(), strict=True))
    own, below = _images_of(workshop, "Vehicle"), _images_of(workshop, "Car", "Bus")
    assert len(own) < len(own | below)
    assert images["Vehicle"] == len(own if parents == "ignore" else own | below)


@pytest.mark.slow
@pytest.mark.parametrize("parents", ["expand", "ignore"])
def test_parents_that_are_not_learnt_are_expanded_to_or_ignored(workshop: Any, parents: str) -> None:
    output = workshop.folder / parents
    config = workshop.settings(parents=parents, epochs=1, track="false", output=str(output))
    result = train.run(config)
    assert load_checkpoint(result.checkpoint).parents == parents
    assert 0 <= result.evaluation.metrics["val/mAP"] <= 1
    if parents == "expand":
        given = {"from_run": result.checkpoint, "output": output, "track": "false", "bootstrap": 0}
        assert workshop.cli("evaluate", **given, score_threshold="0.005", max_detections=1000) == 0
        found = pd.read_csv(output / "predictions.csv")
        trees, plants = (found[found["LabelName"] == mid] for mid in ("/m/0tree", "/m/0plant"))
        assert len(trees)
        assert set(trees["ImageID"]) <= set(plants["ImageID"])


def _images_of(workshop: Any, *names: str) -> set[str]:
    boxes = pd.read_csv(workshop.data / "train-annotations-bbox.csv")
    classes = pd.read_csv(workshop.data / "class-descriptions.csv", names=["id", "name"])
    return set(boxes[boxes["LabelName"].isin(classes[classes["name"].isin(names)]["id"])]["ImageID"])


# Without MLflow


@pytest.mark.slow
def test_without_tracking_the_same_files_go_to_the_output_folder(trained: TrainResult, workshop: Any) -> None:
    before = len(_runs("train"))
    output = workshop.folder / "untracked"
    result = train.run(workshop.settings(track="false", output=str(output)))
    files = {path.name for path in (output / "train").iterdir() if path.is_file()}
    only_in_mlflow = {"per_class_ap.json", "checkpoints", "images"}
    assert (
        files - {"params.json", "metrics.jsonl", "tags.json", "datasets.json"}
        == _names(trained.run_id) - only_in_mlflow
    )
    assert result.checkpoint == output / "train" / "checkpoints" / "best.pt"
    assert len(_runs("train")) == before

    points = [json.loads(line) for line in (output / "train" / "metrics.jsonl").read_text().splitlines()]
    names = {name for point in points for name in point} - {"step"}
    assert names == set(MlflowClient().get_run(trained.run_id).data.metrics)
    # Same settings, same numbers, wherever they go.
    last = {name: value for point in points for name, value in point.items()}
    tracked = MlflowClient().get_run(trained.run_id).data.metrics
    for name in ("train/loss", "val/mAP", "best/mAP"):
        assert last[name] == tracked[name]


# Stops, failures, resumes


def _signal_when(path_of: Any, number: signal.Signals) -> threading.Thread:
    """Send this process a signal as soon as a file is there."""

    def wait() -> None:
        for _ in range(6000):
            if path_of() is not None:
                os.kill(os.getpid(), number)
                return
            time.sleep(0.01)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


@pytest.mark.slow
def test_a_stopped_training_is_killed_and_goes_on_as_if_nothing_had_been(workshop: Any) -> None:
    output = workshop.folder / "stopped"
    config = workshop.settings(epochs=4, eval_every=4, output=str(output))
    thread = _signal_when(lambda: next(output.glob("*/checkpoints/last.pt"), None), signal.SIGTERM)
    with pytest.raises(Interrupted, match="SIGTERM"):
        train.run(config)
    thread.join()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert mlflow.active_run() is None

    killed = _runs("train")[0]
    assert killed.info.status == "KILLED"
    assert "SIGTERM" in killed.data.tags["retinaflow.end"]
    run_id = killed.info.run_id
    assert _names(run_id) >= {"config.json", "bins.json", "checkpoints"}
    kept = mlflow.artifacts.download_artifacts(run_id=run_id, artifact_path="checkpoints/last.pt")
    epoch = load_checkpoint(Path(kept)).epoch
    assert 0 <= epoch < 4

    # From the artifacts alone, as on another machine.
    shutil.rmtree(output)
    elsewhere = workshop.settings(epochs=4, eval_every=4, output=str(workshop.folder / "elsewhere"), resume=run_id)
    result = train.run(elsewhere)
    assert result.run_id == run_id
    client = MlflowClient()
    assert client.get_run(run_id).info.status == "FINISHED"
    steps = [point.step for point in client.get_metric_history(run_id, "train/epoch")]
    assert steps == [3, 6, 9, 12]

    whole = train.run(workshop.settings(epochs=4, eval_every=4, track="false", output=str(workshop.folder / "whole")))
    ours, theirs = (load_checkpoint(path.with_name("last.pt")) for path in (result.checkpoint, whole.checkpoint))
    assert not [name for name in ours.state if not torch.equal(ours.state[name], theirs.state[name])]
    assert result.evaluation.metrics == whole.evaluation.metrics


def test_a_finished_training_can_be_resumed_and_keeps_its_best(trained: TrainResult, workshop: Any) -> None:
    """Nothing is left to train: the run is evaluated again, from artifacts, with the weights it had."""
    again = train.run(workshop.settings(output=str(workshop.folder / "third place"), resume=trained.run_id))
    assert again.run_id == trained.run_id
    assert again.evaluation.metrics == trained.evaluation.metrics


def test_other_data_is_refused_on_resume(trained: TrainResult, workshop: Any) -> None:
    last = trained.checkpoint.with_name("last.pt")
    Path("some.txt").write_text("train001\n")
    with pytest.raises(ValueError, match="the data must be that of the checkpoint, but its digest is"):
        train.run(workshop.settings(resume=str(last), eval_ids="some.txt", track="false"))


@pytest.mark.trains
def test_a_training_that_fails_ends_as_failed_with_its_reason(
    workshop: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert workshop.cli("train", data=workshop.data, **SMALL_FLAGS, lr="1e30", warmup=0, clip="1e30") == 2
    assert "the loss must be finite" in capsys.readouterr().err
    run = _runs("train")[0]
    assert run.info.status == "FAILED"
    assert run.data.tags["retinaflow.end"].startswith("TrainingError: the loss must be finite")
    assert mlflow.active_run() is None


# main


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2], ids=["one after the other", "side by side"])
def test_main_is_a_parent_run_with_two_children_and_their_comparison(
    workshop: Any, threads: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    main.run(resolve(MainConfig, workshop.settings(epochs=1, register_as=f"pair-{threads}").model_dump(mode="json")))
    lines = capfd.readouterr().out.splitlines()
    assert any(line.startswith("uniform: epoch   1/1") for line in lines) == (threads == 2)
    parent = _runs("main")[0]
    assert parent.info.status == "FINISHED"
    children = _children(parent)
    assert {run.info.run_name for run in children} == {"uniform", "binned"}
    assert {run.info.status for run in children} == {"FINISHED"}
    path = mlflow.artifacts.download_artifacts(run_id=parent.info.run_id, artifact_path="comparison.csv")
    table = pd.read_csv(path).set_index("group")
    assert list(table.columns) == ["classes", "uniform", "binned", "difference", "low", "high"]
    assert (table.index[0], table.index[-1]) == ("mAP_bin_1", "mAP")
    for run in children:
        name = run.info.run_name
        for group in table.index:
            assert table.loc[group, name] == pytest.approx(run.data.metrics[f"best/{group}"], abs=1e-12)
    np.testing.assert_allclose(table["difference"], table["binned"] - table["uniform"], atol=1e-12)
    assert (table["low"] <= table["difference"] + 1e-12).all()
    assert (table["difference"] <= table["high"] + 1e-12).all()
    assert parent.data.metrics["val/mAP"] == pytest.approx(table.loc["mAP", "binned"], abs=1e-12)
    # The baseline is not what is put to use.
    assert [int(version.version) for version in MlflowClient().search_model_versions(f"name='pair-{threads}'")] == [1]
    # Both are trainings like any other, to be evaluated and resumed as such.
    for run in children:
        checkpoint = load_checkpoint(Path(run.data.params["output"]) / run.info.run_id / "checkpoints" / "best.pt")
        assert set(checkpoint.settings) == set(TrainConfig.model_fields)
        assert workshop.cli("evaluate", from_run=run.info.run_id, output="again", track="false", bootstrap=0) == 0
    # The same command again resumes what was stopped (here at its end) and trains nothing twice.
    stopped = [run.info.run_id for run in children][:threads]
    for run_id in stopped:
        MlflowClient().set_terminated(run_id, "KILLED")
    trainings = {run.info.run_id for run in _runs("train")}
    settings = workshop.settings(epochs=1, register_as=f"pair-{threads}").model_dump(mode="json")
    main.run(resolve(MainConfig, settings | {"resume": "auto"}))
    out = capfd.readouterr().out
    assert {run.info.run_id for run in _runs("train")} == trainings
    for run in children:
        run_id = run.info.run_id
        assert MlflowClient().get_run(run_id).info.status == "FINISHED"
        assert (f"run {run_id} has these settings and data, is not finished, and is resumed" in out) == (
            run_id in stopped
        )
        assert (f"{run_id} has these settings and data and is finished" in out) == (run_id not in stopped)
    path = mlflow.artifacts.download_artifacts(run_id=_runs("main")[0].info.run_id, artifact_path="comparison.csv")
    pd.testing.assert_frame_equal(pd.read_csv(path).set_index("group"), table, atol=1e-12)


@pytest.mark.slow
def test_a_training_that_fails_ends_main_and_the_other_training(
    workshop: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert workshop.cli("main", data=workshop.data, **SMALL_FLAGS, **WILD) == 2
    assert "error: the loss must be finite" in capsys.readouterr().err
    parent = _runs("main")[0]
    assert parent.info.status == "FAILED"
    assert {run.info.status for run in _children(parent)} - {"KILLED"} == {"FAILED"}


@pytest.mark.parametrize("killed", ["training", "main"])
def test_a_kill_ends_main_and_leaves_no_training_and_no_open_run(
    workshop: Any, killed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill() -> None:
        while len(found := multiprocessing.active_children()) < 2:
            time.sleep(0.1)
        pid, sign = (found[0].pid, signal.SIGKILL) if killed == "training" else (os.getpid(), signal.SIGTERM)
        os.kill(pid or 0, sign)

    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    thread = threading.Thread(target=kill)
    thread.start()
    config = resolve(MainConfig, workshop.settings(epochs=100).model_dump(mode="json"))
    kind = WorkerError if killed == "training" else Interrupted
    with pytest.raises(kind, match="exit code -9.*side_by_side=false" if killed == "training" else "SIGTERM"):
        main.run(config)
    thread.join()
    assert multiprocessing.active_children() == []
    parent = _runs("main")[0]
    assert parent.info.status == ("FAILED" if killed == "training" else "KILLED")
    assert [run.info.status for run in _children(parent)] == ["KILLED", "KILLED"]


@pytest.mark.parametrize(
    ("given", "message"),
    [({"sampling": "uniform"}, "but got sampling=uniform"), ({"resume": "abc"}, "but got resume=abc")],
    ids=["two alike", "resume"],
)
def test_main_refuses_what_it_cannot_compare(
    workshop: Any, given: dict[str, str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert workshop.cli("main", data=workshop.data, **given) == 2
    assert message in capsys.readouterr().err


# mlflow run


@pytest.mark.slow
@pytest.mark.trains
def test_mlflow_run_makes_one_run_of_the_train_entry_point(workshop: Any) -> None:
    binaries = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    settings = {
        "data": workshop.data,
        "num_bins": 2,
        **SMALL_FLAGS,
        "output": workshop.folder / "by mlflow",
    }
    words = [word for name, value in settings.items() for word in ("-P", f"{name}={value}")]
    command = [str(binaries / "mlflow"), "run", str(ROOT), "-e", "train", "--env-manager", "local"]
    done = subprocess.run(
        [*command, "--experiment-name", "by mlflow", *words],
        env=environment,
        cwd=workshop.folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    runs = mlflow.search_runs(experiment_names=["by mlflow"], output_format="list")
    assert [run.info.status for run in runs] == ["FINISHED"]
    params = runs[0].data.params
    assert (params["num_bins"], params["epochs"], params["sampling"]) == ("2", "1", "binned")
    assert 0 <= runs[0].data.metrics["best/mAP"] <= 1
    assert "per_class_ap.csv" in _names(runs[0].info.run_id)
