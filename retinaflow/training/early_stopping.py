"""The best value so far, and the end of a training that no longer improves on it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class EarlyStopping:
    """``patience``: evaluations without a new best after which the training is over; 0: never."""

    patience: int
    best: float = float("-inf")
    without_gain: int = 0
    """Evaluations since the best one."""

    def add(self, value: float) -> bool:
        """Add the value of an evaluation; returns whether it is the best so far."""
        self.without_gain += 1
        if value <= self.best:
            return False
        self.best, self.without_gain = value, 0
        return True

    @property
    def is_over(self) -> bool:
        """Whether patience has run out."""
        return 0 < self.patience <= self.without_gain
