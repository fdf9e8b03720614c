"""Which seeds of a trial are trained: a trial that is worse than the best one beyond chance ends before its last seed.

With ``seeds=N`` a trial is compared with the best trial of the study after each of its first N - 1 seeds:

1. **Images.** The error of the difference over the choice of the images, from a paired bootstrap
   (:mod:`retinaflow.statistics.bootstrap`): every training is evaluated on the same resamples of the images.
2. **Seeds.** The error s sqrt(1 / n1 + 1 / n2) over the seeds, as in :mod:`retinaflow.statistics.significance`, with s
   pooled from all trials of the study, since two trials of three seeds hardly show how much seeds matter.
3. **Looks.** There are N - 1 looks, so a trial ends when its one-sided p-value is at most :data:`LEVEL` / (N - 1)
   (Bonferroni). A trial that would have been as good as the best is then lost with a probability of at most
   :data:`LEVEL`.

What a training reached is stored with its trial, so that any worker can compare with it; no detections are kept.
Cost: AP of 200 resamples for each training, 3 s of CPU for 40,000 images of 500 classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.trial import FrozenTrial

from retinaflow.data.training_data import TrainingData
from retinaflow.metric.chosen_metric import OF_CLASS, logged_name
from retinaflow.metric.matches import Matches
from retinaflow.metric.per_class import class_groups
from retinaflow.search.trial import best_trial, set_system_attr
from retinaflow.statistics.intervals import disagreement_variance, normal_quantile
from retinaflow.statistics.resampling import resampled_ap
from retinaflow.statistics.significance import SeedSpread, p_values

LEVEL = 0.05
"""Probability that a trial which is as good as the best one ends early."""
RESAMPLES = 200
CONFIDENCE = 0.95
"""Of the interval that the p-value is computed from, which does not depend on it."""
SCORES = "retinaflow:seeds"
"""System attribute of a trial: its :class:`SeedScores`."""

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class SeedScores:
    """The objective of each training of a trial.

    ``values [S]``; ``resampled [S, R]`` on resamples of the images that are the same for all trials, NaN where these
    have no ground truth; ``num_images``: images with ground truth of a class of the objective; ``unseen``: variance of
    a difference that is added for disagreement in images that were not seen.
    """

    values: FloatArray
    resampled: FloatArray
    num_images: int = 0
    unseen: float = 0.0

    @classmethod
    def of(cls, trial: FrozenTrial) -> SeedScores:
        """Those stored with a trial; of no training where none are."""
        stored = dict(trial.system_attrs.get(SCORES, {"values": [], "resampled": []}))
        values, resampled = (np.array(stored.pop(name), dtype=np.float64) for name in ("values", "resampled"))
        return cls(values, resampled, **stored)

    def document(self) -> dict[str, Any]:
        """The form in which they are stored."""
        rows = [[None if math.isnan(value) else round(value, 6) for value in row] for row in self.resampled.tolist()]
        return {**vars(self), "values": self.values.tolist(), "resampled": rows}


@dataclass(frozen=True)
class SeedTest:
    """The test of a search. ``parts``: the groups of classes of the objective and their weights; ``ends_trials``: else
    what trainings reached is stored, and no trial ends early."""

    seeds: int
    parts: Sequence[tuple[NDArray[np.bool_], float]]
    ends_trials: bool

    @classmethod
    def on(cls, data: TrainingData, parts: Mapping[str, float], *, seeds: int, ends_trials: bool) -> SeedTest:
        """``parts``: metric of a group of classes (``val/mAP_rare``) or of a class -> weight. Metrics by other rules
        (``val/coco_AP``) are not resampled: no trial ends early."""
        bins, ids = data.scored_bins or data.bins, data.evaluated.taxonomy.ids
        groups = class_groups(bins.images_per_class, bins.bin_of_class, class_ids=ids)
        groups["mAP"] = np.ones(len(ids), dtype=bool)
        for index, label in enumerate(data.evaluated.taxonomy.labels):
            groups[logged_name(OF_CLASS + label).removeprefix("val/")] = np.arange(len(ids)) == index
        known = {name: groups[group] for name in parts if (group := name.removeprefix("val/")) in groups}
        weighted = [(members, parts[name]) for name, members in known.items()]
        return cls(seeds, weighted, ends_trials and len(known) == len(parts))

    def add(self, trial: optuna.Trial, value: float, matches: Matches) -> str | None:
        """Store what a training of the trial reached; returns why its other seeds are not trained, or None."""
        before = SeedScores.of(trial.study.get_trials(deepcopy=False)[trial.number])
        scores = self.with_training(before, value, matches)
        set_system_attr(trial, SCORES, scores.document())
        best, done = best_trial(trial.study), len(scores.values)
        if not self.ends_trials or best is None or done >= self.seeds:
            return None
        everyone = [SeedScores.of(other).values for other in trial.study.get_trials(deepcopy=False)]
        p = p_value(scores, SeedScores.of(best), everyone)
        if p > LEVEL / (self.seeds - 1):
            return None
        return f"worse than trial {best.number} after {done} of {self.seeds} seeds (p = {p:.2g})"

    def with_training(self, scores: SeedScores, value: float, matches: Matches) -> SeedScores:
        """The scores of a trial with those of one more training."""
        weights = self.weights(matches)
        (ap,) = resampled_ap([matches], resamples=RESAMPLES, seed=0)
        known = np.where(np.isnan(ap), 0.0, weights)
        total = known.sum(axis=1)
        row = np.full(len(ap), np.nan)
        np.divide((np.nan_to_num(ap) * known).sum(axis=1), total, out=row, where=total > 0)
        images = np.bincount(matches.gt_class, minlength=len(weights))
        return SeedScores(
            np.append(scores.values, value),
            np.array([*scores.resampled, row]),
            num_images=len(np.unique(matches.gt_image[weights[matches.gt_class] > 0])),
            unseen=float((weights**2 * disagreement_variance(images)).sum()),
        )

    def weights(self, matches: Matches) -> FloatArray:
        """``[K]`` the objective is the mean of AP with these weights; 0 for classes without ground truth."""
        known = matches.evaluated & (matches.num_truths > 0)
        weights = np.zeros(len(known))
        for members, weight in self.parts:
            weights += weight * (members & known) / max(1, (members & known).sum())
        return np.asarray(weights / (weights.sum() or 1))


def p_value(trial: SeedScores, best: SeedScores, everyone: Sequence[FloatArray]) -> float:
    """Of the hypothesis that the trial is as good as the best one, against its being worse.

    ``everyone``: the values of the trainings of each trial of the study. 1 while no trial has two, as nothing shows how
    much seeds matter then.
    """
    several = [values for values in everyone if len(values) > 1]
    if not several or len(best.values) == 0:
        return 1.0
    freedom = sum(len(values) - 1 for values in several)
    variance = sum(float(((values - values.mean()) ** 2).sum()) for values in several) / freedom
    seeds = math.sqrt(variance * (1 / len(trial.values) + 1 / len(best.values)))
    difference = float(trial.values.mean() - best.values.mean())
    moved = trial.resampled.mean(axis=0) - best.resampled.mean(axis=0)
    moved = moved[~np.isnan(moved)]
    reach = normal_quantile(CONFIDENCE) * math.sqrt((float(moved.var()) if len(moved) else 0.0) + trial.unseen)
    (p,) = p_values(
        np.array([difference]),
        np.array([difference - reach]),
        np.array([difference + reach]),
        SeedSpread(np.array([seeds]), np.array([float(freedom)])),
        num_images=np.array([trial.num_images]),
        confidence=CONFIDENCE,
    )
    return float(p / 2 if difference < 0 else 1 - p / 2)
