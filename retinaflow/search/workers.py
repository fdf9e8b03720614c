"""Workers: take a trial, run it, report its value to the study, until the requested number of trials is done.

A worker takes a trial while it holds the lock of the study, so that all workers of all machines together run exactly
the requested number. Before that it queues the trials of dead processes again. When no trial is left to take, it waits
for those that other workers run, as one of these may have to be run again.

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
from contextlib import closing, redirect_stderr, redirect_stdout
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
from retinaflow.search.storage import is_connection_error
from retinaflow.search.study import Search, attach
from retinaflow.search.trial import (
    METRICS,
    REASON,
    TAKEN_OVER,
    WORKER,
    Heartbeat,
    LostTrials,
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
"""After so many failed trials in a row the cause lies outside of the trials, and the search ends."""
REPLACEMENTS = 3
"""Number of processes per worker that may be killed before the search ends."""


class Stage(Protocol):
    """A kind of work on a study: the trials of the search, or the trainings that confirm its result."""

    @property
    def study(self) -> optuna.Study:
        """The study that holds its trials."""

    def take(self, trials: Sequence[FrozenTrial]) -> optuna.Trial | None:
        """The next trial, now RUNNING, or None when none is left; called with the lock of the study."""

    def run(self, trial: optuna.Trial) -> float | Sequence[float]:
        """Run a trial; returns its values."""

    def log_progress(self, trials: Sequence[FrozenTrial]) -> None:
        """Log the state of the study; called with the lock, in the process that opened the search."""


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

    def log_progress(self, trials: Sequence[FrozenTrial]) -> None:
        """The metrics of the best trial so far, under the names that they have in trials, with one point per trial."""
        done = sum(map(is_done, trials))
        best = best_trial(self.study)
        if best is None or self.study.user_attrs.get("retinaflow_announced") == done:
            return
        metrics = dict(best.user_attrs.get(METRICS, {}))
        metrics |= {f"best/{name.removeprefix('val/')}": value for name, value in metrics.items()}
        values = {f"search/objective{'' if n == 0 else f'_{n + 1}'}": value for n, value in enumerate(best.values)}
        self.search.runs.parent.log_metrics({**metrics, **values, "search/trials": done}, step=done)
        self.study.set_user_attr("retinaflow_announced", done)


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
    failed, lost = 0, LostTrials(search.storage, search.runs)
    while True:
        search.stop.check()
        trial, others = search.storage.retry(lambda: _take(search, stage, lost))
        if trial is None:
            update()
            if not others:
                return
            time.sleep(POLL_SECONDS)
            continue
        error = _run(search, stage, trial)
        update()
        failed = 0 if error is None else failed + 1
        if error is not None and failed == FAILURES_IN_A_ROW:
            report(f"{failed} trials failed in a row; the search ends with the error of the last")
            raise error


def _take(search: Search, stage: Stage, lost: LostTrials) -> tuple[optuna.Trial | None, bool]:
    """A trial to run, if there is one, and whether others are running."""
    with search.storage.lock(search.config.study) as check_lock:
        lost.check(stage.study)
        trials = stage.study.get_trials(deepcopy=False)
        # A restart of the database has released the lock: another worker may have taken a trial since.
        check_lock()
        trial = stage.take(trials)
        if trial is not None:
            # At once, as Optuna finds a trial without a process only if it has had a heartbeat.
            Heartbeat(search.storage, trial).beat()
            trial.set_user_attr(WORKER, worker_name())
        return trial, any(other.state == TrialState.RUNNING for other in trials)


def _run(search: Search, stage: Stage, trial: optuna.Trial) -> Exception | None:
    """Run a trial and report to the study how it ended; returns the error that it failed with."""

    def tell(values: float | Sequence[float] | None = None, *, state: TrialState | None = None) -> None:
        search.storage.retry(lambda: stage.study.tell(trial, values, state=state, skip_if_finished=True))

    try:
        tell(stage.run(trial))
    except optuna.TrialPruned:
        tell(state=TrialState.PRUNED)
    except UpdateFinishedTrialError:
        report(f"trial {trial.number}: {TAKEN_OVER}; its result is dropped")
    except (Interrupted, KeyboardInterrupt):
        search.storage.retry(lambda: _return(search, stage.study, trial))
        raise
    except Exception as error:
        if is_connection_error(error):
            search.storage.retry(lambda: _return(search, stage.study, trial))
        else:
            tell(state=TrialState.FAIL)
        return error
    return None


def _return(search: Search, study: optuna.Study, trial: optuna.Trial) -> None:
    """Queue the parameters of a trial again that was not finished."""
    with search.storage.lock(search.config.study):
        study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
        queue_again(study, study.get_trials(deepcopy=False)[trial.number], died=False)


class Progress:
    """Prints a line for every trial that has ended since the last update, and logs the best so far."""

    def __init__(self, search: Search, stage: Stage) -> None:
        self._search, self._stage, self._study = search, stage, stage.study
        self._known = {trial.number for trial in self._study.get_trials(deepcopy=False) if trial.state.is_finished()}
        self._logged = -1

    def update(self) -> None:
        """Print and log what is new."""
        self._search.storage.retry(self._update)

    def _update(self) -> None:
        trials = self._study.get_trials(deepcopy=False)
        fresh = [trial for trial in trials if trial.state.is_finished() and trial.number not in self._known]
        for trial in fresh:
            self._known.add(trial.number)
            report(self._line(trial, done=sum(map(is_done, trials))))
        if self._logged != sum(map(is_done, trials)):
            with self._search.storage.lock(self._search.config.study):
                trials = self._study.get_trials(deepcopy=False)
                self._stage.log_progress(trials)
            self._logged = sum(map(is_done, trials))

    def _line(self, trial: FrozenTrial, *, done: int) -> str:
        attributes = trial.user_attrs
        outcome = "stopped" if is_lost(trial) else trial.state.name.lower()
        if trial.state == TrialState.COMPLETE:
            named = zip(self._search.metrics.names, trial.values, strict=False)
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
