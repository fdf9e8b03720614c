"""Optuna's samplers and pruners by the names that the settings ``sampler`` and ``pruner`` have."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import optuna
from optuna.exceptions import ExperimentalWarning

from retinaflow.errors import SettingError
from retinaflow.settings.commands import SearchConfig, TrainConfig

TRIALS_PER_RANDOM_TRIAL = 3
"""One trial in so many has random settings before the sampler uses earlier trials, but at most ten trials do."""


def sampler_of(name: str, *, seed: int, trial: int, trials: int) -> optuna.samplers.BaseSampler:
    """The sampler for one trial. ``trials``: number of trials of the study.

    Its randomness is a function of the seed and the trial alone, so that neither several workers nor a resumed search
    sample the same values twice.
    """
    number = (seed * 1_000_003 + trial) % 2**32
    # With Optuna's 10 a search of a dozen trials would be a random search.
    startup = max(1, min(10, trials // TRIALS_PER_RANDOM_TRIAL))
    with quiet():
        if name == "random":
            return optuna.samplers.RandomSampler(seed=number)
        if name == "gp":
            return optuna.samplers.GPSampler(seed=number, n_startup_trials=startup)
        if name == "cmaes":
            return optuna.samplers.CmaEsSampler(seed=number, warn_independent_sampling=False)
        if name == "nsgaii":
            return optuna.samplers.NSGAIISampler(seed=number)
        # group: settings that apply in some trials only are sampled together with those that they depend on.
        return optuna.samplers.TPESampler(seed=number, n_startup_trials=startup, group=True)


def pruner_of(config: SearchConfig) -> optuna.pruners.BasePruner:
    """The pruner of a search. Its steps are evaluations. Raises SettingError for one with two objectives."""
    name = config.pruner
    if name != "none" and len(config.objective) > 1:
        raise SettingError(f"pruner must be none with two objectives, but got pruner={name}")
    if evaluations(config) < 2:
        return optuna.pruners.NopPruner()
    if name == "median":
        # Steps count from 1. A trial that samples uniformly at first is not pruned within that part.
        return optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=1 + evaluations(config) // 3)
    if name == "hyperband":
        return optuna.pruners.HyperbandPruner(min_resource=1, max_resource=evaluations(config), reduction_factor=3)
    return optuna.pruners.NopPruner()


def evaluations(config: TrainConfig) -> int:
    """How often a training with these settings is evaluated."""
    return math.ceil(config.epochs / config.eval_every)


@contextmanager
def quiet() -> Iterator[None]:
    """Without Optuna's log lines, and without its warnings about experimental features."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)
