"""Goals of a training: the best epoch by any metric, patience, a target and the seconds to it, all resumed."""

from __future__ import annotations

import time
from typing import Any

import pytest

from retinaflow.errors import SettingError
from retinaflow.settings.commands import TrainConfig
from retinaflow.settings.resolve import resolve
from retinaflow.taxonomy import Taxonomy
from retinaflow.training.goals import Goals

TAXONOMY = Taxonomy(("/m/a", "/m/b"), ("Car", "Bus"))


def goals(**given: Any) -> Goals:
    return Goals(resolve(TrainConfig, {"epochs": "5", **given}), TAXONOMY)


def epochs(goal: Goals, *evaluations: dict[str, float]) -> list[bool]:
    """Whether each evaluation is the best so far."""
    return [goal.add(goal.value(metrics, epoch=n), metrics) for n, metrics in enumerate(evaluations, 1)]


FIRST = {"val/mAP": 0.3, "val/mAP_rare": 0.1, "val/AP/Car": 0.5}
SECOND = {"val/mAP": 0.2, "val/mAP_rare": 0.2, "val/AP/Car": 0.4}


@pytest.mark.parametrize(
    ("keep_best", "second_is_better"),
    [
        ("val/mAP", False),
        ("val/mAP_rare", True),
        ("val/AP//m/a", False),
        # 0.3 + 2 * 0.1 = 0.5 against 0.2 + 2 * 0.2 = 0.6
        ("val/mAP:1,val/mAP_rare:2", True),
        ("val/mAP:3,val/mAP_rare:2", False),
    ],
)
def test_the_best_epoch_is_that_of_the_chosen_metric(keep_best: str, second_is_better: bool) -> None:
    assert epochs(goals(keep_best=keep_best), FIRST, SECOND) == [True, second_is_better]


def test_another_metric_on_resume_compares_with_the_best_epoch_so_far() -> None:
    before = goals()
    epochs(before, FIRST, SECOND)
    after = goals(keep_best="val/mAP_rare")
    after.restore(before.stored())
    # The first epoch was the best by val/mAP; its val/mAP_rare is 0.1.
    assert (after.best, after.without_gain) == (0.1, 1)
    assert epochs(after, {**SECOND, "val/mAP_rare": 0.15}) == [True]


def test_without_ground_truth_the_last_epoch_is_the_best(capsys: pytest.CaptureFixture[str]) -> None:
    assert epochs(goals(), {}, {}) == [True, True]
    assert "val/mAP cannot be measured on these images" in capsys.readouterr().out


def test_patience_counts_evaluations_without_a_better_one() -> None:
    goal = goals(patience="2")
    epochs(goal, FIRST, SECOND)
    assert not goal.is_over(epoch=2)
    epochs(goal, SECOND)
    assert goal.is_over(epoch=3)


def test_a_target_ends_the_training_and_seconds_add_up(capsys: pytest.CaptureFixture[str]) -> None:
    goal = goals(target="val/mAP_rare:0.2")
    goal.start()
    assert not goal.reaches_target(FIRST)
    assert not goal.reaches_target({})
    assert goal.reaches_target(SECOND)
    time.sleep(0.05)
    stored = goal.stored()
    assert stored["seconds"] >= 0.05
    # A pause between the processes does not count.
    resumed = goals(target="val/mAP_rare:0.2")
    time.sleep(0.05)
    resumed.restore(stored)
    resumed.start()
    assert stored["seconds"] <= resumed.seconds < stored["seconds"] + 0.05
    resumed.seconds_to_target = 12.0
    finished = goals(target="val/mAP_rare:0.2")
    finished.restore(resumed.stored())
    assert finished.is_over(epoch=2)
    assert "target val/mAP_rare:0.2 reached in 12.0 s, after 2 epochs" in capsys.readouterr().out
    # A higher target is another one.
    higher = goals(target="val/mAP_rare:0.4")
    higher.restore(resumed.stored())
    assert not higher.is_over(epoch=2)


def test_a_target_that_was_not_reached_is_printed_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    goal = goals(target="val/AP/Car:0.9")
    assert not goal.is_over(epoch=4)
    assert not goal.is_over(epoch=5)
    assert capsys.readouterr().out == "target val/AP/Car:0.9 not reached in 5 epochs\n"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"keep_best": "val/mAP:0"}, r"keep_best.*NAME or NAME:WEIGHT, with a weight above 0"),
        ({"keep_best": "none"}, r"keep_best.*NAME or NAME:WEIGHT"),
        ({"keep_best": "val/mAP:-1,val/mAP_rare:2"}, r"with a weight above 0"),
        ({"target": "val/mAP"}, r"target.*METRIC:VALUE \(val/mAP:0.5\), with a value in \(0, 1\]"),
        ({"target": "val/mAP:34"}, r"with a value in \(0, 1\]"),
    ],
)
def test_goals_of_another_form_are_refused(given: dict[str, str], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        resolve(TrainConfig, given)
