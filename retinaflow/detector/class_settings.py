"""What the losses and the detections know of classes: settings per class, and who is whose ancestor."""

from __future__ import annotations

import torch
from torch import Tensor


def check_per_class(name: str, value: float | Tensor | None, num_classes: int) -> None:
    """Raises ValueError unless ``value`` is a number (or None) or a tensor ``[K]``."""
    if isinstance(value, Tensor) and value.shape not in ((), (num_classes,)):
        raise ValueError(f"{name} must be a number or [{num_classes}], but got shape {tuple(value.shape)}.")


def check_ancestors(ancestors: Tensor | None, num_classes: int) -> None:
    """Raises ValueError unless ``ancestors`` is ``[K, K]`` bool: row c marks the strict ancestors of class c."""
    if ancestors is not None and (ancestors.shape != (num_classes, num_classes) or ancestors.dtype != torch.bool):
        raise ValueError(
            f"ancestors must be [{num_classes}, {num_classes}] bool, "
            f"but got {tuple(ancestors.shape)} {str(ancestors.dtype).removeprefix('torch.')}."
        )
