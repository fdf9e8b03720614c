"""Registered models: the checkpoint of one, the champion of a name, and promotion to it."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import mlflow
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from retinaflow.errors import DataError, SettingError
from retinaflow.runs.store import filter_of, new_folder, refuses, store_errors, uri

MODEL = "model"
"""Name of the logged model of a run."""


def fetch_model(name: str) -> Path:
    """The checkpoint of a registered or logged model (``models:/NAME@ALIAS``, ``models:/NAME/VERSION``).

    Raises DataError when there is no such model, or when it holds no checkpoint.
    """
    with store_errors(f"from_run={name}: no such model in {uri()}", refused=DataError):
        folder = Path(mlflow.artifacts.download_artifacts(name, dst_path=new_folder()))
    found = sorted(folder.rglob("*.pt"))
    if not found:
        raise DataError(
            f"from_run={name}: the model holds no checkpoint, as one that is known by its "
            "predictions only, or that was not logged by retinaflow"
        )
    return found[0]


def run_of_model(name: str) -> str | None:
    """Id of the run that logged a model; None when the store has no record of it."""
    try:
        found = mlflow.models.get_model_info(name).run_id
    except (MlflowException, OSError):
        return None
    return str(found) if found else None


def champion(name: str, alias: str) -> tuple[str, str] | None:
    """(version, run id) of the registered model that has the alias; None when no version has it."""
    with store_errors(f"registered model {name} cannot be read"):
        try:
            version = mlflow.MlflowClient().get_model_version_by_alias(name, alias)
        except MlflowException as error:
            if refuses(error):
                return None
            raise
    return str(version.version), str(version.run_id)


def promote(run_id: str, name: str, *, alias: str, reason: str, tags: Mapping[str, str], has_model: bool = True) -> str:
    """Give a run's model the alias, as the version it has or a new one; the reason is its description.

    ``has_model=False``: the version is the evaluation of a detector that is not here, and cannot be loaded. Returns the
    version. Raises SettingError when the run has no model.
    """
    client = mlflow.MlflowClient()
    with store_errors(f"run {run_id}: its model cannot be registered as {name}", refused=SettingError):
        known = client.search_model_versions(filter_of({"name": name, "run_id": run_id}))
        version = max(known, key=lambda one: int(one.version)) if known else None
        if version is None:
            with quiet():
                version = _registered(run_id, name) if has_model else _registered_evaluation(run_id, name)
        client.update_model_version(name, version.version, description=reason)
        for key, value in tags.items():
            client.set_model_version_tag(name, version.version, key, value)
        client.set_registered_model_alias(name, alias, version.version)
    return str(version.version)


def _registered(run_id: str, name: str) -> ModelVersion:
    return mlflow.register_model(f"runs:/{run_id}/{MODEL}", name)


def _registered_evaluation(run_id: str, name: str) -> ModelVersion:
    client = mlflow.MlflowClient()
    with contextlib.suppress(MlflowException):
        client.create_registered_model(name)
    return client.create_model_version(name, client.get_run(run_id).info.artifact_uri, run_id)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside the block MLflow neither logs nor warns about models and type hints."""
    logger = logging.getLogger("mlflow")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
