"""Two ranks of gloo train what one trains, in one MLflow run; one that dies is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
from mlflow.tracking import MlflowClient

from retinaflow.commands import train
from retinaflow.data.batching import AspectBuckets, plan_batches
from retinaflow.errors import WorkerError
from retinaflow.inference.checkpoint import load_checkpoint
from retinaflow.training import launch

# AdamW turns the rounding of tiny gradients into whole steps, and large steps carry it on; small steps of SGD do not.
RECIPE = {"optimizer": "sgd", "schedule": "constant", "lr": 1e-5, "momentum": 0.0, "epochs": 2, "clip": 0}


def _history(run_id: str, name: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in MlflowClient().get_metric_history(run_id, name)]


@pytest.mark.slow
def test_two_ranks_train_what_one_trains_in_one_run(workshop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    one = train.run(workshop.settings(**RECIPE, output=str(workshop.folder / "one")))
    # As under `mlflow run`: all processes see the run, the first one alone joins it.
    mlflow.set_experiment("two processes")
    run_id = MlflowClient().create_run(mlflow.get_experiment_by_name("two processes").experiment_id).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
    two = train.run(workshop.settings(**RECIPE, nproc=2, output=str(workshop.folder / "two")))

    assert two.run_id == run_id
    runs = mlflow.search_runs(experiment_names=["two processes"], output_format="list")
    assert [(run.info.run_id, run.info.status) for run in runs] == [(run_id, "FINISHED")]
    assert runs[0].data.tags["retinaflow.processes"] == "2"
    for name in ("train/loss_class", "train/loss_box", "train/gradient_norm"):
        ours, theirs = _history(two.run_id, name), _history(one.run_id, name)
        assert [step for step, _ in ours] == [step for step, _ in theirs] == [3, 6]
        np.testing.assert_allclose([value for _, value in ours], [value for _, value in theirs], rtol=1e-3)
    ours, theirs = (load_checkpoint(result.checkpoint.with_name("last.pt")).state for result in (two, one))
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-3, atol=1e-4, msg=lambda text, key=key: f"{key}: {text}")
    assert two.evaluation.metrics == pytest.approx(one.evaluation.metrics, abs=0.02)


@pytest.mark.parametrize("length", [2, 12, 13, 37])
def test_every_planned_image_is_on_one_rank_and_the_batches_are_those_of_one_rank(length: int) -> None:
    rng = np.random.default_rng(length)
    buckets = AspectBuckets(((64, 96), (64, 64), (96, 64)))
    bucket_of_image = rng.integers(0, 3, 20)
    plan = rng.integers(0, 20, length)
    alone = plan_batches(plan, bucket_of_image, buckets, batch_size=4)
    parts = [plan_batches(plan, bucket_of_image, buckets, batch_size=2, rank=rank, world_size=2) for rank in (0, 1)]
    assert len(parts[0]) == len(parts[1])
    assert sorted(position for part in parts for batch in part for position in batch.positions) == list(range(length))
    together = [
        np.sort(np.concatenate([first.positions, second.positions])) for first, second in zip(*parts, strict=True)
    ]
    # A left-over of one image cannot be shared out: then the last two batches are cut anew.
    if len(alone[-1].positions) >= 2:
        assert all(np.array_equal(both, np.sort(batch.positions)) for both, batch in zip(together, alone, strict=True))


def test_a_rank_that_dies_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho 'no such device'\nkill -9 $$\n")
    script.chmod(0o755)
    monkeypatch.setattr(launch.sys, "executable", str(script))
    with (
        pytest.raises(WorkerError, match=r"rank 1 \(pid \d+\) died: killed by SIGKILL\n  no such"),
        launch.ranks(2),
    ):
        pass
