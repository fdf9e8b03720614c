"""Several processes for one training: this one and the helpers it starts, or those that torchrun started.

``nproc=N``: the process that was asked becomes rank 0, starts N - 1 others, and has the one MLflow run, so a training
with helpers is called and answers like one without. Each of them runs ``python -m retinaflow train`` with the
environment that torchrun would give it, learns everything else from rank 0, and writes to a log of its own, of which
the end is shown when it fails. Under torchrun (several machines, with its rendezvous settings) the processes are there
already, and ``nproc`` counts for nothing.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

import retinaflow
from retinaflow.training.distributed import ALONE, World, connected, joined_world

RENDEZVOUS = "RETINAFLOW_RENDEZVOUS"
"""Environment variable that tells a helper where to meet rank 0."""
START_SECONDS = 900.0
END_SECONDS = 20.0
_SHOWN_LINES = 5


def is_first_process() -> bool:
    """Whether this process is rank 0, or the only one; known before the others are met."""
    return int(os.environ.get("RANK", "0")) == 0


@contextlib.contextmanager
def processes(nproc: int) -> Iterator[World]:
    """The world of this training. Inside it, a helper that dies ends the training with a ChildProcessError that names
    it."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        with _ended_with_the_others(), joined_world(rendezvous=_announced()) as world:
            yield world
    elif nproc == 1:
        yield ALONE
    else:
        if torch.cuda.is_available() and torch.cuda.device_count() < nproc:
            raise ValueError(f"nproc <= GPUs must hold, but got nproc={nproc}, GPUs={torch.cuda.device_count()}")
        with tempfile.TemporaryDirectory() as folder, _shared_cores(nproc):
            helpers = [_Helper.start(rank, nproc, Path(folder)) for rank in range(1, nproc)]
            try:
                _wait_until_ready(helpers)
                with connected(World(0, nproc, 0), f"file://{folder}/meeting") as world:
                    yield world
            except RuntimeError as error:
                # What is left of a lost connection says nothing about who was lost.
                fault = _first_failure(helpers, wait=2.0)
                if fault is None:
                    raise
                raise ChildProcessError(f"{fault}\nresume= resumes from the last checkpoint.") from error
            finally:
                for helper in helpers:
                    helper.end()


@dataclass(frozen=True)
class _Helper:
    rank: int
    process: subprocess.Popen[bytes]
    log: Path
    ready: Path

    @staticmethod
    def start(rank: int, nproc: int, folder: Path) -> _Helper:
        package = str(Path(retinaflow.__file__).parents[1])
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(nproc),
            RENDEZVOUS: f"file://{folder}/meeting",
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
            # The same code as this process's, wherever it was started.
            "PYTHONPATH": os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")])),
        }
        log = folder / f"rank{rank}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "retinaflow", "train"], env=environment, stdout=file, stderr=file
            )
        return _Helper(rank, process, log, folder / f"meeting.ready{rank}")

    def fault(self) -> str | None:
        """How the process failed; None while it runs or when it has ended in order."""
        code = self.process.poll()
        if code in (None, 0):
            return None
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-_SHOWN_LINES:]
        told = "".join(f"\n  {line}" for line in lines)
        return f"process of rank {self.rank} (pid {self.process.pid}) died: {how}{told}"

    def end(self) -> None:
        """See to it that the process is gone."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(END_SECONDS if self.process.poll() is None and sys.exc_info()[0] is None else 0.1)
        for stop in (self.process.terminate, self.process.kill):
            if self.process.poll() is None:
                stop()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(END_SECONDS)


def _wait_until_ready(helpers: list[_Helper]) -> None:
    """Until all helpers are about to meet: the meeting itself waits long and in silence."""
    deadline = time.monotonic() + START_SECONDS
    while not all(helper.ready.is_file() for helper in helpers):
        fault = _first_failure(helpers, wait=0.0)
        if fault is not None:
            raise ChildProcessError(fault)
        if time.monotonic() > deadline:
            raise ChildProcessError(f"the processes of nproc={len(helpers) + 1} did not start in {START_SECONDS:g} s")
        time.sleep(0.02)


def _announced() -> str:
    """Where to meet; a helper's rank 0 is told that it is about to."""
    url = os.environ.get(RENDEZVOUS, "env://")
    if url.startswith("file://"):
        Path(f"{url.removeprefix('file://')}.ready{os.environ['RANK']}").touch()
    return url


def _first_failure(helpers: list[_Helper], *, wait: float) -> str | None:
    """How the first helper that failed did so, looked for during ``wait`` seconds."""
    deadline = time.monotonic() + wait
    while True:
        for fault in filter(None, (helper.fault() for helper in helpers)):
            return fault
        if time.monotonic() > deadline:
            return None
        time.sleep(0.05)


@contextlib.contextmanager
def _ended_with_the_others() -> Iterator[None]:
    """Turns the lost connection that another process's end leaves here into words."""
    try:
        yield
    except RuntimeError as error:
        if "gloo" not in str(error).lower() and "nccl" not in str(error).lower():
            raise
        raise ConnectionError(f"another process of the training has ended ({str(error).splitlines()[0]})") from None


@contextlib.contextmanager
def _shared_cores(nproc: int) -> Iterator[None]:
    """Processes on one machine share its cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(before // nproc, 1))
    try:
        yield
    finally:
        torch.set_num_threads(before)
