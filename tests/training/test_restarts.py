"""torchrun starts the ranks again when one is killed: they resume their own training, to the bits of one left alone."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlflow
import psutil
import pytest
import torch

from retinaflow.inference.checkpoint import load_checkpoint
from retinaflow.training.earlier_training import RESTARTS, TRAINING_TAG

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = "-m torch.distributed.run --standalone --max-restarts=3 --nproc-per-node=2 --monitor-interval=0.1"
KILLED = (0, 1)
"""The ranks that are killed, one after the other."""
TIMES = ("images_per_second", "waiting_for_images", "peak_memory", "system/")


def _start(output: Path, workshop: Any) -> subprocess.Popen[str]:
    given = {**workshop.settings(epochs=4).model_dump(mode="json", exclude_defaults=True)}
    given = {name: ",".join(value) if isinstance(value, list) else value for name, value in given.items()}
    given |= {"batch_size": 2, "save_minutes": 0.02, "output": output, "eval_every": 2}
    given["experiment"] = output.name
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    environment = {name: value for name, value in os.environ.items() if name not in RESTARTS}
    return subprocess.Popen(
        [sys.executable, *TORCHRUN.split(), "-m", "retinaflow", "train", *words],
        env={
            **environment,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "MLFLOW_TRACKING_URI": workshop.uri,
        },
        cwd=workshop.folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _rank(torchrun: int, rank: int) -> psutil.Process | None:
    for process in psutil.Process(torchrun).children():
        try:
            if process.environ().get("RANK") == str(rank):
                return process
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return None


def _kill(torchrun: subprocess.Popen[str], output: Path, rank: int) -> None:
    """Kill a rank after a new checkpoint: there is one before it, of the first step or of the training before."""
    seen: set[int] = set()
    deadline = time.monotonic() + 300
    while len(seen) < 2:
        assert torchrun.poll() is None, torchrun.communicate()[0][-3000:]
        assert time.monotonic() < deadline, "no checkpoint"
        seen |= {path.stat().st_mtime_ns for path in output.glob("*/checkpoints/last.pt")}
        time.sleep(0.01)
    process = _rank(torchrun.pid, rank)
    assert process is not None
    process.kill()


def _end(torchrun: subprocess.Popen[str]) -> str:
    text, _ = torchrun.communicate(timeout=600)
    assert torchrun.returncode == 0, text
    return text


def test_a_training_of_two_ranks_killed_twice_ends_with_the_bits_of_one_left_alone(
    workshop: Any, tmp_path: Path
) -> None:
    _end(_start(tmp_path / "whole", workshop))
    torchrun = _start(tmp_path / "broken", workshop)
    try:
        for rank in KILLED:
            _kill(torchrun, tmp_path / "broken", rank)
        text = _end(torchrun)
    finally:
        torchrun.kill()
    assert text.count("has these settings and data, is not finished, and is resumed") == len(KILLED)
    assert text.count("resumed after step ") == len(KILLED)

    found = {kind: [path.parent for path in (tmp_path / kind).glob("*/checkpoints")] for kind in ("whole", "broken")}
    assert [len(folders) for folders in found.values()] == [1, 1], "one run each"
    (whole,), (broken,) = found.values()
    for name in ("last", "best"):
        ours, theirs = (load_checkpoint(folder / "checkpoints" / f"{name}.pt") for folder in (broken, whole))
        assert [key for key in theirs.state if not torch.equal(ours.state[key], theirs.state[key])] == []
    for folder in (whole, broken):
        assert mlflow.get_run(folder.name).info.status == "FINISHED"
        assert len(mlflow.search_runs(experiment_names=[folder.parent.name], output_format="list")) == 1
    keys = {mlflow.get_run(folder.name).data.tags[TRAINING_TAG] for folder in (whole, broken)}
    ours, theirs = (_history(folder.name) for folder in (broken, whole))
    assert len(keys) == 1
    assert theirs
    assert ours == theirs, "each point once, with the same value"


def _history(run_id: str) -> list[tuple[str, int, float]]:
    client = mlflow.MlflowClient()
    names = filter(_is_same, client.get_run(run_id).data.metrics)
    return sorted(
        (name, point.step, point.value) for name in names for point in client.get_metric_history(run_id, name)
    )


def _is_same(name: str) -> bool:
    """Whether a metric is the same on every machine and at every time."""
    return not any(time in name for time in TIMES)
