"""The ranks of one training: this process and those that it starts, or those that torchrun started.

``nproc=N``: the process that was called becomes rank 0, starts N - 1 others and has the only MLflow run, so a training
of several ranks is called like one of one rank and returns the same. Each of the others runs ``python -m retinaflow
train`` with the environment that torchrun would give it, gets everything else from rank 0, and writes to a log of its
own, whose end is shown when it fails. Under torchrun (several machines, with its rendezvous settings) the ranks are
there already, and ``nproc`` has no effect.
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
from retinaflow.errors import SettingError, WorkerError, first_line
from retinaflow.interrupts import without_ctrl_c
from retinaflow.training.distributed import ALONE, World, connected, joined_world

RENDEZVOUS = "RETINAFLOW_RENDEZVOUS"
"""Environment variable: where a rank meets rank 0."""
START_SECONDS = 900.0
END_SECONDS = 20.0
_SHOWN_LINES = 5


def is_rank_0() -> bool:
    """Whether this process is rank 0, or the only one; known before the ranks are connected."""
    return int(os.environ.get("RANK", "0")) == 0


@contextlib.contextmanager
def ranks(nproc: int) -> Iterator[World]:
    """The world of this training. A rank that dies ends the training with a WorkerError that names it.

    Raises SettingError for more ranks than GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        with _lost_rank_named(), joined_world(rendezvous=_rendezvous()) as world:
            yield world
    elif nproc == 1:
        yield ALONE
    else:
        if torch.cuda.is_available() and torch.cuda.device_count() < nproc:
            raise SettingError(f"nproc <= GPUs must hold, but got nproc={nproc}, GPUs={torch.cuda.device_count()}")
        with tempfile.TemporaryDirectory() as folder, _shared_cores(nproc):
            others = [_Rank.start(rank, nproc, Path(folder)) for rank in range(1, nproc)]
            try:
                _wait_until_ready(others)
                with connected(World(0, nproc, 0), f"file://{folder}/meeting") as world:
                    yield world
            except RuntimeError as error:
                # The error of a lost connection does not name the rank that was lost.
                failure = _first_failure(others, wait=2.0)
                if failure is None:
                    raise
                raise WorkerError(f"{failure}\nresume= resumes from the last checkpoint.") from error
            finally:
                for other in others:
                    other.end()


@contextlib.contextmanager
def printing_on_rank_0(world: World) -> Iterator[None]:
    """Inside the block what other ranks print is dropped."""
    with contextlib.ExitStack() as stack:
        if not world.is_first:
            dropped = stack.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(dropped))
        yield


@dataclass(frozen=True)
class _Rank:
    rank: int
    process: subprocess.Popen[bytes]
    log: Path
    ready: Path

    @staticmethod
    def start(rank: int, nproc: int, folder: Path) -> _Rank:
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
        with log.open("wb") as file, without_ctrl_c():
            process = subprocess.Popen(
                [sys.executable, "-m", "retinaflow", "train"], env=environment, stdout=file, stderr=file
            )
        return _Rank(rank, process, log, folder / f"meeting.ready{rank}")

    def failure(self) -> str | None:
        """How the process failed; None while it runs or when it has ended in order."""
        code = self.process.poll()
        if code in (None, 0):
            return None
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-_SHOWN_LINES:]
        shown = "".join(f"\n  {line}" for line in lines)
        return f"rank {self.rank} (pid {self.process.pid}) died: {how}{shown}"

    def end(self) -> None:
        """End the process, by force if it does not end by itself."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(END_SECONDS if self.process.poll() is None and sys.exc_info()[0] is None else 0.1)
        for stop in (self.process.terminate, self.process.kill):
            if self.process.poll() is None:
                stop()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(END_SECONDS)


def _wait_until_ready(others: list[_Rank]) -> None:
    """Wait until all ranks are about to connect: connecting waits long and prints nothing."""
    deadline = time.monotonic() + START_SECONDS
    while not all(other.ready.is_file() for other in others):
        failure = _first_failure(others, wait=0.0)
        if failure is not None:
            raise WorkerError(failure)
        if time.monotonic() > deadline:
            raise WorkerError(f"the ranks of nproc={len(others) + 1} did not start in {START_SECONDS:g} s")
        time.sleep(0.02)


def _rendezvous() -> str:
    """Where to meet rank 0, which is shown that this rank is about to connect."""
    url = os.environ.get(RENDEZVOUS, "env://")
    if url.startswith("file://"):
        Path(f"{url.removeprefix('file://')}.ready{os.environ['RANK']}").touch()
    return url


def _first_failure(others: list[_Rank], *, wait: float) -> str | None:
    """How the first rank that failed did so; looked for during ``wait`` seconds."""
    deadline = time.monotonic() + wait
    while True:
        for failure in filter(None, (other.failure() for other in others)):
            return failure
        if time.monotonic() > deadline:
            return None
        time.sleep(0.05)


@contextlib.contextmanager
def _lost_rank_named() -> Iterator[None]:
    """Turn the lost connection that the end of another rank leaves here into a WorkerError."""
    try:
        yield
    except RuntimeError as error:
        if "gloo" not in str(error).lower() and "nccl" not in str(error).lower():
            raise
        raise WorkerError(f"another rank of the training has ended ({first_line(error)})") from error


@contextlib.contextmanager
def _shared_cores(nproc: int) -> Iterator[None]:
    """Ranks on one machine share its cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(before // nproc, 1))
    try:
        yield
    finally:
        torch.set_num_threads(before)
