"""The experiment of a run: by the setting, or by MLflow's own variables; made where there is none of that name.

It is passed to MLflow with each run. ``mlflow.set_experiment`` would change the environment of this process, in which a
later command could not distinguish it from what the user has set.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from typing import Any

import mlflow
from mlflow.entities import LifecycleStage
from mlflow.exceptions import MlflowException
from mlflow.tracking import fluent

from retinaflow.errors import SettingError
from retinaflow.files import growing_waits, retry
from retinaflow.runs.store import refuses, store_errors, uri
from retinaflow.settings.data_settings import DEFAULT_EXPERIMENT, EXPERIMENT_VARIABLES

NAME, ID = EXPERIMENT_VARIABLES
KIND = "mlflow.experimentKind"
"""Tag of an experiment with its kind: of trainings, or of generative models."""
RUN_NAME, TAGS = "MLFLOW_RUN_NAME", "MLFLOW_TAGS"
"""Environment variables that the trainers of other libraries read for the name and the tags of a run."""


def find_experiment(name: str | None) -> Any:
    """MLflow's experiment of that name, or, for None, that of the environment. A new name makes a new experiment.

    Raises SettingError for an experiment that cannot take runs, and StoreError when the store does not answer.
    """
    number = None if name else os.environ.get(ID) or None
    name = name or os.environ.get(NAME) or (None if number else DEFAULT_EXPERIMENT)
    with store_errors(f"experiment {name or number} cannot be opened in {uri()}", refused=SettingError):
        # Several processes may make it at the same time, and a database may be busy with the others.
        found = retry(
            lambda: _of_name(name) if name is not None else mlflow.get_experiment(str(number)),
            waits=growing_waits(0.1, 1.0, count=6),
            may_pass=lambda error: not refuses(error) or "already exists" in str(error).lower(),
        )
    if name is not None and number is not None and found.experiment_id != number:
        raise SettingError(f"{NAME}={name} has the id {found.experiment_id}, but {ID}={number}; set one of them only")
    if found.lifecycle_stage != LifecycleStage.ACTIVE:
        raise SettingError(
            f"experiment {found.name} is deleted in {uri()}, and a deleted experiment takes no runs; choose another "
            f"experiment=, or restore it: mlflow experiments restore --experiment-id {found.experiment_id}"
        )
    return found


def _of_name(name: str) -> Any:
    found = mlflow.get_experiment_by_name(name)
    if found is None:
        found = mlflow.get_experiment(mlflow.create_experiment(name))
    return found


def mark_experiment(number: str) -> None:
    """Tag an experiment as one of trainings, unless somebody has given it a kind."""
    # Whoever may add runs may not always change the experiment.
    with contextlib.suppress(MlflowException):
        if KIND not in mlflow.get_experiment(number).tags:
            mlflow.MlflowClient().set_experiment_tag(number, KIND, "custom_model_development")


@contextlib.contextmanager
def in_experiment_of(run_id: str) -> Iterator[None]:
    """Inside the block a run's experiment is the active one: MLflow resumes no run of another than a notebook may have
    chosen. After it the user's choice is as it was."""
    variable, active = os.environ.get(ID), fluent._active_experiment_id
    mlflow.set_experiment(experiment_id=mlflow.get_run(run_id).info.experiment_id)
    try:
        yield
    finally:
        fluent._active_experiment_id = active
        # It has written the variable too.
        if variable is None:
            os.environ.pop(ID, None)
        else:
            os.environ[ID] = variable


def run_name_of_environment() -> str | None:
    """The name for a run that no command has named."""
    return os.environ.get(RUN_NAME) or None


def tags_of_environment() -> dict[str, str]:
    """Tags for the run of a command. Raises SettingError for what is no JSON object."""
    text = os.environ.get(TAGS)
    if not text:
        return {}
    try:
        tags = json.loads(text)
    except json.JSONDecodeError as error:
        raise SettingError(f"{TAGS} must be a JSON object of tags, but it cannot be read: {error}") from None
    if not isinstance(tags, dict):
        raise SettingError(f"{TAGS} must be a JSON object of tags, but got {type(tags).__name__}")
    return {str(name): str(value) for name, value in tags.items()}


def refused_model_name(name: str) -> str | None:
    """Why no model can be registered under a name; None when one can."""
    from mlflow.utils.validation import _validate_model_name

    if "'" in name and '"' in name:
        return "it holds both kinds of quotes"
    if mlflow.get_registry_uri().startswith(("databricks", "uc")):
        return None  # CATALOG.SCHEMA.NAME, which that registry verifies itself.
    return _refusal(_validate_model_name, name)


def refused_alias(alias: str) -> str | None:
    """Why a registered model cannot have an alias; None when it can."""
    from mlflow.utils.validation import _validate_model_alias_name, _validate_model_alias_name_reserved

    return _refusal(_validate_model_alias_name, alias) or _refusal(_validate_model_alias_name_reserved, alias)


def _refusal(validate: Any, text: str) -> str | None:
    try:
        validate(text)
    except MlflowException as error:
        return str(error.message)
    return None
