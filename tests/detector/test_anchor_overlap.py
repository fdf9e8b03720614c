"""The best overlap of boxes with anchors, without making the anchors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.ops import box_iou

from retinaflow.detector.anchor_overlap import best_overlaps
from retinaflow.detector.anchors import anchor_grid


@pytest.mark.parametrize("image_size", [(96, 160), (256, 64), (100, 75)])
@pytest.mark.parametrize("anchor_scale", [1.5, 3.0, 4.0])
def test_it_is_the_best_of_all_anchors(image_size: tuple[int, int], anchor_scale: float) -> None:
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
