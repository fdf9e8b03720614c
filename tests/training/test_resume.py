"""The progress that a checkpoint stores, whose values may be damaged."""

from __future__ import annotations

from typing import Any

import pytest

from retinaflow.training.resume import check_progress

WHOLE: dict[str, Any] = {
    "epoch": 2,
    "step": 7,
    "without_gain": 0,
    "best": float("-inf"),
    "open": {"batches": 1, "images": 4, "plan": 123, "sums": (0.5, 0.25)},
    "curve": {"steps": 3, "sums": {"train/loss": 1.5}},
}
DAMAGED: dict[str, dict[str, Any]] = {
    "no epoch": {"epoch": None},
    "an epoch before the first": {"epoch": -1},
    "a step in words": {"step": "seven"},
    "a step of true": {"step": True},
    "a fraction": {"without_gain": 0.5},
    "no position": {"open": None},
    "a position without its plan": {"open": {"batches": 1, "images": 4}},
    "no curve": {"curve": []},
    "a curve without names": {"curve": {"steps": 3, "sums": [1.5]}},
    "no best value": {"best": None},
}


def test_whole_progress_is_taken() -> None:
    check_progress(WHOLE)


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_progress_is_refused(damage: str) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        check_progress({**WHOLE, **DAMAGED[damage]})
