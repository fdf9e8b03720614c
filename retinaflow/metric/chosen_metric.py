"""Metrics by name: what epochs are ranked by, what a training aims at, what a search maximises.

A name is that of an aggregate (``val/mAP``, ``val/mAP_rare``, ``val/mAP_bin_1``, ``val/coco_AP``) or ``val/AP/CLASS``
with the name or the id of a class. Several names with weights are the weighted mean of their metrics.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from retinaflow.errors import SettingError
from retinaflow.metric.result import EvaluationResult
from retinaflow.settings.resolve import nearest
from retinaflow.taxonomy import Taxonomy

OF_CLASS = "val/AP/"
_SHOWN = 5
"""Number of classes named in an error."""


def measured(evaluation: EvaluationResult) -> dict[str, float]:
    """All aggregates and the AP of each class that has ground truth, by name."""
    table = evaluation.table
    by_class = zip(table["class"], table["ap"].astype(float), strict=True)
    return {**evaluation.metrics, **{f"{OF_CLASS}{name}": ap for name, ap in by_class if not np.isnan(ap)}}


def logged_name(name: str) -> str:
    """A metric's name as a tracking server accepts it: in the name of a class other characters become ``_``."""
    label = name.removeprefix(OF_CLASS)
    return name if label == name else OF_CLASS + (re.sub(r"[^\w\-. :]", "_", label).strip(".") or "_")


@dataclass(frozen=True)
class ChosenMetric:
    """A weighted mean of metrics; ``weights``: name as in :func:`measured` -> weight."""

    weights: Mapping[str, float]

    @staticmethod
    def read(setting: str, given: Mapping[str, float], known: Mapping[str, float], taxonomy: Taxonomy) -> ChosenMetric:
        """The metric of a setting. ``known``: those of :func:`measured` for any evaluation of the same images.

        Raises SettingError, with the names that there are, for a metric that does not exist or that cannot be measured
        on these images. Where nothing can be measured, as no box is annotated, all names are taken.
        """
        weights: dict[str, float] = {}
        for name, weight in given.items():
            full, why = name, ""
            if name.startswith(OF_CLASS):
                label = _label(setting, name, known, taxonomy)
                full, why = f"{OF_CLASS}{label}", f", and no evaluated image has a box of {label}"
            if known and full not in known:
                raise SettingError(
                    f"{setting} must name metrics of these images, but got {name}{why or nearest(name, known)}; "
                    f"there are {_shown(known)}"
                )
            weights[full] = weights.get(full, 0.0) + weight
        return ChosenMetric(weights)

    def value(self, metrics: Mapping[str, float]) -> float | None:
        """The mean by some metrics; None where one of them was not measured."""
        if any(name not in metrics for name in self.weights):
            return None
        return sum(weight * metrics[name] for name, weight in self.weights.items()) / sum(self.weights.values())

    def of_classes(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """The AP of each class that it names, by the name under which it is logged."""
        names = [name for name in self.weights if name.startswith(OF_CLASS) and name in metrics]
        return {logged_name(name): metrics[name] for name in names}

    def __str__(self) -> str:
        if len(self.weights) == 1:
            return next(iter(self.weights))
        return ",".join(f"{name}:{weight:g}" for name, weight in self.weights.items())


def _label(setting: str, name: str, known: Mapping[str, float], taxonomy: Taxonomy) -> str:
    key = name.removeprefix(OF_CLASS)
    if key in taxonomy.labels:
        return key
    try:
        return taxonomy.labels[taxonomy.find(key)]
    except SettingError as error:
        there_are = f"; there are {_shown(known)}" if known else ""
        raise SettingError(f"{setting} must name a class, but got {name}: {error}{there_are}") from None


def _shown(known: Mapping[str, float]) -> str:
    groups = [name for name in known if not name.startswith(OF_CLASS)]
    classes = [name for name in known if name.startswith(OF_CLASS)]
    more = len(classes) - _SHOWN
    return ", ".join([*groups, *classes[:_SHOWN]]) + (f" and {more:,} more classes" if more > 0 else "")
