"""What is verified before a command reads its data: that its results can be stored, and under the names that it was
given. A training must not find out at its end.
"""

from __future__ import annotations

import os
import secrets
import tempfile
from pathlib import Path
from typing import Any

import mlflow

from retinaflow.errors import SettingError, StoreError, first_line
from retinaflow.progress import report
from retinaflow.runs.experiment import find_experiment, refused_alias, refused_model_name, tags_of_environment
from retinaflow.runs.new_store import make_store
from retinaflow.runs.registry import quiet
from retinaflow.runs.store import store_errors, uri


def verify_store(
    *, experiment: str | None, register_as: str | None = None, alias: str | None = None, resumes: bool = False
) -> None:
    """Verify the model name and alias, the store, the experiment and its artifact root; a new sqlite store is made.

    ``experiment``: None unless it was given. ``resumes``: the run is there already, in an experiment of its own.
    Raises SettingError or StoreError.
    """
    for name, text, reason in (
        ("register_as", register_as, None if register_as is None else refused_model_name(register_as)),
        ("alias", alias, None if alias is None else refused_alias(alias)),
    ):
        if reason is not None:
            raise SettingError(f"{name}={text} is no name that the model registry takes: {reason}")
    tags_of_environment()
    with quiet():
        _verify_store(experiment, resumes=resumes)


def _verify_store(experiment: str | None, *, resumes: bool) -> None:
    with store_errors(f"the MLflow store {uri()} cannot be opened"):
        make_store(uri())
    launched = os.environ.get("MLFLOW_RUN_ID")
    if launched is None and resumes:
        return
    if launched is None:
        found = find_experiment(experiment)
        root = found.artifact_location
    else:
        with store_errors(f"run {launched} of mlflow run cannot be read in {uri()}"):
            root = mlflow.get_run(launched).info.artifact_uri
            found = mlflow.get_experiment(mlflow.get_run(launched).info.experiment_id)
        if experiment is not None and experiment != found.name:
            report(
                f"experiment={experiment} has no effect under mlflow run, which has started the run in experiment "
                f"{found.name}; give mlflow run --experiment-name {experiment}"
            )
    _verify_artifact_root(root, found)


def _verify_artifact_root(root: str, experiment: Any) -> None:
    """Write one small file and remove it. Raises StoreError."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    name = f".retinaflow-{secrets.token_hex(4)}"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_text("Whether files can be written here.\n", encoding="utf-8")
        try:
            repository = get_artifact_repository(root)
            repository.log_artifact(str(path))  # type: ignore[no-untyped-call]
        except Exception as error:  # Each kind of storage has its own errors.
            raise StoreError(
                f"the artifact root {root} of experiment {experiment.name} cannot be written: {first_line(error)}; "
                "correct its permissions or credentials, or choose another experiment="
            ) from error
        try:
            repository.delete_artifacts(name)  # type: ignore[no-untyped-call]
        except Exception as error:  # Who may write may not always delete.
            report(f"the file {name} stays in the artifact root {root}: {first_line(error)}")
