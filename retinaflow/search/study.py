"""A study in its storage: made or resumed, which of its trials count, samplers and pruners by name.

A trial counts as done when it is complete, pruned, or failed by an error of its own, which is then its ``reason``. A
trial that failed without a reason is *lost*: its process was killed or stopped. A lost trial is run again with the same
parameters, as a new trial, and does not count itself.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.trial import FrozenTrial, TrialState

from retinaflow.search.goal import Goal
from retinaflow.search.runs import SearchRuns
from retinaflow.search.storage import PatientStorage
from retinaflow.settings.commands import SearchConfig, TrainConfig

IDENTITY, PARENT = "retinaflow", "retinaflow_run"
"""User attributes of a study: what makes its trials comparable, and the run that holds their runs."""
WORKER, REASON, METRICS, RUN_ID, SECONDS, OVERHEAD, RETRY_OF, DEATHS = (
    *("worker", "reason", "metrics", "run_id", "seconds", "overhead_seconds", "retry_of", "deaths"),
)
"""User attributes of a trial."""
RANDOM_SHARE = 3
"""One trial of so many is drawn at random before the sampler learns from them, but not more than ten."""
MAX_DEATHS = 3
"""A set of parameters that so many workers died on is given up."""


def open_study(storage: PatientStorage, config: SearchConfig, goal: Goal, identity: Mapping[str, Any]) -> optuna.Study:
    """The study of that name, made if it is new. To be called under :meth:`PatientStorage.claiming`.

    Raises ValueError with the differences when it was made with other data, space, goal or settings.
    """
    study = optuna.create_study(
        study_name=config.study,
        storage=storage,
        directions=["maximize"] * len(goal.names),
        pruner=pruner_of(config, goal),
        load_if_exists=True,
    )
    attributes = study.user_attrs
    if IDENTITY in attributes:
        found = list(differences(attributes[IDENTITY], identity))
        if found:
            raise ValueError(
                f"study {config.study} holds trials that cannot be compared with these; choose another name as study=, "
                "or give what it was made with:\n" + "\n".join(found)
            )
    elif study.get_trials(deepcopy=False) or len(study.directions) != len(goal.names):
        raise ValueError(f"study {config.study} was not made by retinaflow; choose another name as study=")
    else:
        with quiet():
            study.set_metric_names([name.removeprefix("val/") for name in goal.names])
        study.set_user_attr(IDENTITY, dict(identity))
    return study


def differences(made_with: Mapping[str, Any], given: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """One line per entry that is not the same in two nested documents."""
    for name in sorted({*made_with, *given}):
        old, new = made_with.get(name, "not in it"), given.get(name, "not in it")
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from differences(old, new, f"{prefix}{name}: ")
        elif old != new:
            yield f"  {prefix}{name}: the study has {old}, now {new}"


def pruner_of(config: SearchConfig, goal: Goal) -> optuna.pruners.BasePruner:
    """The pruner of the settings. Steps are evaluations. Raises ValueError for one with two objectives."""
    name = config.pruner
    if name != "none" and not goal.is_single:
        raise ValueError(f"trials with two objectives cannot be pruned, but got pruner={name}; say pruner=none")
    if evaluations(config) < 2:
        return optuna.pruners.NopPruner()
    if name == "median":
        # Steps count from 1. A trial that draws evenly at first is not to be evaluated by that part.
        return optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=1 + evaluations(config) // 3)
    if name == "hyperband":
        return optuna.pruners.HyperbandPruner(min_resource=1, max_resource=evaluations(config), reduction_factor=3)
    return optuna.pruners.NopPruner()


def evaluations(config: TrainConfig) -> int:
    """How often a training of these settings is evaluated."""
    return math.ceil(config.epochs / config.eval_every)


def sampler_of(name: str, *, seed: int, trial: int, trials: int) -> optuna.samplers.BaseSampler:
    """The sampler for one trial, its randomness a function of the seed and the trial alone, so that neither several
    workers nor a search that is resumed draw the same values twice. ``trials``: of the study in all."""
    number = (seed * 1_000_003 + trial) % 2**32
    # Optuna's 10 would make a search of a dozen trials a random one.
    startup = max(1, min(10, trials // RANDOM_SHARE))
    with quiet():
        if name == "random":
            return optuna.samplers.RandomSampler(seed=number)
        if name == "gp":
            return optuna.samplers.GPSampler(seed=number, n_startup_trials=startup)
        if name == "cmaes":
            return optuna.samplers.CmaEsSampler(seed=number, warn_independent_sampling=False)
        if name == "nsgaii":
            return optuna.samplers.NSGAIISampler(seed=number)
        # group: settings that apply in some trials only are sampled together with those they come with.
        return optuna.samplers.TPESampler(seed=number, n_startup_trials=startup, group=True)


def is_lost(trial: FrozenTrial) -> bool:
    """Whether the process of a trial ended before the trial did."""
    return trial.state == TrialState.FAIL and REASON not in trial.user_attrs


def counts(trial: FrozenTrial) -> bool:
    """Whether a trial is one of those asked for: done, running or waiting, but not lost."""
    return not is_lost(trial)


def is_done(trial: FrozenTrial) -> bool:
    """Whether a trial counts and is over."""
    return trial.state.is_finished() and not is_lost(trial)


def run_again(study: optuna.Study, trial: FrozenTrial, *, died: bool) -> None:
    """Queue the parameters of a lost trial, unless too many workers died on them (a new trial then takes its place)."""
    deaths = int(trial.user_attrs.get(DEATHS, 0)) + died
    if deaths < MAX_DEATHS:
        study.enqueue_trial(trial.params, user_attrs={RETRY_OF: trial.number, DEATHS: deaths})


class LostTrials:
    """Finds trials whose process is gone; to be called under the claim."""

    def __init__(self, storage: PatientStorage, runs: SearchRuns) -> None:
        self._storage, self._runs = storage, runs
        self._unbegun: dict[int, float] = {}

    def when_stale(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Called by Optuna for a trial whose heartbeat has stopped, once it is marked as failed."""
        reason = f"its worker {trial.user_attrs.get(WORKER, '')} gave no sign of life"
        run_again(study, trial, died=True)
        self._runs.end_lost(study=study.study_name, trial=trial.number, reason=reason)
        print(f"trial {trial.number}: {reason}; it is run again", flush=True)

    def clear(self, study: optuna.Study) -> None:
        """Fail and queue again what is lost."""
        with quiet():
            optuna.storages.fail_stale_trials(study)
        now, unbegun = time.monotonic(), {}
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if WORKER not in trial.user_attrs:
                # Killed between asking for the trial and its first sign of life.
                unbegun[trial.number] = self._unbegun.get(trial.number, now)
                if now - unbegun[trial.number] > self._storage.grace_seconds:
                    study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
                    self.when_stale(study, trial)
        self._unbegun = unbegun


