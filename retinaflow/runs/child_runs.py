"""Runs under another one, made, found and opened by id in any process on any machine: the trials of a search.

Unlike :func:`retinaflow.runs.tracking.start_run` this leaves MLflow's active run alone. Such a run is ended by
:func:`retinaflow.runs.tracking.end_run`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

# First, as it decides on MLflow's environment before MLflow is loaded.
from retinaflow.runs.mlflow_run import MlflowRun, refuses, store_uri  # isort: skip
import mlflow
from mlflow.exceptions import MlflowException

from retinaflow.errors import first_line
from retinaflow.runs import tracking
from retinaflow.runs.outbox import PAUSES


def start_child(parent_id: str, *, name: str, tags: Mapping[str, str], folder: Path) -> MlflowRun:
    """A new run under another; it stays RUNNING until it is ended.

    ``tags`` tell it from the parent's other children; ``folder``: where results wait that have not arrived. A store
    that is away is waited for as at the end of a run. Raises ValueError when it stays away or lacks the parent.
    """
    tries = 0

    def make() -> str:
        nonlocal tries
        tries += 1
        # An earlier try may have made it, and the answer was lost.
        found = _children(parent_id, tags) if tries > 1 else []
        return found[0] if found else _made(parent_id, name, tags)

    return open_run(_patiently(make, parent_id), folder)


def open_run(run_id: str, folder: Path, *, resumed: bool = False) -> MlflowRun:
    """A run that is there already, to log to. What an earlier process left unsent in ``folder`` is sent first."""
    return MlflowRun(run_id, folder / f"unsent-{run_id}", resumed=resumed)


def children(parent_id: str, *, tags: Mapping[str, str]) -> list[str]:
    """Ids of the runs under another that have these tags. Raises ValueError when the store cannot say."""
    try:
        return _children(parent_id, tags)
    except MlflowException as error:
        raise _not_found(parent_id, error) from None


def _children(parent_id: str, tags: Mapping[str, str]) -> list[str]:
    client = mlflow.MlflowClient()
    wanted = {"mlflow.parentRunId": parent_id, **tags}
    found = client.search_runs(
        [client.get_run(parent_id).info.experiment_id],
        filter_string=" and ".join(f"tags.`{key}` = '{value}'" for key, value in wanted.items()),
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


def _patiently(call: Callable[[], str], parent_id: str) -> str:
    deadline, tries = time.monotonic() + tracking.PATIENCE, 0
    while True:
        try:
            return call()
        except MlflowException as error:
            if refuses(error) or time.monotonic() > deadline:
                raise _not_found(parent_id, error) from None
        time.sleep(PAUSES[min(tries, len(PAUSES) - 1)])
        tries += 1


def _not_found(parent_id: str, error: MlflowException) -> ValueError:
    return ValueError(f"run {parent_id} is not in {store_uri()}: {first_line(error)}")
