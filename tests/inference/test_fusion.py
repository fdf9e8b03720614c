"""Weighted boxes fusion against arithmetic by hand and the paper's steps written as plain loops."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from retinaflow.detections import Detections
from retinaflow.inference.fusion import fuse, fuse_group

UNIT = [0.0, 0.0, 1.0, 1.0]


def _detections(rows: list[tuple[int, int, float, list[float]]]) -> Detections:
    """Rows of image, class, score, box."""
    return Detections(
        np.array([row[0] for row in rows], dtype=np.int32),
        np.array([row[1] for row in rows], dtype=np.int32),
        np.array([row[2] for row in rows]),
        np.array([row[3] for row in rows]).reshape(-1, 4),
    )


def test_two_models_by_hand() -> None:
    """IoU 1/2 > 0.4: y2 = (0.8 * 1 + 0.4 * 0.5) / 1.2 = 5/6, score (0.8 + 0.4) / 2. What one model alone found counts
    half: 0.9 / 2."""
    alone = [0.2, 0.2, 0.3, 0.3]
    boxes, score = fuse_group(np.array([UNIT, [0, 0, 1, 0.5], alone]), np.array([0.8, 0.4, 0.9]), 2, iou_threshold=0.4)
    np.testing.assert_allclose(boxes, [[0, 0, 1, 5 / 6], alone])
    np.testing.assert_allclose(score, [0.6, 0.45])


def test_more_boxes_than_models_by_hand() -> None:
    """Three equal boxes of two models, scores 0.9, 0.6, 0.3: mean 0.6, and min(3, 2) / 2 = 1."""
    boxes, score = fuse_group(np.array([UNIT] * 3), np.array([0.9, 0.6, 0.3]), 2, iou_threshold=0.55)
    np.testing.assert_allclose(boxes, [UNIT])
    np.testing.assert_allclose(score, [0.6])


def test_an_overlap_of_exactly_the_threshold_is_not_fused() -> None:
    boxes = np.array([UNIT, [0, 0, 1, 0.5]])
    assert len(fuse_group(boxes, np.array([0.8, 0.4]), 2, iou_threshold=0.5)[0]) == 2
    assert len(fuse_group(boxes, np.array([0.8, 0.4]), 2, iou_threshold=0.49)[0]) == 1


def _by_the_paper(
    boxes: NDArray[np.float64], score: NDArray[np.float64], models: int, threshold: float
) -> list[tuple[float, ...]]:
    """The steps of the paper, one box at a time, a list for each cluster."""
    clusters: list[list[int]] = []
    fused: list[NDArray[np.float64]] = []
    for row in sorted(range(len(score)), key=lambda k: -score[k]):
        best, place = threshold, -1
        for number, box in enumerate(fused):
            width = max(0.0, min(box[2], boxes[row][2]) - max(box[0], boxes[row][0]))
            height = max(0.0, min(box[3], boxes[row][3]) - max(box[1], boxes[row][1]))
            both = (box[2] - box[0]) * (box[3] - box[1]) + np.prod(boxes[row][2:] - boxes[row][:2])
            overlap = width * height / (both - width * height)
            if overlap > best:
                best, place = overlap, number
        if place < 0:
            clusters.append([row])
            fused.append(boxes[row])
        else:
            members = [*clusters[place], row]
            clusters[place] = members
            fused[place] = sum(score[k] * boxes[k] for k in members) / sum(score[k] for k in members)
    return sorted(
        (sum(score[k] for k in members) / len(members) * min(len(members), models) / models, *box)
        for members, box in zip(clusters, fused, strict=True)
    )


@pytest.mark.parametrize("seed", range(10))
def test_fusion_takes_the_steps_of_the_paper(seed: int) -> None:
    rng = np.random.default_rng(seed)
    corner = rng.uniform(0, 0.5, (30, 2)).round(1)
    boxes = np.hstack([corner, corner + rng.uniform(0.2, 0.5, (30, 2))])
    score = rng.uniform(0.05, 1, 30)
    found, fused_score = fuse_group(boxes, score, 3, iou_threshold=0.55)
    ours = sorted((value, *box) for value, box in zip(fused_score, found, strict=True))
    np.testing.assert_allclose(ours, _by_the_paper(boxes, score, 3, 0.55))


def test_only_shared_classes_are_fused_and_each_image_for_itself() -> None:
    """Class 0 is the first model's alone, class 1 is shared: one box on image 0, on image 1 two far apart."""
    first = _detections([(0, 0, 0.9, UNIT), (0, 0, 0.8, UNIT), (0, 1, 0.8, UNIT), (1, 1, 0.4, [0, 0, 0.2, 0.2])])
    second = _detections([(0, 1, 0.6, UNIT), (1, 1, 0.5, [0.5, 0.5, 1, 1])])
    found = fuse([first, second], np.array([1, 2]), iou_threshold=0.55)
    assert found.class_index.tolist() == [0, 0, 1, 1, 1]
    assert found.image_index.tolist() == [0, 0, 0, 1, 1]
    np.testing.assert_allclose(found.score, [0.9, 0.8, 0.7, 0.25, 0.2])


def test_the_order_of_the_models_changes_nothing() -> None:
    rng = np.random.default_rng(5)
    parts = [
        _detections(
            [
                (int(rng.integers(2)), 0, float(rng.integers(1, 5)) / 4, [0, 0, *rng.uniform(0.3, 1, 2)])
                for _ in range(20)
            ]
        )
        for _ in range(3)
    ]
    one, other = (fuse(order, np.array([3]), iou_threshold=0.6) for order in (parts, parts[::-1]))
    np.testing.assert_array_equal(one.score, other.score)
    np.testing.assert_array_equal(one.boxes, other.boxes)


def test_no_detections_and_scores_of_zero_can_be_fused() -> None:
    assert len(fuse([Detections.empty(), Detections.empty()], np.array([2]), iou_threshold=0.55)) == 0
    boxes, score = fuse_group(np.array([UNIT, UNIT]), np.zeros(2), 2, iou_threshold=0.55)
    np.testing.assert_allclose(boxes, [UNIT])
    assert score.tolist() == [0.0]
