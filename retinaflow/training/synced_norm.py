"""Batch norm over the images of all ranks, so that several train what one would.

A GPU takes torch's own ``SyncBatchNorm``, which cannot run on a CPU; there :class:`SyncedBatchNorm2d` computes the same
as an autograd function. With x of N = B * H * W values a channel over all ranks, m and v their mean and variance,
y = w (x - m) / sqrt(v + eps) + b, and

    dx = w / sqrt(v + eps) * (dy - mean(dy) - xhat * mean(dy * xhat)),   xhat = (x - m) / sqrt(v + eps)

(Ioffe and Szegedy 2015, section 3), means over all ranks. Sums are added in float64: E[x^2] - E[x]^2 cancels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from retinaflow.training.distributed import World

_OVER = (0, 2, 3)


def sync_batch_norms(model: nn.Module, world: World) -> None:
    """Replace every trained batch norm of a model, in place; parameters, buffers and their names stay."""
    if world.size == 1:
        return
    for parent in list(model.modules()):
        for name, norm in list(parent.named_children()):
            if isinstance(norm, nn.BatchNorm2d):
                on_gpu = norm.weight.device.type == "cuda"
                new = SyncedBatchNorm2d(norm, world) if not on_gpu else _torchs_own(norm)
                setattr(parent, name, new)


class _TorchsOwn(nn.SyncBatchNorm):
    def forward(self, input: Tensor) -> Tensor:
        return _with_children(self, super().forward(input))


def _torchs_own(norm: nn.BatchNorm2d) -> nn.Module:
    own = _TorchsOwn(norm.num_features, eps=norm.eps, momentum=norm.momentum)
    _take_over(own, norm)
    return own


def _take_over(new: nn.Module, norm: nn.BatchNorm2d) -> None:
    for name, value in (*norm.named_parameters(recurse=False), *norm.named_buffers(recurse=False)):
        setattr(new, name, value)
    for name, child in norm.named_children():
        new.add_module(name, child)
    new.train(norm.training)


def _with_children(norm: nn.Module, x: Tensor) -> Tensor:
    """What timm's batch norms hold comes after them: their activation."""
    for child in norm.children():
        x = child(x)
    return x


class SyncedBatchNorm2d(nn.BatchNorm2d):
    """A batch norm that takes over another's parameters and statistics."""

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, norm: nn.BatchNorm2d, world: World) -> None:
        super().__init__(norm.num_features, eps=norm.eps, momentum=norm.momentum)
        self._world = world
        _take_over(self, norm)

    def forward(self, input: Tensor) -> Tensor:
        """``[B, C, H, W]`` -> the same; statistics of the batch of all ranks in training, else the running ones."""
        if not self.training:
            return _with_children(self, super().forward(input))
        results = _Normalise.apply(input, self.weight, self.bias, self.eps, self._world)
        output: Tensor = results[0]
        mean, variance, count = results[1:]
        momentum = 0.1 if self.momentum is None else self.momentum
        with torch.no_grad():
            self.running_mean.lerp_(mean, momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), momentum)
            self.num_batches_tracked += 1
        return _with_children(self, output)


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, world: World
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        values = x.float()
        count = values.numel() // values.shape[1]
        mean, variance = values.mean(_OVER).double(), values.var(_OVER, correction=0).double()
        total = world.sum_(torch.cat([mean * count, (variance + mean**2) * count, mean.new_tensor([count])]))
        channels = len(mean)
        mean, variance = total[:channels] / total[-1], total[channels:-1] / total[-1]
        variance = (variance - mean**2).clamp(min=0)
        scale = (variance + eps).rsqrt().float()
        centred = (values - mean.float()[:, None, None]) * scale[:, None, None]
        ctx.save_for_backward(centred, weight, scale)
        ctx.world, ctx.count = world, float(total[-1])
        output = centred * weight[:, None, None] + bias[:, None, None]
        statistics = mean.float(), variance.float(), total[-1].float()
        ctx.mark_non_differentiable(*statistics)
        return output.to(x.dtype), *statistics

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        centred, weight, scale = ctx.saved_tensors
        gradient = gradients[0].float()
        of_bias, of_weight = gradient.sum(_OVER), (gradient * centred).sum(_OVER)
        means = ctx.world.sum_(torch.cat([of_bias, of_weight]).double()).float() / ctx.count
        mean, product = means[: len(of_bias), None, None], means[len(of_bias) :, None, None]
        of_input = (weight * scale)[:, None, None] * (gradient - mean - centred * product)
        # The gradients of the parameters are of this rank alone; the training sums them over all ranks.
        return of_input.to(gradients[0].dtype), of_weight, of_bias, None, None
