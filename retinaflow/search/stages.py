"""What a search works through: first its trials, then the trainings that confirm its result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import optuna
from optuna.trial import FrozenTrial, TrialState

from retinaflow.search.confirmation import Confirmation
from retinaflow.search.sampler_and_pruner import quiet, sampler_of
from retinaflow.search.study import Search
from retinaflow.search.trial import METRICS, best_trial, counts, is_done


class Stage(Protocol):
    """A kind of work on a study: the trials of the search, or the trainings that confirm its result."""

    @property
    def study(self) -> optuna.Study:
        """The study that holds its trials."""

    def take(self, trials: Sequence[FrozenTrial]) -> optuna.Trial | None:
        """The next trial, now RUNNING, or None when none is left; a part of a transaction."""

    def run(self, trial: optuna.Trial) -> float | Sequence[float]:
        """Run a trial; returns its values."""

    def log_progress(self) -> None:
        """Log the state of the study; called in the process that opened the search."""


@dataclass(frozen=True)
class Trials:
    """The trials of a search."""

    search: Search

    @property
    def study(self) -> optuna.Study:
        return self.search.study

    def take(self, trials: Sequence[FrozenTrial]) -> optuna.Trial | None:
        """A queued trial, or a new one while fewer count than requested. The first ones are :meth:`Space.starts`."""
        waiting = any(trial.state == TrialState.WAITING for trial in trials)
        enough = sum(map(counts, trials)) >= self.search.config.trials or gained_nothing(self.search, trials)
        if enough and not waiting:
            return None
        config = self.search.config
        if not trials:
            for start in self.search.space.starts()[: config.trials]:
                self.study.enqueue_trial(start)
        self.study.sampler = sampler_of(config.sampler, seed=config.seed, trial=len(trials), trials=config.trials)
        with quiet():
            return self.study.ask()

    def run(self, trial: optuna.Trial) -> float | Sequence[float]:
        return self.search.objective(trial)

    def log_progress(self) -> None:
        """The metrics of the best trial so far, under the names that they have in trials, with one point per trial."""
        search = self.search
        point = search.storage.transaction(self.study.study_name, self._next_point)
        if point is not None:
            search.runs.parent.log_metrics(point, step=int(point["search/trials"]))

    def _next_point(self) -> dict[str, float] | None:
        """What no process has logged yet, marked as logged."""
        done = sum(map(is_done, self.study.get_trials(deepcopy=False)))
        best = best_trial(self.study)
        if best is None or self.study.user_attrs.get("retinaflow_announced") == done:
            return None
        self.study.set_user_attr("retinaflow_announced", done)
        metrics = dict(best.user_attrs.get(METRICS, {}))
        metrics |= {f"best/{name.removeprefix('val/')}": value for name, value in metrics.items()}
        values = {f"search/objective{'' if n == 0 else f'_{n + 1}'}": value for n, value in enumerate(best.values)}
        return {**metrics, **values, "search/trials": done}


def stage_of(name: str, search: Search) -> Stage:
    """The stage of that name: ``trials`` or ``confirmation``."""
    return Trials(search) if name == "trials" else Confirmation(search)


def gained_nothing(search: Search, trials: Sequence[FrozenTrial]) -> bool:
    """Whether the last ``search_patience`` trials brought no better one. The first trials, which are no choice of the
    sampler, do not count, nor do lost ones."""
    patience, best = search.config.search_patience, best_trial(search.study)
    if not patience or best is None:
        return False
    last = max(best.number, len(search.space.starts()) - 1)
    if not search.metrics.is_single:
        last = max(last, *(trial.number for trial in search.study.best_trials))
    return sum(is_done(trial) and trial.number > last for trial in trials) >= patience
