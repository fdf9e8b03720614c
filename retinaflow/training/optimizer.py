"""The optimizer of a detector: AdamW or SGD with momentum, without decay on biases and norms."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from retinaflow.settings.training_settings import OptimizationSettings


def make_optimizer(model: nn.Module, settings: OptimizationSettings, *, fused: bool = False) -> torch.optim.Optimizer:
    """The optimizer over the parameters that are trained. fused: one that can leave out a step on the device."""
    groups = _parameter_groups(model, settings.weight_decay)
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum, fused=fused)
    # Fused: one pass over the weights instead of ten, which counts when a batch is small.
    return torch.optim.AdamW(groups, lr=settings.lr, fused=True)


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices and kernels decay; biases and the scales of norms do not."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in learning if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in learning if p.dim() <= 1], "weight_decay": 0.0},
    ]
