"""Starting and ending tracked runs.

A command opens a run with :func:`retinaflow.runs.start.start_run` and gets a :class:`~retinaflow.runs.run.Run`. Under
``mlflow run`` the run that it made is joined. A run ends as FINISHED, as KILLED when it was stopped on request, else as
FAILED.

Child runs (the trials of a search) are made, found and opened by id in any process on any machine. They leave MLflow's
active run alone and are ended by :func:`end_run`.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import mlflow
from mlflow.exceptions import MlflowException

from retinaflow.addresses import without_secrets
from retinaflow.errors import Interrupted
from retinaflow.files import growing_waits, retry
from retinaflow.runs import new_store, store
from retinaflow.runs.experiment import (
    find_experiment,
    leave_experiment_for,
    mark_experiment,
    run_name_of_environment,
    tags_of_environment,
)
from retinaflow.runs.mlflow_run import MlflowRun, warn
from retinaflow.runs.names import is_generated
from retinaflow.runs.outbox import Unsent
from retinaflow.runs.run import Run
from retinaflow.settings.data_settings import TrackingSettings

_LAUNCHED = "MLFLOW_RUN_ID" in os.environ
"""Noted now, as MLflow takes the variable away with the first run it starts."""

PATIENCE = float(os.environ.get("RETINAFLOW_TRACKING_PATIENCE", "120"))
"""Seconds for which a finished run waits for a server that does not answer."""
PATIENCE_STOPPED = 15.0
"""The same for a run that was stopped on request: it may be killed soon."""


def launched_by_mlflow() -> bool:
    """Whether ``mlflow run`` started this process."""
    return _LAUNCHED


@contextlib.contextmanager
def start_tracked_run(
    command: str,
    config: TrackingSettings,
    *,
    output: Path,
    name: str | None = None,
    default_name: str | None = None,
    resume: str | None = None,
) -> Iterator[MlflowRun]:
    """:func:`retinaflow.runs.start.start_run` with ``track=true``."""
    run_id = _started(config.experiment, name=name, default_name=default_name, resume=resume)
    run = open_run(run_id, output, resumed=resume is not None)
    run.set_tags({"retinaflow.command": command, **_commit(), **_tags_without_secrets()})
    try:
        yield run
    except BaseException as error:
        stopped = isinstance(error, Interrupted | KeyboardInterrupt)
        run.set_tags({"retinaflow.end": without_secrets(f"{type(error).__name__}: {error}")[:500]})
        end_run(run, "KILLED" if stopped else "FAILED", command=command, is_current=True)
        raise
    end_run(run, "FINISHED", command=command, is_current=True)


def _started(experiment: str | None, *, name: str | None, default_name: str | None, resume: str | None) -> str:
    """Id of the run to log to, which is now MLflow's active run: a new one, that of `mlflow run`, or one to resume."""
    launched, outer = os.environ.get("MLFLOW_RUN_ID"), mlflow.active_run()
    where: dict[str, Any] = {}
    with store.store_errors(f"no run can be started in {store.uri()}"):
        if resume is not None:
            where = {"run_id": resume}
            leave_experiment_for(resume)
            if launched not in (None, resume):
                _link_launched(launched, resume, "Resumes")
        elif outer is not None:
            where = {"experiment_id": outer.info.experiment_id, "run_name": name or default_name}
        elif launched is None:
            new_store.make_store(store.uri())
            where = {
                "experiment_id": find_experiment(experiment).experiment_id,
                "run_name": name or run_name_of_environment() or default_name,
            }
        tags = {} if outer is not None else tags_of_environment()
        started = mlflow.start_run(**where, nested=outer is not None, tags=tags, log_system_metrics=False)
        if outer is None:
            mark_experiment(started.info.experiment_id)
        found, own_name = started.info, name or default_name
        if launched == found.run_id and own_name is not None and is_generated(found.run_name):
            mlflow.MlflowClient().set_tag(found.run_id, "mlflow.runName", own_name)
    return str(started.info.run_id)


def _tags_without_secrets() -> dict[str, str]:
    """The tags of the active run that hold a password, such as that of a git address given to `mlflow run`."""
    active = mlflow.active_run()
    tags = {} if active is None else active.data.tags
    return {name: without_secrets(value) for name, value in tags.items() if without_secrets(value) != value}


def link_launched(run_id: str) -> None:
    """Let the run that `mlflow run` has made for this process, if any, lead to one that has all results already."""
    launched = os.environ.get("MLFLOW_RUN_ID")
    if launched not in (None, run_id):
        with store.store_errors(f"run {launched} of mlflow run cannot be linked to run {run_id} in {store.uri()}"):
            _link_launched(launched, run_id, "Is the same training as")


def _link_launched(launched: str, run_id: str, what: str) -> None:
    """Let the run that `mlflow run` has made for this process, which stays empty, lead to the one with the results."""
    client = mlflow.MlflowClient()
    info = client.get_run(run_id).info
    page = f"#/experiments/{info.experiment_id}/runs/{run_id}"
    client.set_tag(launched, "retinaflow.command", "resume")
    client.set_tag(launched, "retinaflow.continues", run_id)
    client.set_tag(launched, "mlflow.note.content", f"{what} [{info.run_name}]({page}), which has all results.")
    # MLflow would start the next run of this process in it.
    del os.environ["MLFLOW_RUN_ID"]


