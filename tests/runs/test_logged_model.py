"""The model of a training in MLflow: which metrics it has, which runs name it, and that it is logged once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow.tracking import MlflowClient

from retinaflow.commands import export, predict, promote
from retinaflow.runs import logged_model
from retinaflow.runs.models import TrainedModel
from retinaflow.settings.commands import ExportConfig, PredictConfig, PromoteConfig
from retinaflow.settings.resolve import resolve

pytestmark = pytest.mark.slow


def _model(run_id: str) -> Any:
    [found] = logged_model._models_of(MlflowClient(), run_id)
    return found


def test_a_model_has_the_metrics_and_the_step_of_its_evaluation_on_the_validation_images(
    trained: Any, workshop: Any
) -> None:
    client, model = MlflowClient(), _model(trained.run_id)
    run = client.get_run(trained.run_id)
    validation = run.inputs.dataset_inputs[1].dataset
    own = {metric.key: metric for metric in model.metrics if metric.run_id == trained.run_id}
    assert own["val/mAP"].value == pytest.approx(trained.evaluation.metrics["val/mAP"])
    assert set(trained.evaluation.metrics) <= set(own)
    assert {metric.dataset_name for metric in own.values()} == {f"{workshop.data.name}/validation"}
    assert {metric.dataset_digest for metric in own.values()} == {validation.digest}
    [output] = run.outputs.model_outputs
    assert (output.model_id, output.step) == (model.model_id, own["val/mAP"].step)
    assert output.step in (3, 6)  # Two epochs of three steps.
    # The points are those of the run, which has each of them once.
    steps = [point.step for point in client.get_metric_history(trained.run_id, "val/mAP")]
    assert steps == [3, 6]
    found = mlflow.search_logged_models(
        experiment_ids=[run.info.experiment_id], filter_string="metrics.`val/mAP` >= 0", output_format="list"
    )
    assert model.model_id in [one.model_id for one in found]


def test_an_evaluation_gives_its_metrics_to_the_model_that_it_names_as_input(trained: Any, evaluated: Path) -> None:
    [run] = mlflow.search_runs(
        search_all_experiments=True,
        filter_string=f"params.output = '{evaluated}'",
        output_format="list",
    )
    run = MlflowClient().get_run(run.info.run_id)  # A search returns no models.
    model = _model(trained.run_id)
    assert [one.model_id for one in run.inputs.model_inputs] == [model.model_id]
    given = {metric.key: metric.value for metric in model.metrics if metric.run_id == run.info.run_id}
    assert given == {name: value for name, value in run.data.metrics.items() if name.startswith("val/")}


def _inputs_of_last(command: str) -> list[str]:
    [run] = mlflow.search_runs(
        search_all_experiments=True,
        filter_string=f"tags.`retinaflow.command` = '{command}'",
        order_by=["attributes.start_time DESC"],
        max_results=1,
        output_format="list",
    )
    return [one.model_id for one in MlflowClient().get_run(run.info.run_id).inputs.model_inputs]


def test_runs_that_use_a_model_name_it_as_input(trained: Any, workshop: Any) -> None:
    model = _model(trained.run_id).model_id
    output = workshop.folder / "used"
    predict.run(resolve(PredictConfig, {"from_run": "models:/tiny-detector/1", "output": str(output)}))
    assert _inputs_of_last("predict") == [model]
    promote.run(resolve(PromoteConfig, {"runs": trained.run_id, "register_as": "named", "bootstrap": "100"}))
    assert _inputs_of_last("promote") == [model]
    pytest.importorskip("onnx")
    export.run(resolve(ExportConfig, {"from_run": trained.run_id, "output": str(output / "model.onnx")}))
    assert _inputs_of_last("export") == [model]


def test_a_checkpoint_with_other_weights_is_no_model_of_the_run(trained: Any) -> None:
    assert TrainedModel.find(trained.run_id).model_id == _model(trained.run_id).model_id
    assert logged_model.model_of_run(trained.run_id, "0" * 64) is None
    assert TrainedModel.find(trained.checkpoint).model_id is None
    assert logged_model.model_of_run("0" * 32) is None


@pytest.mark.parametrize("lost", ["create_logged_model", "log_outputs", "log_batch", "finalize_logged_model"])
def test_a_model_is_logged_once_whichever_answer_is_lost(
    lost: str, trained: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = MlflowClient()
    experiment = client.get_run(trained.run_id).info.experiment_id
    run_id = client.create_run(experiment).info.run_id
    client.log_metric(run_id, "val/mAP", 0.5, step=7)
    whole, calls = getattr(MlflowClient, lost), []

    def unanswered_once(client: MlflowClient, *words: object, **named: object) -> object:
        calls.append(lost)
        answer = whole(client, *words, **named)
        if len(calls) == 1:
            raise ConnectionError("the answer was lost")
        return answer

    monkeypatch.setattr(MlflowClient, lost, unanswered_once)
    name = f"once-{lost}"
    log = (run_id, trained.checkpoint)
    more: dict[str, Any] = {"register_as": name, "step": 7, "dataset": ("birds/validation", "0123456789abcdef")}
    with pytest.raises(ConnectionError):
        logged_model.log_checkpoint(*log, **more)
    for _ in range(2):
        logged_model.log_checkpoint(*log, **more)
    model = _model(run_id)
    assert str(model.status) == "READY"
    assert [(metric.key, metric.value, metric.dataset_name) for metric in model.metrics] == [
        ("val/mAP", 0.5, "birds/validation")
    ]
    assert len(client.get_metric_history(run_id, "val/mAP")) == 1
    assert [(one.model_id, one.step) for one in client.get_run(run_id).outputs.model_outputs] == [(model.model_id, 7)]
    [version] = client.search_model_versions(f"name = '{name}'")
    assert version.run_id == run_id
