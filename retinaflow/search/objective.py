"""The objective of a study: the metrics that it maximises, and ``objective(trial)``, which trains and evaluates.

``Objective`` works in :func:`retinaflow.search.workers.work`, in ``study.optimize(objective)``, and with
``study.ask()`` and ``study.tell()``. It sends heartbeats while it runs, so that a trial whose process has ended is
noticed.

The value of a trial is that of its best epoch, which is the best by the objective itself (:func:`keep_best_of`) and is
logged under ``best/``; with several seeds it is the mean of those that were trained
(:mod:`retinaflow.search.seed_test`). Metrics are those of :func:`retinaflow.metric.per_class.summary` over the **same
bins in every trial** (those of the defaults), whatever bins a trial samples images by. Otherwise a trial could improve
by moving classes to another bin.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import optuna

from retinaflow.data.training_data import TrainingData
from retinaflow.errors import DataError, SettingError
from retinaflow.interrupts import StopRequest
from retinaflow.metric.chosen_metric import OF_CLASS, ChosenMetric, logged_name
from retinaflow.metric.result import EvaluationResult
from retinaflow.runs.datasets import training_datasets
from retinaflow.runs.names import description
from retinaflow.runs.run import Run
from retinaflow.search.runs import SearchRuns, TrialRun, trial_name
from retinaflow.search.sampler_and_pruner import evaluations, quiet
from retinaflow.search.seed_test import SeedTest
from retinaflow.search.space import Space
from retinaflow.search.training import log_trial, train_once
from retinaflow.search.trial import METRICS, OVERHEAD, REASON, SECONDS, TRAININGS, trial_run
from retinaflow.settings.commands import SearchConfig, TrainConfig
from retinaflow.settings.value_types import as_text
from retinaflow.taxonomy import Taxonomy

BINS = "bins"
"""Name of the objective that is a weighted mean over bins."""


@dataclass(frozen=True)
class ObjectiveMetrics:
    """``names``: one or two metrics to maximise; ``weights``: of the bins, rarest first; ``floor``: smallest allowed
    value of ``floor_metric``, or None."""

    names: tuple[str, ...]
    weights: tuple[float, ...]
    floor: float | None
    floor_metric: str

    @property
    def is_single(self) -> bool:
        """Whether there is one objective; two give a Pareto front."""
        return len(self.names) == 1

    def values(self, metrics: Mapping[str, float]) -> tuple[float, ...]:
        """The objectives of a trial. Raises DataError for a metric that could not be measured."""
        return tuple(self._value(name, metrics) for name in self.names)

    def shortfall(self, metrics: Mapping[str, float]) -> float | None:
        """The floor minus the value: at most 0 when it is met (Optuna's constraint). None without a floor."""
        return None if self.floor is None else self.floor - _measured(self.floor_metric, metrics)

    @property
    def parts(self) -> dict[str, float]:
        """The first objective as a weighted mean: metric of a group of classes -> weight."""
        if self.names[0] != BINS:
            return {self.names[0]: 1.0}
        return {f"val/mAP_bin_{number}": weight for number, weight in enumerate(self.weights, start=1)}

    def document(self) -> dict[str, object]:
        """The form in which it is stored with the study."""
        return {
            "objective": ",".join(self.names),
            "bin_weights": ",".join(f"{weight:g}" for weight in self.weights) or "none",
            "floor": "none" if self.floor is None else f"{self.floor_metric} >= {self.floor:g}",
        }

    def _value(self, name: str, metrics: Mapping[str, float]) -> float:
        if name != BINS:
            return _measured(name, metrics)
        pairs = [(weight, metrics[part]) for part, weight in self.parts.items() if part in metrics]
        total = sum(weight for weight, _ in pairs)
        if total <= 0:
            raise DataError("objective=bins: no bin with a weight has ground truth in the evaluated images")
        return sum(weight * value for weight, value in pairs) / total


def read_objective(
    config: SearchConfig, *, num_bins: int, known: Mapping[str, float], taxonomy: Taxonomy
) -> ObjectiveMetrics:
    """The metrics of a search over data with ``num_bins`` bins. ``known``: what can be measured on its images.

    Raises SettingError for names or weights that do not fit.
    """
    names = tuple(name if name == BINS else _checked("objective", name, known, taxonomy) for name in config.objective)
    if config.floor_metric.startswith(OF_CLASS):
        raise SettingError(f"floor_metric must be that of a group of classes, but got {config.floor_metric}")
    if config.floor is not None:
        _checked("floor_metric", config.floor_metric, known, taxonomy)
    if len(set(names)) < len(names):
        raise SettingError(f"two objectives must differ, but got objective={','.join(config.objective)}")
    _check_weights(config, num_bins)
    return ObjectiveMetrics(names, config.bin_weights, config.floor, config.floor_metric)


def keep_best_of(config: SearchConfig, known: Mapping[str, float]) -> tuple[str, ...]:
    """``keep_best`` of the trainings of a search: its objective; of two objectives their mean, of ``bins`` their
    weighted mean. Raises SettingError for another one that was given."""
    weights: dict[str, float] = {}
    for name in config.objective:
        parts = {name: 1.0}
        if name == BINS:
            bins = {f"val/mAP_bin_{number}": weight for number, weight in enumerate(config.bin_weights, start=1)}
            parts = {part: weight for part, weight in bins.items() if weight > 0 and (part in known or not known)}
        total = sum(parts.values())
        if not parts:
            raise SettingError("objective=bins: no bin with a weight has ground truth in the evaluated images")
        for part, weight in parts.items():
            weights[part] = weights.get(part, 0.0) + weight / total
    found = tuple(weights) if len(weights) == 1 else tuple(f"{name}:{weight!r}" for name, weight in weights.items())
    if "keep_best" in config.model_fields_set and config.keep_best != found:
        raise SettingError(
            f"the trainings of a search keep the epoch that is best by its objective ({as_text(found)}), but got "
            f"keep_best={as_text(config.keep_best)}; leave it out, or give it as objective"
        )
    return found


def _checked(setting: str, name: str, known: Mapping[str, float], taxonomy: Taxonomy) -> str:
    """The name under which trainings log the metric."""
    (full,) = ChosenMetric.read(setting, {name: 1.0}, known, taxonomy).weights
    return logged_name(full)


def _check_weights(config: SearchConfig, num_bins: int) -> None:
    weights = config.bin_weights
    shown = ",".join(f"{weight:g}" for weight in weights) or "none"
    if (BINS in config.objective) != bool(weights):
        raise SettingError(
            f"objective=bins and bin_weights belong together, but got objective={','.join(config.objective)}, "
            f"bin_weights={shown}"
        )
    if weights and (len(weights) > num_bins or min(weights) < 0 or sum(weights) <= 0):
        raise SettingError(
            f"bin_weights must be at most {num_bins} weights >= 0, not all 0, rarest bin first, but got {shown}"
        )


def mean_metrics(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean over the seeds of a trial of each metric that all of them have."""
    shared = [name for name in found[0] if all(name in metrics for metrics in found)]
    return {name: sum(metrics[name] for metrics in found) / len(found) for name in shared}


def _measured(name: str, metrics: Mapping[str, float]) -> float:
    if name not in metrics:
        raise DataError(
            f"{name} must be measurable, but none of its classes has ground truth in the evaluated images; there are "
            f"{', '.join(metrics)}"
        )
    return metrics[name]


@dataclass(frozen=True)
class Objective:
    """``objective(trial)``: a float, or a pair for two objectives. Raises TrialPruned, or what the training raised.

    ``data``: that of the defaults, whose bins AP is averaged over in every trial; ``folder``: for checkpoints, which
    are deleted after each training; ``seed_test``: how many seeds a trial is trained with; ``prunes``: whether the
    study's pruner may end a trial; ``heartbeat``: seconds between two heartbeats.
    """

    space: Space
    metrics: ObjectiveMetrics
    data: TrainingData
    runs: SearchRuns
    heartbeat: int
    folder: Path
    seed_test: SeedTest
    prunes: bool
    stop: StopRequest

    def __call__(self, trial: optuna.Trial) -> float | tuple[float, ...]:
        start = time.perf_counter()
        settings = self.space.settings(trial)
        with trial_run(trial, self.runs, name=trial_name(trial.number), heartbeat=self.heartbeat) as run:
            run.log_params(settings.model_dump())
            datasets = training_datasets(settings.model_dump(), self.data)
            run.log_datasets(datasets)
            results, trained = self._train(trial, settings, run)
            metrics = mean_metrics([result.metrics for result in results])
            values = self.metrics.values(metrics)
            log_trial(run, results, metrics)
            chosen = ", ".join(f"{name}={as_text(value)}" for name, value in trial.params.items())
            run.set_description(description(metrics, datasets[-1], lines=(chosen,)))
            named = {"search/objective" + ("" if n == 0 else f"_{n + 1}"): value for n, value in enumerate(values)}
            run.log_metrics(named, step=trial.number)
            seconds = time.perf_counter() - start
            cost = {SECONDS: round(seconds, 3), OVERHEAD: round(seconds - trained, 3), TRAININGS: len(results)}
            _record(trial, metrics, self.metrics, **cost)
        return values[0] if self.metrics.is_single else values

    def _train(self, trial: optuna.Trial, settings: TrainConfig, run: Run) -> tuple[list[EvaluationResult], float]:
        """One result per seed, and the seconds that training and evaluating took."""
        results: list[EvaluationResult] = []
        seconds, worse = 0.0, None
        while worse is None and len(results) < self.seed_test.seeds:
            number = len(results)
            prunes = self.prunes and number == 0
            reports = TrialReports(trial, self.metrics, evaluations(settings), prunes=prunes)
            watched = TrialRun(run, curves=number == 0, evaluated=reports)
            start = time.perf_counter()
            one = settings.model_copy(update={"seed": settings.seed + number})
            results.append(
                train_once(one, self.data, watched, folder=self.folder, stop=self.stop, with_history=number == 0)
            )
            seconds += time.perf_counter() - start
            if self.metrics.is_single and self.seed_test.seeds > 1:
                value = self.metrics.values(results[-1].metrics)[0]
                worse = self.seed_test.add(trial, value, results[-1].scores.matches)
        if worse is not None:
            trial.set_user_attr(REASON, worse)
        return results, seconds


@dataclass
class TrialReports:
    """Called with the metrics of each evaluated epoch of a training: reports the objective to the trial, and raises
    TrialPruned when the pruner ends the trial. ``total``: number of evaluations of the training."""

    trial: optuna.Trial
    objective: ObjectiveMetrics
    total: int
    prunes: bool
    count: int = 0

    def __call__(self, metrics: Mapping[str, float]) -> None:
        self.count += 1
        if not self.objective.is_single or not self.prunes:
            return
        value = self.objective.values(metrics)[0]
        self.trial.report(value, self.count)
        # After the last evaluation the work is done, and there is nothing left to save.
        if self.count < self.total and self.trial.should_prune():
            _record(self.trial, metrics, self.objective)
            raise optuna.TrialPruned(
                f"{self.objective.names[0]} {value:.4f} at evaluation {self.count} of {self.total} was below that of "
                "other trials"
            )


def _record(trial: optuna.Trial, metrics: Mapping[str, float], objective: ObjectiveMetrics, **cost: float) -> None:
    """Store the metrics and the cost of a trial, and by how much it misses the floor."""
    for name, value in {METRICS: dict(metrics), **cost}.items():
        trial.set_user_attr(name, value)
    shortfall = objective.shortfall(metrics)
    if shortfall is not None:
        with quiet():
            trial.set_constraint("floor", shortfall)
