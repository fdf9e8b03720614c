"""A run has one owner: a second process is refused, and is told who the first one is."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from retinaflow.errors import SettingError
from retinaflow.inference.checkpoint import load_checkpoint, save_checkpoint
from retinaflow.runs.owner import LOCK, OWNER, owner_of
from retinaflow.training.distributed import ALONE
from retinaflow.training.resume import find_resumed
from retinaflow.training.run_folder import refuse_second_training, training_run

ROOT = Path(__file__).resolve().parents[2]
HOLD = """
import sys, time
from pathlib import Path
from retinaflow.runs.owner import owner_of
with owner_of(Path(sys.argv[1])):
    print("owned", flush=True)
    time.sleep(600)
"""


@contextlib.contextmanager
def _hold(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that owns a folder while the block runs."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "owned\n"
        try:
            yield process
        finally:
            # Also when the test fails: leaving the block waits for the process.
            process.kill()


def test_a_second_process_is_refused_and_reads_who_is_the_first_until_that_ends(tmp_path: Path) -> None:
    with _hold(tmp_path / "run") as process:
        message = rf"a training is in progress in .*run, by process {process.pid} on \S+ since 20\d\d-.*; wait for it"
        with pytest.raises(SettingError, match=message), owner_of(tmp_path / "run"):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
    with owner_of(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / OWNER).read_text(encoding="utf-8"))["process"] == os.getpid()
    assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK]


def test_an_owner_without_its_note_is_another_process(tmp_path: Path) -> None:
    with owner_of(tmp_path):
        (tmp_path / OWNER).write_text("{", encoding="utf-8")
        with pytest.raises(SettingError, match="by another process"), owner_of(tmp_path):
            pass


@pytest.mark.slow
@pytest.mark.trains
def test_a_resumed_run_that_is_in_progress_stays_as_it_is(trained: Any, workshop: Any) -> None:
    import mlflow

    before = mlflow.get_run(trained.run_id)
    resumed = find_resumed(workshop.settings(resume=trained.run_id))
    assert resumed is not None
    assert resumed.folder == Path("outputs") / trained.run_id / "checkpoints"
    with _hold(resumed.folder) as process:
        for given in ({"resume": trained.run_id}, {"resume": str(trained.checkpoint.with_name("last.pt"))}):
            config = workshop.settings(epochs=3, **given)
            with pytest.raises(SettingError, match=f"by process {process.pid}"):
                refuse_second_training(config, find_resumed(config), folder_name="train")
            with (
                pytest.raises(SettingError, match=f"by process {process.pid}"),
                training_run(config, find_resumed(config), ALONE, name=None, called="train", folder_name="train"),
            ):
                pass
    after = mlflow.get_run(trained.run_id)
    assert (after.info.status, after.data.metrics) == (before.info.status, before.data.metrics)
    assert after.data.tags == before.data.tags


@pytest.mark.slow
@pytest.mark.trains
def test_a_checkpoint_cannot_name_a_run_outside_of_the_output(trained: Any, workshop: Any, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(trained.checkpoint.with_name("last.pt"))
    assert checkpoint.progress is not None
    checkpoint.progress["run_id"] = "../../elsewhere"
    save_checkpoint(checkpoint, tmp_path / "last.pt")
    with pytest.raises(SettingError, match=re.escape("names the run '../../elsewhere', which names no folder")):
        find_resumed(workshop.settings(resume=str(tmp_path / "last.pt")))


def test_two_trainings_in_one_folder_do_not_mix(
    workshop: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = workshop.settings(track=False, output=str(tmp_path))
    for loss in (1.0, 2.0):
        with training_run(config, None, ALONE, name=None, called="train", folder_name="train") as run:
            run.log_metrics({"train/loss": loss}, step=1)
            run.log_text(str(loss), f"only-of-{loss}.txt")
            with (
                pytest.raises(SettingError, match=f"by process {os.getpid()}"),
                training_run(config, None, ALONE, name=None, called="train", folder_name="train"),
            ):
                pass
    found = {
        folder.name: sorted(path.name for path in folder.iterdir() if path.name[0] != ".")
        for folder in tmp_path.iterdir()
    }
    assert found == {
        "train": ["checkpoints", "metrics.jsonl", "only-of-2.0.txt", "tags.json"],
        "train-1": ["checkpoints", "metrics.jsonl", "only-of-1.0.txt", "tags.json"],
    }
    assert "holds an earlier training, which is now" in capsys.readouterr().out
