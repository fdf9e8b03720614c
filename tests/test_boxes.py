"""Box arithmetic: by hand, against torchvision, and what must hold for any boxes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torchvision.ops import box_area, box_iou

from retinaflow.boxes import (
    are_valid,
    areas,
    ioa,
    iou,
    normalised_from_pixels,
    paired_intersections,
    paired_ioa,
    paired_iou,
    pixels_from_normalised,
)

EMPTY = np.zeros((0, 4))
UNIT = np.array([[0.0, 0.0, 2.0, 4.0]])


def random_boxes(count: int, seed: int) -> NDArray[np.float64]:
    corners = np.random.default_rng(seed).random((count, 2, 2))
    return np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)


def test_no_boxes_give_empty_results_of_the_right_shape() -> None:
    assert areas(EMPTY).shape == are_valid(EMPTY).shape == (0,)
    for pairwise in (iou, ioa):
        assert pairwise(EMPTY, UNIT).shape == (0, 1)
        assert pairwise(UNIT, EMPTY).shape == (1, 0)


def test_two_boxes_by_hand() -> None:
    # a is 2 x 4 = 8, b is 4 x 3 = 12 at (1, 2); they share 1 x 2 = 2.
    b = np.array([[1.0, 2.0, 5.0, 5.0]])
    assert areas(np.concatenate([UNIT, b])).tolist() == [8, 12]
    assert paired_intersections(UNIT, b).tolist() == [2]
    assert iou(UNIT, b).tolist() == [[2 / 18]]
    assert ioa(UNIT, b).tolist() == [[2 / 8]]
    assert ioa(b, UNIT).tolist() == [[2 / 12]]


def test_paired_functions_give_the_diagonal_of_all_pairs() -> None:
    a, b = random_boxes(20, 0), random_boxes(20, 1)
    assert paired_iou(a, b).tolist() == np.diag(iou(a, b)).tolist()
    assert paired_ioa(a, b).tolist() == np.diag(ioa(a, b)).tolist()


def test_agreement_with_torchvision() -> None:
    a, b = random_boxes(40, 0), random_boxes(30, 1)
    np.testing.assert_allclose(iou(a, b), box_iou(torch.from_numpy(a), torch.from_numpy(b)).numpy(), rtol=1e-12)
    np.testing.assert_allclose(areas(a), box_area(torch.from_numpy(a)).numpy(), rtol=1e-12)


@pytest.mark.parametrize(
    "box", [[1, 1, 1, 3], [1, 1, 3, 1], [2, 2, 1, 3], [1, 1, 1, 1]], ids=["no width", "no height", "crossed", "point"]
)
def test_a_box_without_area_overlaps_nothing_and_makes_no_nan(box: list[float]) -> None:
    flat = np.array([box], dtype=np.float64)
    for pairwise in (iou, ioa):
        for a, b in ((flat, UNIT), (UNIT, flat), (flat, flat)):
            assert pairwise(a, b).tolist() == [[0]]
    assert areas(flat).tolist() == [0]
    assert are_valid(flat).tolist() == [False]


def test_touching_boxes_do_not_overlap_and_nan_is_not_valid() -> None:
    assert iou(UNIT, np.array([[2.0, 0.0, 3.0, 4.0]])).tolist() == [[0]]
    assert are_valid(np.array([[0, 0, 1, 1], [np.nan, 0, 1, 1], [0, 0, 1, np.nan]])).tolist() == [True, False, False]


numbers = st.floats(-1e6, 1e6, allow_nan=False)
any_boxes = st.lists(st.tuples(numbers, numbers, numbers, numbers), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(any_boxes, any_boxes)
def test_overlap_is_between_0_and_1_symmetric_and_whole_with_itself(
    first: list[tuple[float, ...]], second: list[tuple[float, ...]]
) -> None:
    a, b = np.array(first), np.array(second)
    overlap = iou(a, b)
    assert ((overlap >= 0) & (overlap <= 1 + 1e-9)).all()
    np.testing.assert_array_equal(overlap, iou(b, a).T)
    assert (ioa(a, b) <= 1 + 1e-9).all()
    assert (ioa(a, b) >= overlap - 1e-9).all(), "a share of one box is at least the share of both"
    own = np.diagonal(iou(a, a))
    np.testing.assert_allclose(own, (areas(a) > 0).astype(float))


def test_pixels_are_width_for_x_and_height_for_y_and_the_way_back_is_exact() -> None:
    size = (32, 128)  # (height, width)
    boxes = np.array([[0.25, 0.5, 0.75, 1.0]])
    assert pixels_from_normalised(boxes, size).tolist() == [[32, 16, 96, 32]]
    assert normalised_from_pixels(np.array([[32.0, 16.0, 96.0, 32.0]]), size).tolist() == boxes.tolist()
    many = random_boxes(50, 3)
    np.testing.assert_allclose(normalised_from_pixels(pixels_from_normalised(many, (37, 91)), (37, 91)), many)
    assert pixels_from_normalised(many.astype(np.float32), size).dtype == np.float32
