"""One stop, however many signals it arrives as: the checkpoint is whole and of the last step, and the run ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.trains]

ROOT = Path(__file__).resolve().parents[2]
TRIES = 3

DRIVER = """
import json, os, random, signal, sys, time, traceback
from pathlib import Path
# Loaded once here; every training is a process of its own, forked from this one.
from retinaflow.commands import train
from retinaflow.cli import main
from retinaflow.inference.checkpoint import load_checkpoint

settings, tries, folder = json.loads(sys.argv[1])
draw = random.Random(3)
for number in range(tries):
    output = Path(folder) / str(number)
    child = os.fork()
    if child == 0:
        # A group of its own, as a terminal gives to a command: its loader workers get the signal too.
        os.setpgid(0, 0)
        code = 70
        try:
            words = {**settings, "output": output}
            code = main(["train", *(word for name, value in words.items() for word in ("--" + name, str(value)))])
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    last = output / "train" / "checkpoints" / "last.pt"
    while not last.is_file():
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
        time.sleep(0.02)
    time.sleep(draw.uniform(0, 1))
    os.killpg(child, signal.SIGINT)
    # mlflow run sends its signal within milliseconds; a scheduler may take until the checkpoint is being written.
    time.sleep(draw.choice([0, 0.005, 0.05, 0.3]))
    os.kill(child, signal.SIGTERM)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    rows = (output / "train" / "metrics.jsonl").read_text().splitlines()
    logged = max(json.loads(row)["step"] for row in rows) if rows else 0
    step = load_checkpoint(last).progress["step"]
    assert code == 130, code
    # Every step ends an epoch here, whose point is logged after the step at which the training stops.
    assert step in (logged, logged + 1), (step, logged)
    assert not [path for path in last.parent.iterdir() if path.name not in ("last.pt", ".owner.lock")]
    print("stopped at step", step, flush=True)
print("tries", tries)
"""


@pytest.mark.parametrize("workers", [0, 2], ids=["in one process", "with loader workers"])
def test_ctrl_c_that_is_followed_by_sigterm_leaves_the_last_step(workers: int, workshop: Any, tmp_path: Path) -> None:
    given = {**workshop.settings().model_dump(mode="json", exclude_defaults=True)}
    given |= {"track": "false", "epochs": 500, "epoch_length": 4, "eval_every": 500, "workers": workers}
    given = {name: ",".join(value) if isinstance(value, list) else value for name, value in given.items()}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps([given, TRIES, str(tmp_path)])],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=workshop.folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    assert done.stdout.endswith(f"tries {TRIES}\n")
    assert done.stderr.count("stopped: signal SIGINT\n") == TRIES
    assert done.stderr.count("stopping once the present step is stored; Ctrl-C again ends at once") == TRIES
    assert "Traceback" not in done.stderr


def _listens_to_sigterm(process: int) -> bool:
    status = Path(f"/proc/{process}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.parametrize("seconds", [0.0, 0.2, 0.5, 1.0, 2.0])
def test_ctrl_c_in_the_first_seconds_is_one_line(seconds: float, tmp_path: Path) -> None:
    """While modules are imported, settings read and data generated."""
    with subprocess.Popen(
        [sys.executable, "-m", "retinaflow", "binning", "--data", "demo", "--track", "false"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "RETINAFLOW_CACHE": str(tmp_path)},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as started:
        while not _listens_to_sigterm(started.pid):
            assert started.poll() is None
            time.sleep(0.01)
        time.sleep(seconds)
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
            os.killpg(started.pid, number)
            time.sleep(0.02)
        _, errors = started.communicate(timeout=60)
    # CPython kills itself with SIGINT where the interrupt came up in the text of a namedtuple or dataclass.
    assert started.returncode in (130, -signal.SIGINT)
    assert errors.splitlines()[-1] == "stopped: signal SIGINT"
    assert "Traceback" not in errors
