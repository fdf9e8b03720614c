"""Images by step in MLflow: in the form that its Image Grid reads, each once, also after lost answers and on resume."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow.tracking import MlflowClient

from retinaflow.runs.start import start_run
from retinaflow.settings.data_settings import TrackingSettings

pytestmark = pytest.mark.slow
PIXELS = np.full((90, 400, 3), 200, dtype=np.uint8)


def _files(run_id: str) -> list[list[str]]:
    """Parts of the names: key, step, small or whole."""
    names = [Path(item.path).name for item in MlflowClient().list_artifacts(run_id, "images")]
    parts = [name.split("+") for name in names]
    return sorted([part[0], part[2], "small" if part[-1] == "compressed.webp" else "whole"] for part in parts)


def _started(**more: Any) -> Any:
    return start_run("train", TrackingSettings(experiment="images", output=Path("out")), **more)


def _of(*steps: int) -> list[list[str]]:
    return [["validation~1 Bus", str(step), kind] for step in steps for kind in ("small", "whole")]


def test_an_image_is_stored_whole_and_small_with_its_step(workshop: Any) -> None:
    del workshop
    with _started() as run:
        for step in (3, 6):
            run.log_image(PIXELS, key="validation/1 Bus", step=step)
    assert _files(run.run_id) == _of(3, 6)
    assert MlflowClient().get_run(run.run_id).data.tags["mlflow.loggedImages"] == "True"


def test_a_resumed_run_keeps_the_images_that_it_has(workshop: Any) -> None:
    del workshop
    with _started() as run:
        for step in (3, 6):
            run.log_image(PIXELS, key="validation/1 Bus", step=step)
    with _started(resume=run.run_id) as resumed:
        for step in (6, 9):
            resumed.log_image(PIXELS, key="validation/1 Bus", step=step)
    assert _files(run.run_id) == _of(3, 6, 9)


@pytest.mark.parametrize("lost", [1, 2], ids=["of the whole image", "of the small image"])
def test_an_image_whose_answer_was_lost_is_there_once(
    lost: int, workshop: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    del workshop
    log_artifact, calls = MlflowClient.log_artifact, []

    def unanswered(client: MlflowClient, *words: Any) -> None:
        log_artifact(client, *words)
        if words[-1] == "images":
            calls.append(words)
            if len(calls) == lost:
                raise ConnectionError("the answer was lost")

    monkeypatch.setattr(MlflowClient, "log_artifact", unanswered)
    with _started() as run:
        run.log_image(PIXELS, key="validation/1 Bus", step=3)
    assert len(calls) > 2
    assert _files(run.run_id) == _of(3)


_KILLED = """
import os, signal, sys
from pathlib import Path

import numpy as np
from mlflow.tracking import MlflowClient

from retinaflow.runs import store
from retinaflow.runs.start import start_run
from retinaflow.settings.data_settings import TrackingSettings

left, log_artifact = [int(sys.argv[2])], MlflowClient.log_artifact


def killed(client, *words):
    if words[-1] == "images":
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
    log_artifact(client, *words)


MlflowClient.log_artifact = killed
store.use(sys.argv[1])
with start_run("train", TrackingSettings(experiment="images", output=Path("out"))) as run:
    print(run.run_id, flush=True)
    for step in (3, 6):
        run.log_image(np.full((90, 400, 3), 200, dtype=np.uint8), key="validation/1 Bus", step=step)
"""


@pytest.mark.parametrize("upload", [2, 3], ids=["of the small image", "of the next image"])
def test_a_process_that_is_killed_while_it_uploads_leaves_each_image_once_after_the_resume(
    upload: int, workshop: Any
) -> None:
    command = [sys.executable, "-c", _KILLED, workshop.uri, str(upload)]
    killed = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    run_id = killed.stdout.split()[0]
    assert len(_files(run_id)) == upload - 1
    with _started(resume=run_id) as resumed:
        for step in (3, 6):
            resumed.log_image(PIXELS, key="validation/1 Bus", step=step)
    assert _files(run_id) == _of(3, 6)
