"""Numbers and flags of boxes as tools write them, rotated boxes, and numbers that contradict their unit."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retinaflow.errors import DataError

_YES, _NO = ("1", "true", "yes", "y", "t"), ("", "0", "false", "no", "n", "f", "none", "unspecified")


def yes_or_no(value: Any) -> bool | None:
    """A flag as tools write it; a number other than 0 is yes. None for a value that is neither."""
    if isinstance(value, int | float):
        return bool(value == value and value != 0)
    text = value.strip().lower() if isinstance(value, str) else "" if value is None else "?"
    if text in _YES or text in _NO:
        return text in _YES
    try:
        return float(text) != 0
    except ValueError:
        return None


def upright(x: float, y: float, width: float, height: float, radians: float) -> tuple[float, float, float, float]:
    """Corners of the upright box around a box (left, top, width, height) that is rotated around its centre."""
    across = (abs(width * math.cos(radians)) + abs(height * math.sin(radians))) / 2
    down = (abs(width * math.sin(radians)) + abs(height * math.cos(radians))) / 2
    centre = x + width / 2, y + height / 2
    return centre[0] - across, centre[1] - down, centre[0] + across, centre[1] + down


def refuse_fractions(given: NDArray[np.float64], name: str) -> None:
    """Raise DataError where boxes that should be in pixels, ``given [N, 4]`` as they stand, are fractions of the image.

    No set of images has all its boxes within two pixels of the first; a box a little over the edge is over 1.
    """
    finite = given[np.isfinite(given).all(axis=1)]
    if len(finite) and np.abs(finite).max() <= 2 and (finite != np.round(finite)).any():
        shown = ", ".join(f"{value:g}" for value in finite[0])
        raise DataError(
            f"{name}: boxes must be in pixels, but all {len(finite):,} look like fractions of the image, {shown} for "
            "example; give box_unit=fraction if they are, or box_unit=pixel if they are pixels all the same"
        )


def number_of(value: Any) -> float:
    """A number as float64: infinite for an integer that is too large, NaN for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return math.nan
    try:
        return float(value)
    except ValueError:
        return math.nan
    except OverflowError:
        return math.inf if isinstance(value, int) and value > 0 else -math.inf
