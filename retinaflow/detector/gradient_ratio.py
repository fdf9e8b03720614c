"""Equalized focal loss (Li et al. 2022, CVPR, equations 3 to 5): exponents that follow the gradients of each class.

For class k, over all steps so far:

    g_k     = clamp(sum of |gradient| of its positives / sum of |gradient| of its negatives, 0, 1)
    gamma_k = gamma + s * (1 - g_k)
    loss_k  = gamma_k / gamma * focal loss with gamma_k

Gradients are those of the class loss by the logits. A rare class has few positives against the negatives of all images:
its g is small, its exponent large (easy negatives count for nothing), and the factor restores the size of its loss.
Worked example, gamma = 2 and s = 8: positives 3, negatives 4 give g = 0.75, gamma_k = 4 and a factor of 2; a class that
has had negatives only has g = 0, gamma_k = 10 and a factor of 5; one with g = 1 has the focal loss.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gradient_ratio(sums: Tensor) -> Tensor:
    """g ``[K]`` float64 in [0, 1] of ``sums [2, K]``: absolute gradients of positives and of negatives.

    1 for a class that has had no negative: so every class starts with the focal loss, as in the published code.
    """
    positives, negatives = sums.double()
    return torch.where(negatives > 0, positives / negatives, 1.0).clamp(max=1.0)


def equalized(gamma: float | Tensor, ratio: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
    """gamma_k and gamma_k / gamma, both ``[K]`` float64, of g ``[K]``. gamma: a number > 0 or ``[K]``."""
    # A number stays one: a tensor made of it would be a copy to the device, for which the host waits.
    start = gamma.to(ratio.device, torch.float64) if isinstance(gamma, Tensor) else gamma
    gamma_k = start + scale * (1 - ratio.double())
    return gamma_k, gamma_k / start
