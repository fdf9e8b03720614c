"""``objective(trial) -> float``: the settings a trial suggests, trained, evaluated and logged as a run of their own.

Works in :func:`retinaflow.search.workers.work`, in ``study.optimize(objective)`` and by hand with
``study.ask()`` and ``study.tell()``. It sends heartbeats while it runs, so a trial whose process is gone is noticed.

The value is that of the best epoch (highest val/mAP), as ``train`` logs it under ``best/``; of several seeds the mean.
"""

from __future__ import annotations

import os
import platform
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
import optuna
import pandas as pd
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState

from retinaflow.data.bins import make_bins
from retinaflow.data.training_data import TrainingData
from retinaflow.errors import Interrupted
from retinaflow.interrupts import StopRequest
from retinaflow.metric.result import EvaluationResult
from retinaflow.runs.run import Run
from retinaflow.search.goal import Goal, mean_metrics
from retinaflow.search.runs import SearchRuns, TrialRun, trial_name
from retinaflow.search.space import Space
from retinaflow.search.storage import PatientStorage
from retinaflow.search.study import (
    METRICS,
    OVERHEAD,
    REASON,
    RUN_ID,
    SECONDS,
    WORKER,
    evaluations,
    quiet,
)
from retinaflow.settings.commands import TrainConfig
from retinaflow.training.session import start_session


def worker_name() -> str:
    """Machine and process, for people who look for a worker."""
    return f"{platform.node()}:{os.getpid()}"


@dataclass(frozen=True)
class Objective:
    """``objective(trial)``: a float, or a pair for two objectives. Raises TrialPruned, or what the training raised.

    ``data``: of the defaults, whose bins AP is averaged over in every trial; ``folder``: for checkpoints, which are
    deleted with each training; ``prunes``: whether the study's pruner may end a trial.
    """

    space: Space
    goal: Goal
    data: TrainingData
    runs: SearchRuns
    storage: PatientStorage
    folder: Path
    seeds: int
    prunes: bool
    stop: StopRequest

    def __call__(self, trial: optuna.Trial) -> float | tuple[float, ...]:
        start = time.perf_counter()
        settings = self.space.settings(trial)
        with trial_run(trial, self.runs, self.storage, name=trial_name(trial.number)) as run:
            run.log_params(settings.model_dump())
            evaluations, trained = self._train(trial, settings, run)
            metrics = mean_metrics([evaluation.metrics for evaluation in evaluations])
            values = self.goal.values(metrics)
            self._record(trial, run, evaluations, metrics, values)
            seconds = time.perf_counter() - start
            trial.set_user_attr(SECONDS, round(seconds, 3))
            trial.set_user_attr(OVERHEAD, round(seconds - trained, 3))
        return values[0] if self.goal.is_single else values

    def _train(self, trial: optuna.Trial, settings: TrainConfig, run: Run) -> tuple[list[EvaluationResult], float]:
        """One evaluation per seed, and the seconds that training and evaluating took."""
        results, seconds = [], 0.0
        for number in range(self.seeds):
            watched = TrialRun(
                run,
                curves=number == 0,
                evaluated=ScoredDetections(trial, self.goal, evaluations(settings), prunes=self.prunes and number == 0),
            )
            start = time.perf_counter()
            one = settings.model_copy(update={"seed": settings.seed + number})
            results.append(train_once(one, self.data, watched, folder=self.folder, stop=self.stop))
            seconds += time.perf_counter() - start
        return results, seconds

    def _record(
        self,
        trial: optuna.Trial,
        run: Run,
        evaluations: list[EvaluationResult],
        metrics: Mapping[str, float],
        values: tuple[float, ...],
    ) -> None:
        shortfall = self.goal.shortfall(metrics)
        if shortfall is not None:
            set_floor(trial, shortfall)
        trial.set_user_attr(METRICS, dict(metrics))
        log_trial(run, evaluations, metrics)
        named = {"search/objective" + ("" if n == 0 else f"_{n + 1}"): value for n, value in enumerate(values)}
        run.log_metrics(named, step=trial.number)


@dataclass
class ScoredDetections:
    """Told of every evaluated epoch of a training; tells the trial, and raises TrialPruned when the pruner says so."""

    trial: optuna.Trial
    goal: Goal
    total: int
    prunes: bool
    count: int = 0

    def __call__(self, metrics: Mapping[str, float]) -> None:
        self.count += 1
        if not self.goal.is_single or not self.prunes:
            return
        value = self.goal.values(metrics)[0]
        self.trial.report(value, self.count)
        # After the last evaluation the work is done, and there is nothing left to save.
        if self.count < self.total and self.trial.should_prune():
            shortfall = self.goal.shortfall(metrics)
            if shortfall is not None:
                set_floor(self.trial, shortfall)
            self.trial.set_user_attr(METRICS, dict(metrics))
            raise optuna.TrialPruned(
                f"{self.goal.names[0]} {value:.4f} at evaluation {self.count} of {self.total} was below the others'"
            )


