"""How a value of a setting is written, on the command line, in MLproject and in a run's parameters alike."""

from __future__ import annotations

from typing import Any


def as_text(value: Any) -> str:
    """``none``, ``true``, ``0.5``, or a list with commas (an empty one is ``none``)."""
    if isinstance(value, tuple | list):
        return ",".join(map(as_text, value)) or "none"
    if isinstance(value, bool):
        return str(value).lower()
    return "none" if value is None else str(value)
