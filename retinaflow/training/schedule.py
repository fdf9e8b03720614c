"""The learning rate of every step: a linear rise, then one of three ways down.

- ``cosine``: half a cosine to 0 (Loshchilov and Hutter 2017).
- ``steps``: at each milestone, a fraction of the training, the rate is multiplied by ``lr_drop`` (Girshick's Detectron:
  at 60,000 and 80,000 of 90,000 steps by 0.1).
- ``constant``: stays at its highest; goes well with averaged weights.

A pure function of the step, so a resumed training has nothing to remember.
"""

from __future__ import annotations

import math

from retinaflow.settings.training_settings import OptimizationSettings


def learning_rate(step: int, total_steps: int, settings: OptimizationSettings) -> float:
    """The rate of a step (from 0): linear up to ``lr`` over the ``warmup`` fraction of the steps, then ``schedule``.

    A milestone during the rise lowers what follows the rise.
    """
    rising = max(round(settings.warmup * total_steps), 1)
    if step < rising:
        return settings.lr * (step + 1) / rising
    if settings.schedule == "constant":
        return settings.lr
    if settings.schedule == "steps":
        passed = sum(step >= round(milestone * total_steps) for milestone in settings.milestones)
        return settings.lr * settings.lr_drop**passed
    done = (step - rising) / max(total_steps - rising, 1)
    return settings.lr * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
