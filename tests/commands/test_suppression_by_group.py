"""Class groups suppressed each in its own way, from the command line to the detections."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from retinaflow.commands import train
from retinaflow.detections import Detections
from retinaflow.inference.checkpoint import load_checkpoint, save_checkpoint
from retinaflow.inference.detector import Detector
from retinaflow.inference.evaluated_images import images_for_model
from retinaflow.settings.commands import EvaluateConfig
from retinaflow.settings.groups import DetectorSettings
from retinaflow.settings.resolve import resolve


def _found(checkpoint: Path, **given: str) -> Detections:
    loaded = load_checkpoint(checkpoint)
    settings = DetectorSettings(score_threshold=0.01, max_detections=100_000, **given)
    images = images_for_model(resolve(EvaluateConfig, {}), loaded.taxonomy, loaded.settings)
    return Detector.load(loaded, settings).detect(images.index)


def _of(found: Detections, label: int) -> list[float]:
    return sorted(found.score[found.class_index == label].tolist())


def test_a_class_is_thinned_out_by_the_rule_of_its_group_and_as_it_would_be_alone(
    trained: train.TrainResult, tmp_path: Path
) -> None:
    loaded = load_checkpoint(trained.checkpoint)
    car, tree, bus = (loaded.taxonomy.find(name) for name in ("Car", "Tree", "Bus"))
    # The rules of a training go with its checkpoint.
    loaded.settings.update(nms="Car:soft-nms:0.4,Tree:nms:0.9")
    save_checkpoint(loaded, tmp_path / "best.pt")
    mixed = _found(tmp_path / "best.pt")
    soft, wide, plain = (_found(trained.checkpoint, nms=nms) for nms in ("soft-nms:0.4", "nms:0.9", "nms"))
    assert _of(mixed, car) == _of(soft, car) != _of(plain, car)
    assert _of(mixed, tree) == _of(wide, tree) != _of(plain, tree)
    assert _of(mixed, bus) == _of(plain, bus)


def test_evaluate_says_which_class_a_rule_does_not_know(
    workshop: Any, trained: train.TrainResult, capsys: pytest.CaptureFixture[str]
) -> None:
    assert workshop.cli("evaluate", from_run=trained.checkpoint, track="false", nms="Carr:soft-nms") != 0
    assert "nms=Carr: no class has the id or name 'Carr'" in capsys.readouterr().err
