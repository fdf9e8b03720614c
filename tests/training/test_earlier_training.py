"""``resume=auto``: the newest training of the same settings is reported, resumed or refused, and what cannot be is
named."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlflow
import pytest

from retinaflow.commands import train
from retinaflow.errors import SettingError
from retinaflow.runs.owner import owner_of
from retinaflow.settings.commands import TrainConfig
from retinaflow.settings.resolve import resolve
from retinaflow.training.earlier_training import (
    RESTARTS,
    TRAINING_TAG,
    after_restart,
    earlier_training,
    is_restart,
    own_training,
)
from retinaflow.training.resume import prepare
from retinaflow.training.run_folder import folder_name_of

ROOT = Path(__file__).resolve().parents[2]


class Shop:
    """Unfinished trainings with one key: copies of a checkpoint."""

    def __init__(self, workshop: Any, last: Path, output: Path, *, track: bool) -> None:
        self.config = workshop.settings(resume="auto", output=str(output), track=track)
        self.key, self.last, self.output, self.track = f"key of {output.name}", last, output, track

    def add(self, content: bytes | None = b"") -> str:
        """A further training; ``content``: of its checkpoint instead of a whole one, None: it has none."""
        time.sleep(0.01)
        tags = {TRAINING_TAG: self.key}
        if self.track:
            run = mlflow.MlflowClient().create_run("0", tags=tags, start_time=int(time.time() * 1000))
            name = str(run.info.run_id)
        else:
            name = f"train-{len(list(self.output.glob('*')))}"
        folder = self.output / name / "checkpoints"
        folder.mkdir(parents=True)
        if not self.track:
            (folder.parent / "tags.json").write_text(json.dumps(tags), encoding="utf-8")
        if content == b"":
            shutil.copyfile(self.last, folder / "last.pt")
        elif content is not None:
            (folder / "last.pt").write_bytes(content)
        return name

    def finish(self, name: str) -> None:
        """Let a training be finished."""
        if self.track:
            mlflow.MlflowClient().set_terminated(name, "FINISHED")
        else:
            tags = {TRAINING_TAG: self.key, "retinaflow.status": "FINISHED"}
            path = self.output / name / "tags.json"
            written = path.stat().st_mtime_ns
            path.write_text(json.dumps(tags), encoding="utf-8")
            os.utime(path, ns=(written, written))

    def found(self) -> tuple[str | None, str | None]:
        """The finished training that is found, and the one to resume."""
        earlier = earlier_training(self.key, self.config)
        return earlier.finished, None if earlier.resumed is None else earlier.resumed.run_id


@pytest.fixture(params=[True, False], ids=["in MLflow", "in a folder"])
def shop(request: pytest.FixtureRequest, trained: Any, workshop: Any, tmp_path: Path) -> Shop:
    return Shop(workshop, trained.checkpoint.with_name("last.pt"), tmp_path, track=request.param)


@pytest.mark.slow
def test_the_newest_training_that_is_not_finished_is_resumed_and_the_others_are_named(
    shop: Shop, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shop.found() == (None, None)
    assert capsys.readouterr().out == "", "a first training needs no line"
    first, second = shop.add(), shop.add()
    assert shop.found() == (None, second)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.count("is resumed; it is the newest of 2 that can be, the others: ") == 1
    assert line.endswith(first)
    shop.finish(first)
    assert shop.found() == (None, second), "it was begun after the finished one"
    shop.finish(second)
    assert shop.found() == (second, None)


@pytest.mark.slow
def test_a_checkpoint_that_is_damaged_or_missing_is_named_and_the_one_before_it_is_resumed(
    shop: Shop, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = shop.add()
    damaged, without = shop.add(shop.last.read_bytes()[:-1000]), shop.add(None)
    assert shop.found() == (None, whole)
    text = capsys.readouterr().out
    for name, reason in ((damaged, "not a readable checkpoint"), (without, "checkpoint")):
        assert any(name in line and "is not finished, but" in line and reason in line for line in text.splitlines())
    shutil.rmtree(shop.output / whole)
    assert shop.found() == (None, None)
    assert capsys.readouterr().out.endswith("a new training starts\n")


@pytest.mark.slow
def test_a_training_in_progress_is_refused_not_doubled(shop: Shop) -> None:
    name = shop.add()
    with owner_of(shop.output / name / "checkpoints"), pytest.raises(SettingError, match="a training is in progress"):
        shop.found()
    with (
        own_training(shop.key, shop.config),
        pytest.raises(SettingError, match=f"in progress in .*, by process {os.getpid()}"),
        own_training(shop.key, shop.config),
    ):
        pass


@pytest.mark.slow
def test_a_training_is_resumed_in_the_folder_that_it_has_been_renamed_to(
    trained: Any, workshop: Any, tmp_path: Path
) -> None:
    """As ``main`` and ``split`` do: by the settings that were found, under a name of their own."""
    shop = Shop(workshop, trained.checkpoint.with_name("last.pt"), tmp_path, track=False)
    name = shop.add()
    (tmp_path / name).rename(tmp_path / "uniform-1")
    config, resumed = prepare(earlier_training(shop.key, shop.config).config)
    assert folder_name_of(config, resumed, "uniform") == "uniform-1"


@pytest.mark.slow
def test_a_checkpoint_that_is_with_the_run_only_is_resumed_from_there(
    trained: Any, workshop: Any, tmp_path: Path
) -> None:
    shop = Shop(workshop, trained.checkpoint.with_name("last.pt"), tmp_path, track=True)
    name = shop.add(None)
    mlflow.MlflowClient().log_artifact(name, str(shop.last), "checkpoints")
    assert shop.found() == (None, name)
    # A damaged copy here is no reason to lose the one with the run.
    (tmp_path / name / "checkpoints" / "last.pt").write_bytes(b"damaged")
    assert shop.found() == (None, name)


@pytest.mark.slow
def test_the_same_command_again_reports_the_finished_training(
    trained: Any, workshop: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def runs() -> list[str]:
        return [run.info.run_id for run in mlflow.search_runs(search_all_experiments=True, output_format="list")]

    before = runs()
    assert train.run(workshop.settings(resume="auto")) is None
    message = f"run {trained.run_id} has these settings and data and is finished, so nothing is trained; resume=none"
    assert message in capsys.readouterr().out
    assert runs() == before
    # Under mlflow run: the run that it has made leads to that one.
    launched = mlflow.MlflowClient().create_run("0").info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", launched)
    assert train.run(workshop.settings(resume="auto")) is None
    tags = mlflow.get_run(launched).data.tags
    assert tags["retinaflow.continues"] == trained.run_id
    assert f"/runs/{trained.run_id})" in tags["mlflow.note.content"]


@pytest.mark.slow
def test_a_training_that_was_changed_while_it_was_resumed_is_not_that_of_its_first_settings(
    workshop: Any, tmp_path: Path
) -> None:
    given = {"track": False, "output": str(tmp_path), "epochs": 1}
    assert train.run(workshop.settings(**given)) is not None
    assert train.run(workshop.settings(**given, resume="auto")) is None
    more = {**given, "epochs": 2}
    assert train.run(workshop.settings(**more, resume=str(tmp_path / "train"))) is not None
    tags = json.loads((tmp_path / "train" / "tags.json").read_text(encoding="utf-8"))
    assert tags[TRAINING_TAG] == "its settings were changed"
    assert tags["retinaflow.status"] == "FINISHED"


@pytest.mark.parametrize("name", RESTARTS)
def test_a_restart_resumes_unless_resume_was_given(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in RESTARTS:
        monkeypatch.delenv(variable, raising=False)
    assert not is_restart()
    for count, expected in (("0", False), ("", False), ("2", True)):
        monkeypatch.setenv(name, count)
        assert is_restart() == expected
    assert after_restart(resolve(TrainConfig, {})).resume == "auto"
    assert after_restart(resolve(TrainConfig, {"resume": "none"})).resume is None
    assert after_restart(resolve(TrainConfig, {"resume": "last.pt"})).resume == "last.pt"


HOLD_IN_A_CHILD = """
import os, sys, time
from pathlib import Path
from retinaflow.runs.owner import owner_of
with owner_of(Path(sys.argv[1])):
    if os.fork() == 0:
        # Printed here: the lock is closed in the child when fork returns there.
        print("owned", flush=True)
        time.sleep(5)
        os._exit(0)
    time.sleep(600)
"""


def test_the_children_of_a_killed_owner_own_nothing(tmp_path: Path) -> None:
    """Loader workers live on for seconds after their parent was killed, when torchrun starts the next ranks."""
    command = [sys.executable, "-c", HOLD_IN_A_CHILD, str(tmp_path)]
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"owned\n"
        process.send_signal(signal.SIGKILL)
        process.wait()
        with owner_of(tmp_path):
            pass
