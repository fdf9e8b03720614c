"""Several trainings at the same time, each in a process of its own with its part of the processor's cores.

The threads of one training wait for each other after every operation of the network. Trainings of fewer threads each
wait less: two of one thread train more images a second than one of two threads, and lose no more than their part to
other programs on the same cores (``benchmarks/shared_cores.py``). They need the memory of all of them together.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import sys
import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, Generic, Protocol, TextIO, TypeVar

import torch

from retinaflow.data.training_data import TrainingData
from retinaflow.errors import WorkerError
from retinaflow.interrupts import StopRequest, without_ctrl_c
from retinaflow.runs import store, tracking
from retinaflow.runs.run import Run
from retinaflow.settings.commands import TrainConfig

Result = TypeVar("Result", covariant=True)
_POLL_SECONDS = 0.2


class Train(Protocol[Result]):
    """A function at the top level of a module that trains once, such as ``retinaflow.commands.train.run``."""

    def __call__(self, config: TrainConfig, *, data: TrainingData, name: str) -> Result: ...


def train_side_by_side(
    train: Train[Result], trainings: Mapping[str, TrainConfig], data: TrainingData, *, parent: Run
) -> dict[str, Result]:
    """Train all of them on the same data, as runs of these names under ``parent`` or as the runs that ``resume`` names;
    returns their results by name.

    Each prints its lines with its name in front. When one fails or this process is asked to stop, the others save
    their state and stop too, and the error is raised here. Raises WorkerError when the system ended one.
    """
    threads = max(torch.get_num_threads() // len(trainings), 1)
    working: dict[str, _Training[Result]] = {}
    results: dict[str, Result] = {}
    with StopRequest(watch_parent=tracking.launched_by_mlflow()) as stop:
        try:
            for name, config in trainings.items():
                working[name] = _Training.start(train, name, config, data, parent=parent, threads=threads)
            while len(results) < len(working):
                for name in working.keys() - results.keys():
                    stop.check()
                    if working[name].results.poll(_POLL_SECONDS):
                        results[name] = working[name].result()
        finally:
            for training in working.values():
                training.process.terminate()
            for training in working.values():
                training.end()
    return {name: results[name] for name in trainings}


@dataclass(frozen=True)
class _Training(Generic[Result]):
    process: SpawnProcess
    results: Connection
    run_id: str | None
    folder: Path

    @staticmethod
    def start(
        train: Train[Result], name: str, config: TrainConfig, data: TrainingData, *, parent: Run, threads: int
    ) -> _Training[Result]:
        run_id = None
        if config.track and config.resume is not None:
            run_id = config.resume if store.has_run(config.resume) else None
        elif config.track:
            # The process joins this run, as under `mlflow run`.
            run = tracking.start_child(parent.run_id, name=name, tags={"mlflow.runName": name}, folder=config.output)
            run.close()
            run_id = run.run_id
        context = multiprocessing.get_context("spawn")
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(
            target=_train,
            args=(sender, train, config, data, name, run_id, threads, store.uri()),
            name=name,
        )
        with without_ctrl_c():
            process.start()
        # The process has the only one now, so that its end is noticed.
        sender.close()
        return _Training(process, receiver, run_id, config.output)

    def result(self) -> Result:
        """What the training returned; raises what it raised."""
        try:
            outcome: Result | Exception | None = self.results.recv()
        except EOFError:
            outcome = None
        self.process.join()
        if outcome is None:
            raise WorkerError(
                f"the {self.process.name} training ended with exit code {self.process.exitcode}, often because the "
                "memory ran out; side_by_side=false trains one after the other"
            )
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def end(self) -> None:
        """Wait for the process, and end the run of one that was killed before it could."""
        # A process that had trained before the stop reached it ends when its result, which is larger than the pipe, is
        # read.
        with suppress(EOFError, OSError):
            while True:
                self.results.recv_bytes()
        self.process.join()
        if self.run_id is not None and (self.process.exitcode or 0) < 0:
            tracking.end_run(tracking.open_run(self.run_id, self.folder), "KILLED", command="train")


def _train(
    sender: Connection,
    train: Train[Any],
    config: TrainConfig,
    data: TrainingData,
    name: str,
    run_id: str | None,
    threads: int,
    store_uri: str,
) -> None:
    """Main function of a process."""
    torch.set_num_threads(threads)
    store.use(store_uri)
    if run_id is not None and config.resume is None:
        os.environ["MLFLOW_RUN_ID"] = run_id
    sys.stdout, sys.stderr = NamedLines(sys.stdout, name), NamedLines(sys.stderr, name)
    try:
        sender.send(train(config, data=data, name=name))
    except Exception as error:
        # Seen where the parent shows a traceback.
        error.add_note(traceback.format_exc())
        sender.send(error if _arrives(error) else RuntimeError(traceback.format_exc()))


def _arrives(error: Exception) -> bool:
    """Whether the other process can make it again."""
    try:
        return type(pickle.loads(pickle.dumps(error))) is type(error)
    except Exception:
        return False


class NamedLines(io.TextIOBase):
    """A text stream that writes whole lines to ``stream``, each with ``name`` in front; never a terminal, so that no
    progress bar is drawn on it."""

    def __init__(self, stream: TextIO, name: str) -> None:
        self._stream, self._name, self._rest = stream, name, ""

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """That of the stream."""
        return self._stream.encoding

    def fileno(self) -> int:
        """That of the stream."""
        return self._stream.fileno()

    def writable(self) -> bool:
        """It is."""
        return True

    def write(self, text: str) -> int:
        """Write the lines that ``text`` completes."""
        *lines, self._rest = (self._rest + text).split("\n")
        if lines:
            self._stream.write("".join(f"{self._name}: {line}\n" if line else "\n" for line in lines))
            self._stream.flush()
        return len(text)
