"""Box arithmetic on numpy arrays: areas, intersections, IoU, IoA and conversions.

Boxes are ``xyxy`` (x1, y1, x2, y2) everywhere inside retinaflow, continuous (no ``+1``), float64 unless the caller
passes another float type. Pairwise functions take ``a: [N, 4]`` and ``b: [M, 4]`` and return ``[N, M]``. A box without
area has IoU and IoA 0 with everything, never NaN. Coordinates may be pixels or normalised, but both
arguments must use the same.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.floating]
BoolArray = NDArray[np.bool_]


def areas(boxes: FloatArray) -> FloatArray:
    """Areas ``[N]``; 0 where x2 <= x1 or y2 <= y1."""
    return np.clip(boxes[:, 2] - boxes[:, 0], 0, None) * np.clip(boxes[:, 3] - boxes[:, 1], 0, None)


def intersections(a: FloatArray, b: FloatArray) -> FloatArray:
    """Areas of overlap, ``[N, M]``."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    sides = np.clip(high - low, 0, None)
    return np.asarray(sides[..., 0] * sides[..., 1])


def iou(a: FloatArray, b: FloatArray) -> FloatArray:
    """Intersection over union, ``[N, M]`` in [0, 1]."""
    overlap = intersections(a, b)
    union = areas(a)[:, None] + areas(b)[None, :] - overlap
    return np.divide(overlap, union, out=np.zeros_like(overlap), where=union > 0)


def ioa(a: FloatArray, b: FloatArray) -> FloatArray:
    """Intersection over the area of ``a``, ``[N, M]`` in [0, 1]: how much of each box of ``a`` lies inside ``b``."""
    overlap = intersections(a, b)
    own = np.broadcast_to(areas(a)[:, None], overlap.shape)
    return np.divide(overlap, own, out=np.zeros_like(overlap), where=own > 0)


def are_valid(boxes: FloatArray) -> BoolArray:
    """True ``[N]`` where x1 < x2 and y1 < y2 (False where a coordinate is NaN)."""
    return (boxes[:, 0] < boxes[:, 2]) & (boxes[:, 1] < boxes[:, 3])


def normalised_from_pixels(boxes: FloatArray, size: tuple[int, int]) -> FloatArray:
    """Pixels of an image of ``size`` (height, width) -> [0, 1] of that image."""
    height, width = size
    return boxes / np.array([width, height, width, height], dtype=boxes.dtype)


def pixels_from_normalised(boxes: FloatArray, size: tuple[int, int]) -> FloatArray:
    """[0, 1] of an image -> pixels of that image at ``size`` (height, width)."""
    height, width = size
    return boxes * np.array([width, height, width, height], dtype=boxes.dtype)
