"""Which run's model becomes champion: the best candidate, and whether it is significantly better than the champion.

A candidate is promoted when the lower end of the interval of its difference in mAP is above 0 (paired bootstrap over
images, :func:`~retinaflow.comparison.comparison.compare_runs`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from retinaflow.comparison.chosen_runs import ChosenRun
from retinaflow.comparison.comparison import Resampling, Side, compare_runs
from retinaflow.comparison.stored_matches import StoredMatches, read_matches
from retinaflow.errors import SettingError
from retinaflow.metric.challenge import average_precision, mean_of_classes
from retinaflow.runs import store
from retinaflow.runs.logged_model import run_of_weights, weights_of_run
from retinaflow.settings.commands import PromoteConfig


@dataclass(frozen=True)
class Decision:
    """Whether the candidate becomes champion, why, and the numbers as tags of its version."""

    promoted: bool
    reason: str
    tags: dict[str, str]


def best_of(runs: list[ChosenRun]) -> ChosenRun:
    """The candidate of the highest mAP. Raises SettingError when they were not evaluated on the same data."""
    if len(runs) > 1:
        digests = {one.record.name: one.stored.ground_truth.of_all for one in runs}
        if len(set(digests.values())) > 1:
            shown = "; ".join(f"{name}: {digest}" for name, digest in digests.items())
            raise SettingError(f"candidates must be evaluated on the same data and classes, but got {shown}")
    return max(runs, key=lambda one: (np.nan_to_num(_mean_ap(one.stored), nan=-1.0), one.record.started))


def has_model(candidate: ChosenRun) -> bool:
    """Whether there is a model: not for an evaluation of a file of predictions."""
    return candidate.stored.settings.get("predictions") is None


def promoted_run(candidate: ChosenRun) -> str:
    """The run that becomes a version: the training that the candidate evaluated, else the candidate."""
    record = candidate.record
    if not record.experiment_id:
        raise SettingError(f"runs={record.run_id}: only runs of the MLflow store can be promoted")
    if record.tags.get("retinaflow.command") != "evaluate" or not has_model(candidate):
        return record.run_id
    trained = record.tags.get("retinaflow.model_run")
    if trained is None and "retinaflow.model_digest" in record.tags:
        # A checkpoint file was evaluated.
        trained = run_of_weights(record.tags["retinaflow.model_digest"])
    if trained is None:
        evaluated = record.tags.get("retinaflow.evaluated", "nothing that it names")
        raise SettingError(
            f"runs={record.run_id}: the run has evaluated {evaluated}, of which {store.uri()} has no training; name a "
            "run that has logged a model, or an evaluation of such a run or of a registered model"
        )
    return trained


def decide(config: PromoteConfig, candidate: ChosenRun, run_id: str, present: tuple[str, str] | None) -> Decision:
    """The decision. Raises SettingError when the two cannot be compared, unless ``force`` promotes without a test."""
    name = f"{candidate.record.name} ({run_id})"
    score = f"mAP {_mean_ap(candidate.stored):.4f} on {len(candidate.stored.matches.image_ids):,} images"
    tags = {
        "retinaflow.mAP": f"{_mean_ap(candidate.stored):.6f}",
        "retinaflow.evaluated_data": candidate.stored.ground_truth.of_all,
    }
    if present is None:
        reason = f"{name} is the first {config.alias} of {config.register_as}: {score}."
        return Decision(True, reason, tags | {"retinaflow.reason": "first"})
    version, champion_run = present
    tags |= {"retinaflow.replaces": version}
    if champion_run == run_id:
        reason = f"{name} is the {config.alias} of {config.register_as} already, as version {version}."
        return Decision(False, reason, tags | {"retinaflow.reason": "already champion"})
    if config.force:
        reason = f"{name} replaces version {version} by force=true, without a test: {score}."
        return Decision(True, reason, tags | {"retinaflow.reason": "force"})
    return _tested(config, candidate, name, version, champion_matches(champion_run, candidate.stored), tags)


def champion_matches(run_id: str, candidate: StoredMatches) -> StoredMatches:
    """The champion's matches on the candidate's data: those of its training, or of an ``evaluate`` of it."""
    own = read_matches(run_id)
    if own.ground_truth == candidate.ground_truth:
        return own
    evaluated = {"tags.`retinaflow.command`": "evaluate", "attributes.status": "FINISHED"}
    models = [{"tags.`retinaflow.model_digest`": digest} for digest in weights_of_run(run_id)]
    for model in [{"tags.`retinaflow.model_run`": run_id}, *models]:
        for record in store.find_runs(store.filter_of(evaluated | model)):
            stored = read_matches(record.run_id)
            if stored.ground_truth == candidate.ground_truth:
                return stored
    return own


def _tested(
    config: PromoteConfig,
    candidate: ChosenRun,
    name: str,
    version: str,
    champion: StoredMatches,
    tags: dict[str, str],
) -> Decision:
    sides = [Side("A", f"version {version}", (champion,)), Side("B", candidate.record.name, (candidate.stored,))]
    comparison = compare_runs(sides, Resampling(config.bootstrap, config.confidence, config.seed))
    row = comparison.group("mAP")
    if not row:
        raise SettingError(
            f"{name} cannot be tested against version {version}: none of the {len(comparison.classes)} classes that "
            f"both have has ground truth on the {comparison.num_images:,} images; evaluate both on annotated images, "
            "or promote it without a test by force=true"
        )
    low, high = row["B_difference_low"], row["B_difference_high"]
    better = bool(low > 0)
    figures = (
        f"mAP {row['B']:.4f} against {row['A']:.4f} of version {version}, difference {row['B_difference']:+.4f} "
        f"({config.confidence:.0%} interval {low:+.4f} to {high:+.4f}, paired bootstrap over "
        f"{comparison.num_images:,} images, {len(comparison.classes)} classes"
        + (f", {len(comparison.left_out)} classes not shared left out)" if comparison.left_out else ")")
    )
    tags |= {
        "retinaflow.reason": "better" if better else "not surely better",
        "retinaflow.difference": f"{row['B_difference']:.6f}",
        "retinaflow.difference_low": f"{low:.6f}",
        "retinaflow.difference_high": f"{high:.6f}",
    }
    if better:
        return Decision(True, f"{name} beats version {version}: {figures}.", tags)
    reason = f"{name} is not significantly better than version {version}, which stays {config.alias}: {figures}."
    return Decision(False, f"{reason} force=true promotes it without a test.", tags)


def _mean_ap(stored: StoredMatches) -> float:
    return mean_of_classes(average_precision(stored.matches))
