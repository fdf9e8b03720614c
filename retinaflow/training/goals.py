"""What a training ranks its epochs by, and when it has reached its end early: patience, or a target.

Of the best epoch all metrics are stored with a checkpoint, so that a training that is resumed with another
``keep_best`` compares its next epochs by that. Seconds are those that trainings and evaluations took, over all
processes that worked on a training; work that was lost with a process is not in them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from retinaflow.data.training_data import TrainingData
from retinaflow.metric.chosen_metric import ChosenMetric
from retinaflow.progress import report
from retinaflow.settings.commands import TrainConfig
from retinaflow.settings.value_types import metric_target, metric_weights
from retinaflow.taxonomy import Taxonomy
from retinaflow.training.validation import known_metrics

TIME_TO_TARGET = "time_to_target"
"""Metric of a run: seconds until the target was reached."""
_DEFAULT = ("val/mAP",)


def check_metrics(config: TrainConfig, data: TrainingData) -> None:
    """Raise SettingError unless the metrics of ``keep_best`` and ``target`` can be measured on the validation images.

    For the default there is nothing to check.
    """
    if config.keep_best != _DEFAULT or config.target is not None:
        Goals(config, data.evaluated.taxonomy, known=known_metrics(data, config))


class Goals:
    """The goals of one training. ``known``: metrics to check its names by, else they are taken as they are."""

    def __init__(self, config: TrainConfig, taxonomy: Taxonomy, *, known: Mapping[str, float] | None = None) -> None:
        known = known or {}
        self.keep_best = ChosenMetric.read("keep_best", metric_weights(config.keep_best), known, taxonomy)
        self.best = float("-inf")
        self.without_gain = 0
        """Evaluations since the best one."""
        self.seconds_to_target: float | None = None
        self._target = None
        if config.target is not None:
            name, self._wanted = metric_target(config.target)
            self._target = ChosenMetric.read("target", {name: 1.0}, known, taxonomy)
        self._config = config
        self._of_best: dict[str, float] = {}
        self._start, self._seconds_before = time.monotonic(), 0.0

    @property
    def seconds(self) -> float:
        """Seconds of training so far."""
        return self._seconds_before + time.monotonic() - self._start

    def start(self) -> None:
        """The training begins, or continues, now."""
        self._start = time.monotonic()

    def named_classes(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """The AP of the classes that the goals name, as they are logged."""
        named = self.keep_best.of_classes(metrics)
        return named if self._target is None else {**named, **self._target.of_classes(metrics)}

    def value(self, metrics: Mapping[str, float], *, epoch: int) -> float:
        """What an epoch is ranked by."""
        value = self.keep_best.value(metrics)
        if value is not None:
            return value
        # No class with ground truth: every epoch is as good as any other.
        report(f"{self.keep_best} cannot be measured on these images: the last epoch is saved as the best")
        return float(epoch)

    def add(self, value: float, metrics: Mapping[str, float]) -> bool:
        """Add the value of an evaluation and its metrics; returns whether it is the best so far."""
        self.without_gain += 1
        if value <= self.best:
            return False
        self.best, self.without_gain, self._of_best = value, 0, dict(metrics)
        return True

    def reaches_target(self, metrics: Mapping[str, float]) -> bool:
        """Whether an evaluation reaches the target."""
        value = None if self._target is None else self._target.value(metrics)
        return value is not None and value >= self._wanted

    def is_over(self, *, epoch: int) -> bool:
        """Whether the training ends after so many epochs. Prints why, where it is early."""
        config = self._config
        if self.seconds_to_target is not None:
            report(f"target {config.target} reached in {self.seconds_to_target:.1f} s, after {epoch} epochs")
            return True
        if epoch >= config.epochs and config.target is not None:
            report(f"target {config.target} not reached in {epoch} epochs")
        over = epoch < config.epochs and 0 < config.patience <= self.without_gain
        if over:
            report(f"early stop: {self.keep_best} has not risen in {self.without_gain} evaluations")
        return over

    def stored(self) -> dict[str, Any]:
        """What a checkpoint stores; :meth:`restore` reads it."""
        return {
            "best": self.best,
            "without_gain": self.without_gain,
            "best_metrics": self._of_best,
            "seconds": self.seconds,
            TIME_TO_TARGET: None if self.seconds_to_target is None else [self._config.target, self.seconds_to_target],
        }

    def restore(self, stored: Mapping[str, Any]) -> None:
        """Continue from what a checkpoint stored, which may be that of other goals."""
        self.without_gain, self._of_best = stored["without_gain"], dict(stored["best_metrics"])
        value = self.keep_best.value(self._of_best)
        # Without ground truth there is the value alone.
        self.best = stored["best"] if value is None else value
        self._seconds_before = float(stored["seconds"])
        reached = stored[TIME_TO_TARGET]
        if reached is not None and reached[0] == self._config.target:
            self.seconds_to_target = float(reached[1])
