"""Detections as columns: one row per detected box, the shape in which they are merged, scored and stored.

Rows keep the order in which they were made; the metric breaks equal scores by it. Coordinates are ``xyxy``,
normalised to [0, 1] of the original image. Numpy only, so that detector, scoring and commands can all use it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Detections:
    """``image_index [D]`` int32, ``class_index [D]`` int32, ``score [D]`` float, ``boxes [D, 4]`` float, normalised
    xyxy."""

    image_index: NDArray[np.int32]
    class_index: NDArray[np.int32]
    score: NDArray[np.floating]
    boxes: NDArray[np.floating]

    def __post_init__(self) -> None:
        rows = {len(self.image_index), len(self.class_index), len(self.score), len(self.boxes)}
        if len(rows) != 1 or self.boxes.shape[1:] != (4,):
            raise ValueError(
                "Detections need columns of one length and boxes [D, 4], but got image_index "
                f"{self.image_index.shape}, class_index {self.class_index.shape}, score {self.score.shape}, "
                f"boxes {self.boxes.shape}."
            )

    def __len__(self) -> int:
        return len(self.score)

    def take(self, rows: NDArray[np.integer] | NDArray[np.bool_]) -> Detections:
        """The rows chosen by an index or a boolean array, in that order."""
        return Detections(self.image_index[rows], self.class_index[rows], self.score[rows], self.boxes[rows])

    def of_classes(self, classes: NDArray[np.integer]) -> Detections:
        """The detections of some classes, ascending; class ``classes[k]`` becomes class k."""
        found = self.take(np.isin(self.class_index, classes))
        return replace(found, class_index=np.searchsorted(classes, found.class_index).astype(np.int32))

    @staticmethod
    def empty() -> Detections:
        return Detections(np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0), np.zeros((0, 4)))

    @staticmethod
    def concatenate(parts: Sequence[Detections]) -> Detections:
        """All rows of all parts, in order."""
        if not parts:
            return Detections.empty()
        return Detections(
            np.concatenate([part.image_index for part in parts]),
            np.concatenate([part.class_index for part in parts]),
            np.concatenate([part.score for part in parts]),
            np.concatenate([part.boxes for part in parts]),
        )
