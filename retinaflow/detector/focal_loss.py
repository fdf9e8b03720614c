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

``equalized_focal_loss`` is the same pass with an exponent and a factor of each class; it also returns the sums of the
absolute gradients, from which ``equalized`` derives the next exponents.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, cast

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
    alpha = alpha.to(logits.device, dtype) if isinstance(alpha, Tensor) else alpha
    gamma = gamma.to(logits.device, dtype) if isinstance(gamma, Tensor) else gamma
    return cast(Tensor, _FocalLoss.apply(logits, targets, _Focal(alpha, gamma)))


def equalized_focal_loss(
    logits: Tensor, targets: ClassTargets, *, alpha: float | Tensor | None, gamma: Tensor, factor: Tensor
) -> tuple[Tensor, Tensor]:
    """The sum of factor * focal loss over all pairs that count, and the sums of its absolute gradients by the logits.

    As :func:`focal_loss`, with gamma ``[K]`` > 0 and factor ``[K]`` >= 0. The second result is ``[2, K]`` float64
    without gradient: over the positives and over the negatives of each class; zeros if the logits need no gradient.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    gamma, factor = (v.to(logits.device, dtype) for v in (gamma, factor))
    alpha = alpha.to(logits.device, dtype) if isinstance(alpha, Tensor) else alpha
    weights = (factor, factor) if alpha is None else (factor * alpha, factor * (1 - alpha))
    sums = torch.zeros(2, logits.shape[2], dtype=torch.float64, device=logits.device)
    loss = _FocalLoss.apply(logits, targets, _Equalized(gamma, weights[0].log(), weights[1].log(), sums))
    # A second backward adds to the sums of the form once more.
    return cast(Tensor, loss), sums.clone()


class _FocalLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: ClassTargets, form: _Form) -> Tensor:
        gradient = _gradient_like(logits) if ctx.needs_input_grad[0] else None
        loss = _focal_pass(logits, targets, form, gradient)
        ctx.save_for_backward(logits)
        ctx.arguments = (targets, form)
        ctx.gradient = gradient
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        (logits,) = ctx.saved_tensors
        # Scaled in place and let go, so that no second tensor of this size is needed. A second backward (retain_graph)
        # is rare and makes it anew.
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            targets, form = ctx.arguments
            gradient = _gradient_like(logits)
            _focal_pass(logits, targets, form, gradient)
        return gradient.mul_(grad_output).to(logits.dtype), None, None


def _gradient_like(logits: Tensor) -> Tensor:
    # Small gradients vanish in float16 before a loss scaler has multiplied them; bfloat16 has the range of float32.
    dtype = torch.float32 if logits.dtype == torch.float16 else logits.dtype
    return torch.empty(logits.shape, dtype=dtype, device=logits.device)


class _Form(Protocol):
    """A form of the loss."""

    def terms(self, z: Tensor, slope: Tensor | None, label: Tensor | None = None) -> Tensor:
        """The sum of weight * f(z), z may be overwritten; weight * f'(z) is written to ``slope`` unless that is None.

        z, slope: ``[b, a, K]`` of negatives, or ``[n]`` of positives, whose classes are then ``label [n]``.
        """


def _focal_pass(logits: Tensor, targets: ClassTargets, form: _Form, gradient: Tensor | None) -> Tensor:
    """The loss, and its gradient written to ``gradient`` unless that is None."""
    logits = logits.detach().contiguous()
    sums = []
    for block in _blocks(logits, targets.silent.row):
        x = _negative_logits(logits, targets, block)
        out = None if gradient is None else gradient[block.images, block.anchors]
        sums.append(form.terms(x, out))
    # Last, because the dense pass leaves a zero at each positive.
    sums.append(_positive_pass(logits, targets.positives, form, gradient))
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


def _positive_pass(logits: Tensor, pairs: Pairs, form: _Form, gradient: Tensor | None) -> Tensor:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    at = (pairs.row // max(1, logits.shape[1]), pairs.row % max(1, logits.shape[1]), pairs.label)
    z = -logits[at].to(dtype)
    slope = None if gradient is None else torch.empty_like(z)
    loss = form.terms(z, slope, pairs.label)
    if gradient is not None and slope is not None:
        gradient[at] = slope.neg_().to(gradient.dtype)
    return loss


class _Focal(NamedTuple):
    """Equation 5: one alpha and gamma, or ``[K]``."""

    alpha: float | Tensor | None
    gamma: float | Tensor

    def terms(self, z: Tensor, slope: Tensor | None, label: Tensor | None = None) -> Tensor:
        weight, gamma = self.alpha, self.gamma
        if label is None:
            weight = None if weight is None else 1 - weight
        else:
            weight = weight[label] if isinstance(weight, Tensor) and weight.dim() else weight
            gamma = gamma[label] if isinstance(gamma, Tensor) and gamma.dim() else gamma
        # Blocks are as large as the cache allows, so another temporary is what costs.
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


class _Equalized(NamedTuple):
    """Equation 5 with ``gamma [K]`` and the logarithms ``[K]`` of the weights; adds the absolute gradients of positives
    and of negatives to ``sums [2, K]``."""

    gamma: Tensor
    log_positive: Tensor
    log_negative: Tensor
    sums: Tensor

    def terms(self, z: Tensor, slope: Tensor | None, label: Tensor | None = None) -> Tensor:
        gamma, log_weight = self.gamma, self.log_negative
        if label is not None:
            gamma, log_weight = gamma[label], self.log_positive[label]
        softplus = F.softplus(z, threshold=40.0)
        # log p = z - softplus(z), and one exp gives weight * p^gamma: a power with another exponent for each class
        # costs four times as much. Every pass over the block counts, so the sums are written with as few as there are.
        log_p = z - softplus
        factor = torch.addcmul(log_weight, log_p, gamma, out=log_p).exp_()
        loss = torch.dot(softplus.flatten(), factor.flatten())
        if slope is None:
            return loss
        p, steep = z.sigmoid_(), softplus.mul_(gamma)
        steep.addcmul_(steep, p, value=-1).add_(p).mul_(factor)
        if label is None:
            self.sums[1] += steep.sum((0, 1))
        else:
            self.sums[0].index_add_(0, label, steep.to(self.sums.dtype))
        slope.copy_(steep)
        return loss
