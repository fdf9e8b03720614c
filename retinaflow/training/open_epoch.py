"""The epoch in progress: how far it is, and the means of its losses so far; a checkpoint stores it."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from retinaflow.errors import SettingError
from retinaflow.training.step import StepValues


@dataclass
class OpenEpoch:
    """The epoch in progress. ``batches``: done by each rank. ``sums``: of class and box loss times images."""

    batches: int = 0
    images: int = 0
    sums: tuple[float, float] = (0.0, 0.0)
    plan: int = 0
    """Checksum of the epoch's plan, which a resumed training must have too."""

    def check_plan(self, plan: NDArray[np.int64], epoch: int) -> None:
        """Raise SettingError when the epoch was begun with another plan."""
        checksum = zlib.crc32(np.ascontiguousarray(plan).tobytes())
        if self.batches and self.plan != checksum:
            raise SettingError(
                f"epoch {epoch + 1} must be resumed with the plan that it began with, but the settings give another; "
                "leave out those that change the sampling (epochs changes when balance_start ends)"
            )
        self.plan = checksum

    def add(self, done: StepValues) -> None:
        """Count a step."""
        self.batches += done.batches
        self.images += done.images
        self.sums = self.sums[0] + done.loss_class * done.images, self.sums[1] + done.loss_box * done.images
