"""The result of matching detections with ground truth, as columns: entries of precision-recall curves, and counts.

Made by :class:`retinaflow.metric.evaluator.Evaluator`. About 50 bytes per detection, and all that average precision,
the bootstrap and the error analysis need.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray


class Kind(IntEnum):
    """What an entry of the precision-recall curve is."""

    FALSE_POSITIVE = 0
    TRUE_POSITIVE = 1
    GROUP_OF = 2


@dataclass(frozen=True)
class Dropped:
    """Detections that are neither true nor false positives, each counted once, for the first reason that applies."""

    unknown_image: int = 0
    """The image has no annotation at all (image index -1)."""
    class_not_evaluated: int = 0
    """The class is not among the evaluated ``classes``."""
    not_verified: int = 0
    """The class is neither verified present nor absent on the image."""
    invalid_box: int = 0
    """x1 < x2 and y1 < y2 does not hold."""
    over_limit: int = 0
    """Beyond the first 10,000 of an image and class."""
    not_exhaustive: int = 0
    """Unmatched, of a class of which the image may have objects without a box."""

    @property
    def total(self) -> int:
        return sum(vars(self).values())

    def __add__(self, other: Dropped) -> Dropped:
        return Dropped(**{item.name: getattr(self, item.name) + getattr(other, item.name) for item in fields(self)})


@dataclass(frozen=True)
class Matches:
    """Entries of the precision-recall curves and ground truth counts, as columns.

    The E entries are ordered by class, then by rule 8: descending score, ImageID as a string, row of the detection,
    group-of entries after the detections of their image. The P ground truth counts are ordered by class, then image.
    """

    image_index: NDArray[np.int64]
    """``[E]`` image of the entry."""
    class_index: NDArray[np.int64]
    """``[E]`` class of the entry, ascending."""
    score: NDArray[np.float64]
    """``[E]`` score; of a group-of entry the highest score that the group-of box absorbed."""
    kind: NDArray[np.int8]
    """``[E]`` a :class:`Kind`."""
    weight: NDArray[np.float64]
    """``[E]`` 1, and ``group_of_weight`` for group-of entries."""
    detection_row: NDArray[np.int64]
    """``[E]`` row of the detection that made the entry."""
    gt_image: NDArray[np.int64]
    """``[P]`` image of a ground truth count."""
    gt_class: NDArray[np.int64]
    """``[P]`` class of a ground truth count, ascending."""
    gt_count: NDArray[np.float64]
    """``[P]`` ordinary boxes + ``group_of_weight`` x group-of boxes of that image and class."""
    image_ids: NDArray[np.str_]
    """``[I]`` the evaluated images."""
    evaluated: NDArray[np.bool_]
    """``[K]`` the evaluated classes."""
    dropped: Dropped
    absorbed: int
    """Detections absorbed by group-of boxes: no false positives."""
    verified_labels: int
    """Image-level labels used, as published (before expansion)."""
    repeated_ground_truths: int
    """Ground-truth boxes that repeat a box of the same class and image; more than 0 is an error in the data."""
    iou_threshold: float
    group_of_weight: float

    @property
    def num_truths(self) -> NDArray[np.float64]:
        """``[K]`` ground truth count of each class (rule 5)."""
        counts = np.bincount(self.gt_class, self.gt_count, minlength=len(self.evaluated))
        return counts.astype(np.float64)