def train_once(
    settings: TrainConfig, data: TrainingData, run: Run, *, folder: Path, stop: StopRequest
) -> EvaluationResult:
    """Train with some settings and evaluate the best epoch; the weights are not kept.

    The index, its sizes and the images that classes are on are those of ``data``; only the bins are made anew.
    """
    bins = make_bins(data.pairs, num_bins=settings.num_bins, strategy=settings.bin_strategy, edges=settings.bin_edges)
    own = replace(data, bins=bins, scored_bins=data.scored_bins or data.bins)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as checkpoints:
        # A killed trial starts anew: checkpoints within its epochs would only cost time.
        session = start_session(settings.model_copy(update={"save_minutes": 0.0}), own, None)
        best = session.train(run, Path(checkpoints), stop)
        return session.evaluate_best(best, stop).evaluation


def log_trial(run: Run, evaluations: list[EvaluationResult], metrics: Mapping[str, float]) -> None:
    """The final figures of one or several trainings: means as ``best/`` metrics and in ``per_class_ap.csv``."""
    run.log_metrics({f"best/{name.removeprefix('val/')}": value for name, value in metrics.items()}, step=0)
    table = evaluations[0].table.copy()
    table["ap"] = np.mean([evaluation.table["ap"].to_numpy(dtype=np.float64) for evaluation in evaluations], axis=0)
    run.log_csv(table, "per_class_ap.csv")
    run.log_table(table, "per_class_ap.json")
    if len(evaluations) > 1:
        seeds = {f"ap_seed_{n}": evaluation.table["ap"] for n, evaluation in enumerate(evaluations)}
        run.log_csv(pd.concat([table[["class", "class_id"]], pd.DataFrame(seeds)], axis=1), "per_seed_ap.csv")


def set_floor(trial: optuna.Trial, shortfall: float) -> None:
    """Tell Optuna how far the floor is missed (at most 0: kept)."""
    with quiet():
        trial.set_constraint("floor", shortfall)


@contextmanager
def trial_run(trial: optuna.Trial, runs: SearchRuns, storage: PatientStorage, *, name: str) -> Iterator[Run]:
    """The run of a trial, from the trial's first sign of life to its end."""
    with Heartbeat(storage, trial):
        if WORKER not in trial.user_attrs:
            trial.set_user_attr(WORKER, worker_name())
        run = runs.start(name, study=trial.study.study_name, trial=trial.number)
        trial.set_user_attr(RUN_ID, run.run_id)
        with ending(runs, run, trial):
            yield run


@contextmanager
def ending(runs: SearchRuns, run: Run, trial: optuna.Trial) -> Iterator[None]:
    """End the run of a trial by how the block ends; an error of the trial's own becomes its ``reason``."""
    try:
        yield
    except optuna.TrialPruned as error:
        trial.set_user_attr(REASON, str(error))
        runs.end(run, "FINISHED", state="pruned", reason=str(error))
        raise
    except (Interrupted, KeyboardInterrupt) as error:
        runs.end(run, "KILLED", state="stopped", reason=str(error) or "interrupted")
        raise
    except UpdateFinishedTrialError:
        runs.end(run, "KILLED", state="lost", reason="taken for dead by another worker")
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        runs.end(run, "FAILED", state="failed", reason=reason)
        trial.set_user_attr(REASON, reason[:1000])
        raise
    if _is_running(trial):
        runs.end(run, "FINISHED", state="complete", reason="all epochs done")
    else:
        runs.end(run, "KILLED", state="lost", reason="taken for dead by another worker")
        raise UpdateFinishedTrialError(f"trial {trial.number} was taken for dead by another worker")


def _is_running(trial: optuna.Trial) -> bool:
    running = trial.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    return any(other.number == trial.number for other in running)


class Heartbeat:
    """Signs of life of a trial, sent by a thread while the block runs."""

    def __init__(self, storage: PatientStorage, trial: optuna.Trial) -> None:
        self._storage = storage
        study = storage.get_study_id_from_name(trial.study.study_name)
        self._trial = storage.get_trial_id_from_study_id_trial_number(study, trial.number)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"heartbeat of trial {trial.number}", daemon=True)

    def beat(self) -> None:
        """One sign of life."""
        self._storage.record_heartbeat(self._trial)

    def __enter__(self) -> Self:
        self.beat()
        self._thread.start()
        return self

    def __exit__(self, *details: object) -> None:
        self._over.set()
        self._thread.join(timeout=5)

    def _work(self) -> None:
        while not self._over.wait(self._storage.get_heartbeat_interval()):
            self.beat()
