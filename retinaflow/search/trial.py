"""A trial: its state, its user attributes, its run with heartbeats, and what happens when its process ends early.

A trial counts when it is waiting, running, complete, pruned, or failed by an error of its own, which is then its
``reason``. A trial that failed without a reason is *lost*: its process was killed or stopped, or its connection to the
database broke. A lost trial does not count; its parameters are queued again as a new trial.
"""

from __future__ import annotations

import os
import platform
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Self

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from retinaflow.errors import Interrupted
from retinaflow.progress import report
from retinaflow.runs.run import Run
from retinaflow.search.runs import SearchRuns
from retinaflow.search.sampler_and_pruner import quiet
from retinaflow.search.storage import StudyStorage, is_connection_error

WORKER, REASON, METRICS, RUN_ID, SECONDS, OVERHEAD, RETRY_OF, DEATHS = (
    *("worker", "reason", "metrics", "run_id", "seconds", "overhead_seconds", "retry_of", "deaths"),
)
"""User attributes of a trial."""
MAX_DEATHS = 3
"""Parameters are not queued again once so many workers died while they ran them."""
TAKEN_OVER = "another worker found it without heartbeats and queued it again"


# States


def is_lost(trial: FrozenTrial) -> bool:
    """Whether the process of a trial ended before the trial did."""
    return trial.state == TrialState.FAIL and REASON not in trial.user_attrs


def counts(trial: FrozenTrial) -> bool:
    """Whether a trial is one of the requested number."""
    return not is_lost(trial)


def is_done(trial: FrozenTrial) -> bool:
    """Whether a trial counts and has ended."""
    return trial.state.is_finished() and not is_lost(trial)


def state_of(trial: FrozenTrial) -> str:
    """The state as it is shown: ``lost``, or Optuna's in lower case."""
    return "lost" if is_lost(trial) else trial.state.name.lower()


def states_of(trials: Sequence[FrozenTrial]) -> str:
    """The number of trials in each state, as text."""
    states = [state_of(trial) for trial in trials]
    return ", ".join(f"{states.count(state)} {state}" for state in sorted(set(states))) or "none"


def meets_floor(trial: FrozenTrial) -> bool:
    """Whether a trial meets all its constraints."""
    return all(value <= 0 for value in trial.constraints.values())


def best_trial(study: optuna.Study) -> FrozenTrial | None:
    """The best complete trial that meets the floor; with two objectives that with the greatest mean of both, which is
    on the Pareto front. None when there is none."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    allowed = [trial for trial in complete if meets_floor(trial)]
    return max(allowed, key=lambda trial: (sum(trial.values), -trial.number), default=None)


def all_equal(study: optuna.Study) -> bool:
    """Whether several trials are complete and all have the same values."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return len(complete) > 1 and len({tuple(trial.values) for trial in complete}) == 1


# Lost trials


def queue_again(study: optuna.Study, trial: FrozenTrial, *, died: bool) -> None:
    """Queue the parameters of a lost trial, unless too many workers died while they ran them; then a new trial
    replaces it. To be called with the lock of the study."""
    deaths = int(trial.user_attrs.get(DEATHS, 0)) + died
    queued = any(other.user_attrs.get(RETRY_OF) == trial.number for other in study.get_trials(deepcopy=False))
    if deaths < MAX_DEATHS and not queued:
        study.enqueue_trial(trial.params, user_attrs={RETRY_OF: trial.number, DEATHS: deaths})


