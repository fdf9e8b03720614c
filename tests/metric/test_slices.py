"""AP on a part of the ground truth: small, medium, large, crowded."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from scoring_scenes import Found, Label, Scene, Truth
from slow_challenge import expanded_truths, iou
from test_challenge import NAN, scenes

from retinaflow.metric.challenge import Evaluator, average_precision
from retinaflow.metric.details import detail_tables
from retinaflow.metric.evaluator import Subset
from retinaflow.metric.slices import are_crowded, slice_scores

SMALL, MEDIUM, LARGE = (0.1, 0.1, 0.15, 0.15), (0.2, 0.2, 0.3, 0.3), (0.4, 0.4, 0.9, 0.9)
TWIN = (0.4, 0.4, 0.9, 0.7)
"""IoU with LARGE: 0.15 / 0.25 = 0.6."""


def evaluator_of(scene: Scene) -> Evaluator:
    evaluator = Evaluator(scene.annotations())
    evaluator.add(scene.detections())
    return evaluator


def test_sizes_are_shares_of_the_image_and_wrong_detections_count_by_their_own_size() -> None:
    # Areas 0.0025 < 1/300 <= 0.01 < 3/100 <= 0.25. The wrong detection is of medium size and ranks first there:
    # AP medium = 1/2; small and large are found with nothing wrong among them.
    scene = Scene(
        1,
        (Truth("i", 0, SMALL), Truth("i", 0, MEDIUM), Truth("i", 0, LARGE)),
        (Label("i", 0, True),),
        (Found("i", 0, 0.9, (0.6, 0.0, 0.7, 0.1)), *(Found("i", 0, 0.5, box) for box in (SMALL, MEDIUM, LARGE))),
    )
    found = {part.name: part for part in slice_scores(evaluator_of(scene))}
    assert {name: part.ap.tolist() for name, part in found.items() if name != "crowded"} == {
        "small": [1.0], "medium": [0.5], "large": [1.0],
    }  # fmt: skip
    assert [part.num_truths.tolist() for part in found.values()] == [[1.0], [1.0], [1.0], [0.0]]
    np.testing.assert_array_equal(found["crowded"].ap, [NAN])


def test_the_crowded_slice_judges_crowded_truths_where_they_are() -> None:
    # On i LARGE and TWIN crowd each other; SMALL does not belong, so its detection plays no part. On j nobody is
    # crowded, so what is wrong there plays none either. By score: wrong (0.8, on i), right (TWIN): one of two
    # ground-truth boxes at precision 1/2.
    scene = Scene(
        1,
        (Truth("i", 0, SMALL), Truth("i", 0, LARGE), Truth("i", 0, TWIN), Truth("j", 0, LARGE)),
        (Label("i", 0, True),),
        (
            Found("i", 0, 0.9, SMALL),
            Found("j", 0, 0.9, SMALL),
            Found("i", 0, 0.8, MEDIUM),
            Found("i", 0, 0.7, TWIN),
        ),
    )
    crowded = slice_scores(evaluator_of(scene))[-1]
    assert (crowded.name, crowded.ap.tolist(), crowded.recall.tolist()) == ("crowded", [0.25], [0.5])
    assert crowded.num_truths.tolist() == [2.0]


@settings(max_examples=40, deadline=None)
@given(scene=scenes())
def test_crowded_truths_are_those_a_double_loop_finds(scene: Scene) -> None:
    evaluator = evaluator_of(scene)
    count = scene.num_classes
    rows = [row for row in expanded_truths(scene) if not row.group_of]
    wanted = sorted(
        (scene.image_ids.index(row.image) * count + row.label, row.box)
        for number, row in enumerate(rows)
        if any(
            other.image == row.image and other.label == row.label and place != number and iou(row.box, other.box) > 0.3
            for place, other in enumerate(rows)
        )
    )
    ordinary = evaluator.ground_truth.ordinary
    crowded = are_crowded(evaluator.ground_truth)
    found = zip(ordinary.pair[crowded].tolist(), map(tuple, ordinary.boxes[crowded].tolist()), strict=True)
    assert sorted(found) == wanted


@settings(max_examples=40, deadline=None)
@given(scene=scenes())
def test_the_slice_of_everything_is_the_whole_at_weight_zero(scene: Scene) -> None:
    evaluator = evaluator_of(scene)
    everything = Subset(
        np.ones(len(evaluator.ground_truth.ordinary), dtype=bool),
        np.ones(len(evaluator.ranked_candidates()), dtype=bool),
    )
    whole = evaluator.matches(group_of_weight=0)
    part = evaluator.matches(group_of_weight=0, subset=everything)
    np.testing.assert_array_equal(average_precision(part), average_precision(whole))


def test_the_tables_hold_one_row_per_class_and_per_slice() -> None:
    scene = Scene(2, (Truth("i", 0, LARGE),), (Label("i", 0, True),), (Found("i", 0, 0.6, LARGE),))
    ground_truth = scene.annotations()
    per_class, slices = detail_tables(evaluator_of(scene), ground_truth.taxonomy, iou_thresholds=(0.5, 0.75))
    assert list(per_class.columns[:3]) == ["class", "ap", "num_truths"]
    assert per_class.columns[-1] == "class_id"
    first = per_class.iloc[0]
    assert [first["ap_iou_50"], first["ap_iou_75"], first["ap_iou_mean"], first["recall_at_0.5"]] == [1, 1, 1, 1]
    assert slices["slice"].tolist() == ["small", "medium", "large", "crowded"]
    assert slices.set_index("slice")["num_truths"].to_dict() == {"small": 0, "medium": 0, "large": 1, "crowded": 0}
