from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import _default_anchorgen
from torchvision.ops import box_iou

from retinaflow.detector.anchors import anchor_grid, best_overlaps, cell_anchors, decode, encode


@pytest.mark.parametrize("size", [(64, 64), (96, 160), (160, 96), (33, 470), (100, 37), (7, 3)])
def test_anchors_are_torchvisions_for_any_image_shape(size: tuple[int, int]) -> None:
    height, width = size
    features = [torch.zeros(1, 1, -(-height // stride), -(-width // stride)) for stride in (8, 16, 32, 64, 128)]
    expected = _default_anchorgen()(ImageList(torch.zeros(1, 3, height, width), [size]), features)[0]
    grid = anchor_grid(size)
    assert torch.equal(grid.boxes, expected)
    assert grid.image_size == size
    assert list(grid.level_counts) == [9 * feature[0, 0].numel() for feature in features]


def test_the_first_square_anchor_on_stride_8_has_a_side_of_32_pixels() -> None:
    # Ratios are the outer loop: the square ones are rows 3..5, with sides 32, 40 and 50.
    assert cell_anchors(8, 4.0)[3:6].tolist() == [[-16, -16, 16, 16], [-20, -20, 20, 20], [-25, -25, 25, 25]]


def test_halving_the_anchor_scale_halves_the_base_anchor() -> None:
    assert cell_anchors(16, 2.0)[3].tolist() == [-16, -16, 16, 16]


def test_a_shape_is_computed_once_and_usable_in_training_even_if_first_made_in_inference_mode() -> None:
    with torch.inference_mode():
        grid = anchor_grid((40, 72), anchor_scale=3.0)
    assert anchor_grid((40, 72), anchor_scale=3.0) is grid
    assert not grid.boxes.is_inference()


@pytest.mark.parametrize(
    ("size", "scale", "words"), [((0, 5), 4.0, "at least 1 pixel"), ((64, 64), 0.1, "use at least")]
)
def test_impossible_anchors_are_an_error_that_says_what_must_hold(
    size: tuple[int, int], scale: float, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        anchor_grid(size, anchor_scale=scale)


def test_the_box_code_is_torchvisions(random_boxes: Callable[[int], Tensor], generator: torch.Generator) -> None:
    coder = BoxCoder(weights=(1.0, 1.0, 1.0, 1.0))
    boxes, anchors = random_boxes(50), random_boxes(50)
    torch.testing.assert_close(encode(boxes, anchors), coder.encode_single(boxes, anchors), rtol=0, atol=0)
    deltas = torch.randn(50, 4, generator=generator) * 3
    torch.testing.assert_close(decode(deltas, anchors), coder.decode_single(deltas, anchors), rtol=0, atol=0)


def test_decode_undoes_encode(random_boxes: Callable[[int], Tensor]) -> None:
    boxes, anchors = random_boxes(50), random_boxes(50)
    torch.testing.assert_close(decode(encode(boxes, anchors), anchors), boxes, rtol=1e-4, atol=1e-3)


def test_a_box_twice_as_wide_and_moved_by_half_an_anchor_has_the_code_worked_by_hand() -> None:
    # Anchor of 10 x 20 at centre (5, 10); box of 20 x 20 at centre (10, 10): dx = 5 / 10, dy = 0, log 2, log 1.
    code = encode(torch.tensor([[0.0, 0.0, 20.0, 20.0]]), torch.tensor([[0.0, 0.0, 10.0, 20.0]]))
    torch.testing.assert_close(code, torch.tensor([[0.5, 0.0, 0.6931472, 0.0]]))


def test_an_absurd_size_offset_is_clamped_at_1000_over_16() -> None:
    box = decode(torch.tensor([[0.0, 0.0, 100.0, 100.0]]), torch.tensor([[0.0, 0.0, 16.0, 16.0]]))
    torch.testing.assert_close(box, torch.tensor([[-492.0, -492.0, 508.0, 508.0]]))


@pytest.mark.parametrize("image_size", [(96, 160), (256, 64), (100, 75)])
@pytest.mark.parametrize("anchor_scale", [1.5, 3.0, 4.0])
def test_the_best_overlap_is_that_of_all_anchors(image_size: tuple[int, int], anchor_scale: float) -> None:
    random = np.random.default_rng(0)
    height, width = image_size
    corners = random.uniform(0, 1, (400, 2, 2)) ** 2 * [width, height]
    boxes = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1).astype(np.float32)
    anchors = anchor_grid(image_size, anchor_scale=anchor_scale).boxes
    expected = box_iou(torch.from_numpy(boxes), anchors).amax(dim=1)
    found = best_overlaps(boxes, image_size, anchor_scale=anchor_scale)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


def test_no_boxes_have_no_overlaps() -> None:
    assert best_overlaps(np.zeros((0, 4)), (64, 64), anchor_scale=4.0).shape == (0,)
