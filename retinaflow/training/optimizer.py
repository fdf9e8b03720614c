"""The optimizer of a detector: AdamW or SGD with momentum, without decay on biases and norms."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

OptimizerName = Literal["adamw", "sgd"]


def make_optimizer(
    name: OptimizerName, model: nn.Module, *, lr: float, weight_decay: float, momentum: float
) -> torch.optim.Optimizer:
    """The optimizer over the parameters that learn. ``momentum``: of ``sgd``."""
    groups = _parameter_groups(model, weight_decay)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum)
    # Fused: one pass over the weights instead of ten, which counts when a batch is small.
    return torch.optim.AdamW(groups, lr=lr, fused=True)


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices and kernels decay; biases and the scales of norms do not."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in learning if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in learning if p.dim() <= 1], "weight_decay": 0.0},
    ]
