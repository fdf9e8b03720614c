"""One thing that the store refuses does not take the others along, and no secret of an address is logged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest
from mlflow.tracking import MlflowClient

from retinaflow.runs import outbox
from retinaflow.runs.run import FolderRun
from retinaflow.runs.start import start_run
from retinaflow.settings.data_settings import TrackingSettings

LONG = "0123456789" * 700
SECRET = "postgresql://ann:S3cret@h/db"


@pytest.fixture(autouse=True)
def _in_the_workshop(workshop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    del workshop
    monkeypatch.setattr(outbox, "PAUSES", (0.01,))


def _run(**given: Any) -> Any:
    return start_run("train", TrackingSettings(experiment="tests", output=Path("out")), **given)


def test_a_refused_parameter_leaves_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    with _run() as run:
        run.log_params({"lr": 0.1, "no:way?": 1, "x" * 300: 2, "seed": 3})
    params = MlflowClient().get_run(run.run_id).data.params
    assert {name: params.get(name) for name in ("lr", "seed", "no:way?")} == {"lr": "0.1", "seed": "3", "no:way?": None}
    shown = capsys.readouterr().err
    assert "does not take params: no:way?: " in shown
    assert "1 sets of parameters or tags" in shown


def test_a_refused_metric_leaves_the_others() -> None:
    with _run() as run:
        run.log_metrics({"val/mAP": 0.5, "val/AP of A, B (C)": 0.1, "val/mAP_rare": 0.25}, step=1)
        run.log_metrics({"val/mAP": 0.75}, step=2)
    assert MlflowClient().get_run(run.run_id).data.metrics == {"val/mAP": 0.75, "val/mAP_rare": 0.25}


def test_a_refused_tag_leaves_the_others() -> None:
    with _run() as run:
        run.set_tags({"a": "1", "y" * 300: "2", "b": "3"})
    tags = MlflowClient().get_run(run.run_id).data.tags
    assert (tags["a"], tags["b"]) == ("1", "3")


def test_a_file_that_cannot_be_stored_leaves_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    with _run() as run:
        root = Path(mlflow.get_run(run.run_id).info.artifact_uri.removeprefix("file://"))
        root.mkdir(parents=True, exist_ok=True)
        (root / "checkpoints").write_text("a file where a folder should be", encoding="utf-8")
        for number in range(3):
            path = Path(f"last-{number}.pt")
            path.write_bytes(b"weights")
            run.log_file(path, "checkpoints")
        run.log_text("whole", "after.txt")
        run.log_metrics({"val/mAP": 0.5}, step=1)
    found = mlflow.get_run(run.run_id)
    assert (found.info.status, found.data.metrics) == ("FINISHED", {"val/mAP": 0.5})
    assert (root / "after.txt").read_text(encoding="utf-8") == "whole"
    shown = capsys.readouterr().err
    assert "out of reach" not in shown
    assert shown.count("answers, but cannot store last-0.pt; it is tried again") == 1
    assert "last-1.pt; it is tried again" not in shown
    assert "3 files (last-0.pt, last-1.pt, last-2.pt) never arrived" in shown


@pytest.mark.parametrize(
    ("quoted", "value"),
    [("'" + LONG[:5999], LONG), (LONG[:6000], LONG), ("'a b'", "a b"), ("1e-3", "0.001")],
    ids=["cut between quotes", "cut without quotes", "quoted", "another spelling"],
)
def test_a_parameter_that_mlflow_run_has_quoted_or_cut_takes_none_along(quoted: str, value: str) -> None:
    with _run() as run:
        MlflowClient().log_param(run.run_id, "eval_ids", quoted)
        run.log_params({"eval_ids": value, "seed": 3})
    assert MlflowClient().get_run(run.run_id).data.params == {"eval_ids": quoted, "seed": "3"}


# Secrets


def _log_with_secrets(run: Any) -> None:
    run.log_params({"storage": SECRET, "data": Path("small")})
    run.set_tags({"address": SECRET})
    run.log_json({"storage": SECRET}, "config.json")
    run.log_text(f"<a href='{SECRET}'>", "page.html")
    run.log_csv(pd.DataFrame({"setting": ["storage"], "A": [SECRET]}), "settings.csv")
    run.log_table(pd.DataFrame({"setting": ["storage"], "A": [SECRET]}), "settings.json")


def test_no_secret_is_logged_in_any_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError), _run() as run:  # noqa: PT012
        _log_with_secrets(run)
        raise RuntimeError(f"{'x' * 475} {SECRET}")
    data = mlflow.get_run(run.run_id).data
    folder = mlflow.artifacts.download_artifacts(run_id=run.run_id, dst_path=str(tmp_path))
    _log_with_secrets(FolderRun(tmp_path / "folder"))
    texts = [json.dumps([data.params, data.tags]), *capsys.readouterr()]
    texts += [path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.*") if path.is_file()]
    assert len(texts) >= 3 + 4 + 5
    assert Path(folder).exists()
    assert not [text for text in texts if "S3cr" in text or "ann" in text]
    assert sum("postgresql://h/db" in text for text in texts) >= 8


def test_a_password_that_mlflow_run_has_logged_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    with _run() as run:
        MlflowClient().log_param(run.run_id, "storage", SECRET)
        run.log_params({"storage": SECRET})
    assert "the parameter storage, which mlflow run has logged, holds a password" in capsys.readouterr().err


def test_a_tag_that_mlflow_run_has_set_loses_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    tags = {"mlflow.source.name": "https://ann:S3cret@h/a.git#sub"}
    # In the experiment that an earlier test of this process may have left active.
    experiment = mlflow.tracking.fluent._get_experiment_id()
    made = MlflowClient().create_run(experiment, tags=tags).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", made)
    with _run() as run:
        assert run.run_id == made
    assert mlflow.get_run(made).data.tags["mlflow.source.name"] == "https://h/a.git#sub"


def test_user_and_password_of_the_server_move_out_of_its_address() -> None:
    script = "import os, retinaflow.runs, mlflow; print(mlflow.get_tracking_uri(), *map(os.environ.get, NAMES))"
    names = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
    done = subprocess.run(
        [sys.executable, "-c", f"NAMES = {names}\n{script}"],
        env={**os.environ, "MLFLOW_TRACKING_URI": "http://ann:S3%40cret@h:5000/path"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["http://h:5000/path", "ann", "S3@cret"]