@contextlib.contextmanager
def start_path_run(command: str, config: TrackingSettings, *, default_name: str | None = None) -> Iterator[Run]:
    """The run of a command whose ``output`` is a data folder or a file: all its results. Without MLflow nothing is
    logged."""
    if config.track:
        with start_tracked_run(
            command, config, output=config.output.absolute().parent, default_name=default_name
        ) as run:
            yield run
    else:
        yield Run()


def end_run(run: MlflowRun, status: str, *, command: str | None = None, is_current: bool = False) -> None:
    """End a run as FINISHED, FAILED or KILLED once all has arrived, and report the file of what did not.

    Waits for a store that is out of reach, but not long for a run that was stopped. ``command``: whose run it is, None
    for one that no command logs to again. ``is_current``: it is MLflow's active run.
    """
    patience = min(PATIENCE, PATIENCE_STOPPED) if status == "KILLED" else PATIENCE
    try:
        run.end(status, patience=patience)
    finally:  # Also when somebody interrupts the waiting.
        unsent = run.close()
        if is_current:
            # The store knows already; this puts away MLflow's own note of the active run.
            with contextlib.suppress(Exception):
                mlflow.end_run(status)
        if unsent is not None:
            later = "" if command is None else _SENT_LATER.get(command, _LOGGED_AGAIN).format(run.run_id)
            warn(_unsent_message(run.run_id, unsent) + later)


_SENT_LATER = {
    "train": "; a training that resumes resume={} sends them first",
    "search": "; the same search sends them first when it is started again",
    "main": "; main with resume=auto logs them to a new run and trains nothing again",
}
_LOGGED_AGAIN = "; the same command logs them to a new run when it is started again"


def _unsent_message(run_id: str, unsent: Unsent) -> str:
    points = sum(len(item.content["metrics"]) for item in unsent.items if item.kind == "metrics")
    files = [item.file.name for item in unsent.items if item.file is not None]
    others = sum(item.kind not in ("metrics", "end") and item.file is None for item in unsent.items)
    what = [
        f"{points} points of curves" if points else "",
        f"{len(files)} files ({', '.join(files)})" if files else "",
        f"{others} sets of parameters or tags" if others else "",
        "the end of the run" if any(item.kind == "end" for item in unsent.items) else "",
    ]
    return (
        f"run {run_id}: {', '.join(filter(None, what))} never arrived in MLflow at {store.uri()} ({unsent.reason}). "
        f"They are in {unsent.journal}"
    )


def start_child(parent_id: str, *, name: str, tags: Mapping[str, str], folder: Path) -> MlflowRun:
    """A new run under another; it stays RUNNING until it is ended.

    ``tags`` identify it among the parent's children; ``folder``: where results wait that have not arrived. A store that
    is out of reach is waited for as at the end of a run. Raises StoreError when it stays so or lacks the parent.
    """
    tries = 0

    def make() -> str:
        nonlocal tries
        tries += 1
        # An earlier try may have made it, and the answer was lost.
        found = _children(parent_id, tags) if tries > 1 else []
        return found[0] if found else _made(parent_id, name, tags)

    with store.store_errors(f"no run can be started under run {parent_id} in {store.uri()}"):
        run_id = retry(
            make,
            waits=growing_waits(0.5, 8.0, patience=PATIENCE),
            may_pass=lambda error: isinstance(error, MlflowException) and not store.refuses(error),
        )
    return open_run(run_id, folder)


def open_run(run_id: str, folder: Path, *, resumed: bool = False) -> MlflowRun:
    """A run that is there already, to log to. What an earlier process left unsent in ``folder`` is sent first."""
    return MlflowRun(run_id, folder / f"unsent-{run_id}", resumed=resumed)


def children(parent_id: str, *, tags: Mapping[str, str]) -> list[str]:
    """Ids of the runs under another that have these tags. Raises StoreError when the store does not answer."""
    with store.store_errors(f"the runs under run {parent_id} cannot be found in {store.uri()}"):
        return _children(parent_id, tags)


def _children(parent_id: str, tags: Mapping[str, str]) -> list[str]:
    client = mlflow.MlflowClient()
    wanted = {"mlflow.parentRunId": parent_id, **tags}
    found = client.search_runs(
        [client.get_run(parent_id).info.experiment_id],
        filter_string=store.filter_of({f"tags.`{key}`": value for key, value in wanted.items()}),
    )
    return [run.info.run_id for run in found]


def _made(parent_id: str, name: str, tags: Mapping[str, str]) -> str:
    client = mlflow.MlflowClient()
    parent = client.get_run(parent_id)
    inherited = {key: v for key, v in parent.data.tags.items() if key.startswith(("mlflow.user", "mlflow.source"))}
    made = client.create_run(
        parent.info.experiment_id, run_name=name, tags={**inherited, "mlflow.parentRunId": parent_id, **tags}
    )
    return str(made.info.run_id)


def _commit() -> dict[str, str]:
    """Commit of the working tree this runs from, and whether it was changed; nothing outside a checkout."""
    folder = Path(__file__).parent

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    if commit is None:
        return {}
    return {"retinaflow.commit": commit, "retinaflow.dirty": str(bool(git("status", "--porcelain"))).lower()}
