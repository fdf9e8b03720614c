"""A training that is killed again and again, by ``kill -9`` of a real process, and resumed to the same bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from retinaflow.inference.checkpoint import load_checkpoint

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]

DRIVER = """
import json, os, random, signal, sys, time, traceback
# Loaded once here; every training is a process of its own, forked from this one.
from retinaflow.commands import train
from retinaflow.cli import main

def start(settings):
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        code = main(["train", *(word for name, value in settings.items() for word in ("--" + name, str(value)))])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)

def ended(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

settings, whole, broken, kills, seed = json.loads(sys.argv[1])
began = time.monotonic()
assert ended(start({**settings, "output": whole})) == 0
lasts = time.monotonic() - began
draw, last, killed = random.Random(seed), os.path.join(broken, "train", "checkpoints", "last.pt"), 0
for attempt in range(20):
    # What there is to resume from is all that is said: the settings are in the checkpoint.
    again = {"resume": last} if os.path.exists(last) else {**settings, "output": broken}
    child = start(again)
    if killed < kills:
        time.sleep(draw.uniform(0.1, 0.9) * lasts)
        os.kill(child, signal.SIGKILL)
    code = ended(child)
    if code == 0:
        break
    assert code == -signal.SIGKILL, code
    killed += 1
print("killed", killed)
assert code == 0
"""

TIMES = ("images_per_second", "waiting_for_images", "peak_memory", "system/")


def _points(folder: Path) -> list[tuple[str, int, float]]:
    """(metric, step, value) of what does not depend on the machine."""
    lines = (folder / "train" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [
        (name, row["step"], value)
        for row in rows
        for name, value in row.items()
        if name != "step" and not any(time in name for time in TIMES)
    ]


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def test_a_training_killed_at_random_moments_ends_with_the_bits_of_one_left_alone(
    workshop: Any, tmp_path: Path
) -> None:
    given = {**workshop.settings(epochs=2).model_dump(mode="json", exclude_defaults=True)}
    given |= {"track": "false", "ema": 0.9, "accumulate": 2, "batch_size": 2, "save_minutes": 0.01, "patience": 5}
    given |= {"loss": "equalized-focal"}
    given = {name: ",".join(value) if isinstance(value, list) else value for name, value in given.items()}
    job = json.dumps([given, str(tmp_path / "whole"), str(tmp_path / "broken"), 3, 7])
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, job],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=workshop.folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert int(done.stdout.split("killed ")[-1]) >= 2

    for name in ("last", "best"):
        ours, theirs = (
            load_checkpoint(tmp_path / kind / "train/checkpoints" / f"{name}.pt") for kind in ("broken", "whole")
        )
        different = [key for key in theirs.state if not torch.equal(ours.state[key], theirs.state[key])]
        assert not different, name
        own, other = _tensors(ours.progress), _tensors(theirs.progress)
        assert len(own) == len(other)
        assert all(torch.equal(mine, its) for mine, its in zip(own, other, strict=True))
    points = _points(tmp_path / "broken")
    assert len({(metric, step) for metric, step, _ in points}) == len(points), "a point stands there twice"
    assert points == _points(tmp_path / "whole")
    assert [path.name for path in (tmp_path / "broken/train/checkpoints").iterdir() if ".partial" in path.name] == []


@pytest.mark.parametrize("cut", ['{"step": 4, "train/lo', ""], ids=["in mid-line", "between lines"])
def test_points_logged_before_a_kill_are_not_logged_again(tmp_path: Path, cut: str) -> None:
    from retinaflow.runs.run import FolderRun

    first = FolderRun(tmp_path)
    first.log_metrics({"train/loss": 3.0, "val/mAP": 0.5}, step=2)
    first.log_metrics({"train/loss": 2.0}, step=3)
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(cut)
    again = FolderRun(tmp_path, resumed=True)
    again.log_metrics({"train/loss": 2.0}, step=3)
    again.log_metrics({"train/loss": 1.5, "val/mAP": 0.6}, step=4)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [
        {"step": 2, "train/loss": 3.0, "val/mAP": 0.5},
        {"step": 3, "train/loss": 2.0},
        {"step": 4, "train/loss": 1.5, "val/mAP": 0.6},
    ]
    FolderRun(tmp_path).log_metrics({"train/loss": 9.0}, step=1)
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 1, "a new run begins a new file"
