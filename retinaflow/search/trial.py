"""A trial: its state, its user attributes, its run with heartbeats, and what happens when its process ends early.

A trial counts when it is waiting, running, complete, pruned, or failed by an error of its own, which is then its
``reason``. A trial that failed without a reason is *lost*: its process was killed or stopped, or a store stayed out of
reach. A lost trial does not count; its parameters are queued again as a new trial.
"""

from __future__ import annotations

import os
import platform
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from retinaflow.addresses import without_secrets
from retinaflow.errors import Interrupted, StoreError
from retinaflow.runs.run import Run
from retinaflow.search.runs import SearchRuns
from retinaflow.search.storage import StudyStorage

WORKER, HEARTBEAT, REASON, METRICS, RUN_ID, SECONDS, OVERHEAD, TRAININGS, RETRY_OF, DEATHS = (
    *("worker", "heartbeat", "reason", "metrics", "run_id", "seconds", "overhead_seconds", "trainings", "retry_of"),
    "deaths",
)
"""User attributes of a trial."""
GRACE_BEATS = 4
"""Number of missed heartbeats after which a worker counts as dead."""
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


# What is stored with a trial beside user attributes


def set_system_attr(trial: optuna.Trial, name: str, value: Any) -> None:
    """Store a value with a trial that people need not see; ``FrozenTrial.system_attrs`` has it."""
    trial.storage.set_trial_system_attr(_ids(trial)[1], name, value)


def set_note(trial: optuna.Trial, text: str) -> None:
    """The note of a trial, Markdown, where optuna-dashboard looks for it: among the system attributes of the study."""
    study, number = _ids(trial)
    for name, value in (("note_str:0", text), ("note_ver", 1)):
        trial.storage.set_study_system_attr(study, f"dashboard:{number}:{name}", value)


def _ids(trial: optuna.Trial) -> tuple[int, int]:
    """How the storage numbers the study and the trial."""
    study = trial.storage.get_study_id_from_name(trial.study.study_name)
    return study, trial.storage.get_trial_id_from_study_id_trial_number(study, trial.number)


# Lost trials


def queue_again(study: optuna.Study, trial: FrozenTrial, *, died: bool) -> None:
    """Queue the parameters of a lost trial, unless too many workers died while they ran them; then a new trial
    replaces it. A part of a transaction."""
    deaths = int(trial.user_attrs.get(DEATHS, 0)) + died
    queued = any(other.user_attrs.get(RETRY_OF) == trial.number for other in study.get_trials(deepcopy=False))
    if deaths < MAX_DEATHS and not queued:
        study.enqueue_trial(trial.params, user_attrs={RETRY_OF: trial.number, DEATHS: deaths})


class LostTrials:
    """Finds trials whose process has ended: their heartbeat stays the same for :data:`GRACE_BEATS` heartbeats, in which
    the process that looks could reach the database. No clocks of two machines are compared."""

    def __init__(self, storage: StudyStorage, *, heartbeat: float) -> None:
        """``heartbeat``: seconds between two heartbeats of a trial."""
        self._storage, self._grace = storage, GRACE_BEATS * heartbeat
        self._seen: dict[int, tuple[str | None, float]] = {}

    def among(self, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
        """Those of the trials that have ended so."""
        now, seen = time.monotonic(), self._seen
        running = [trial for trial in trials if trial.state == TrialState.RUNNING]
        self._seen = {}
        for trial in running:
            beat = trial.user_attrs.get(HEARTBEAT)
            before, since = seen.get(trial.number, (beat, now))
            self._seen[trial.number] = (beat, since if beat == before else now)
        return [
            trial
            for trial in running
            if now - max(self._seen[trial.number][1], self._storage.last_outage) > self._grace
        ]


# The run of a trial


def worker_name() -> str:
    """Machine and process of a worker."""
    return f"{platform.node()}:{os.getpid()}"


@contextmanager
def trial_run(trial: optuna.Trial, runs: SearchRuns, *, name: str, heartbeat: float) -> Iterator[Run]:
    """The run of a trial, with a heartbeat every ``heartbeat`` seconds until it ends."""
    with _heartbeats(trial, heartbeat):
        if WORKER not in trial.user_attrs:
            trial.set_user_attr(WORKER, worker_name())
        run = runs.start(name, study=trial.study.study_name, trial=trial.number)
        trial.set_user_attr(RUN_ID, run.run_id)
        set_note(trial, runs.note(run, name))
        with _ending(runs, run, trial):
            yield run
            if not _is_running(trial):
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
    except StoreError as error:
        runs.end(run, "KILLED", state="lost", reason=str(error))
        raise
    except Exception as error:
        reason = without_secrets(f"{type(error).__name__}: {error}")
        runs.end(run, "FAILED", state="failed", reason=reason)
        trial.set_user_attr(REASON, reason[:1000])
        raise
    runs.end(run, "FINISHED", state="complete", reason=trial.user_attrs.get(REASON, "all epochs done"))


def _is_running(trial: optuna.Trial) -> bool:
    running = trial.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    return any(other.number == trial.number for other in running)


def beat(trial: optuna.Trial) -> None:
    """Send a heartbeat."""
    trial.set_user_attr(HEARTBEAT, datetime.now(UTC).isoformat(timespec="milliseconds"))


@contextmanager
def _heartbeats(trial: optuna.Trial, seconds: float) -> Iterator[None]:
    """Heartbeats of a trial, sent by a thread while the block runs."""
    over = threading.Event()

    def work() -> None:
        # A trial that another worker took over needs none; without the database the training reports the error.
        with suppress(UpdateFinishedTrialError, Interrupted):
            while not over.wait(seconds):
                with suppress(StoreError):
                    beat(trial)

    beat(trial)
    thread = threading.Thread(target=work, name=f"heartbeats of trial {trial.number}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(timeout=5)
