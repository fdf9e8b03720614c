"""Several workers on one machine: processes that divide its cores evenly. A process that is killed, or stopped by
another program than this one, is replaced.

Neither ``multiprocessing.Pool`` nor ``ProcessPoolExecutor`` does that: the death of a process makes the first wait for
ever and breaks the second.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import closing, redirect_stderr, redirect_stdout
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import torch

from retinaflow.errors import SHOWN, Interrupted, WorkerError
from retinaflow.interrupts import STOPPED, StopRequest, without_ctrl_c
from retinaflow.progress import report
from retinaflow.runs import store
from retinaflow.search.sampler_and_pruner import quiet
from retinaflow.search.stages import stage_of
from retinaflow.search.study import Search, attach
from retinaflow.search.workers import Progress, work
from retinaflow.settings.commands import SearchConfig

POLL_SECONDS = 0.25
REPLACEMENTS = 3
"""Number of processes per worker that may be killed or stopped before the search ends."""


def run_stage(search: Search, name: str) -> None:
    """Run a stage (``trials`` or ``confirmation``) with ``search_workers`` workers, and print its progress."""
    stage = stage_of(name, search)
    progress = Progress(search, stage)
    if search.config.search_workers == 1:
        work(search, stage, progress.update)
    else:
        work_in_processes(search, name, progress.update)


def work_in_processes(search: Search, stage: str, update: Callable[[], None]) -> None:
    """The same as :func:`work` in ``search_workers`` processes. Raises the error that a worker ended with, and
    Interrupted on request."""
    workers = _Processes(search.config, stage)
    try:
        while True:
            # First: a stop of this process may have been sent to its workers too, which are not replaced then.
            search.stop.check()
            if not workers.are_running():
                break
            update()
            time.sleep(POLL_SECONDS)
    finally:
        workers.end()
        update()


class _Processes:
    """Worker processes, replaced when they are killed."""

    def __init__(self, config: SearchConfig, stage: str) -> None:
        self._config, self._stage = config, stage
        self._context = multiprocessing.get_context("spawn")
        self._errors: Any = self._context.SimpleQueue()
        self._started = 0
        self._processes = [self._start() for _ in range(config.search_workers)]

    def _start(self) -> SpawnProcess:
        self._started += 1
        process = self._context.Process(
            target=run_worker,
            args=(self._config, self._stage, store.uri(), self._log(self._started), self._errors),
            name=f"search worker {self._started}",
        )
        with without_ctrl_c():
            process.start()
        return process

    def _log(self, number: int) -> Path:
        return self._config.output / self._config.study / f"worker-{number}.log"

    def are_running(self) -> bool:
        """Whether a worker runs. Raises the error that one ended with."""
        for index, process in enumerate(self._processes):
            code = process.exitcode or 0
            if code > 0 and code != STOPPED:
                if not self._errors.empty():
                    raise self._errors.get()
                folder = self._config.output / self._config.study
                raise RuntimeError(f"{process.name} ended with code {code}; its traceback is in a log in {folder}")
            if code != 0:
                how = f"killed by signal {-code}" if code < 0 else "stopped by a signal"
                report(f"{process.name} was {how}; another one replaces it")
                if self._started >= len(self._processes) * (1 + REPLACEMENTS):
                    raise WorkerError(
                        f"search_workers={len(self._processes)}: {self._started} workers ended early, the last one was "
                        f"{how}; if memory ran out, use fewer search_workers or a smaller batch_size"
                    )
                self._processes[index] = self._start()
        return any(process.is_alive() for process in self._processes)

    def end(self) -> None:
        """Ask the workers to stop, and wait for them."""
        for process in self._processes:
            if process.is_alive():
                process.terminate()
        for process in self._processes:
            process.join()


def run_worker(config: SearchConfig, stage: str, store_uri: str, log: Path, errors: Any) -> None:
    """Main function of a worker process; what it prints goes to its log, errors of users to ``errors`` too."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", buffering=1, encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
        torch.set_num_threads(max(1, torch.get_num_threads() // config.search_workers))
        if config.track:
            store.use(store_uri)
        try:
            with quiet(), StopRequest(watch_parent=True) as stop:
                search = attach(config, stop=stop)
                with closing(search.storage):
                    work(search, stage_of(stage, search))
        except (Interrupted, KeyboardInterrupt) as error:
            report(f"stopped: {error}")
            # The process that has asked for it no longer looks.
            sys.exit(STOPPED)
        except Exception as error:
            report(traceback.format_exc())
            if isinstance(error, SHOWN):
                errors.put(error)
            sys.exit(1)
