"""Precision, recall and F1 at a score threshold and at the best one."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from scoring_scenes import Found, Scene, Truth
from test_challenge import FAR, LEFT, NAN, RIGHT, one_class, scenes

from retinaflow.metric.challenge import Kind, match
from retinaflow.metric.operating_points import at_threshold, best_f1

# Two ground-truth boxes; by score: right 0.9, wrong 0.8, right 0.4.
SCENE = one_class(
    [Truth("i1", 0, LEFT), Truth("i1", 0, RIGHT)],
    [Found("i1", 0, 0.9, LEFT), Found("i1", 0, 0.8, FAR), Found("i1", 0, 0.4, RIGHT)],
)


@pytest.mark.parametrize(
    ("threshold", "precision", "recall", "f1"),
    [
        pytest.param(0.95, NAN, 0.0, 0.0, id="nothing passes"),
        pytest.param(0.9, 1.0, 1 / 2, 2 / 3, id="the score itself passes"),
        pytest.param(0.5, 1 / 2, 1 / 2, 1 / 2, id="one right, one wrong"),
        pytest.param(0.0, 2 / 3, 1.0, 4 / 5, id="all"),
    ],
)
def test_the_point_at_a_threshold_worked_by_hand(threshold: float, precision: float, recall: float, f1: float) -> None:
    found = at_threshold(match(SCENE.detections(), SCENE.annotations()), threshold)
    got = [found.precision[0], found.recall[0], found.f1[0]]
    np.testing.assert_allclose(got, [precision, recall, f1], rtol=0, atol=1e-12)


def test_the_best_f1_worked_by_hand() -> None:
    # F1 after each: 2/(1+2) = 2/3, 2/(2+2) = 1/2, 4/(3+2) = 4/5.
    found = best_f1(match(SCENE.detections(), SCENE.annotations()))
    assert [found.threshold[0], found.f1[0]] == [0.4, pytest.approx(4 / 5)]
    assert [found.precision[0], found.recall[0]] == [pytest.approx(2 / 3), 1.0]


def test_classes_without_truth_or_without_a_right_detection_have_no_best_point() -> None:
    scene = Scene(3, (Truth("i1", 0, LEFT),), (), (Found("i1", 0, 0.9, FAR),))
    found = best_f1(match(scene.detections(), scene.annotations()))
    assert np.isnan([found.threshold, found.f1, found.recall, found.precision]).all()
    assert at_threshold(match(scene.detections(), scene.annotations()), 0.0).recall.tolist()[0] == 0.0


@settings(max_examples=40, deadline=None)
@given(scene=scenes())
def test_no_threshold_beats_the_best_f1_and_its_point_is_the_one_at_its_threshold(scene: Scene) -> None:
    matches = match(scene.detections(), scene.annotations())
    best = best_f1(matches)
    for c in range(scene.num_classes):
        own = matches.class_index == c
        right = own & (matches.kind != Kind.FALSE_POSITIVE)
        tried = {
            float(t): 2 * matches.weight[right & (matches.score >= t)].sum()
            / (matches.weight[right & (matches.score >= t)].sum()
               + (own & ~right & (matches.score >= t)).sum() + matches.num_truths[c])
            for t in matches.score[own]
            if matches.num_truths[c] > 0
        }  # fmt: skip
        highest = max(tried.values(), default=0.0)
        if highest > 0:
            assert best.f1[c] == pytest.approx(highest)
            assert best.threshold[c] == max(t for t, f1 in tried.items() if math.isclose(f1, highest))
            there = at_threshold(matches, best.threshold[c])
            assert (there.precision[c], there.recall[c]) == (best.precision[c], best.recall[c])
        else:
            assert math.isnan(best.f1[c])
