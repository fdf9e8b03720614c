"""How well the anchors of an image shape meet given boxes, before anything is trained.

A box is learned from every anchor that overlaps it with an IoU of 0.5 or more (:mod:`retinaflow.detector.targets`). A
box that no anchor meets so is left with the one it overlaps most, and small objects are then hardly learned.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from retinaflow.detector.anchors import LEVEL_STRIDES, cell_anchors, level_spacing


def best_overlaps(
    boxes: NDArray[np.floating], image_size: tuple[int, int], *, anchor_scale: float
) -> NDArray[np.float32]:
    """``[N]`` IoU of each box with the anchor that meets it best, of all anchors of the image.

    boxes: ``[N, 4]`` xyxy pixels of the resized image, with area. image_size: (height, width) in pixels.

    Of the anchors of one form the one whose centre is nearest overlaps most, in x and in y by itself; so 9 anchors of
    each level are looked at and not all, in memory of N floats.
    """
    corners = np.asarray(boxes, dtype=np.float32)
    sizes, centres = corners[:, 2:] - corners[:, :2], (corners[:, 2:] + corners[:, :2]) * np.float32(0.5)
    best = np.zeros(len(corners), dtype=np.float32)
    for stride in LEVEL_STRIDES:
        cells = level_spacing(image_size, stride)
        distances = [_to_nearest(centres[:, axis], cells[1 - axis]) for axis in (0, 1)]
        for anchor in cell_anchors(stride, anchor_scale).numpy():
            width, height = anchor[2:] - anchor[:2]
            shared = _shared(sizes[:, 0], width, distances[0]) * _shared(sizes[:, 1], height, distances[1])
            np.maximum(best, shared / (sizes[:, 0] * sizes[:, 1] + width * height - shared), out=best)
    return best


def _to_nearest(centres: NDArray[np.floating], cells: tuple[int, int]) -> NDArray[np.floating]:
    """Distance to the nearest of ``count`` places, ``step`` pixels apart from 0 on; ``cells`` is (count, step)."""
    count, step = cells
    nearest = np.clip(np.round(centres / step), 0, count - 1) * step
    return np.abs(centres - nearest)


def _shared(side: NDArray[np.floating], anchor_side: float, distance: NDArray[np.floating]) -> NDArray[np.floating]:
    """Length that a side of a box and of an anchor share, their centres being ``distance`` apart."""
    apart = (side + anchor_side) / 2 - distance
    return np.asarray(np.clip(np.minimum(apart, np.minimum(side, anchor_side)), 0, None))
