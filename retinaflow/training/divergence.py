"""Why a step is not finite: the losses before it show whether the training diverges or single images are to blame."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence

from retinaflow.detector.device import Precision

RECENT_LOSSES = 50
"""Number of steps whose losses are remembered."""


class RecentLosses:
    """The losses of the latest steps."""

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=RECENT_LOSSES)

    def add(self, loss: float) -> None:
        """Add the loss of a step."""
        self._losses.append(loss)

    def diverge(self, again: float | None) -> bool:
        """Whether the latest are far above those before, or ``again``, the loss that the images of the latest step have
        after it (None: unknown), is far above what it was."""
        return has_grown(self._losses) or (again is not None and again > 2 * self._losses[-1])

    def advice(self, loss: float, precision: Precision, *, sound: bool) -> str:
        """What the user can do about a step of this loss that was not taken. ``sound``: whether the images of the step
        before it have an ordinary loss with the same weights."""
        if has_grown([*self._losses, loss]):
            return f"The loss has grown from {statistics.median(self._losses):.3g}: lower lr."
        if not sound:
            return "The images of the step before have no ordinary loss any more either: lower lr."
        other = "." if precision == "float32" else ", or try precision=float32."
        return f"The losses before were ordinary: look at these images and their boxes{other}"


def has_grown(losses: Sequence[float]) -> bool:
    """Whether the latest finite losses (up to three, the last is the newest) are more than twice the median of those
    before them; False with fewer than two before."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    earlier = finite[:-3] or finite[:-1]
    return len(earlier) >= 2 and max(finite[-3:]) > 2 * statistics.median(earlier)
