"""A stop outside of detection ends a command where it is: with exit code 130, and its run as KILLED."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import mlflow
import pytest

from retinaflow.cli import main
from retinaflow.commands import evaluate, predict, visualize
from retinaflow.commands.train import TrainResult

FOUND = "ImageID,LabelName,Score,XMin,XMax,YMin,YMax\nvalidation000,/m/0car,0.9,0.1,0.6,0.1,0.6\n"


def _stopped(*_: Any, **__: Any) -> None:
    """In the place of a step of the command: a signal, and then work that would take longer."""
    os.kill(os.getpid(), signal.SIGTERM)
    for _second in range(1000):
        time.sleep(0.01)
    raise AssertionError("the command went on")


def _run(command: str, given: dict[str, Any]) -> int:
    return main([command, *(word for name, value in given.items() for word in (f"--{name}", str(value)))])


def _last_run(command: str) -> Any:
    return mlflow.search_runs(
        filter_string=f"tags.`retinaflow.command` = '{command}'",
        search_all_experiments=True,
        order_by=["attributes.start_time DESC"],
        output_format="list",
    )[0]


@pytest.mark.parametrize("track", ["true", "false"])
@pytest.mark.parametrize(
    ("command", "place", "step"), [("evaluate", evaluate, "log_page"), ("visualize", visualize, "log_sample_page")]
)
def test_a_command_with_predictions_stops_where_it_is(
    command: str,
    place: Any,
    step: str,
    track: str,
    workshop: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("stopped.csv").write_text(FOUND)
    monkeypatch.setattr(place, step, _stopped)
    given = {"predictions": "stopped.csv", "data": workshop.data, "output": f"stopped-{command}", "track": track}
    assert _run(command, {**given, "experiment": "stopped"}) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "stopped: signal SIGTERM"
    if track == "true":
        assert _last_run(command).info.status == "KILLED"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "place", "step"),
    [
        ("evaluate", evaluate, "log_page"),
        ("visualize", visualize, "log_sample_page"),
        ("predict", predict.PredictionFolder, "write_predictions"),
    ],
)
def test_a_command_with_a_model_stops_after_its_detections(
    command: str, place: Any, step: str, trained: TrainResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place, step, _stopped)
    output = f"stopped-model-{command}"
    assert _run(command, {"from_run": trained.run_id, "output": output, "experiment": "stopped"}) == 130
    assert _last_run(command).info.status == "KILLED"
