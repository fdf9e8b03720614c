"""Sigmoid focal loss over sparse positives: loss and gradient of a whole batch in one pass.

Lin et al. 2017, equation 5, per (anchor, class): FL = -alpha_t (1 - p_t)^gamma log(p_t), where for a positive p_t = p =
sigmoid(x) and alpha_t = alpha, and for a negative p_t = 1 - p and alpha_t = 1 - alpha. With z = x for a negative and
z = -x for a positive both are weight * f(z), and so are the gradients:

    f(z)  = sigmoid(z)^gamma * softplus(z)
    f'(z) = sigmoid(z)^gamma * (gamma * sigmoid(-z) * softplus(z) + sigmoid(z))

Neither has a logarithm of a probability nor a negative power, so both are finite for every z and exact for gamma = 0
and gamma < 1. Nearly all pairs are negatives: those are computed densely, block by block, and the few positives are
gathered, computed and scattered back. No one-hot target is made. The gradient is made together with the loss, so
the extra memory is one tensor like the logits and a few blocks (torchvision's formula keeps about ten such tensors).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from retinaflow.detector.targets import IgnoreMasks

# A logit at which a negative's loss and gradient are exactly zero: what a silent pair is given in the dense pass.
SILENT = -1e4
# Elements of a block: per core as many as its cache holds (twice as fast here as 8 times more or fewer), and for a GPU
# as many as fill it (64 MiB of float32, about six such temporaries at a time).
CPU_BLOCK_PER_THREAD, GPU_BLOCK = 1 << 16, 1 << 24


class Pairs(NamedTuple):
    """Distinct (anchor, class) pairs, by anchor: ``row [n]`` int64 in 0..B*A-1, ascending, and ``label [n]`` int64."""

    row: Tensor
    label: Tensor


@dataclass(frozen=True, eq=False)
class ClassTargets:
    """What is learned from each (image, anchor, class).

    positives: pairs whose target is 1; they count whatever the masks below are.
    silent: pairs that give no negative loss; holds the positives.
    anchors: ``[B, A]`` bool, False where an anchor gives no negative loss.
    classes: ``[B, K]`` bool, False where a class gives none on an image.
    regions: group-of regions, or None.
    """

    positives: Pairs
    silent: Pairs
    anchors: Tensor
    classes: Tensor
    regions: IgnoreMasks | None = None


def focal_loss(
    logits: Tensor, targets: ClassTargets, *, alpha: float | Tensor | None = 0.25, gamma: float | Tensor = 2.0
) -> Tensor:
    """The sum of the focal loss over all pairs that count: a scalar, float32 (float64 for float64 logits).

    logits: ``[B, A, K]`` in any float type; computed in float32 at least. alpha: None for no weights,
    a number in [0, 1] or ``[K]``. gamma: a number >= 0 or ``[K]``. Differentiable once, by the logits.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    alpha_k, gamma_k = (v.to(logits.device, dtype) if isinstance(v, Tensor) else v for v in (alpha, gamma))
    return cast(Tensor, _FocalLoss.apply(logits, targets, alpha_k, gamma_k))


class _FocalLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: ClassTargets, alpha: float | Tensor | None, gamma: float | Tensor
    ) -> Tensor:
        gradient = _gradient_like(logits) if ctx.needs_input_grad[0] else None
        loss = _focal_pass(logits, targets, alpha, gamma, gradient)
        ctx.save_for_backward(logits)
        ctx.arguments = (targets, alpha, gamma)
        ctx.gradient = gradient
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        (logits,) = ctx.saved_tensors
        # Scaled in place and let go, so that no second tensor of this size is needed. A second backward (retain_graph)
        # is rare and makes it anew.
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            targets, alpha, gamma = ctx.arguments
            gradient = _gradient_like(logits)
            _focal_pass(logits, targets, alpha, gamma, gradient)
        return gradient.mul_(grad_output).to(logits.dtype), None, None, None


def _gradient_like(logits: Tensor) -> Tensor:
    # Small gradients vanish in float16 before a loss scaler has multiplied them; bfloat16 has the range of float32.
    dtype = torch.float32 if logits.dtype == torch.float16 else logits.dtype
    return torch.empty(logits.shape, dtype=dtype, device=logits.device)


