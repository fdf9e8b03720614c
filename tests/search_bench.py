"""Searches whose trials only wait: the study, the storage, the locks and the processes are real, the training is not.

What is tested with these is who runs which trial, and that takes no detector.
"""

from __future__ import annotations

import multiprocessing
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import optuna

from retinaflow.errors import Interrupted
from retinaflow.interrupts import StopRequest
from retinaflow.search.runs import trial_name
from retinaflow.search.stages import Trials
from retinaflow.search.study import Search, attach
from retinaflow.search.trial import METRICS, trial_run
from retinaflow.search.workers import work
from retinaflow.settings.commands import SearchConfig

PATIENCE = 240.0
"""Seconds that a test waits for another process on a busy machine before it fails."""


@dataclass(frozen=True)
class Waiting:
    """An objective that takes a while, and longer as long as the file ``hold`` is there."""

    search: Search
    hold: Path
    seconds: float

    def __call__(self, trial: optuna.Trial) -> float:
        search = self.search
        settings = search.space.settings(trial)
        with trial_run(trial, search.runs, name=trial_name(trial.number), heartbeat=search.config.heartbeat):
            trial.report(0.0, 1)
            time.sleep(self.seconds)
            while self.hold.exists():
                search.stop.check()
                time.sleep(0.05)
            trial.set_user_attr(METRICS, {"val/mAP_rare": settings.focal_gamma})
        return settings.focal_gamma


def start_worker(config: SearchConfig, hold: Path, *, seconds: float = 0.05) -> ForkProcess:
    """A process that works on the study until nothing is left."""
    process = multiprocessing.get_context("fork").Process(target=_work, args=(config, hold, seconds))
    process.start()
    return process


def _work(config: SearchConfig, hold: Path, seconds: float) -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with suppress(Interrupted), StopRequest() as stop:
        search = attach(config, stop=stop)
        objective: Any = Waiting(search, hold, seconds)
        work(search, Trials(replace(search, objective=objective)))


def wait_for(condition: Any, *, what: str) -> Any:
    """The first true result of a condition."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        result = condition()
        if result:
            return result
        time.sleep(0.1)
    raise AssertionError(f"waited {PATIENCE} s in vain for {what}")


def finish(*processes: ForkProcess) -> list[int | None]:
    """Exit codes of processes, waited for."""
    for process in processes:
        process.join(PATIENCE)
        if process.is_alive():
            process.kill()
    return [process.exitcode for process in processes]
