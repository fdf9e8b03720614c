"""What a search maximises: metric names -> one or two values, and the floor that a trial must keep.

Metrics are those of :func:`retinaflow.metric.per_class.summary` over the **same bins in every trial** (those of the
defaults), whatever bins a trial draws images by: else a trial could win by moving classes to another bin.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from retinaflow.settings.commands import SearchConfig

BINS = "bins"
"""Name of the objective that is a weighted mean over bins."""


@dataclass(frozen=True)
class Goal:
    """``names``: one or two objectives, maximised; ``weights``: of the bins, rarest first; ``floor``: least value of
    ``floor_metric``, or None."""

    names: tuple[str, ...]
    weights: tuple[float, ...]
    floor: float | None
    floor_metric: str

    @property
    def is_single(self) -> bool:
        """Whether there is one objective; two give a Pareto front."""
        return len(self.names) == 1

    def values(self, metrics: Mapping[str, float]) -> tuple[float, ...]:
        """The objectives of a trial. Raises ValueError for a metric that could not be measured."""
        return tuple(self._value(name, metrics) for name in self.names)

    def shortfall(self, metrics: Mapping[str, float]) -> float | None:
        """How far the floor is missed: at most 0 when it is kept (Optuna's constraint), None without a floor."""
        return None if self.floor is None else self.floor - _measured(self.floor_metric, metrics)

    def document(self) -> dict[str, object]:
        """For the study to remember."""
        return {
            "objective": ",".join(self.names),
            "bin_weights": ",".join(f"{weight:g}" for weight in self.weights) or "none",
            "floor": "none" if self.floor is None else f"{self.floor_metric} >= {self.floor:g}",
        }

    def _value(self, name: str, metrics: Mapping[str, float]) -> float:
        if name != BINS:
            return _measured(name, metrics)
        pairs = [
            (weight, metrics[f"val/mAP_bin_{number}"])
            for number, weight in enumerate(self.weights, start=1)
            if f"val/mAP_bin_{number}" in metrics
        ]
        total = sum(weight for weight, _ in pairs)
        if total <= 0:
            raise ValueError("objective=bins: no bin with a weight has ground truth in the images that are evaluated")
        return sum(weight * value for weight, value in pairs) / total


def read_goal(config: SearchConfig, *, num_bins: int) -> Goal:
    """The goal of a search over data with so many bins. Raises ValueError for names and weights that do not fit."""
    known = [f"val/mAP{suffix}" for suffix in ("", "_rare", "_common", "_frequent")]
    known += [f"val/mAP_bin_{number + 1}" for number in range(num_bins)]
    for setting, names in (("objective", config.objective), ("floor_metric", (config.floor_metric,))):
        for name in names:
            if name not in known and (name, setting) != (BINS, "objective"):
                raise ValueError(f"{setting} must be one of {', '.join([*known, BINS])}, but got {name}")
    if len(set(config.objective)) < len(config.objective):
        raise ValueError(f"two objectives must differ, but got objective={','.join(config.objective)}")
    _check_weights(config, num_bins)
    return Goal(config.objective, config.bin_weights, config.floor, config.floor_metric)


def _check_weights(config: SearchConfig, num_bins: int) -> None:
    weights = config.bin_weights
    shown = ",".join(f"{weight:g}" for weight in weights) or "none"
    if (BINS in config.objective) != bool(weights):
        raise ValueError(
            f"objective=bins and bin_weights belong together, but got objective={','.join(config.objective)}, "
            f"bin_weights={shown}"
        )
    if weights and (len(weights) > num_bins or min(weights) < 0 or sum(weights) <= 0):
        raise ValueError(
            f"bin_weights must be at most {num_bins} weights >= 0, not all 0, rarest bin first, but got {shown}"
        )


def mean_metrics(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean over the seeds of a trial of each metric that all of them have."""
    shared = [name for name in found[0] if all(name in metrics for metrics in found)]
    return {name: sum(metrics[name] for metrics in found) / len(found) for name in shared}


def _measured(name: str, metrics: Mapping[str, float]) -> float:
    if name not in metrics:
        raise ValueError(
            f"{name} must be measurable, but no class of it has ground truth in the images that are evaluated; there are "
            f"{', '.join(metrics)}"
        )
    return metrics[name]
