"""An exponential moving average of a detector's weights, which is evaluated and saved instead of the last weights.

After step t (from 1) with weights w: average = d * average + (1 - d) * w, d = min(decay, (1 + t) / (10 + t)), the rise
of TensorFlow's ``ExponentialMovingAverage``. So the average always covers about the last tenth of the training: with
decay 0.9998 it reaches back 60 steps after 600 steps, and never more than 5,000. The statistics of batch norms are
averaged too (timm's ``ModelEmaV2``).

Cost: one copy of the detector and one pass over its weights a step.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from retinaflow.detector.network import RetinaNet


class WeightAverage:
    """``model`` holds the average; ``updates`` counts the steps in it."""

    def __init__(self, model: RetinaNet, *, decay: float) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, model: RetinaNet, taken: Tensor | None = None) -> None:
        """Add the weights after a step. ``taken``: a scalar of the device, False if the step was not taken."""
        self.updates += 1
        new_weight: float | Tensor = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        if taken is not None:
            new_weight = new_weight * taken.float()
        new = model.state_dict()
        for name, average in self.model.state_dict().items():
            if average.is_floating_point():
                average.lerp_(new[name], new_weight)
            else:
                average.copy_(new[name])
