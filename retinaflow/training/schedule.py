"""The learning rate of every step: a linear rise, then one of three ways down.

- ``cosine``: half a cosine to 0 (Loshchilov and Hutter 2017).
- ``steps``: at each milestone, a share of the training, the rate is multiplied by ``drop`` (Girshick's Detectron:
  at 60,000 and 80,000 of 90,000 steps by 0.1).
- ``constant``: stays at its highest; goes well with averaged weights.

A pure function of the step, so a resumed training has nothing to remember.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

Schedule = Literal["cosine", "steps", "constant"]


def learning_rate(
    step: int,
    total_steps: int,
    *,
    highest: float,
    warmup: float,
    schedule: Schedule = "cosine",
    milestones: Sequence[float] = (),
    drop: float = 0.1,
) -> float:
    """The rate of a step (from 0): linear up to ``highest`` over the ``warmup`` share of the steps, then ``schedule``.

    ``milestones``, ``drop``: of ``steps``. A milestone during the rise lowers what follows the rise.
    """
    rising = max(round(warmup * total_steps), 1)
    if step < rising:
        return highest * (step + 1) / rising
    if schedule == "constant":
        return highest
    if schedule == "steps":
        passed = sum(step >= round(milestone * total_steps) for milestone in milestones)
        return highest * drop**passed
    done = (step - rising) / max(total_steps - rising, 1)
    return highest * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
