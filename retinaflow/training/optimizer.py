"""The optimizer of a detector, AdamW or SGD with momentum, without decay on biases and norms, and its learning rate.

The rate rises linearly, then goes one of three ways down:

- ``cosine``: half a cosine to 0 (Loshchilov and Hutter 2017).
- ``steps``: at each milestone, a fraction of the training, the rate is multiplied by ``lr_drop`` (Girshick's Detectron:
  at 60,000 and 80,000 of 90,000 steps by 0.1).
- ``constant``: stays at its highest; goes well with averaged weights.

It is a pure function of the step, so a resumed training has nothing to remember.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from retinaflow.detector.network import RetinaNet
from retinaflow.settings.training_settings import OptimizationSettings

_FACTOR = "lr_factor"
"""Key of a group of parameters: its learning rate, as a factor of ``lr``."""


def make_optimizer(model: RetinaNet, settings: OptimizationSettings, *, fused: bool = False) -> torch.optim.Optimizer:
    """The optimizer over the parameters that are trained. fused: one that can leave out a step on the device."""
    groups = _parameter_groups(model, settings)
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum, fused=fused)
    # Fused: one pass over the weights instead of ten, which counts when a batch is small.
    return torch.optim.AdamW(groups, lr=settings.lr, fused=True)


def load_state(optimizer: torch.optim.Optimizer, stored: Mapping[str, Any]) -> None:
    """Continue from the state of an optimizer, with the options of this one: weight decay and momentum may be others
    now, and ``fused`` that of another device. Raises ValueError for the state of other groups of parameters."""
    groups = [
        {**own, "params": of_stored["params"]}
        for own, of_stored in zip(optimizer.param_groups, stored["param_groups"], strict=True)
    ]
    # Before it is loaded, as fused optimizers keep their state in another form.
    optimizer.load_state_dict({**stored, "param_groups": groups})


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """``lr`` for the next step, times ``backbone_lr_factor`` for the layers of the backbone."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get(_FACTOR, 1.0)


def _parameter_groups(model: RetinaNet, settings: OptimizationSettings) -> list[dict[str, Any]]:
    """Matrices and kernels decay; biases and the scales of norms do not."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if settings.backbone_lr_factor == 1:
        return _by_decay(learning, settings.weight_decay)
    of_body = set(model.backbone.body.parameters())
    return [
        *_by_decay([p for p in learning if p not in of_body], settings.weight_decay),
        *_by_decay(
            [p for p in learning if p in of_body], settings.weight_decay, **{_FACTOR: settings.backbone_lr_factor}
        ),
    ]


def _by_decay(parameters: Sequence[nn.Parameter], weight_decay: float, **values: float) -> list[dict[str, Any]]:
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay, **values},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0, **values},
    ]


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
