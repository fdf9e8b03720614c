"""Box arithmetic on numpy arrays: areas, IoU, IoA and conversions.

Boxes are ``xyxy`` (x1, y1, x2, y2) everywhere inside retinaflow, continuous (no ``+1``), float64 unless the caller
passes another float type. ``iou`` and ``ioa`` compare all pairs of ``a: [N, 4]`` and ``b: [M, 4]`` and return
``[N, M]``; the paired functions compare two arrays row by row. A box without area has IoU and IoA 0 with everything,
never NaN. Coordinates may be pixels or normalised; both arguments must be of the same kind.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.floating]
BoolArray = NDArray[np.bool_]


def areas(boxes: FloatArray) -> FloatArray:
    """Areas ``[...]`` of boxes ``[..., 4]``; 0 where x2 <= x1 or y2 <= y1."""
    return np.clip(boxes[..., 2] - boxes[..., 0], 0, None) * np.clip(boxes[..., 3] - boxes[..., 1], 0, None)


def paired_intersections(a: FloatArray, b: FloatArray) -> FloatArray:
    """Areas of overlap ``[...]`` of each box of ``a [..., 4]`` with the box of ``b`` at the same index."""
    width = np.minimum(a[..., 2], b[..., 2]) - np.maximum(a[..., 0], b[..., 0])
    height = np.minimum(a[..., 3], b[..., 3]) - np.maximum(a[..., 1], b[..., 1])
    return np.asarray(np.maximum(width, 0) * np.maximum(height, 0))


def paired_iou(a: FloatArray, b: FloatArray) -> FloatArray:
    """Intersection over union ``[...]`` in [0, 1] of each box of ``a [..., 4]`` with the box of ``b`` at its index."""
    overlap = paired_intersections(a, b)
    union = areas(a) + areas(b) - overlap
    return np.divide(overlap, union, out=np.zeros_like(overlap), where=union > 0)


def paired_ioa(a: FloatArray, b: FloatArray) -> FloatArray:
    """Intersection over the area of ``a``, ``[...]`` in [0, 1]: the fraction of each box of ``a`` inside ``b``."""
    overlap = paired_intersections(a, b)
    own = np.broadcast_to(areas(a), overlap.shape)
    return np.divide(overlap, own, out=np.zeros_like(overlap), where=own > 0)


def iou(a: FloatArray, b: FloatArray) -> FloatArray:
    """Intersection over union of all pairs, ``[N, M]`` in [0, 1]."""
    return paired_iou(a[:, None], b[None])


def ioa(a: FloatArray, b: FloatArray) -> FloatArray:
    """Intersection over the area of ``a`` of all pairs, ``[N, M]`` in [0, 1]."""
    return paired_ioa(a[:, None], b[None])


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
