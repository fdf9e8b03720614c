"""Parents of merged detections, and the best of each image, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from retinaflow.detections import Detections
from retinaflow.inference.merged_detections import best_of_each_image, expand_to_parents
from retinaflow.taxonomy import Hierarchy, Taxonomy

CAR, BUS, VEHICLE, TREE = range(4)
TAXONOMY = Taxonomy(
    ("/m/car", "/m/bus", "/m/vehicle", "/m/tree"),
    ("Car", "Bus", "Vehicle", "Tree"),
    Hierarchy((("/m/vehicle", "/m/car"), ("/m/vehicle", "/m/bus"))),
)
HERE, THERE = [0.0, 0.0, 0.4, 0.4], [0.5, 0.5, 0.9, 0.9]


def _found(*rows: tuple[int, int, float, list[float]]) -> Detections:
    image, label, score, boxes = zip(*rows, strict=True)
    return Detections(np.array(image, np.int32), np.array(label, np.int32), np.array(score), np.array(boxes))


def _of(found: Detections, label: int) -> list[tuple[int, float]]:
    rows = found.class_index == label
    return sorted(zip(found.image_index[rows].tolist(), found.score[rows].tolist(), strict=True))


def test_a_parent_scores_as_its_best_child_at_the_same_place() -> None:
    found = expand_to_parents(
        _found(
            (0, CAR, 0.9, HERE), (0, BUS, 0.8, HERE), (0, VEHICLE, 0.5, HERE), (0, VEHICLE, 0.3, THERE),
            (0, TREE, 0.7, HERE), (0, TREE, 0.6, HERE), (1, BUS, 0.4, HERE),
        ),
        TAXONOMY,
        nms_iou=0.5,
    )  # fmt: skip
    assert _of(found, VEHICLE) == [(0, 0.3), (0, 0.9), (1, 0.4)]
    # Children stay, and so do overlapping trees, of which there are no copies.
    assert _of(found, CAR) == [(0, 0.9)]
    assert _of(found, BUS) == [(0, 0.8), (1, 0.4)]
    assert _of(found, TREE) == [(0, 0.6), (0, 0.7)]


def test_without_detections_there_are_no_parents() -> None:
    assert len(expand_to_parents(Detections.empty(), TAXONOMY, nms_iou=0.5)) == 0


def test_the_best_of_each_image_over_all_classes_are_kept() -> None:
    found = best_of_each_image(
        _found((1, TREE, 0.2, HERE), (0, TREE, 0.5, HERE), (0, CAR, 0.5, THERE), (0, BUS, 0.9, HERE)), 2
    )
    assert list(zip(found.image_index, found.class_index, strict=True)) == [(0, BUS), (0, CAR), (1, TREE)]


def test_a_limit_per_class_leaves_room_for_the_others() -> None:
    rows = [
        (0, TREE, 0.9, HERE),
        (0, TREE, 0.8, HERE),
        (1, TREE, 0.3, HERE),
        (0, CAR, 0.1, THERE),
        (0, TREE, 0.7, HERE),
    ]
    found = best_of_each_image(_found(*rows), 3, of_class=2)
    assert list(zip(found.image_index, found.class_index, strict=True)) == [(0, TREE), (0, TREE), (0, CAR), (1, TREE)]
    assert found.score.tolist() == pytest.approx([0.9, 0.8, 0.1, 0.3])
    assert len(best_of_each_image(Detections.empty(), 3, of_class=2)) == 0
