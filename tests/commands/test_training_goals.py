"""``keep_best`` and ``target`` in real trainings: checked before the work, curves of named classes, resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from retinaflow.commands import train
from retinaflow.errors import SettingError
from retinaflow.inference.checkpoint import load_checkpoint
from retinaflow.settings.commands import TrainConfig
from retinaflow.settings.resolve import resolve


def points(folder: Path, name: str) -> list[float]:
    """The values of a metric, one for each step."""
    table = pd.read_json(folder / "metrics.jsonl", lines=True)
    return table[name].dropna().tolist() if name in table else []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"keep_best": "val/mAP_bin_9"},
            r"got val/mAP_bin_9; did you mean val/mAP_bin_.*there are val/mAP, .*val/coco_AP",
        ),
        ({"keep_best": "val/AP/Carr:2,val/mAP"}, r"no class has the id or name 'Carr'; did you mean Car"),
        ({"target": "val/accuracy:0.5"}, r"target must name metrics of these images, but got val/accuracy; there are"),
    ],
)
def test_goals_are_checked_before_anything_is_trained(
    given: dict[str, str], message: str, workshop: Any, tmp_path: Path
) -> None:
    with pytest.raises(SettingError, match=message):
        train.run(workshop.settings(**given, track="false", output=str(tmp_path)))
    assert not (tmp_path / "train").exists()


@pytest.mark.slow
def test_a_target_ends_a_training_which_stays_ended_and_can_be_raised(workshop: Any, tmp_path: Path) -> None:
    given = {"epochs": 3, "track": "false", "output": str(tmp_path)}
    goals = {"keep_best": "val/AP/Car:2,val/coco_AP:1", "target": "val/AP//m/0car:0.0001"}
    result = train.run(workshop.settings(**given, **goals))
    last, folder = result.checkpoint.with_name("last.pt"), tmp_path / "train"
    reached = load_checkpoint(last)
    assert reached.progress is not None
    curve = points(folder, "val/AP/Car")
    # The first evaluation that reached it is the last one.
    assert [value >= 0.0001 for value in curve] == [False] * (reached.epoch - 1) + [True]
    (seconds,) = points(folder, "time_to_target")
    assert 0 < seconds <= reached.progress["seconds"]
    assert reached.progress["time_to_target"] == [goals["target"], pytest.approx(seconds)]
    best = max(2 * car + coco for car, coco in zip(curve, points(folder, "val/coco_AP"), strict=True))
    assert reached.progress["best"] == pytest.approx(best / 3)
    assert any(result.evaluation.metrics["val/AP/Car"] == pytest.approx(value) for value in curve)
    train.run(resolve(TrainConfig, {"resume": str(last)}))
    assert load_checkpoint(last).epoch == reached.epoch
    with pytest.raises(SettingError, match="no class has the id or name"):
        train.run(resolve(TrainConfig, {"resume": str(last), "keep_best": "val/AP/Nothing"}))
    train.run(resolve(TrainConfig, {"resume": str(last), "target": "val/AP/Car:1"}))
    after = load_checkpoint(last)
    assert after.epoch == 3
    assert after.progress is not None
    assert after.progress["seconds"] > reached.progress["seconds"] or reached.epoch == 3


@pytest.mark.slow
def test_all_ranks_end_at_the_target(workshop: Any, tmp_path: Path) -> None:
    """The target is seen by rank 0 alone, which scores."""
    goals = {"target": "val/mAP:1e-6", "epochs": 4, "nproc": 2, "batch_norm": "train"}
    result = train.run(workshop.settings(**goals, track="false", output=str(tmp_path)))
    reached = load_checkpoint(result.checkpoint.with_name("last.pt"))
    assert reached.progress is not None
    target, seconds = reached.progress["time_to_target"]
    assert (target, points(tmp_path / "train", "time_to_target")) == ("val/mAP:1e-6", [pytest.approx(seconds)])
    assert len(points(tmp_path / "train", "val/mAP")) == reached.epoch
