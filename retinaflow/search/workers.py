"""Workers: take a trial, run it, tell the study, until as many trials are done as were asked for.

A worker takes a trial under the study's claim, so that among all workers of all machines exactly the number asked for
is run. Before it takes one it looks for trials whose process is gone and queues them again. When nothing is left to
take it waits for the trials that others still run: one of those may have to be run again.

Several workers on one machine are processes of their own with an equal share of the cores each. A process that is
killed is replaced.
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

from retinaflow.errors import Interrupted
from retinaflow.interrupts import StopRequest
from retinaflow.progress import report
from retinaflow.runs import store
from retinaflow.search.confirmation import ARM, SEED, Confirmation
from retinaflow.search.objective import Heartbeat, worker_name
from retinaflow.search.opening import Search, attach
from retinaflow.search.study import (
    METRICS,
    REASON,
    WORKER,
    best_trial,
    counts,
    is_done,
    is_lost,
    quiet,
    run_again,
    sampler_of,
)
from retinaflow.settings.commands import SearchConfig

POLL_SECONDS = 1.0
FAILURES_IN_A_ROW = 3
"""So many trials failing one after the other say that it is not the trials' fault."""
REPLACEMENTS = 3
"""Processes that may die per worker before the search gives up."""
_SHARED_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class Stage(Protocol):
    """A kind of work on a study: the trials of the search, or the trainings that confirm its result."""

    @property
    def study(self) -> optuna.Study:
        """Where its trials are."""

    def take(self, trials: Sequence[FrozenTrial]) -> optuna.Trial | None:
        """The next trial, made RUNNING, or None when none is left; called under the claim."""

    def run(self, trial: optuna.Trial) -> float | Sequence[float]:
        """Do the work of a trial."""

    def announce(self, trials: Sequence[FrozenTrial]) -> None:
        """Log the state of the study; called under the claim, in the process that opened the search."""


@dataclass(frozen=True)
class Trials:
    """The trials of a search."""

    search: Search

    @property
    def study(self) -> optuna.Study:
        return self.search.study

    def take(self, trials: Sequence[FrozenTrial]) -> optuna.Trial | None:
        """A queued trial, or a new one while fewer count than were asked for. The first are :meth:`Space.starts`."""
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

    def announce(self, trials: Sequence[FrozenTrial]) -> None:
        """The best trial so far under the metric names that trials have, one point per trial done."""
        done = sum(map(is_done, trials))
        best = best_trial(self.study, self.search.goal)
        if best is None or self.study.user_attrs.get("retinaflow_announced") == done:
            return
        metrics = dict(best.user_attrs.get(METRICS, {}))
        metrics |= {f"best/{name.removeprefix('val/')}": value for name, value in metrics.items()}
        values = {f"search/objective{'' if n == 0 else f'_{n + 1}'}": value for n, value in enumerate(best.values)}
        self.search.runs.parent.log_metrics({**metrics, **values, "search/trials": done}, step=done)
        self.study.set_user_attr("retinaflow_announced", done)


def work(search: Search, stage: Stage, told: Callable[[], None] = lambda: None) -> None:
    """Run trials until none is left, neither to take nor running elsewhere. ``told`` is called after each.

    Raises Interrupted on request, after queueing the trial in work again, and ValueError when one trial after the other
    fails.
    """
    study, failed = stage.study, 0
    while True:
        search.stop.check()
        trial, others = _take(search, stage)
        if trial is None:
            told()
            if not others:
                return
            time.sleep(POLL_SECONDS)
            continue
        try:
            values = stage.run(trial)
        except optuna.TrialPruned:
            study.tell(trial, state=TrialState.PRUNED, skip_if_finished=True)
            failed = 0
        except (Interrupted, KeyboardInterrupt):
            study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
            run_again(study, study.trials[trial.number], died=False)
            raise
        except UpdateFinishedTrialError:
            report(f"trial {trial.number} was taken for dead and is run again elsewhere; its result is dropped")
        except Exception as error:
            study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
            failed += 1
            if failed == FAILURES_IN_A_ROW:
                raise ValueError(f"{failed} trials failed one after the other, the last by: {error}") from error
        else:
            study.tell(trial, values, skip_if_finished=True)
            failed = 0
        told()


def _take(search: Search, stage: Stage) -> tuple[optuna.Trial | None, bool]:
    """A trial to run, if there is one, and whether others are still being run."""
    with search.storage.claiming(search.config.study):
        search.lost.clear(stage.study)
        trials = stage.study.get_trials(deepcopy=False)
        trial = stage.take(trials)
        if trial is not None:
            # First, as only a trial that has shown life can be seen to be dead.
            Heartbeat(search.storage, trial).beat()
            trial.set_user_attr(WORKER, worker_name())
        return trial, any(other.state == TrialState.RUNNING for other in trials)


