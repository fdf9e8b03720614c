"""Runs in a real sqlite store and in a folder: what is written, how a run ends, what is fetched back."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from workshop import make_store

from retinaflow.errors import DataError, Interrupted, SettingError, StoreError
from retinaflow.reports.class_figures import exposure_curves
from retinaflow.runs import registry, store, tracking
from retinaflow.runs.datasets import DatasetInput
from retinaflow.runs.run import FolderRun, Run
from retinaflow.runs.start import start_run
from retinaflow.settings.data_settings import TrackingSettings
from retinaflow.settings.value_types import as_text

DATASET = DatasetInput("birds/validation", "0123456789abcdef", "/data/birds", {"images": 6}, "validation")


@pytest.fixture(scope="module")
def _store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_store(tmp_path_factory.mktemp("store"))


@pytest.fixture
def client(_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MlflowClient]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(_store)
    yield MlflowClient()
    # Choosing an experiment is remembered in the environment.
    os.environ.pop("MLFLOW_EXPERIMENT_ID", None)
    mlflow.set_tracking_uri(before)


def _start(command: str = "train", *, track: bool = True, output: Path = Path("out"), **more: Any) -> Any:
    settings = TrackingSettings(track=track, experiment="tests", output=output)
    return start_run(command, settings, **more)


def test_a_run_ends_as_finished(client: MlflowClient) -> None:
    with _start(name="first") as run:
        assert client.get_run(run.run_id).info.status == "RUNNING"
    info = client.get_run(run.run_id).info
    assert (info.status, info.run_name) == ("FINISHED", "first")
    assert mlflow.active_run() is None


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (Interrupted("signal SIGTERM"), "KILLED"),
        (KeyboardInterrupt(), "KILLED"),
        (ValueError("the rule"), "FAILED"),
        (SystemExit(1), "FAILED"),
    ],
    ids=["stopped", "interrupted", "an error", "an exit"],
)
def test_a_run_that_is_interrupted_records_how(client: MlflowClient, error: BaseException, status: str) -> None:
    with pytest.raises(type(error)), _start() as run:
        raise error
    ended = client.get_run(run.run_id)
    assert ended.info.status == status
    assert ended.data.tags["retinaflow.end"] == f"{type(error).__name__}: {error}"
    assert mlflow.active_run() is None


def test_a_run_inside_another_is_its_child(client: MlflowClient) -> None:
    with _start("main") as parent, _start("train", name="child") as child:
        pass
    found = client.get_run(child.run_id)
    assert found.data.tags["mlflow.parentRunId"] == parent.run_id
    assert found.info.run_name == "child"
    assert found.info.experiment_id == client.get_run(parent.run_id).info.experiment_id


def test_the_run_that_mlflow_run_made_is_joined(client: MlflowClient, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = client.create_experiment("by mlflow run")
    made = client.create_run(experiment, run_name="given").info.run_id
    mlflow.set_experiment("by mlflow run")
    monkeypatch.setenv("MLFLOW_RUN_ID", made)
    with _start(name="own name") as run:
        pass
    assert run.run_id == made
    assert client.get_run(made).info.run_name == "given"


def test_a_run_is_resumed(client: MlflowClient) -> None:
    with pytest.raises(Interrupted), _start() as first:
        raise Interrupted
    with _start(resume=first.run_id) as second:
        assert second.run_id == first.run_id
    assert client.get_run(first.run_id).info.status == "FINISHED"


def test_a_run_of_mlflow_run_leads_to_the_one_that_is_resumed(
    client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Interrupted), _start(name="first") as first:
        raise Interrupted
    made = client.create_run(client.create_experiment("elsewhere")).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", made)
    with _start(resume=first.run_id) as second, _start("evaluate", name="inner") as inner:
        assert second.run_id == first.run_id
        assert inner.run_id != made
    tags = client.get_run(made).data.tags
    assert (tags["retinaflow.command"], tags["retinaflow.continues"]) == ("resume", first.run_id)
    page = f"#/experiments/{client.get_run(first.run_id).info.experiment_id}/runs/{first.run_id}"
    assert tags["mlflow.note.content"] == f"Resumes [first]({page}), which has all results."
    assert client.get_run(first.run_id).info.status == "FINISHED"


def test_a_deleted_run_cannot_be_resumed_and_the_message_reports_it(client: MlflowClient) -> None:
    with _start() as run:
        pass
    client.delete_run(run.run_id)
    with pytest.raises(StoreError, match=r"no run can be started in sqlite:.*deleted"), _start(resume=run.run_id):
        pass


def test_a_value_that_is_not_the_one_mlflow_run_has_logged_is_logged_beside_it(client: MlflowClient) -> None:
    with _start() as run:
        for name, logged in {"focal_gamma": "2.0", "lr": "1e-3", "data": "'my data'"}.items():
            client.log_param(run.run_id, name, logged)
        for _ in range(2):
            run.log_params({"focal_gamma": 3.1, "lr": 0.001, "data": "my data"})
    params = client.get_run(run.run_id).data.params
    assert params == {"focal_gamma": "2.0", "lr": "1e-3", "data": "'my data'", "used/focal_gamma": "3.1"}


def test_a_child_is_made_and_ended_from_outside_of_its_parent(client: MlflowClient) -> None:
    with _start("main") as parent:
        pass
    folder, tags = Path("waiting"), {"retinaflow.trial": "0"}
    child = tracking.start_child(parent.run_id, name="trial-0000", tags=tags, folder=folder)
    assert mlflow.active_run() is None
    assert tracking.children(parent.run_id, tags=tags) == [child.run_id]
    assert tracking.children(parent.run_id, tags={"retinaflow.trial": "1"}) == []
    child.log_metrics({"val/mAP": 0.5}, step=1)
    tracking.end_run(child, "KILLED")
    assert not folder.exists()
    found = client.get_run(child.run_id)
    assert found.data.metrics == {"val/mAP": 0.5}
    assert (found.info.status, found.info.run_name) == ("KILLED", "trial-0000")
    assert found.data.tags["mlflow.parentRunId"] == parent.run_id
    with pytest.raises(StoreError, match=r"no run can be started under run 0+ in sqlite:"):
        tracking.start_child("0" * 32, name="orphan", tags={}, folder=folder)


def test_a_child_whose_making_was_not_answered_is_made_once(
    client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    with _start("main") as parent:
        pass
    create_run, asked = MlflowClient.create_run, []

    def unanswered_once(client: MlflowClient, *words: object, **named: object) -> object:
        asked.append(named["run_name"])
        made = create_run(client, *words, **named)  # type: ignore[arg-type]
        if len(asked) == 1:
            raise MlflowException("API request failed: the connection was closed")
        return made

    monkeypatch.setattr(MlflowClient, "create_run", unanswered_once)
    tags = {"retinaflow.trial": "0"}
    child = tracking.start_child(parent.run_id, name="trial-0000", tags=tags, folder=Path("waiting"))
    tracking.end_run(child, "FINISHED")
    assert asked == ["trial-0000"]
    assert tracking.children(parent.run_id, tags=tags) == [child.run_id]
    assert client.get_run(child.run_id).info.status == "FINISHED"


def test_what_a_killed_process_left_unsent_is_sent_with_the_end_of_its_run(client: MlflowClient) -> None:
    with _start("main") as parent:
        pass
    folder = Path("waiting")
    child = tracking.start_child(parent.run_id, name="trial-0000", tags={}, folder=folder)
    assert child.close() is None
    point = {"kind": "metrics", "time": 1, "step": 1, "metrics": {"val/mAP": 0.5}}
    (folder / f"unsent-{child.run_id}").mkdir(parents=True)
    (folder / f"unsent-{child.run_id}" / "unsent.jsonl").write_text(json.dumps(point) + "\n", encoding="utf-8")
    tracking.end_run(tracking.open_run(child.run_id, folder, resumed=True), "KILLED")
    found = client.get_run(child.run_id)
    assert (found.info.status, found.data.metrics) == ("KILLED", {"val/mAP": 0.5})
    assert not any(folder.iterdir())


def test_parameters_are_written_as_on_the_command_line_and_never_twice(client: MlflowClient) -> None:
    with _start() as run:
        client.log_param(run.run_id, "lr", "1e-3")
        run.log_params({"lr": 0.001, "splits": ("a", "b"), "boxes": (), "eval_ids": None, "track": True})
    params = client.get_run(run.run_id).data.params
    assert params == {"lr": "1e-3", "splits": "a,b", "boxes": "none", "eval_ids": "none", "track": "true"}


def test_metrics_are_points_of_curves(client: MlflowClient) -> None:
    with _start() as run:
        for step in (1, 5):
            run.log_metrics({"train/loss": np.float64(step / 2), "val/mAP": 0.25}, step=step)
    points = client.get_metric_history(run.run_id, "train/loss")
    assert [(point.step, point.value) for point in points] == [(1, 0.5), (5, 2.5)]


TABLE = pd.DataFrame({"class": ["A", "B"], "ap": [1 / 3, np.nan], "bin": pd.array([1, None], dtype="Int64")})


def _log_everything(run: Run) -> None:
    run.log_csv(TABLE, "table.csv")
    run.log_table(TABLE, "table.json")
    run.log_json({"path": Path("a"), "values": [1]}, "document.json")
    run.log_figure(exposure_curves({"uniform": np.ones(2)}, images_per_class=np.array([1, 2])), "curves.png")
    Path("last.pt").write_bytes(b"weights")
    run.log_file(Path("last.pt"), "checkpoints")


def test_a_full_disk_takes_files_and_not_the_work(
    client: MlflowClient, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_room(*_given: object, **_more: object) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/tmp/x")

    with _start() as run:
        with monkeypatch.context() as patch:
            patch.setattr(tempfile, "mkdtemp", no_room)
            _log_everything(run)
            run.log_image(np.zeros((4, 4, 3), dtype=np.uint8), key="Car", step=1)
        run.log_text("room again", "later.txt")
        with pytest.raises(FileNotFoundError):
            run.log_written("bug.txt", lambda path: path.with_name("none").read_text())
    assert {item.path for item in client.list_artifacts(run.run_id)} >= {"later.txt"}
    said = capsys.readouterr().err
    assert "document.json is not logged: No space left on device: /tmp/x; make room, or give another output=" in said
    assert "the image Car of step 1 is not logged: No space left on device" in said


def test_a_folder_gets_the_files_that_mlflow_gets(client: MlflowClient, tmp_path: Path) -> None:
    with _start() as run:
        _log_everything(run)
    with _start(track=False, output=tmp_path / "folder") as local:
        _log_everything(local)
    logged = Path(mlflow.artifacts.download_artifacts(run_id=run.run_id, dst_path=str(tmp_path / "logged")))
    ours, theirs = (
        {path.relative_to(place).as_posix(): path.read_bytes() for path in place.rglob("*") if path.is_file()}
        for place in (tmp_path / "folder", logged)
    )
    shown = json.loads(theirs.pop("table.json"))
    assert ours == theirs
    # MLflow writes ten digits into its tables; a missing value is null, not NaN.
    assert shown == {"columns": ["class", "ap", "bin"], "data": [["A", pytest.approx(1 / 3), 1], ["B", None, None]]}
    assert client.get_run(run.run_id).info.status == "FINISHED"


def test_a_table_that_is_logged_again_replaces_the_first(client: MlflowClient) -> None:
    """A run that is resumed is evaluated again."""
    with _start() as run:
        run.log_table(TABLE, "table.json")
        run.log_table(TABLE.assign(ap=[0.5, 0.25]), "table.json")
    shown = mlflow.artifacts.load_dict(f"runs:/{run.run_id}/table.json")
    assert shown == {"columns": ["class", "ap", "bin"], "data": [["A", 0.5, 1], ["B", 0.25, None]]}
    assert "table.json" in client.get_run(run.run_id).data.tags["mlflow.loggedArtifacts"]


def test_a_csv_keeps_every_digit(tmp_path: Path) -> None:
    numbers = np.random.default_rng(0).random(50) * 10.0 ** np.arange(-25, 25)
    FolderRun(tmp_path).log_csv(pd.DataFrame({"ap": numbers}), "table.csv")
    header, *lines = (tmp_path / "table.csv").read_text(encoding="utf-8").splitlines()
    assert header == "ap"
    assert [float(line) for line in lines] == numbers.tolist()


def test_a_folder_keeps_parameters_tags_and_curves(tmp_path: Path) -> None:
    run = FolderRun(tmp_path / "run")
    run.log_params({"boxes": (), "lr": 0.001})
    run.set_tags({"digest": "abc"})
    run.set_tags({"device": "cpu"})
    run.log_metrics({"val/mAP": np.float64(0.5)}, step=3)
    run.log_metrics({"val/mAP": 0.6}, step=6)
    assert json.loads((run.folder / "params.json").read_text()) == {"boxes": "none", "lr": "0.001"}
    assert json.loads((run.folder / "tags.json").read_text()) == {"digest": "abc", "device": "cpu"}
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 3, "val/mAP": 0.5}, {"step": 6, "val/mAP": 0.6}]


def test_a_file_that_lies_in_the_folder_already_stays(tmp_path: Path) -> None:
    run = FolderRun(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.pt").write_bytes(b"weights")
    run.log_file(tmp_path / "checkpoints" / "last.pt", "checkpoints")
    assert (tmp_path / "checkpoints" / "last.pt").read_bytes() == b"weights"


def test_untracked_work_opens_no_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/untouched.db")
    try:
        with _start(track=False) as run:
            _log_everything(run)
            run.log_model(Path("last.pt"), register_as="nothing", step=0, dataset=DATASET)
    finally:
        mlflow.set_tracking_uri(before)
    assert not list(tmp_path.glob("*.db"))
    assert not (tmp_path / "mlruns").exists()


def test_the_last_run_is_the_newest_finished_one_of_its_command(client: MlflowClient) -> None:
    with pytest.raises(SettingError, match="there is no finished search run in sqlite:"):
        store.last_run("search")
    with _start("search") as first, _start("train"):
        pass
    with pytest.raises(RuntimeError), _start("search"):
        raise RuntimeError
    assert store.last_run("search") == first.run_id
    assert client.get_run(first.run_id).info.status == "FINISHED"


def test_what_a_run_lacks_is_named(client: MlflowClient) -> None:
    with _start() as run:
        pass
    assert client.get_run(run.run_id).info.status == "FINISHED"
    with pytest.raises(DataError, match=rf"run {run.run_id} has no checkpoints/best\.pt in sqlite:"):
        store.fetch(run.run_id, "checkpoints/best.pt")
    with pytest.raises(DataError, match=r"run nobody has no checkpoints/best\.pt in sqlite:"):
        store.fetch("nobody", "checkpoints/best.pt")
    with pytest.raises(DataError, match="from_run=models:/nobody@champion: no such model in sqlite:"):
        registry.fetch_model("models:/nobody@champion")


@pytest.mark.parametrize(
    ("value", "text"),
    [((), "none"), (("a", 1), "a,1"), (None, "none"), (0.001, "0.001"), (False, "false"), (Path("a/b"), "a/b")],
    ids=["empty", "list", "None", "number", "no", "path"],
)
def test_a_value_is_written_as_on_the_command_line(value: object, text: str) -> None:
    assert as_text(value) == text


@pytest.mark.slow
def test_copies_of_artifacts_are_gone_when_the_process_ends(client: MlflowClient) -> None:
    del client
    with _start() as run:
        run.log_text("hello", "note.txt")
    script = (
        "import sys, mlflow; from retinaflow.runs import store; mlflow.set_tracking_uri(sys.argv[1]); "
        "path = store.fetch(sys.argv[2], 'note.txt'); print(path, path.read_text())"
    )
    words = [sys.executable, "-W", "ignore", "-c", script, mlflow.get_tracking_uri(), run.run_id]
    path, text = subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()
    assert text == "hello"
    assert not Path(path).exists()
