"""Detections in batches and from several processes: the same number, bit for bit, in whatever order they come."""

from __future__ import annotations

import pickle
from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from scoring_scenes import Found, Label, Scene, Truth
from test_challenge import FAR, LEFT, RIGHT, scenes

from retinaflow.detections import Detections
from retinaflow.metric.challenge import (
    COCO_THRESHOLDS,
    Evaluator,
    ap_by_threshold,
    average_precision,
    challenge_scores,
    score,
)

TWO = Scene(
    1,
    (Truth("a", 0, LEFT), Truth("b", 0, LEFT)),
    (Label("a", 0, True),),
    (Found("a", 0, 0.5, LEFT), Found("a", 0, 0.5, FAR), Found("b", 0, 0.5, RIGHT)),
)


def by_image(detections: Detections) -> list[Detections]:
    """One batch per image, in order of first appearance."""
    return [
        detections.take(detections.image_index == image) for image in dict.fromkeys(detections.image_index.tolist())
    ]


@settings(max_examples=60, deadline=None)
@given(scene=scenes(), seed=st.integers(0, 1000), weight=st.sampled_from([0.0, 1.0]))
def test_batches_of_whole_images_in_any_order_score_as_all_at_once(scene: Scene, seed: int, weight: float) -> None:
    ground_truth, detections = scene.annotations(), scene.detections()
    whole = challenge_scores(detections, ground_truth, group_of_weight=weight)
    batches = by_image(detections)
    evaluator = Evaluator(ground_truth)
    for number in np.random.default_rng(seed).permutation(len(batches)):
        evaluator.add(batches[number])
    matches = evaluator.matches(group_of_weight=weight)
    np.testing.assert_array_equal(average_precision(matches), whole.ap)
    assert matches.dropped == whole.dropped
    assert matches.absorbed == whole.matches.absorbed


@settings(max_examples=60, deadline=None)
@given(scene=scenes(), seed=st.integers(0, 1000), processes=st.integers(1, 4))
def test_parts_of_several_processes_merge_to_the_same_bits_in_any_order(
    scene: Scene, seed: int, processes: int
) -> None:
    ground_truth, detections = scene.annotations(), scene.detections()
    rng = np.random.default_rng(seed)
    owner = rng.integers(0, processes, len(detections))
    evaluators = [Evaluator(ground_truth) for _ in range(processes)]
    for number, evaluator in enumerate(evaluators):
        # With their rows even detections of one image may be anywhere, in any order.
        rows = rng.permutation(np.flatnonzero(owner == number))
        for some in np.array_split(rows, 2):
            evaluator.add(detections.take(some), rows=some)
    together = Evaluator(ground_truth)
    for number in rng.permutation(processes):
        together.merge(pickle.loads(pickle.dumps(evaluators[number].part())))
    whole = challenge_scores(detections, ground_truth).matches
    for name in ("score", "kind", "class_index", "image_index", "detection_row", "gt_count"):
        np.testing.assert_array_equal(getattr(together.matches(), name), getattr(whole, name))
    assert together.matches().dropped == whole.dropped


def test_a_score_can_be_asked_for_between_batches() -> None:
    ground_truth, batches = TWO.annotations(), by_image(TWO.detections())
    evaluator = Evaluator(ground_truth)
    assert score(evaluator.matches()).ap.tolist() == [0.0]
    evaluator.add(batches[0])
    # Image a alone: right, then wrong; one of two ground-truth boxes found at precision 1.
    assert score(evaluator.matches()).ap.tolist() == [0.5]
    evaluator.add(Detections.empty())
    evaluator.add(batches[1])
    assert score(evaluator.matches()).ap.tolist() == challenge_scores(TWO.detections(), ground_truth).ap.tolist()


def test_an_image_in_two_batches_is_refused_unless_rows_are_given() -> None:
    ground_truth, detections = TWO.annotations(), TWO.detections()
    first, rest = np.array([1]), np.array([2, 0])
    evaluator = Evaluator(ground_truth)
    evaluator.add(detections.take(first))
    with pytest.raises(ValueError, match="must come in one batch, or with their rows, but image a came in two"):
        evaluator.add(detections.take(rest))
    with pytest.raises(ValueError, match="image a came in two"):
        evaluator.add(detections.take(rest), rows=rest)
    ordered = Evaluator(ground_truth)
    for rows in (first, rest):
        ordered.add(detections.take(rows), rows=rows)
    assert ordered.matches().detection_row.tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="rows must have one value per detection"):
        ordered.add(detections, rows=first)


def test_parts_of_other_truth_or_classes_are_refused() -> None:
    evaluator = Evaluator(TWO.annotations())
    moved = replace(TWO, ground_truths=(Truth("a", 0, LEFT), Truth("b", 0, RIGHT))).annotations()
    with pytest.raises(ValueError, match="parts must be made with the same ground truth and classes"):
        evaluator.merge(Evaluator(moved).part())
    with pytest.raises(ValueError, match="parts must be made with the same ground truth and classes"):
        evaluator.merge(Evaluator(TWO.annotations(), classes=np.array([False])).part())


@settings(max_examples=40, deadline=None)
@given(scene=scenes())
def test_ap_at_many_thresholds_is_that_of_each_by_itself(scene: Scene) -> None:
    ground_truth, detections = scene.annotations(), scene.detections()
    evaluator = Evaluator(ground_truth)
    evaluator.add(detections)
    found = ap_by_threshold(evaluator, COCO_THRESHOLDS)
    alone = [challenge_scores(detections, ground_truth, iou_threshold=threshold).ap for threshold in COCO_THRESHOLDS]
    np.testing.assert_array_equal(found, alone)
    assert ap_by_threshold(evaluator, ()).shape == (0, scene.num_classes)
