"""The way to MLflow, and the only file that imports it (but for ``served_model.py``, which runs inside MLflow's own
server).

A command opens a run with :func:`start_run` and gets a :class:`Run`. Under ``mlflow run`` the run that it made is
joined. A run ends as FINISHED, as KILLED when it was stopped on request, else as FAILED.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import subprocess
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd

from retinaflow.run_files import FileRun, FolderRun, Run, as_text
from retinaflow.training.stopping import Stopped

# MLflow reports usage to its makers unless told not to; a training run needs no network.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")

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
        """Log parameters the run does not have: ``mlflow run`` has logged its own in its own spelling.

        What it logged is not always what was used (a file of settings wins over its declared defaults); MLflow lets no
        parameter be changed, so such a value is logged as ``used/NAME``.
        """
        known = self._client.get_run(self.run_id).data.params
        new = {name: as_text(value) for name, value in params.items() if name not in known}
        changed = {f"used/{name}": as_text(params[name]) for name in params if name in known}
        for name, value in changed.items():
            if name not in known and not _same_value(known[name.removeprefix("used/")], value):
                new[name] = value
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


def start_child(parent_id: str, *, name: str, tags: Mapping[str, str]) -> MlflowRun:
    """A new run under another, from any process or machine; leaves the process's current run alone.

    It stays RUNNING until :func:`end_run`. Raises ValueError when the store does not have the parent.
    """
    client = mlflow.MlflowClient()
    parent = find_run(parent_id)
    inherited = {
        key: value for key, value in parent.data.tags.items() if key.startswith(("mlflow.user", "mlflow.source"))
    }
    made = client.create_run(
        parent.info.experiment_id, run_name=name, tags={**inherited, "mlflow.parentRunId": parent_id, **tags}
    )
    return MlflowRun(made.info.run_id)


def find_run(run_id: str) -> Any:
    """MLflow's record of a run. Raises ValueError when the store does not have it."""
    try:
        return mlflow.MlflowClient().get_run(run_id)
    except MlflowException as error:
        raise ValueError(f"run {run_id} is not in {store_uri()}: {_first_line(error)}") from None


def children(parent_id: str, *, tags: Mapping[str, str]) -> list[str]:
    """Ids of the runs under another that have these tags."""
    wanted = {"mlflow.parentRunId": parent_id, **tags}
    found = mlflow.MlflowClient().search_runs(
        [find_run(parent_id).info.experiment_id],
        filter_string=" and ".join(f"tags.`{key}` = '{value}'" for key, value in wanted.items()),
    )
    return [run.info.run_id for run in found]


def end_run(run_id: str, status: str) -> None:
    """End a run that is not the process's current one: FINISHED, FAILED or KILLED."""
    mlflow.MlflowClient().set_terminated(run_id, status)


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


def fetch_file(uri: str) -> Path:
    """A local copy of ``runs:/RUN_ID/FILE``. Raises ValueError when there is none."""
    run_id, _, name = uri.removeprefix("runs:/").partition("/")
    if not run_id or not name:
        raise ValueError(f"a file of a run is written runs:/RUN_ID/FILE, but got {uri}")
    return fetch(run_id, name)


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


def use_store(uri: str) -> None:
    """Log to that store from now on: for a process that was started by one that does."""
    mlflow.set_tracking_uri(uri)


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


def _same_value(quoted: str, value: str) -> bool:
    """Whether a parameter as ``mlflow run`` logs it, quoted for a shell, is this value."""
    logged = " ".join(shlex.split(quoted)) if quoted[:1] in "'\"" else quoted
    try:
        return float(logged) == float(value)
    except ValueError:
        return logged == value


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