def best_trial(study: optuna.Study, goal: Goal) -> FrozenTrial | None:
    """The trial to use: the best that keeps the floor; with two objectives the one of the Pareto front with the
    greatest mean of both. None when no complete trial keeps the floor."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    allowed = [trial for trial in complete if keeps_floor(trial)]
    return max(allowed, key=lambda trial: (sum(trial.values) / len(goal.names), -trial.number), default=None)


def are_alike(study: optuna.Study) -> bool:
    """Whether several trials are complete and all have the same values."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return len(complete) > 1 and len({tuple(trial.values) for trial in complete}) == 1


def keeps_floor(trial: FrozenTrial) -> bool:
    """Whether a trial meets all its constraints."""
    return all(value <= 0 for value in trial.constraints.values())


def states_of(trials: Sequence[FrozenTrial]) -> str:
    """How many trials are in which state, in words."""
    words = [("lost" if is_lost(trial) else trial.state.name.lower()) for trial in trials]
    return ", ".join(f"{words.count(word)} {word}" for word in dict.fromkeys(sorted(words))) or "none"


@contextmanager
def quiet() -> Iterator[None]:
    """Without Optuna's warnings about what it calls experimental, and about heartbeats outside its own loop, where
    :class:`retinaflow.search.objective.Heartbeat` sends them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Heartbeat of storage")
        warnings.simplefilter("ignore", ExperimentalWarning)
        yield
