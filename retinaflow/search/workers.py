"""Workers: take a trial, run it, report its value to the study, until the requested number of trials is done.

A worker takes a trial in a transaction of the study, so that all workers of all machines together run exactly the
requested number. In it, it first queues the trials of dead processes again. When no trial is left to take, it waits for
those that other workers run, as one of these may have to be run again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from retinaflow.errors import Interrupted, StoreError, TrainingError
from retinaflow.progress import report
from retinaflow.search.confirmation import ARM, SEED
from retinaflow.search.stages import Stage
from retinaflow.search.study import Search
from retinaflow.search.trial import (
    REASON,
    TAKEN_OVER,
    WORKER,
    LostTrials,
    beat,
    best_trial,
    is_done,
    is_lost,
    queue_again,
    worker_name,
)

POLL_SECONDS = 1.0
FAILURES_IN_A_ROW = 3
"""After so many failed trials in a row the cause lies outside of the trials, and the search ends. A training that
diverges does not count: the settings of its trial are the cause."""


def work(search: Search, stage: Stage, update: Callable[[], None] = lambda: None) -> None:
    """Run trials until none is left, neither to take nor running elsewhere. ``update`` is called after each.

    Raises Interrupted on request, after the current trial has been queued again, and the error of the last trial when
    several failed in a row.
    """
    failed, lost = 0, LostTrials(search.storage, heartbeat=search.config.heartbeat)
    while True:
        search.stop.check()
        trial, others = _take(search, stage, lost)
        if trial is None:
            update()
            if not others:
                return
            time.sleep(POLL_SECONDS)
            continue
        error = _run(search, stage, trial)
        update()
        if isinstance(error, TrainingError):
            continue
        failed = 0 if error is None else failed + 1
        if error is not None and failed == FAILURES_IN_A_ROW:
            report(f"{failed} trials failed in a row; the search ends with the error of the last")
            raise error


def _take(search: Search, stage: Stage, lost: LostTrials) -> tuple[optuna.Trial | None, bool]:
    """A trial to run, if there is one, and whether others are running."""
    study = stage.study

    def take() -> tuple[optuna.Trial | None, list[FrozenTrial], bool]:
        dead = lost.among(study.get_trials(deepcopy=False))
        for other in dead:
            study.tell(other.number, state=TrialState.FAIL)
            queue_again(study, other, died=True)
        trials = study.get_trials(deepcopy=False)
        trial = stage.take(trials)
        if trial is not None:
            trial.set_user_attr(WORKER, worker_name())
            beat(trial)
        return trial, dead, any(other.state == TrialState.RUNNING for other in trials)

    trial, dead, others = search.storage.transaction(study.study_name, take)
    for other in dead:
        reason = f"its worker {other.user_attrs.get(WORKER, '')} sent no heartbeat"
        search.runs.end_lost(study=study.study_name, trial=other.number, reason=reason)
        report(f"trial {other.number}: {reason}; it is queued again")
    return trial, others


def _run(search: Search, stage: Stage, trial: optuna.Trial) -> Exception | None:
    """Run a trial and report to the study how it ended; returns the error that it failed with."""
    study = stage.study

    def end(values: float | Sequence[float] | None = None, *, state: TrialState | None = None) -> None:
        search.storage.transaction(study.study_name, lambda: _tell(study, trial, values, state))

    try:
        end(stage.run(trial))
    except optuna.TrialPruned:
        end(state=TrialState.PRUNED)
    except UpdateFinishedTrialError:
        report(f"trial {trial.number}: {TAKEN_OVER}; its result is dropped")
    except (Interrupted, KeyboardInterrupt, StoreError):
        with suppress(StoreError):
            search.storage.transaction(study.study_name, lambda: _return(study, trial))
        raise
    except Exception as error:
        end(state=TrialState.FAIL)
        return error
    return None


def _tell(
    study: optuna.Study, trial: optuna.Trial, values: float | Sequence[float] | None, state: TrialState | None
) -> None:
    # An earlier attempt may have stored it.
    study.tell(trial, values, state=state, skip_if_finished=True)


def _return(study: optuna.Study, trial: optuna.Trial) -> None:
    """Queue the parameters of a trial again that was not finished."""
    _tell(study, trial, None, TrialState.FAIL)
    queue_again(study, study.get_trials(deepcopy=False)[trial.number], died=False)


class Progress:
    """Prints a line for every trial that has ended since the last update, and logs the best so far."""

    def __init__(self, search: Search, stage: Stage) -> None:
        self._metrics, self._stage, self._study = search.metrics, stage, stage.study
        self._known = {trial.number for trial in self._study.get_trials(deepcopy=False) if trial.state.is_finished()}
        self._logged = -1

    def update(self) -> None:
        """Print and log what is new."""
        trials = self._study.get_trials(deepcopy=False)
        fresh = [trial for trial in trials if trial.state.is_finished() and trial.number not in self._known]
        for trial in fresh:
            self._known.add(trial.number)
            report(self._line(trial, done=sum(map(is_done, trials))))
        if self._logged != sum(map(is_done, trials)):
            self._stage.log_progress()
            self._logged = sum(map(is_done, trials))

    def _line(self, trial: FrozenTrial, *, done: int) -> str:
        attributes = trial.user_attrs
        outcome = "stopped" if is_lost(trial) else trial.state.name.lower()
        if trial.state == TrialState.COMPLETE:
            named = zip(self._metrics.names, trial.values, strict=False)
            outcome = ", ".join(f"{name} {value:.4f}" for name, value in named)
        elif REASON in attributes:
            outcome += f": {attributes[REASON]}"
        if ARM in attributes:
            return f"{attributes[ARM]}, seed {attributes[SEED]}: {outcome}"
        best = best_trial(self._study)
        shown = "" if best is None else f"; best {' '.join(f'{v:.4f}' for v in best.values)} (trial {best.number})"
        return f"trial {trial.number} {outcome}{shown}; {done} done"
