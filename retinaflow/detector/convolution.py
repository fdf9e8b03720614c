"""A wide 3 x 3 convolution whose weights learn at the speed of matrix products on a CPU.

The gradient of the weight at offset (i, j) is one matrix product, G^T X_ij, of the output's gradient G ``[B h w, out]``
with the input shifted by (i, j), X_ij ``[B h w, in]``: nine products, and with channels-last maps G is a view. Where a
layer has at least twice as many outputs as inputs (the class logits, from 57 classes on) that is faster than oneDNN's
own kernel without AVX-512; where it has fewer, it is slower (``benchmarks/weight_gradient.py``), and is not done. Its
values and the gradient of the input are those of ``torch.nn.Conv2d``, the gradient of the weights up to the rounding of
another order of summation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class Conv3x3(nn.Conv2d):
    """``nn.Conv2d`` of kernel 3, stride 1 and padding 1, which keeps the size of a map: ``[B, in, h, w]`` ->
    ``[B, out, h, w]``.

    With fewer than twice as many outputs as inputs, and where it does not train in float32 on a CPU (autocast, a GPU,
    ``torch.compile``, inference), it is ``nn.Conv2d``.
    """

    def __init__(self, in_channels: int, out_channels: int, *, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, kernel_size=3, padding=1, bias=bias)

    def forward(self, input: Tensor) -> Tensor:
        """input: ``[B, in, h, w]`` float."""
        if not self._pays(input):
            return super().forward(input)
        out: Tensor = _ByMatrixProducts.apply(input, self.weight, self.bias)
        return out

    def _pays(self, maps: Tensor) -> bool:
        return (
            self.out_channels >= 2 * self.in_channels
            and torch.is_grad_enabled()
            and self.weight.requires_grad
            and maps.device.type == "cpu"
            and maps.dtype == self.weight.dtype == torch.float32
            and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling()
        )


class _ByMatrixProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, maps: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(maps, weight)
        return functional.conv2d(maps, weight, bias, padding=1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        maps, weight = ctx.saved_tensors
        of_maps, of_weight, of_bias = ctx.needs_input_grad
        return (
            _maps_gradient(maps, gradient, weight) if of_maps else None,
            weight_gradient(maps, gradient, weight) if of_weight else None,
            gradient.sum((0, 2, 3)) if of_bias else None,
        )


def _maps_gradient(maps: Tensor, gradient: Tensor, weight: Tensor) -> Tensor:
    one, zero = [1, 1], [0, 0]
    found: Tensor = torch.ops.aten.convolution_backward(
        gradient, maps, weight, None, one, one, one, False, zero, 1, [True, False, False]
    )[0]
    return found


def weight_gradient(maps: Tensor, gradient: Tensor, weight: Tensor) -> Tensor:
    """``[out, in, 3, 3]`` in the memory format of ``weight``; maps ``[B, in, h, w]``, gradient ``[B, out, h, w]``."""
    height, width = maps.shape[2:]
    framed = functional.pad(maps.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    rows = gradient.permute(0, 2, 3, 1).reshape(-1, gradient.shape[1]).T
    found = torch.empty_like(weight)
    for i in range(3):
        for j in range(3):
            shifted = framed[:, i : i + height, j : j + width].reshape(-1, maps.shape[1])
            torch.mm(rows, shifted, out=found[:, :, i, j])
    return found
