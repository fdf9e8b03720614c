"""What a recipe's settings do to a training, and what resuming makes of settings given again."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from retinaflow.commands import predict, train
from retinaflow.errors import WorkerError
from retinaflow.inference.checkpoint import load_checkpoint
from retinaflow.settings.commands import STEERING, WITHOUT_EFFECT, PredictConfig, TrainConfig
from retinaflow.settings.resolve import resolve
from retinaflow.training.loop import StepResult
from retinaflow.training.progress import Progress
from retinaflow.training.resume import resumed_settings


@pytest.mark.slow
def test_training_ends_early_when_the_metric_no_longer_rises_and_stays_ended(workshop: Any) -> None:
    """With a learning rate of nothing the second evaluation is like the first, and patience is one."""
    given = {"lr": 1e-12, "epochs": 5, "patience": 1, "batch_norm": "train", "keep_best": "val/mAP_frequent"}
    result = train.run(workshop.settings(**given, track="false", output=str(workshop.folder / "early")))
    last = result.checkpoint.with_name("last.pt")
    checkpoint = load_checkpoint(last)
    assert checkpoint.epoch == 2
    assert checkpoint.progress is not None
    assert checkpoint.progress["best"] == result.evaluation.metrics["val/mAP_frequent"]
    again = train.run(resolve(TrainConfig, {"resume": str(last)}))
    assert load_checkpoint(again.checkpoint.with_name("last.pt")).epoch == 2
    assert again.evaluation.metrics == result.evaluation.metrics


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["efficientnet_b0", "timm:tf_efficientnet_lite0"])
def test_a_training_of_another_backbone_is_resumed_exactly_and_used(
    backbone: str, workshop: Any, tmp_path: Path
) -> None:
    constant = {"schedule": "constant", "warmup": 0}
    given = {"backbone": backbone, "track": "false", "max_detections_per_class": 5, **constant}
    whole = train.run(workshop.settings(**given, output=str(tmp_path / "whole")))
    train.run(workshop.settings(**given, epochs=1, output=str(tmp_path / "half")))
    half = tmp_path / "half/train/checkpoints/last.pt"
    again = train.run(resolve(TrainConfig, {"resume": str(half), "epochs": 2}))
    first, second = (load_checkpoint(done.checkpoint.with_name("last.pt")).state for done in (whole, again))
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]), key
    # The limit of the training is that of later commands.
    given = {"from_run": str(whole.checkpoint), "data": str(workshop.data), "split": "validation", "track": "false"}
    table = pd.read_csv(predict.run(resolve(PredictConfig, {**given, "output": str(tmp_path / "predicted")})))
    assert table.groupby(["ImageID", "LabelName"]).size().max() <= 5


@pytest.mark.slow
def test_a_log_has_plain_lines_with_time_left_and_ap_by_bin(
    workshop: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("retinaflow.progress.SECONDS_PER_LINE", 0.0)
    train.run(workshop.settings(epochs=1, track="false", output=str(workshop.folder / "lines")))
    lines = capsys.readouterr().out.splitlines()
    within = [line for line in lines if line.endswith(" left")]
    assert len(within) == 3
    assert within[0].startswith("4 of 12 images  epoch 1/1  loss class ")
    assert " images/s  " in within[0]
    epoch = next(line for line in lines if line.startswith("epoch   1/1  loss"))
    assert "val/mAP 0." in epoch
    by_bin = epoch.split("by bin, rarest first: ")[1].split()
    assert len(by_bin) >= 2
    assert all(0 <= float(value) <= 1 for value in by_bin)
    rows = [json.loads(line) for line in (workshop.folder / "lines/train/metrics.jsonl").read_text().splitlines()]
    names = {name for row in rows for name in row}
    assert {"train/peak_memory_mib", "train/waiting_for_images", "system/cpu_utilization_percentage"} <= names


def test_a_loader_worker_that_dies_is_named(workshop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def kill(self: Progress, step: StepResult) -> None:
        del self, step
        for child in multiprocessing.active_children():
            os.kill(child.ident or 0, signal.SIGKILL)
            child.join()

    monkeypatch.setattr(Progress, "after_step", kill)
    output = workshop.folder / "worker"
    with pytest.raises(WorkerError, match=r"loader worker \d+.* after step 1, .*resume= resumes from .*last\.pt"):
        train.run(workshop.settings(workers=1, epochs=40, batch_size=1, track="false", output=str(output)))


# Resuming: whose settings


@dataclass
class _Kept:
    """All of a checkpoint that the settings are taken from."""

    settings: dict[str, Any]


def _kept(**given: Any) -> Any:
    return _Kept(resolve(TrainConfig, {"data": "photos", "lr": 0.02, **given}).model_dump(mode="json"))


def test_resume_alone_takes_the_checkpoints_settings() -> None:
    config = resumed_settings(resolve(TrainConfig, {"resume": "abc"}), _kept(num_bins=3))
    assert (config.data, config.lr, config.num_bins, config.resume) == ("photos", 0.02, 3, "abc")


def test_what_steers_the_rest_is_used_and_reported(capsys: pytest.CaptureFixture[str]) -> None:
    config = resumed_settings(resolve(TrainConfig, {"resume": "abc", "lr": "0.01", "workers": "3"}), _kept())
    assert (config.lr, config.workers) == (0.01, 3)
    assert capsys.readouterr().out == "resume: lr=0.01 from here on, instead of 0.02\n"


def test_a_training_from_before_the_backbone_had_a_learning_rate_goes_on_with_one_for_all() -> None:
    kept = _kept(weights="imagenet")
    assert kept.settings.pop("backbone_lr_factor") < 1
    assert resumed_settings(resolve(TrainConfig, {"resume": "abc"}), kept).backbone_lr_factor == 1


@pytest.mark.parametrize(("name", "value"), [("backbone", "resnet50"), ("batch_size", "2"), ("num_bins", "2")])
def test_what_the_checkpoint_cannot_be_resumed_with_is_refused(name: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"resume=abc: {name} must be that of the checkpoint, but got {name}={value}"):
        resumed_settings(resolve(TrainConfig, {"resume": "abc", name: value}), _kept())


def test_the_lists_of_what_may_change_name_settings() -> None:
    assert set(TrainConfig.model_fields) >= WITHOUT_EFFECT | STEERING
    assert not WITHOUT_EFFECT & STEERING
