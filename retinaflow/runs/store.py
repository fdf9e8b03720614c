"""The MLflow store: where it is, which runs it has, and copies of their artifacts.

Raises StoreError when the store cannot be reached, SettingError or DataError when what a user named is not there.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import functools
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
from alembic.util import CommandError
from mlflow.entities import LifecycleStage
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from retinaflow.addresses import without_secrets
from retinaflow.errors import DataError, SettingError, StoreError, first_line
from retinaflow.runs.new_store import database_file


def uri() -> str:
    """Where runs are logged."""
    return str(mlflow.get_tracking_uri())


def use(address: str) -> None:
    """Log to that store from now on: for a process that was started by one that does."""
    mlflow.set_tracking_uri(address)


@contextlib.contextmanager
def store_errors(failed: str, *, refused: type[Exception] = StoreError) -> Iterator[None]:
    """Turn what MLflow or its database raises inside the block into a StoreError. ``failed``: what could not be done.

    ``refused``: raised instead when the store answers that it does not have what was asked for.
    """
    try:
        yield
    except (MlflowException, SQLAlchemyError, CommandError, ImportError, OSError) as error:
        kind = refused if refuses(error) or _is_absent(error) else StoreError
        raise kind(without_secrets(f"{failed}: {first_line(error)}{_advice(error)}")) from error


def _advice(error: BaseException) -> str:
    """What to look at, where the error does not name it: after the store did not answer, or without its driver."""
    if isinstance(error, ImportError):
        return f"; a store of that kind needs the Python module {error.name}, which is not installed here"
    if refuses(error) or _is_absent(error) or "mlflow db upgrade" in str(error):
        return ""
    if database_file(uri()) is not None:
        return f"; can {database_file(uri())} be read and written, and is there room on its disk?"
    return f"; is {uri()} reachable?"


def refuses(error: BaseException) -> bool:
    """Whether this is the answer of a store that will never do it, rather than one that is out of reach or busy."""
    if not isinstance(error, MlflowException):
        return False
    status = error.get_http_status_code()  # type: ignore[no-untyped-call]
    return 400 <= status < 500 and status not in (408, 429)


def _is_absent(error: BaseException) -> bool:
    """Whether an artifact does not exist: MLflow raises a plain OSError for a folder, requests one for a server."""
    if not isinstance(error, OSError):
        return False
    status = getattr(getattr(error, "response", None), "status_code", None)
    return error.errno == errno.ENOENT or "No such artifact" in str(error) or status == 404


@dataclass(frozen=True)
class RunRecord:
    """A run as the store has it."""

    run_id: str
    name: str
    experiment_id: str
    status: str
    started: int
    """Milliseconds since 1970."""
    tags: Mapping[str, str]
    metrics: Mapping[str, float]

    @property
    def path(self) -> str:
        """The run's page, as a path below the address of the server."""
        return f"#/experiments/{self.experiment_id}/runs/{self.run_id}"

    @property
    def page(self) -> str | None:
        """The run's page in the browser; None for a store without a server."""
        server = without_secrets(uri())
        return f"{server.rstrip('/')}/{self.path}" if server.startswith(("http://", "https://")) else None


def has_run(run_id: str) -> bool:
    """Whether the store has a run that can be logged to: not a deleted one."""
    run = _read(run_id)
    return run is not None and run.info.lifecycle_stage == LifecycleStage.ACTIVE


def params_of(run_id: str) -> dict[str, str]:
    """The parameters of a run as they were logged; none of a run that the store does not know."""
    run = _read(run_id)
    return {} if run is None else dict(run.data.params)


def find_run(name: str) -> RunRecord:
    """A run by id, or by its name if only one has it. Raises SettingError when there is none or several."""
    run = _read(name)
    if run is not None:
        return _record(run)
    found = find_runs(filter_of({"attributes.run_name": name}))
    if not found:
        raise SettingError(f"run {name}: there is no such id or name in {uri()}")
    if len(found) > 1:
        ids = ", ".join(run.run_id for run in found[:3])
        raise SettingError(f"run {name}: {len(found)} have that name ({ids}); give the id")
    return found[0]


def filter_of(values: Mapping[str, str]) -> str:
    """The MLflow filter for what has all of these values. Raises SettingError for one with both kinds of quotes, which
    a filter cannot hold."""
    for value in values.values():
        if "'" in value and '"' in value:
            raise SettingError(f"a name with both kinds of quotes, ' and \", cannot be looked up: {value}; give an id")
    quoted = {name: f'"{value}"' if "'" in value else f"'{value}'" for name, value in values.items()}
    return " and ".join(f"{name} = {value}" for name, value in quoted.items())


def find_runs(filter_text: str, *, experiment: str | None = None, most: int = 1000) -> list[RunRecord]:
    """Runs that an MLflow filter finds, newest first. Raises SettingError for a filter that MLflow cannot read."""
    return _search(filter_text, order="attributes.start_time DESC", experiment=experiment, most=most)


def last_run(command: str) -> str:
    """Id of the newest finished run of a command. Raises SettingError when there is none."""
    runs = _search(
        filter_of({"tags.`retinaflow.command`": command, "attributes.status": "FINISHED"}),
        order="attributes.end_time DESC",
        most=1,
    )
    if not runs:
        raise SettingError(
            f"there is no finished {command} run in {uri()}; train one first, or name a run, a model or a checkpoint "
            "file as from_run="
        )
    return runs[0].run_id


def _read(run_id: str) -> Any | None:
    """The run as MLflow has it; None when there is no such id."""
    with store_errors(f"run {run_id} cannot be read"):
        try:
            return mlflow.get_run(run_id)
        except MlflowException as error:
            if refuses(error):
                return None
            raise


def _search(filter_text: str, *, order: str, experiment: str | None = None, most: int) -> list[RunRecord]:
    where: dict[str, Any] = {"experiment_names": [experiment]} if experiment else {"search_all_experiments": True}
    with store_errors(f"filter={filter_text}", refused=SettingError):
        found = mlflow.search_runs(
            filter_string=filter_text, order_by=[order], max_results=most, output_format="list", **where
        )
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


def fetch(run_id: str, artifact: str) -> Path:
    """A local copy of a run's artifact, which lasts as long as this process.

    Raises DataError when the run or the artifact does not exist.
    """
    with store_errors(f"run {run_id} has no {artifact} in {uri()}", refused=DataError):
        mlflow.get_run(run_id)
        path = mlflow.artifacts.download_artifacts(run_id=run_id, artifact_path=artifact, dst_path=new_folder())
    return Path(path)


def fetch_file(name: str) -> Path:
    """A local copy of ``runs:/RUN_ID/FILE``. Raises SettingError for another form, DataError when there is none."""
    run_id, _, artifact = name.removeprefix("runs:/").partition("/")
    if not run_id or not artifact:
        raise SettingError(f"a file of a run is written runs:/RUN_ID/FILE, but got {name}")
    return fetch(run_id, artifact)


def new_folder() -> str:
    """A new folder for copies of artifacts; removed when this process ends, as checkpoints are large."""
    return tempfile.mkdtemp(dir=_copies())


@functools.cache
def _copies() -> str:
    folder = tempfile.TemporaryDirectory(prefix="retinaflow-")
    atexit.register(folder.cleanup)
    return folder.name
