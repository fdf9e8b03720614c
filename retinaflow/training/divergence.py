"""Why a step is not finite: the losses before it show whether the training diverges or single images are to blame."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence

from retinaflow.detector.device import Precision
from retinaflow.training.step import NotFiniteError

RECENT_LOSSES = 50
"""Number of steps whose losses are remembered."""


class RecentLosses:
    """The losses of the latest steps."""

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=RECENT_LOSSES)

    def add(self, loss: float) -> None:
        """Add the loss of a step."""
        self._losses.append(loss)

    def advice(self, error: NotFiniteError, precision: Precision) -> str:
        """What the user can do about a step that was not taken."""
        if has_grown([*self._losses, error.loss]):
            return f"The loss has grown from {statistics.median(self._losses):.3g}: lower lr."
        other = "." if precision == "float32" else ", or try precision=float32."
        return f"The losses before were ordinary: look at these images and their boxes{other}"


def has_grown(losses: Sequence[float]) -> bool:
    """Whether the latest finite losses (up to three, the last is the newest) are more than twice the median of those
    before them; False with fewer than two before."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    earlier = finite[:-3] or finite[:-1]
    return len(earlier) >= 2 and max(finite[-3:]) > 2 * statistics.median(earlier)
