"""What cannot be stored is reported before the data are read, and MLflow's own variables are heeded."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow.tracking import MlflowClient

from retinaflow.errors import SettingError, StoreError
from retinaflow.runs.before_work import verify_store
from retinaflow.runs.experiment import find_experiment, refused_alias, refused_model_name
from retinaflow.runs.start import start_run
from retinaflow.settings.data_settings import TrackingSettings

UNREAD = "nowhere"
"""A data folder that does not exist: a message that names something else was printed before the data were read."""


@pytest.fixture(autouse=True)
def _plain_environment(workshop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    del workshop
    for name in ("EXPERIMENT_NAME", "EXPERIMENT_ID", "RUN_NAME", "TAGS", "RUN_ID", "RUN_CONTEXT"):
        monkeypatch.delenv(f"MLFLOW_{name}", raising=False)


# Names and roots


BEFORE_DATA = {
    "a model name with a slash": ("train", {"register_as": "flowers/v1"}, "register_as=flowers/v1 is no name"),
    "a model name with a colon": ("train", {"register_as": "a:b"}, "register_as=a:b is no name"),
    "an alias that is reserved": ("promote", {"alias": "latest"}, "alias=latest is no name"),
    "an alias like a version": ("promote", {"alias": "v1"}, "alias=v1 is no name"),
    "a study that leaves the folder": ("search", {"study": "../../x"}, "study"),
    "an output that is a file": ("binning", {"output": "a-file"}, "output=a-file: must be a folder, but it is a file"),
    "an output below a file": ("train", {"output": "a-file/x"}, "output=a-file/x: must be a folder, but"),
    "an ONNX file below a file": ("export", {"output": "a-file/x.onnx"}, "output=a-file: must be a folder"),
    "a deleted experiment": ("binning", {"experiment": "deleted"}, "experiment deleted is deleted in sqlite:"),
    "a root below a file": (
        "explore",
        {"experiment": "bad root"},
        "a-file/root of experiment bad root cannot be written",
    ),
}


@pytest.mark.parametrize(("command", "given", "message"), BEFORE_DATA.values(), ids=BEFORE_DATA)
def test_what_cannot_be_stored_is_reported_before_the_data_are_read(
    command: str, given: dict[str, str], message: str, workshop: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("a-file").touch()
    for name in ("deleted", "bad root"):
        if mlflow.get_experiment_by_name(name) is None:
            mlflow.create_experiment(name, artifact_location=str(Path("a-file/root").absolute()))
    deleted = mlflow.get_experiment_by_name("deleted")
    if deleted.lifecycle_stage == "active":
        mlflow.delete_experiment(deleted.experiment_id)
    more = {} if command in ("promote", "export") else {"data": UNREAD}
    assert workshop.cli(command, **more, **given) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert len([line for line in shown.splitlines() if line.startswith("error")]) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_an_output_that_may_not_be_written_is_named(workshop: Any, capsys: pytest.CaptureFixture[str]) -> None:
    Path("locked").mkdir(mode=stat.S_IRUSR | stat.S_IXUSR)
    assert workshop.cli("binning", data=UNREAD, output="locked/x") == 2
    assert "cannot be written by this user" in capsys.readouterr().err


def test_the_file_that_tries_an_artifact_root_does_not_stay(tmp_path: Path) -> None:
    mlflow.create_experiment("tried root", artifact_location=str(tmp_path / "root"))
    verify_store(experiment="tried root")
    assert list((tmp_path / "root").iterdir()) == []


def test_a_registry_takes_these_names() -> None:
    assert refused_model_name("flowers-v1") is None
    assert refused_alias("champion") is None
    assert refused_model_name("Bob's model") is None
    assert refused_model_name("") is not None
    # No filter of the registry can hold both.
    assert refused_model_name('Bob\'s "model"') == "it holds both kinds of quotes"
    assert refused_alias("a:b") is not None


# Experiment, name and tags from MLflow's variables


def _experiment_of(**given: Any) -> str:
    with start_run("binning", TrackingSettings(**{"experiment": None, "output": Path("out"), **given})) as run:
        pass
    found = mlflow.get_run(run.run_id)
    return str(mlflow.get_experiment(found.info.experiment_id).name)


def test_the_experiment_is_that_of_mlflows_variable_unless_one_is_given(
    workshop: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert workshop.settings().experiment == "retinaflow"
    assert _experiment_of() == "retinaflow"
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "by name")
    assert workshop.settings().experiment is None
    assert _experiment_of() == "by name"
    # Also when the given one is the default.
    assert workshop.settings(experiment="retinaflow").experiment == "retinaflow"
    assert _experiment_of(experiment="retinaflow") == "retinaflow"


def test_the_experiment_is_that_of_the_id_in_mlflows_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    number = mlflow.create_experiment("by id")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", number)
    assert _experiment_of() == "by id"
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "another")
    with pytest.raises(SettingError, match=r"MLFLOW_EXPERIMENT_NAME=another has the id \d+, but MLFLOW_EXPERIMENT_ID"):
        find_experiment(None)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "987654321")
    with pytest.raises(SettingError, match="987654321"):
        find_experiment(None)


def test_a_command_leaves_the_variables_as_they_were() -> None:
    _experiment_of(experiment="not remembered")
    assert "MLFLOW_EXPERIMENT_ID" not in os.environ
    assert _experiment_of() == "retinaflow"


def test_name_and_tags_of_the_run_are_those_of_the_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_RUN_NAME", "monday")
    monkeypatch.setenv("MLFLOW_TAGS", json.dumps({"team": "blue", "try": 3}))
    monkeypatch.setenv("MLFLOW_RUN_CONTEXT", json.dumps({"context": "nightly"}))
    with (
        start_run("main", TrackingSettings(experiment=None, output=Path("out"))) as run,
        start_run("train", TrackingSettings(experiment=None, output=Path("out")), name="child") as child,
    ):
        pass
    data = MlflowClient().get_run(run.run_id).data
    assert [data.tags[name] for name in ("mlflow.runName", "team", "try", "context")] == [
        "monday",
        "blue",
        "3",
        "nightly",
    ]
    assert MlflowClient().get_run(child.run_id).info.run_name == "child"


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_tags_that_are_no_object_are_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TAGS", text)
    with pytest.raises(SettingError, match="MLFLOW_TAGS must be a JSON object of tags"):
        verify_store(experiment="retinaflow")


def test_an_experiment_that_has_no_effect_under_mlflow_run_is_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = MlflowClient().create_run(find_experiment("chosen by mlflow run").experiment_id).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", made)
    verify_store(experiment="mine")
    assert "experiment=mine has no effect under mlflow run" in capsys.readouterr().out
    assert mlflow.get_experiment_by_name("mine") is None
    verify_store(experiment="chosen by mlflow run")
    verify_store(experiment=None)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("address", ["mssql+nothing://ann:S3cret@h/db", "nothing://ann:S3cret@h/db"])
def test_a_store_without_its_driver_or_of_an_unknown_kind_is_a_message_without_its_password(address: str) -> None:
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(address)
    try:
        with pytest.raises((SettingError, StoreError), match="nothing") as caught:
            verify_store(experiment="retinaflow")
    finally:
        mlflow.set_tracking_uri(before)
    assert "S3cret" not in str(caught.value)
