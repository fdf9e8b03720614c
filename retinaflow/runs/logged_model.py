"""A checkpoint as MLflow's logged model: its files, the step and the metrics of its evaluation, and its registration.

:func:`log_checkpoint` may be called again after an answer of the store was lost: it finishes what an earlier call
began. The tag :data:`DIGEST` of a model is the digest of its checkpoint, so a run that uses a checkpoint can name the
logged model that has exactly these weights.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.entities import LoggedModel, LoggedModelOutput, LoggedModelStatus, Metric
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

from retinaflow.inference.merged_checkpoint import MergedCheckpoint, load_model
from retinaflow.runs.registry import MODEL, quiet
from retinaflow.runs.served_images import EXAMPLE, Limits
from retinaflow.runs.served_requirements import serving_requirements
from retinaflow.runs.store import filter_of, store_errors, uri
from retinaflow.settings.backbone_names import TIMM

DIGEST = "retinaflow.model_digest"
DIGEST_LETTERS = 16
LINKED = ("val/", "rare/")
"""Prefixes of the metrics of a run that become metrics of its model, by which the Models tab is sorted."""


def log_checkpoint(
    run_id: str, checkpoint: Path, *, register_as: str | None, step: int, dataset: tuple[str | None, str | None]
) -> None:
    """Log a checkpoint as a model of a run (models from code, no pickle); register it if a name is given.

    ``step``: of its evaluation, whose metrics the run has; ``dataset``: name and digest of the evaluated images. Raises
    what MLflow raises.
    """
    client, loaded = mlflow.MlflowClient(), load_model(checkpoint)
    model = _model_for(client, run_id, loaded.digest[:DIGEST_LETTERS])
    outputs = client.get_run(run_id).outputs
    if model.model_id not in [output.model_id for output in (outputs.model_outputs if outputs else [])]:
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step)])
    link_metrics(client, run_id, model.model_id, step=step, dataset=dataset)
    if model.status != LoggedModelStatus.READY:
        parts = [one.checkpoint for one in loaded.members] if isinstance(loaded, MergedCheckpoint) else [loaded]
        uses_timm = any(part.network.backbone.startswith(TIMM) for part in parts)
        _save(client, model, run_id, {"checkpoint": str(checkpoint)}, ["timm"] if uses_timm else [])
        client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
    if register_as is not None and not _is_registered(client, model.model_id, run_id, register_as):
        with quiet():
            mlflow.register_model(f"models:/{model.model_id}", register_as)


def model_of_run(run_id: str, digest: str | None = None) -> str | None:
    """Id of the newest model that a run has logged, with the weights of ``digest`` if that is given; None when it has
    none, or is unknown."""
    try:
        found = _models_of(mlflow.MlflowClient(), run_id)
    except MlflowException:
        return None
    return next((model.model_id for model in found if digest is None or _has_digest(model, digest)), None)


def weights_of_run(run_id: str) -> list[str]:
    """The digests, as in the tag :data:`DIGEST`, of the models that a run has logged."""
    with store_errors(f"the models of run {run_id} cannot be read in {uri()}"):
        found = _models_of(mlflow.MlflowClient(), run_id)
    return list(dict.fromkeys(model.tags[DIGEST] for model in found if DIGEST in model.tags))


def run_of_weights(digest: str) -> str | None:
    """Id of the newest run that has logged a model with these weights; None when the store knows of none."""
    client = mlflow.MlflowClient()
    with store_errors(f"the models of {uri()} cannot be read"):
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        wanted = filter_of({f"tags.`{DIGEST}`": digest[:DIGEST_LETTERS]})
        found = client.search_logged_models(experiments, filter_string=wanted) if experiments else []
    newest = max(found, key=lambda model: model.creation_timestamp, default=None)
    return None if newest is None else newest.source_run_id


def model_of_name(name: str) -> str | None:
    """Id of the logged model behind a registered one (``models:/NAME@ALIAS``); None when it is not known."""
    try:
        found = mlflow.models.get_model_info(name).model_id
    except (MlflowException, OSError):
        return None
    return str(found) if found else None


def _models_of(client: mlflow.MlflowClient, run_id: str) -> list[LoggedModel]:
    """The models of a run, newest first."""
    experiment = client.get_run(run_id).info.experiment_id
    found = client.search_logged_models([experiment], filter_string=filter_of({"source_run_id": run_id}))
    return sorted(found, key=lambda model: -model.creation_timestamp)


def _has_digest(model: LoggedModel, digest: str) -> bool:
    return bool(model.tags.get(DIGEST) == digest[:DIGEST_LETTERS])


def _model_for(client: mlflow.MlflowClient, run_id: str, digest: str) -> LoggedModel:
    """The model that an earlier call has begun, else a new one."""
    begun = next((model for model in _models_of(client, run_id) if _has_digest(model, digest)), None)
    if begun is not None:
        return begun
    run = client.get_run(run_id)
    return client.create_logged_model(
        run.info.experiment_id,
        name=MODEL,
        source_run_id=run_id,
        tags={DIGEST: digest},
        params=dict(run.data.params),
        model_type="object-detection",
    )


def link_metrics(
    client: mlflow.MlflowClient, run_id: str, model_id: str, *, step: int, dataset: tuple[str | None, str | None]
) -> None:
    """Make the points that the run has at this step those of the model too: the same points, so the run gets none."""
    names = [name for name in client.get_run(run_id).data.metrics if name.startswith(LINKED)]
    points = [point for name in names for point in client.get_metric_history(run_id, name) if point.step == step]
    metrics = [Metric(point.key, point.value, point.timestamp, step, model_id, *dataset) for point in points]
    if metrics:
        client.log_batch(run_id, metrics, synchronous=True)


def _save(
    client: mlflow.MlflowClient, model: LoggedModel, run_id: str, artifacts: Mapping[str, str], needs: list[str]
) -> None:
    """Write the files of a model and send them."""
    with quiet(), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / MODEL
        mlflow.pyfunc.save_model(
            path=str(path),
            mlflow_model=Model(
                artifact_path=model.artifact_location,
                model_uuid=model.model_id,
                run_id=run_id,
                model_id=model.model_id,
            ),
            python_model=str(Path(__file__).with_name("served_model.py")),
            artifacts=dict(artifacts),
            code_paths=[str(Path(__file__).parents[1])],
            signature=_signature(),
            input_example=(pd.DataFrame({"image": [EXAMPLE]}), {"score_threshold": 0.3}),
            model_config={"images": "base64", **Limits().as_settings()},
            pip_requirements=serving_requirements(needs),
        )
        for cache in path.rglob("__pycache__"):
            shutil.rmtree(cache, ignore_errors=True)
        client.log_model_artifacts(model.model_id, str(path))


def _signature() -> Any:
    outputs = [
        ColSpec(DataType.long, "image"),
        *(ColSpec(DataType.double, name) for name in ("x1", "y1", "x2", "y2", "score")),
    ]
    return ModelSignature(
        inputs=Schema([ColSpec(DataType.string, "image")]),
        outputs=Schema([*outputs, ColSpec(DataType.string, "label"), ColSpec(DataType.string, "class")]),
        params=ParamSchema([ParamSpec("score_threshold", DataType.double, 0.0)]),
    )


def _is_registered(client: mlflow.MlflowClient, model_id: str, run_id: str, name: str) -> bool:
    versions = client.search_model_versions(filter_of({"name": name, "run_id": run_id}))
    return any(version.model_id == model_id or model_id in str(version.source) for version in versions)
