"""The way to MLflow, and the only file that imports it (but for ``served_model.py``, which runs inside MLflow's own
server).

A command opens a run with :func:`start_run` and gets a :class:`Run`. Under ``mlflow run`` the run that it made is
joined. A run ends as FINISHED, as KILLED when it was stopped on request, else as FAILED.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd

from retinaflow.run_files import FileRun, FolderRun, Run, as_text
from retinaflow.training.stopping import Stopped

# MLflow reports usage to its makers unless told not to; a training run needs no network.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")
# A bar for every fetched file would stand between the lines of a command.
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

import mlflow
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException

_LAUNCHED = "MLFLOW_RUN_ID" in os.environ
"""Noted now, as MLflow takes the variable away with the first run it starts."""

SERVING_PACKAGES = ("torch", "torchvision", "mlflow", "numpy", "pandas", "opencv-python-headless")
"""What a logged model needs besides its own copy of this package."""


class MlflowRun(FileRun):
    """A run in the MLflow store."""

    def __init__(self, run_id: str) -> None:
        self.run_id = run_id
        self._client = mlflow.MlflowClient()

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log parameters the run does not have: ``mlflow run`` has logged its own in its own spelling."""
        known = self._client.get_run(self.run_id).data.params
        new = {name: as_text(value) for name, value in params.items() if name not in known}
        mlflow.log_params(new, run_id=self.run_id)

    def log_metrics(self, metrics: Mapping[str, float], *, step: int) -> None:
        now = int(time.time() * 1000)
        self._client.log_batch(self.run_id, [Metric(name, float(value), now, step) for name, value in metrics.items()])

    def set_tags(self, tags: Mapping[str, str]) -> None:
        for name, value in tags.items():
            self._client.set_tag(self.run_id, name, value)

    def log_file(self, path: Path, folder: str | None = None) -> None:
        self._client.log_artifact(self.run_id, str(path), folder)

    def log_table(self, table: pd.DataFrame, name: str) -> None:
        """A table for the evaluation view of ``mlflow ui`` (class x run)."""
        values = table.astype(object).where(table.notna(), None)
        if any(item.path == name for item in self._client.list_artifacts(self.run_id)):
            # MLflow appends to a table that is there; a run that is gone on with replaces it.
            self.log_json({"columns": list(values), "data": values.to_numpy().tolist()}, name)
        else:
            self._client.log_table(self.run_id, values, name)


@contextlib.contextmanager
def start_run(
    command: str, *, track: bool, experiment: str, output: Path, name: str | None = None, resume: str | None = None
) -> Iterator[Run]:
    """Open a run, nested when one is open; end it by how the block ends.

    ``resume``: id of an MLflow run to go on with instead of a new one.
    """
    if not track:
        yield FolderRun(output)
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
        raise ValueError(f"no run can be started in {store_uri()}: {_first_line(error)}") from None
    run = MlflowRun(started.info.run_id)
    run.set_tags({"retinaflow.command": command, **_commit()})
    try:
        yield run
    except BaseException as error:
        killed = isinstance(error, Stopped | KeyboardInterrupt)
        run.set_tags({"retinaflow.end": f"{type(error).__name__}: {error}"[:500]})
        mlflow.end_run("KILLED" if killed else "FAILED")
        raise
    mlflow.end_run("FINISHED")


def launched_by_mlflow() -> bool:
    """Whether ``mlflow run`` started this process."""
    return _LAUNCHED


def fetch(run_id: str, artifact: str) -> Path:
    """A local copy of a run's artifact. Raises ValueError when the run or the artifact does not exist."""
    try:
        mlflow.get_run(run_id)
        path = mlflow.artifacts.download_artifacts(run_id=run_id, artifact_path=artifact, dst_path=tempfile.mkdtemp())
    except (MlflowException, OSError) as error:
        raise ValueError(
            f"run {run_id} has no {artifact} in {mlflow.get_tracking_uri()}: {_first_line(error)}"
        ) from None
    return Path(path)


def fetch_model(uri: str) -> Path:
    """The checkpoint of a registered or logged model (``models:/NAME@ALIAS``, ``models:/NAME/VERSION``)."""
    try:
        folder = Path(mlflow.artifacts.download_artifacts(uri, dst_path=tempfile.mkdtemp()))
    except (MlflowException, OSError) as error:
        raise ValueError(
            f"from_run={uri}: no such model in {mlflow.get_tracking_uri()}: {_first_line(error)}"
        ) from None
    found = sorted(folder.rglob("*.pt"))
    if not found:
        raise ValueError(f"from_run={uri}: the model holds no checkpoint; was it logged by retinaflow?")
    return found[0]


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
        raise ValueError(f"filter={filter_text}: {_first_line(error)}") from None
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
            with _quiet():
                version = mlflow.register_model(f"runs:/{run_id}/model", name)
        client.update_model_version(name, version.version, description=reason)
        for key, value in tags.items():
            client.set_model_version_tag(name, version.version, key, value)
        client.set_registered_model_alias(name, alias, version.version)
    except MlflowException as error:
        raise ValueError(f"run {run_id}: its model cannot be registered as {name}: {_first_line(error)}") from None
    return str(version.version)


def log_model(run: Run, checkpoint: Path, *, register_as: str | None) -> None:
    """Log a checkpoint as an MLflow model (models from code, no pickle) and register it if a name is given."""
    if not isinstance(run, MlflowRun):
        return
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema

    outputs = [
        ColSpec(DataType.long, "image"),
        *(ColSpec(DataType.double, name) for name in ("x1", "y1", "x2", "y2", "score")),
    ]
    signature = ModelSignature(
        inputs=Schema([ColSpec(DataType.string, "image")]),
        outputs=Schema([*outputs, ColSpec(DataType.string, "label")]),
    )
    with _quiet():
        mlflow.pyfunc.log_model(
            name="model",
            python_model=str(Path(__file__).with_name("served_model.py")),
            artifacts={"checkpoint": str(checkpoint)},
            code_paths=[str(Path(__file__).parent)],
            signature=signature,
            registered_model_name=register_as,
            pip_requirements=[f"{package}=={version(package)}" for package in SERVING_PACKAGES],
        )


def store_uri() -> str:
    """Where runs are logged."""
    return str(mlflow.get_tracking_uri())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """MLflow's chatter about models and type hints, logged or warned, is not for the user of a training."""
    logger = logging.getLogger("mlflow")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


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


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
