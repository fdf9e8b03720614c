"""The way to MLflow; besides it only ``mlflow_run.py`` (what a run logs) and ``served_model.py`` (which runs inside
MLflow's own server) import it.

A command opens a run with :func:`start_run` and gets a :class:`Run`. Under ``mlflow run`` the run that it made is
joined. A run ends as FINISHED, as KILLED when it was stopped on request, else as FAILED.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# First, as it decides on MLflow's environment before MLflow is loaded.
from retinaflow.runs.mlflow_run import MlflowRun, quiet, report, store_uri as store_uri  # isort: skip
import mlflow
from mlflow.exceptions import MlflowException

from retinaflow.errors import Interrupted, first_line
from retinaflow.runs.outbox import Unsent
from retinaflow.runs.run import FolderRun, Run

_LAUNCHED = "MLFLOW_RUN_ID" in os.environ
"""Noted now, as MLflow takes the variable away with the first run it starts."""

PATIENCE = float(os.environ.get("RETINAFLOW_TRACKING_PATIENCE", "120"))
"""Seconds for which a finished run waits for a server that does not answer."""
PATIENCE_STOPPED = 15.0
"""The same for a run that was stopped on request: whoever stops it soon kills it."""


@contextlib.contextmanager
def start_run(
    command: str, *, track: bool, experiment: str, output: Path, name: str | None = None, resume: str | None = None
) -> Iterator[Run]:
    """Open a run, nested when one is open; end it by how the block ends.

    ``resume``: id of an MLflow run to resume instead of a new one.
    """
    if not track:
        yield FolderRun(output, resumed=resume is not None)
        return
    # Under `mlflow run` the experiment and the run are set by it; naming another raises.
    launched = "MLFLOW_RUN_ID" in os.environ
    nested = mlflow.active_run() is not None
    try:
        if not launched and not nested and resume is None:
            mlflow.set_experiment(experiment)
        started = mlflow.start_run(
            run_id=resume, run_name=name if nested or not launched else None, nested=nested, log_system_metrics=False
        )
    except MlflowException as error:
        raise ValueError(f"no run can be started in {store_uri()}: {first_line(error)}") from None
    run_id = started.info.run_id
    run = MlflowRun(run_id, output / f"unsent-{run_id}", resumed=resume is not None)
    run.set_tags({"retinaflow.command": command, **_commit()})
    try:
        yield run
    except BaseException as error:
        stopped = isinstance(error, Interrupted | KeyboardInterrupt)
        run.set_tags({"retinaflow.end": f"{type(error).__name__}: {error}"[:500]})
        end_run(run, "KILLED" if stopped else "FAILED", is_current=True)
        raise
    end_run(run, "FINISHED", is_current=True)


def end_run(run: MlflowRun, status: str, *, is_current: bool = False) -> None:
    """End a run as FINISHED, FAILED or KILLED once all has arrived, and name the file of what did not.

    Waits for a store that is away, but not long for a run that was stopped. ``is_current``: it is MLflow's active run.
    """
    patience = min(PATIENCE, PATIENCE_STOPPED) if status == "KILLED" else PATIENCE
    try:
        run.end(status, patience=patience)
    finally:  # also when somebody interrupts the waiting
        unsent = run.close()
        if is_current:
            # The store knows already; this puts away MLflow's own note of the active run.
            with contextlib.suppress(Exception):
                mlflow.end_run(status)
        if unsent is not None:
            report(_unsent_message(run.run_id, unsent) + (_SENT_LATER.format(run.run_id) if is_current else ""))


_SENT_LATER = "; a training that resumes resume={} sends them first"


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
        f"run {run_id}: {', '.join(filter(None, what))} never arrived in MLflow at {store_uri()} ({unsent.reason}). "
        f"They lie in {unsent.journal}"
    )


def launched_by_mlflow() -> bool:
    """Whether ``mlflow run`` started this process."""
    return _LAUNCHED


def is_run(run_id: str) -> bool:
    """Whether the store knows a run."""
    try:
        mlflow.get_run(run_id)
    except MlflowException:
        return False
    return True


def params_of(run_id: str) -> dict[str, str]:
    """The parameters of a run as they were logged; none of a run that the store does not know."""
    try:
        return dict(mlflow.get_run(run_id).data.params)
    except MlflowException:
        return {}


@functools.cache
def _fetched() -> str:
    """The folder of this process's copies of artifacts; gone when it ends, as checkpoints are large."""
    folder = tempfile.TemporaryDirectory(prefix="retinaflow-")
    atexit.register(folder.cleanup)
    return folder.name


def _new_folder() -> str:
    return tempfile.mkdtemp(dir=_fetched())


def fetch(run_id: str, artifact: str) -> Path:
    """A local copy of a run's artifact, which lasts as long as this process.

    Raises ValueError when the run or the artifact does not exist.
    """
    try:
        mlflow.get_run(run_id)
        path = mlflow.artifacts.download_artifacts(run_id=run_id, artifact_path=artifact, dst_path=_new_folder())
    except (MlflowException, OSError) as error:
        raise ValueError(
            f"run {run_id} has no {artifact} in {mlflow.get_tracking_uri()}: {first_line(error)}"
        ) from None
    return Path(path)


def fetch_file(uri: str) -> Path:
    """A local copy of ``runs:/RUN_ID/FILE``. Raises ValueError when there is none."""
    run_id, _, name = uri.removeprefix("runs:/").partition("/")
    if not run_id or not name:
        raise ValueError(f"a file of a run is written runs:/RUN_ID/FILE, but got {uri}")
    return fetch(run_id, name)


