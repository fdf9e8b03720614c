"""Is the best trial better than the defaults? Both are trained again on fresh seeds and compared seed by seed.

The best of many trials looks better than it is, as it was chosen for its value; only seeds that took no part in the
choice can show whether it is. These trainings are trials of a second study, ``STUDY-confirm``, so that all workers
share them and a killed one loses nothing. The best trial counts as better when the paired interval over the seeds lies
above 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import optuna
import pandas as pd
from optuna.trial import FrozenTrial, TrialState

from retinaflow.progress import report
from retinaflow.runs.datasets import training_datasets
from retinaflow.search.runs import TrialRun, trial_name
from retinaflow.search.sampler_and_pruner import quiet, sampler_of
from retinaflow.search.storage import as_optuna
from retinaflow.search.study import Search
from retinaflow.search.training import log_trial, train_once
from retinaflow.search.trial import METRICS, best_trial, counts, trial_run
from retinaflow.settings.commands import TrainConfig
from retinaflow.statistics.intervals import paired_t_interval

DEFAULTS = "defaults"
ARM, SEED = "arm", "seed"
"""User attributes of a trial here: which settings (``defaults`` or ``trial-0007``), and which seed."""
FIRST_FRESH_SEED = 1000
"""Added to the seed of the search."""


class Confirmation:
    """The trainings of the comparison; a stage of :func:`retinaflow.search.workers.work`."""

    def __init__(self, search: Search) -> None:
        self._search = search
        self.settings = arms(search)
        name = f"{search.config.study}-confirm"
        self.study = optuna.create_study(
            study_name=name,
            storage=as_optuna(search.storage),
            direction="maximize",
            sampler=sampler_of("random", seed=0, trial=0, trials=1),
            load_if_exists=True,
        )

    @property
    def seeds(self) -> list[int]:
        """The fresh seeds."""
        first = self._search.config.seed + FIRST_FRESH_SEED
        return list(range(first, first + self._search.config.confirm_seeds))

    def take(self, trials: Sequence[FrozenTrial]) -> optuna.Trial | None:
        """The first training that has no trial yet."""
        there = {(trial.user_attrs.get(ARM), trial.user_attrs.get(SEED)) for trial in trials if counts(trial)}
        missing = [(arm, seed) for seed in self.seeds for arm in self.settings if (arm, seed) not in there]
        if not missing:
            return None
        with quiet():
            trial = self.study.ask()
        trial.set_user_attr(ARM, missing[0][0])
        trial.set_user_attr(SEED, missing[0][1])
        return trial

    def run(self, trial: optuna.Trial) -> float:
        """Train with the settings and the seed of a trial."""
        search = self._search
        arm, seed = trial.user_attrs[ARM], trial.user_attrs[SEED]
        settings = self.settings[arm].model_copy(update={"seed": seed})
        name = f"confirm-{arm}-seed-{seed}"
        with trial_run(trial, search.runs, name=name, heartbeat=search.config.heartbeat) as run:
            run.log_params(settings.model_dump())
            run.log_datasets(training_datasets(settings.model_dump(), search.data))
            watched = TrialRun(run, curves=True, evaluated=lambda metrics: None)
            evaluation = train_once(settings, search.data, watched, folder=search.objective.folder, stop=search.stop)
            log_trial(run, [evaluation], evaluation.metrics)
            trial.set_user_attr(METRICS, dict(evaluation.metrics))
            return search.metrics.values(evaluation.metrics)[0]

    def log_progress(self) -> None:
        """Nothing: the table at the end holds all results."""


def arms(search: Search) -> Mapping[str, TrainConfig]:
    """The two settings to compare by name; empty when the defaults are the best."""
    best = best_trial(search.study)
    if best is None:
        return {}
    chosen = search.space.with_values(best.params)
    return {} if chosen == search.space.base else {DEFAULTS: search.space.base, trial_name(best.number): chosen}


def compare(search: Search) -> pd.DataFrame:
    """One row per group of classes: means over the seeds, their paired difference and its 95% interval. Empty when
    there is nothing to compare."""
    confirmation = Confirmation(search)
    if not confirmation.settings:
        return pd.DataFrame()
    _, best = confirmation.settings
    found: dict[tuple[str, int], dict[str, float]] = {
        (trial.user_attrs[ARM], trial.user_attrs[SEED]): trial.user_attrs[METRICS]
        for trial in confirmation.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    }
    seeds = [seed for seed in confirmation.seeds if (DEFAULTS, seed) in found and (best, seed) in found]
    if not seeds:
        return pd.DataFrame()
    rows = []
    for name in found[best, seeds[0]]:
        before, after = (np.array([found[arm, seed][name] for seed in seeds]) for arm in (DEFAULTS, best))
        interval = paired_t_interval(after - before)
        rows.append(
            {
                "group": name.removeprefix("val/"),
                "seeds": len(seeds),
                DEFAULTS: before.mean(),
                best: after.mean(),
                "difference": interval.estimate,
                "low": interval.low,
                "high": interval.high,
            }
        )
    return pd.DataFrame(rows)


def log_comparison(search: Search) -> None:
    """Log ``confirmation.csv`` and its conclusion to the parent run, and print both."""
    run, table = search.runs.parent, compare(search)
    result = conclusion(table, search)
    run.log_csv(table, "confirmation.csv")
    run.set_tags({"retinaflow.verdict": result})
    report(f"{table.to_string(index=False, float_format=lambda value: f'{value:.4f}')}\n{result}")


def conclusion(table: pd.DataFrame, search: Search) -> str:
    """The result of the comparison for the first objective, as a sentence."""
    name = search.metrics.names[0].removeprefix("val/")
    if table.empty or name not in set(table["group"]):
        return "not compared with the defaults on fresh seeds"
    row = table.set_index("group").loc[name]
    difference, seeds = f"{name} {row['difference']:+.4f}", f"{row['seeds']:.0f} fresh seeds"
    if row["seeds"] < 2:
        return f"not shown to be better than the defaults: {difference}, and one seed has no interval"
    shown = f"{difference} ({row['low']:+.4f} to {row['high']:+.4f}) over {seeds}"
    return (
        f"better than the defaults: {shown}" if row["low"] > 0 else f"not shown to be better than the defaults: {shown}"
    )