class Narrator:
    """Prints a line for every trial that has ended since the last look, and logs the best so far."""

    def __init__(self, search: Search, stage: Stage) -> None:
        self._search, self._stage, self._study = search, stage, stage.study
        self._known = {trial.number for trial in self._study.get_trials(deepcopy=False) if trial.state.is_finished()}
        self._announced = -1

    def look(self) -> None:
        """Print and log what is new."""
        trials = self._study.get_trials(deepcopy=False)
        fresh = [trial for trial in trials if trial.state.is_finished() and trial.number not in self._known]
        for trial in fresh:
            self._known.add(trial.number)
            report(self._line(trial, done=sum(map(is_done, trials))))
        if self._announced != sum(map(is_done, trials)):
            with self._search.storage.claiming(self._search.config.study):
                trials = self._study.get_trials(deepcopy=False)
                self._stage.announce(trials)
            self._announced = sum(map(is_done, trials))

    def _line(self, trial: FrozenTrial, *, done: int) -> str:
        goal, attributes = self._search.goal, trial.user_attrs
        outcome = "stopped" if is_lost(trial) else trial.state.name.lower()
        if trial.state == TrialState.COMPLETE:
            named = zip(goal.names, trial.values, strict=False)
            outcome = ", ".join(f"{name} {value:.4f}" for name, value in named)
        elif REASON in attributes:
            outcome += f": {attributes[REASON]}"
        if ARM in attributes:
            return f"{attributes[ARM]}, seed {attributes[SEED]}: {outcome}"
        best = best_trial(self._study, goal)
        shown = "" if best is None else f"; best {' '.join(f'{v:.4f}' for v in best.values)} (trial {best.number})"
        return f"trial {trial.number} {outcome}{shown}; {done} done"


def work_in_processes(search: Search, stage: str, told: Callable[[], None]) -> None:
    """The same by ``search_workers`` processes. Raises what a worker could not go on after, and Interrupted on request."""
    config = search.config
    team = _Team(config, stage, config.search_workers)
    try:
        while team.is_working():
            search.stop.check()
            told()
            time.sleep(POLL_SECONDS / 4)
    finally:
        team.end()
        told()


class _Team:
    """Worker processes, replaced when killed."""

    def __init__(self, config: SearchConfig, stage: str, size: int) -> None:
        self._config, self._stage, self._size = config, stage, size
        self._context = multiprocessing.get_context("spawn")
        self._errors: Any = self._context.SimpleQueue()
        self._made = 0
        self._processes = [self._start() for _ in range(size)]

    def _start(self) -> SpawnProcess:
        log = self._config.output / self._config.study / f"worker-{self._made + 1}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        self._made += 1
        threads = max(1, len(os.sched_getaffinity(0)) // self._size)
        process = self._context.Process(
            target=run_worker,
            args=(self._config, self._stage, store.uri(), threads, log, self._errors),
            name=f"search worker {self._made}",
        )
        # Read when a library is loaded, which in the new process is before any of our code runs.
        before = {name: os.environ.get(name) for name in (*_SHARED_THREADS, "MLFLOW_RUN_ID")}
        os.environ.update(dict.fromkeys(_SHARED_THREADS, str(threads)))
        os.environ.pop("MLFLOW_RUN_ID", None)
        try:
            process.start()
        finally:
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value
        return process

    def is_working(self) -> bool:
        """Whether a worker still runs. Raises ValueError when one could not go on."""
        for place, process in enumerate(self._processes):
            if process.exitcode is not None and process.exitcode < 0:
                report(f"{process.name} was killed by signal {-process.exitcode}; another takes its place")
                if self._made >= self._size * (1 + REPLACEMENTS):
                    raise ValueError(f"{self._made} workers were killed, the last by signal {-process.exitcode}")
                self._processes[place] = self._start()
            elif process.exitcode and not self._errors.empty():
                raise ValueError(str(self._errors.get()))
            elif process.exitcode:
                raise ValueError(f"{process.name} ended with code {process.exitcode}; its log is beside the results")
        return any(process.is_alive() for process in self._processes)

    def end(self) -> None:
        """Ask the workers to save and stop, and wait for them."""
        for process in self._processes:
            if process.is_alive():
                process.terminate()
        for process in self._processes:
            process.join()


def run_worker(config: SearchConfig, stage: str, store_uri: str, threads: int, log: Path, errors: Any) -> None:
    """Main function of a worker process; what it prints goes to its log."""
    with log.open("a", buffering=1, encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
        torch.set_num_threads(threads)
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        if config.track:
            store.use(store_uri)
        try:
            with StopRequest(watch_parent=True) as stop:
                search = attach(config, stop=stop)
                with closing(search.storage):
                    work(search, stage_of(stage, search))
        except (Interrupted, KeyboardInterrupt) as error:
            report(f"stopped: {error}")
        except Exception as error:
            traceback.print_exc()
            errors.put(str(error))
            sys.exit(1)


def stage_of(name: str, search: Search) -> Stage:
    """The stage of that name: ``trials`` or ``confirmation``."""
    return Trials(search) if name == "trials" else Confirmation(search)
