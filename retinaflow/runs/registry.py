"""Logged and registered models: the checkpoint of one, the champion of a name, and promotion to it."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from retinaflow.errors import DataError, SettingError
from retinaflow.inference.checkpoint import load_checkpoint
from retinaflow.runs.served_requirements import serving_requirements
from retinaflow.runs.store import new_folder, refuses, store_errors, uri
from retinaflow.settings.backbone_names import TIMM

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
        known = client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'")
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


def log_checkpoint(run_id: str, checkpoint: Path, *, register_as: str | None) -> None:
    """Log a checkpoint as an MLflow model of a run (models from code, no pickle); register it if a name is given.

    Raises what MLflow raises.
    """
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    from retinaflow.runs.served_images import EXAMPLE, Limits

    outputs = [
        ColSpec(DataType.long, "image"),
        *(ColSpec(DataType.double, name) for name in ("x1", "y1", "x2", "y2", "score")),
    ]
    signature = ModelSignature(
        inputs=Schema([ColSpec(DataType.string, "image")]),
        outputs=Schema([*outputs, ColSpec(DataType.string, "label"), ColSpec(DataType.string, "class")]),
        params=ParamSchema([ParamSpec("score_threshold", DataType.double, 0.0)]),
    )
    uses_timm = load_checkpoint(checkpoint).network.backbone.startswith(TIMM)
    client = mlflow.MlflowClient()
    run = client.get_run(run_id)
    # pyfunc.log_model, but with the run named, and the model made in its experiment: the run that is active is so in
    # another thread, and without one MLflow takes the experiment that was chosen last.
    made = client.create_logged_model(
        run.info.experiment_id, name=MODEL, source_run_id=run_id, params=dict(run.data.params)
    )
    with quiet():
        Model.log(
            artifact_path=None,
            name=MODEL,
            model_id=made.model_id,
            run_id=run_id,
            flavor=_Unvalidated,
            validate_serving_input=False,
            python_model=str(Path(__file__).with_name("served_model.py")),
            artifacts={"checkpoint": str(checkpoint)},
            code_paths=[str(Path(__file__).parents[1])],
            signature=signature,
            input_example=(pd.DataFrame({"image": [EXAMPLE]}), {"score_threshold": 0.3}),
            model_config={"images": "base64", **Limits().as_settings()},
            registered_model_name=register_as,
            pip_requirements=serving_requirements(["timm"] if uses_timm else []),
            flavor_name="pyfunc.ModelFromCode",
        )


class _Unvalidated:
    """MLflow's pyfunc flavor without its validation, which would load the model again while it is logged."""

    @staticmethod
    def save_model(*, validate_serving_input: bool, **settings: Any) -> None:
        """Called by ``Model.log`` with all that it was given."""
        del validate_serving_input
        mlflow.pyfunc.save_model(**settings)


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