class LostTrials:
    """Finds trials whose process has ended, and queues them again."""

    def __init__(self, storage: StudyStorage, runs: SearchRuns) -> None:
        self._storage, self._runs = storage, runs
        self._without_worker: dict[int, float] = {}

    def check(self, study: optuna.Study) -> None:
        """Fail and queue again what is lost. To be called with the lock of the study."""
        if self._storage.was_away:
            return
        running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        with quiet():
            optuna.storages.fail_stale_trials(study)
        self._fail_without_worker(study, running)
        for number in (trial.number for trial in running):
            trial = study.get_trials(deepcopy=False)[number]
            if is_lost(trial):
                self._end(study, trial)

    def _fail_without_worker(self, study: optuna.Study, running: Sequence[FrozenTrial]) -> None:
        """Fail trials whose process ended between ``ask`` and the first heartbeat, which Optuna does not find."""
        now, since = time.monotonic(), self._without_worker
        numbers = [trial.number for trial in running if WORKER not in trial.user_attrs]
        self._without_worker = {number: since.get(number, now) for number in numbers}
        for number, seen in self._without_worker.items():
            if now - seen > self._storage.grace_seconds:
                study.tell(number, state=TrialState.FAIL, skip_if_finished=True)

    def _end(self, study: optuna.Study, trial: FrozenTrial) -> None:
        reason = f"its worker {trial.user_attrs.get(WORKER, '')} sent no heartbeat"
        queue_again(study, trial, died=True)
        self._runs.end_lost(study=study.study_name, trial=trial.number, reason=reason)
        report(f"trial {trial.number}: {reason}; it is queued again")


# The run of a trial


def worker_name() -> str:
    """Machine and process of a worker."""
    return f"{platform.node()}:{os.getpid()}"


@contextmanager
def trial_run(trial: optuna.Trial, runs: SearchRuns, storage: StudyStorage, *, name: str) -> Iterator[Run]:
    """The run of a trial, with heartbeats until it ends."""
    with Heartbeat(storage, trial):
        if WORKER not in trial.user_attrs:
            trial.set_user_attr(WORKER, worker_name())
        run = runs.start(name, study=trial.study.study_name, trial=trial.number)
        trial.set_user_attr(RUN_ID, run.run_id)
        with _ending(runs, run, trial):
            yield run
            if not storage.retry(lambda: _is_running(trial)):
                raise UpdateFinishedTrialError(f"trial {trial.number}: {TAKEN_OVER}")


@contextmanager
def _ending(runs: SearchRuns, run: Run, trial: optuna.Trial) -> Iterator[None]:
    """End the run of a trial according to how the block ends; an error of the trial's own becomes its ``reason``."""
    try:
        yield
    except optuna.TrialPruned as error:
        trial.set_user_attr(REASON, str(error))
        runs.end(run, "FINISHED", state="pruned", reason=str(error))
        raise
    except (Interrupted, KeyboardInterrupt) as error:
        runs.end(run, "KILLED", state="stopped", reason=str(error) or "interrupted")
        raise
    except UpdateFinishedTrialError:
        runs.end(run, "KILLED", state="lost", reason=TAKEN_OVER)
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        if is_connection_error(error):
            runs.end(run, "KILLED", state="lost", reason=reason)
            raise
        runs.end(run, "FAILED", state="failed", reason=reason)
        trial.set_user_attr(REASON, reason[:1000])
        raise
    runs.end(run, "FINISHED", state="complete", reason="all epochs done")


def _is_running(trial: optuna.Trial) -> bool:
    running = trial.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    return any(other.number == trial.number for other in running)


class Heartbeat:
    """Heartbeats of a trial, sent by a thread while the block runs."""

    def __init__(self, storage: StudyStorage, trial: optuna.Trial) -> None:
        self._storage = storage
        study = storage.get_study_id_from_name(trial.study.study_name)
        self._trial = storage.get_trial_id_from_study_id_trial_number(study, trial.number)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"heartbeat of trial {trial.number}", daemon=True)

    def beat(self) -> None:
        """Send one heartbeat."""
        self._storage.retry(lambda: self._storage.record_heartbeat(self._trial))

    def __enter__(self) -> Self:
        self.beat()
        self._thread.start()
        return self

    def __exit__(self, *details: object) -> None:
        self._over.set()
        self._thread.join(timeout=5)

    def _work(self) -> None:
        while not self._over.wait(self._storage.get_heartbeat_interval()):
            self.beat()