def _focal_pass(
    logits: Tensor, targets: ClassTargets, alpha: float | Tensor | None, gamma: float | Tensor, gradient: Tensor | None
) -> Tensor:
    """The loss, and its gradient written to ``gradient`` unless that is None."""
    logits = logits.detach().contiguous()
    weight = None if alpha is None else 1 - alpha
    sums = []
    for block in _blocks(logits, targets.silent.row):
        x = _negative_logits(logits, targets, block)
        out = None if gradient is None else gradient[block.images, block.anchors]
        sums.append(_focal_terms(x, gamma, weight, out))
    # Last, because the dense pass leaves a zero at each positive.
    sums.append(_positive_pass(logits, targets.positives, alpha, gamma, gradient))
    return torch.stack(sums).sum()


class _Block(NamedTuple):
    """Some whole images, or some anchors of one image.

    first_row: its first anchor in 0..B*A-1. silent: those of ``ClassTargets.silent`` that lie in it.
    """

    images: slice
    anchors: slice
    first_row: int
    silent: slice


def _blocks(logits: Tensor, silent_rows: Tensor) -> Iterator[_Block]:
    batch, count, num_classes = logits.shape
    budget = CPU_BLOCK_PER_THREAD * torch.get_num_threads() if logits.device.type == "cpu" else GPU_BLOCK
    whole = budget // max(1, count * num_classes)
    step = max(1, count if whole else budget // num_classes)
    corners = [(image, anchor) for image in range(0, batch, max(1, whole)) for anchor in range(0, count, step)]
    starts = [image * count + anchor for image, anchor in corners]
    bounds = torch.searchsorted(silent_rows, torch.tensor([*starts, batch * count], device=silent_rows.device)).tolist()
    for index, (image, anchor) in enumerate(corners):
        images = slice(image, min(batch, image + max(1, whole)))
        anchors = slice(anchor, min(count, anchor + step))
        yield _Block(images, anchors, starts[index], slice(bounds[index], bounds[index + 1]))


def _negative_logits(logits: Tensor, targets: ClassTargets, block: _Block) -> Tensor:
    """A copy ``[b, a, K]`` of the block's logits, float32 at least, with ``SILENT`` where there is no negative loss."""
    counts = targets.anchors[block.images, block.anchors, None] & targets.classes[block.images, None]
    if targets.regions is not None:
        inside = targets.regions.anchors[block.images, :, block.anchors].transpose(1, 2)
        # [b, a, R] x [b, R, K]: how many regions silence the pair.
        counts &= torch.bmm(inside.float(), targets.regions.classes[block.images].float()) == 0
    rows = targets.silent.row[block.silent] - block.first_row
    counts.view(-1, logits.shape[2])[rows, targets.silent.label[block.silent]] = False
    x = logits[block.images, block.anchors].to(torch.promote_types(logits.dtype, torch.float32))
    return torch.where(counts, x, SILENT)


def _positive_pass(
    logits: Tensor, pairs: Pairs, alpha: float | Tensor | None, gamma: float | Tensor, gradient: Tensor | None
) -> Tensor:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    at = (pairs.row // max(1, logits.shape[1]), pairs.row % max(1, logits.shape[1]), pairs.label)
    weight = alpha[pairs.label] if isinstance(alpha, Tensor) and alpha.dim() else alpha
    power = gamma[pairs.label] if isinstance(gamma, Tensor) and gamma.dim() else gamma
    z = -logits[at].to(dtype)
    slope = None if gradient is None else torch.empty_like(z)
    loss = _focal_terms(z, power, weight, slope)
    if gradient is not None and slope is not None:
        gradient[at] = slope.neg_().to(gradient.dtype)
    return loss


def _focal_terms(z: Tensor, gamma: float | Tensor, weight: float | Tensor | None, slope: Tensor | None) -> Tensor:
    """The sum of weight * f(z); weight * f'(z) is written to ``slope`` unless that is None.

    Overwrites z: blocks are as large as the cache allows, so another temporary is what costs.
    """
    softplus = F.softplus(z, threshold=40.0)
    p = z.sigmoid_()
    factor = p.pow(gamma)
    if weight is not None:
        factor.mul_(weight)
    if slope is None:
        return softplus.mul_(factor).sum()
    loss = (softplus * factor).sum()
    softplus.mul_(1 - p).mul_(gamma).add_(p)
    torch.mul(softplus, factor, out=slope)
    return loss