def fetch_model(uri: str) -> Path:
    """The checkpoint of a registered or logged model (``models:/NAME@ALIAS``, ``models:/NAME/VERSION``)."""
    try:
        folder = Path(mlflow.artifacts.download_artifacts(uri, dst_path=_new_folder()))
    except (MlflowException, OSError) as error:
        raise ValueError(f"from_run={uri}: no such model in {mlflow.get_tracking_uri()}: {first_line(error)}") from None
    found = sorted(folder.rglob("*.pt"))
    if not found:
        raise ValueError(f"from_run={uri}: the model holds no checkpoint; was it logged by retinaflow?")
    return found[0]


def run_of_model(uri: str) -> str | None:
    """Id of the run that logged a registered model; None when the store does not say."""
    try:
        found = mlflow.models.get_model_info(uri).run_id
    except (MlflowException, OSError):
        return None
    return str(found) if found else None


def last_run(command: str) -> str:
    """Id of the newest finished run of a command. Raises ValueError when there is none."""
    runs = mlflow.search_runs(
        search_all_experiments=True,
        filter_string=f"tags.`retinaflow.command` = '{command}' and attributes.status = 'FINISHED'",
        order_by=["attributes.end_time DESC"],
        max_results=1,
        output_format="list",
    )
    if not runs:
        raise ValueError(
            f"there is no finished {command} run in {mlflow.get_tracking_uri()}; train one first, or name a run, "
            "a model or a checkpoint file as from_run="
        )
    return str(runs[0].info.run_id)


@dataclass(frozen=True)
class RunRecord:
    """What the store says of a run; ``page``: its address in the browser, None for a store without a server."""

    run_id: str
    name: str
    experiment_id: str
    status: str
    started: int
    """Milliseconds since 1970."""
    tags: Mapping[str, str]
    metrics: Mapping[str, float]

    @property
    def place(self) -> str:
        """The run's page, as a path below the address of the server."""
        return f"#/experiments/{self.experiment_id}/runs/{self.run_id}"

    @property
    def page(self) -> str | None:
        server = store_uri()
        return f"{server.rstrip('/')}/{self.place}" if server.startswith(("http://", "https://")) else None


def find_run(name: str) -> RunRecord:
    """A run by id, or by its name if only one has it. Raises ValueError when there is none or several."""
    try:
        return _record(mlflow.get_run(name))
    except MlflowException:
        quoted = name.replace("'", "\\'")
        found = find_runs(f"attributes.run_name = '{quoted}'")
    if len(found) != 1:
        several = f"{len(found)} have that name ({', '.join(run.run_id for run in found[:3])}); give the id"
        raise ValueError(f"run {name}: {several if found else f'there is no such id or name in {store_uri()}'}")
    return found[0]


def find_runs(filter_text: str, *, experiment: str | None = None, most: int = 1000) -> list[RunRecord]:
    """Runs that an MLflow filter finds, newest first. Raises ValueError for a filter that MLflow cannot read."""
    where: dict[str, Any] = {"experiment_names": [experiment]} if experiment else {"search_all_experiments": True}
    try:
        found = mlflow.search_runs(
            filter_string=filter_text,
            order_by=["attributes.start_time DESC"],
            max_results=most,
            output_format="list",
            **where,
        )
    except MlflowException as error:
        raise ValueError(f"filter={filter_text}: {first_line(error)}") from None
    return [_record(run) for run in found]


def _record(run: Any) -> RunRecord:
    info = run.info
    return RunRecord(
        run_id=info.run_id,
        name=info.run_name or info.run_id[:8],
        experiment_id=info.experiment_id,
        status=info.status,
        started=info.start_time,
        tags=run.data.tags,
        metrics=run.data.metrics,
    )


def champion(name: str, alias: str) -> tuple[str, str] | None:
    """(version, run id) of the registered model that has the alias; None when no version has it."""
    try:
        version = mlflow.MlflowClient().get_model_version_by_alias(name, alias)
    except MlflowException:
        return None
    return str(version.version), str(version.run_id)


def promote(run_id: str, name: str, *, alias: str, reason: str, tags: Mapping[str, str]) -> str:
    """Give a run's model the alias, as the version it has or a new one; the reason is its description.

    Returns the version. Raises ValueError when the run has no model.
    """
    client = mlflow.MlflowClient()
    try:
        known = client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'")
        version = max(known, key=lambda one: int(one.version)) if known else None
        if version is None:
            with quiet():
                version = mlflow.register_model(f"runs:/{run_id}/model", name)
        client.update_model_version(name, version.version, description=reason)
        for key, value in tags.items():
            client.set_model_version_tag(name, version.version, key, value)
        client.set_registered_model_alias(name, alias, version.version)
    except MlflowException as error:
        raise ValueError(f"run {run_id}: its model cannot be registered as {name}: {first_line(error)}") from None
    return str(version.version)


def log_model(run: Run, checkpoint: Path, *, register_as: str | None) -> None:
    """Log a checkpoint as an MLflow model (models from code, no pickle) and register it if a name is given."""
    if isinstance(run, MlflowRun):
        run.log_model(checkpoint, register_as=register_as)


def use_store(uri: str) -> None:
    """Log to that store from now on: for a process that was started by one that does."""
    mlflow.set_tracking_uri(uri)


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
