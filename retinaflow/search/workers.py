"""Workers: take a trial, run it, report its value to the study, until the requested number of trials is done.

A worker takes a trial in a transaction of the study, so that all workers of all machines together run exactly the
requested number. In it, it first queues the trials of dead processes again. When no trial is left to take, it waits for
those that other workers run, as one of these may have to be run again.

Several workers on one machine are processes that divide its cores evenly. A process that is killed is replaced.
Neither ``multiprocessing.Pool`` nor ``ProcessPoolExecutor`` does that: the death of a process makes the first wait for
ever and breaks the second.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import closing, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, Protocol

import optuna
import torch
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from retinaflow.errors import DataError, Interrupted, SettingError, StoreError, TrainingError, WorkerError
from retinaflow.interrupts import StopRequest
from retinaflow.progress import report
from retinaflow.runs import store
from retinaflow.search.confirmation import ARM, SEED, Confirmation
from retinaflow.search.sampler_and_pruner import quiet, sampler_of
from retinaflow.search.study import Search, attach
from retinaflow.search.trial import (
    METRICS,
    REASON,
    TAKEN_OVER,
    WORKER,
    LostTrials,
    beat,
    best_trial,
    counts,
    is_done,
    is_lost,
    queue_again,
    worker_name,
)
from retinaflow.settings.commands import SearchConfig

POLL_SECONDS = 1.0
FAILURES_IN_A_ROW = 3
"""After so many failed trials in a row the cause lies outside of the trials, and the search ends. A training that
diverges does not count: the settings of its trial are the cause."""
REPLACEMENTS = 3
"""Number of processes per worker that may be killed before the search ends."""


class Stage(Protocol):
    """A kind of work on a study: the trials of the search, or the trainings that confirm its result."""

    @property
    def study(self) -> optuna.Study:
        """The study that holds its trials."""

    def take(self, trials: Sequence[FrozenTrial]) -> optuna.Trial | None:
        """The next trial, now RUNNING, or None when none is left; a part of a transaction."""

    def run(self, trial: optuna.Trial) -> float | Sequence[float]:
        """Run a trial; returns its values."""

    def log_progress(self) -> None:
        """Log the state of the study; called in the process that opened the search."""


@dataclass(frozen=True)
class Trials:
    """The trials of a search."""

    search: Search

    @property
    def study(self) -> optuna.Study:
        return self.search.study

    def take(self, trials: Sequence[FrozenTrial]) -> optuna.Trial | None:
        """A queued trial, or a new one while fewer count than requested. The first ones are :meth:`Space.starts`."""
        waiting = any(trial.state == TrialState.WAITING for trial in trials)
        if not waiting and sum(map(counts, trials)) >= self.search.config.trials:
            return None
        config = self.search.config
        if not trials:
            for start in self.search.space.starts()[: config.trials]:
                self.study.enqueue_trial(start)
        self.study.sampler = sampler_of(config.sampler, seed=config.seed, trial=len(trials), trials=config.trials)
        with quiet():
            return self.study.ask()

    def run(self, trial: optuna.Trial) -> float | Sequence[float]:
        return self.search.objective(trial)

    def log_progress(self) -> None:
        """The metrics of the best trial so far, under the names that they have in trials, with one point per trial."""
        search = self.search
        point = search.storage.transaction(self.study.study_name, self._next_point)
        if point is not None:
            search.runs.parent.log_metrics(point, step=int(point["search/trials"]))

    def _next_point(self) -> dict[str, float] | None:
        """What no process has logged yet, marked as logged."""
        done = sum(map(is_done, self.study.get_trials(deepcopy=False)))
        best = best_trial(self.study)
        if best is None or self.study.user_attrs.get("retinaflow_announced") == done:
            return None
        self.study.set_user_attr("retinaflow_announced", done)
        metrics = dict(best.user_attrs.get(METRICS, {}))
        metrics |= {f"best/{name.removeprefix('val/')}": value for name, value in metrics.items()}
        values = {f"search/objective{'' if n == 0 else f'_{n + 1}'}": value for n, value in enumerate(best.values)}
        return {**metrics, **values, "search/trials": done}


def stage_of(name: str, search: Search) -> Stage:
    """The stage of that name: ``trials`` or ``confirmation``."""
    return Trials(search) if name == "trials" else Confirmation(search)


def run_stage(search: Search, name: str) -> None:
    """Run a stage (``trials`` or ``confirmation``) with ``search_workers`` workers, and print its progress."""
    stage = stage_of(name, search)
    progress = Progress(search, stage)
    if search.config.search_workers == 1:
        work(search, stage, progress.update)
    else:
        work_in_processes(search, name, progress.update)


# One worker


def work(search: Search, stage: Stage, update: Callable[[], None] = lambda: None) -> None:
    """Run trials until none is left, neither to take nor running elsewhere. ``update`` is called after each.

    Raises Interrupted on request, after the current trial has been queued again, and the error of the last trial when
    several failed in a row.
    """
    failed, lost = 0, LostTrials(search.storage, heartbeat=search.config.heartbeat)
    while True:
        search.stop.check()
        trial, others = _take(search, stage, lost)
        if trial is None:
            update()
            if not others:
                return
            time.sleep(POLL_SECONDS)
            continue
        error = _run(search, stage, trial)
        update()
        if isinstance(error, TrainingError):
            continue
        failed = 0 if error is None else failed + 1
        if error is not None and failed == FAILURES_IN_A_ROW:
            report(f"{failed} trials failed in a row; the search ends with the error of the last")
            raise error


def _take(search: Search, stage: Stage, lost: LostTrials) -> tuple[optuna.Trial | None, bool]:
    """A trial to run, if there is one, and whether others are running."""
    study = stage.study

    def take() -> tuple[optuna.Trial | None, list[FrozenTrial], bool]:
        dead = lost.among(study.get_trials(deepcopy=False))
        for other in dead:
            study.tell(other.number, state=TrialState.FAIL)
            queue_again(study, other, died=True)
        trials = study.get_trials(deepcopy=False)
        trial = stage.take(trials)
        if trial is not None:
            trial.set_user_attr(WORKER, worker_name())
            beat(trial)
        return trial, dead, any(other.state == TrialState.RUNNING for other in trials)

    trial, dead, others = search.storage.transaction(study.study_name, take)
    for other in dead:
        reason = f"its worker {other.user_attrs.get(WORKER, '')} sent no heartbeat"
        search.runs.end_lost(study=study.study_name, trial=other.number, reason=reason)
        report(f"trial {other.number}: {reason}; it is queued again")
    return trial, others


def _run(search: Search, stage: Stage, trial: optuna.Trial) -> Exception | None:
    """Run a trial and report to the study how it ended; returns the error that it failed with."""
    study = stage.study

    def tell(
        values: float | Sequence[float] | None = None, *, state: TrialState | None = None, again: bool = False
    ) -> None:
        """``again``: queue the parameters again."""
        study.tell(trial, values, state=state, skip_if_finished=True)
        if again:
            queue_again(study, study.get_trials(deepcopy=False)[trial.number], died=False)

    def end(*values: Any, **named: Any) -> None:
        search.storage.transaction(study.study_name, lambda: tell(*values, **named))

    try:
        end(stage.run(trial))
    except optuna.TrialPruned:
        end(state=TrialState.PRUNED)
    except UpdateFinishedTrialError:
        report(f"trial {trial.number}: {TAKEN_OVER}; its result is dropped")
    except (Interrupted, KeyboardInterrupt, StoreError):
        with suppress(StoreError):
            end(state=TrialState.FAIL, again=True)
        raise
    except Exception as error:
        end(state=TrialState.FAIL)
        return error
    return None


class Progress:
    """Prints a line for every trial that has ended since the last update, and logs the best so far."""

    def __init__(self, search: Search, stage: Stage) -> None:
        self._metrics, self._stage, self._study = search.metrics, stage, stage.study
        self._known = {trial.number for trial in self._study.get_trials(deepcopy=False) if trial.state.is_finished()}
        self._logged = -1

    def update(self) -> None:
        """Print and log what is new."""
        trials = self._study.get_trials(deepcopy=False)
        fresh = [trial for trial in trials if trial.state.is_finished() and trial.number not in self._known]
        for trial in fresh:
            self._known.add(trial.number)
            report(self._line(trial, done=sum(map(is_done, trials))))
        if self._logged != sum(map(is_done, trials)):
            self._stage.log_progress()
            self._logged = sum(map(is_done, trials))

    def _line(self, trial: FrozenTrial, *, done: int) -> str:
        attributes = trial.user_attrs
        outcome = "stopped" if is_lost(trial) else trial.state.name.lower()
        if trial.state == TrialState.COMPLETE:
            named = zip(self._metrics.names, trial.values, strict=False)
            outcome = ", ".join(f"{name} {value:.4f}" for name, value in named)
        elif REASON in attributes:
            outcome += f": {attributes[REASON]}"
        if ARM in attributes:
            return f"{attributes[ARM]}, seed {attributes[SEED]}: {outcome}"
        best = best_trial(self._study)
        shown = "" if best is None else f"; best {' '.join(f'{v:.4f}' for v in best.values)} (trial {best.number})"
        return f"trial {trial.number} {outcome}{shown}; {done} done"


# Several workers


def work_in_processes(search: Search, stage: str, update: Callable[[], None]) -> None:
    """The same as :func:`work` in ``search_workers`` processes. Raises the error that a worker ended with, and
    Interrupted on request."""
    workers = _Processes(search.config, stage)
    try:
        while workers.are_running():
            search.stop.check()
            update()
            time.sleep(POLL_SECONDS / 4)
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
        process.start()
        return process

    def _log(self, number: int) -> Path:
        return self._config.output / self._config.study / f"worker-{number}.log"

    def are_running(self) -> bool:
        """Whether a worker runs. Raises the error that one ended with."""
        for index, process in enumerate(self._processes):
            code = process.exitcode or 0
            if code > 0:
                if not self._errors.empty():
                    raise self._errors.get()
                folder = self._config.output / self._config.study
                raise RuntimeError(f"{process.name} ended with code {code}; its traceback is in a log in {folder}")
            if code < 0:
                report(f"{process.name} was killed by signal {-code}; another one replaces it")
                if self._started >= len(self._processes) * (1 + REPLACEMENTS):
                    raise WorkerError(
                        f"search_workers={len(self._processes)}: {self._started} workers were killed, the last one by "
                        f"signal {-code}; if memory ran out, use fewer search_workers or a smaller batch_size"
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
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // config.search_workers))
        if config.track:
            store.use(store_uri)
        try:
            with quiet(), StopRequest(watch_parent=True) as stop:
                search = attach(config, stop=stop)
                with closing(search.storage):
                    work(search, stage_of(stage, search))
        except (Interrupted, KeyboardInterrupt) as error:
            report(f"stopped: {error}")
        except Exception as error:
            traceback.print_exc()
            if isinstance(error, SettingError | DataError | StoreError | TrainingError | WorkerError):
                errors.put(error)
            sys.exit(1)
