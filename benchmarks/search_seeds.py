"""What ends with a trial that is worse after its first seeds: trainings saved, and whether the best trial is lost.

    python benchmarks/search_seeds.py --trials 14 --seeds 3 --folder seeds data=demo epochs=8

Runs a search (settings as NAME=VALUE) that trains every trial with all seeds; the same command resumes it. Then replays
its trials in many orders, the defaults first, as the search would have run them, and prints the fraction of trainings
saved, and in how many orders the trial with the highest mean over all seeds ended early.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from optuna.trial import TrialState

from retinaflow.commands import search
from retinaflow.search.sampler_and_pruner import quiet
from retinaflow.search.seed_test import LEVEL, SeedScores, p_value
from retinaflow.search.study import open_search
from retinaflow.settings.commands import SearchConfig
from retinaflow.settings.resolve import resolve

ORDERS = 200


def replay(trials: Sequence[SeedScores], *, seeds: int) -> list[int]:
    """Seeds that each trial is trained with, when the trials are run in this order."""
    done: list[SeedScores] = []
    for trial in trials:
        best = max((other for other in done if len(other.values) == seeds), key=mean, default=None)
        for count in range(1, seeds + 1):
            now = replace(trial, values=trial.values[:count], resampled=trial.resampled[:count])
            everyone = [other.values for other in (*done, now)]
            if best is not None and count < seeds and p_value(now, best, everyone) <= LEVEL / (seeds - 1):
                break
        done.append(now)
    return [len(trial.values) for trial in done]


def mean(scores: SeedScores) -> float:
    return float(scores.values.mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=14)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("settings", nargs="*")
    given = parser.parse_args()
    fixed = {"track": False, "confirm_seeds": 0, "pruner": "none", "output": str(given.folder)}
    more = dict(setting.split("=", 1) for setting in given.settings)
    config = resolve(SearchConfig, {**fixed, "trials": given.trials, "seeds": given.seeds, **more})
    search.run(config)
    with quiet(), open_search(config) as opened:
        complete = opened.study.get_trials(states=(TrialState.COMPLETE,))
    trials = [SeedScores.of(trial) for trial in complete]
    winner = max(range(len(trials)), key=lambda number: mean(trials[number]))
    rng, trained, lost = np.random.default_rng(0), [], 0
    for order in ([0, *(1 + rng.permutation(len(trials) - 1)).tolist()] for _ in range(ORDERS)):
        counts = replay([trials[number] for number in order], seeds=given.seeds)
        trained.append(sum(counts))
        lost += counts[order.index(winner)] < given.seeds
    everything = len(trials) * given.seeds
    spread = np.sqrt(np.mean([trial.values.var(ddof=1) for trial in trials]))
    print(
        f"{len(trials)} trials of {given.seeds} seeds; {config.objective[0]} {min(map(mean, trials)):.4f} to "
        f"{max(map(mean, trials)):.4f}, standard deviation over seeds {spread:.4f}\n"
        f"{ORDERS} orders: {everything} trainings become {np.mean(trained):.1f} ({min(trained)} to {max(trained)}), "
        f"{1 - np.mean(trained) / everything:.0%} saved; the best trial ended early in {lost}"
    )


if __name__ == "__main__":
    main()
