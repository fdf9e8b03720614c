"""A 3 x 3 convolution that trains faster on a CPU where the shapes allow."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from retinaflow.detector.winograd import transform

PAYS_FROM = 1.1
"""How many times cheaper it must be."""
SMALLEST = 3e7
"""Multiplications of a forward pass below which it is not tried, for a call's fixed cost: 6e7 still gained a fifth."""


class Conv3x3(nn.Conv2d):
    """``nn.Conv2d`` of kernel 3, stride 1 and padding 1, which keeps the size of a map: ``[B, in, h, w]`` ->
    ``[B, out, h, w]``.

    While it trains in float32 on a CPU it may compute by :mod:`retinaflow.detector.winograd.transform`, which rounds
    differently. Everywhere else (evaluation, autocast, a GPU, ``torch.compile``, export) it is ``nn.Conv2d``.
    """

    def __init__(self, in_channels: int, out_channels: int, *, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, kernel_size=3, padding=1, bias=bias)

    def forward(self, input: Tensor) -> Tensor:
        """input: ``[B, in, h, w]`` float."""
        return self.on_levels([input])[0]

    def on_levels(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """The same for several maps at once, which may differ in height and width."""
        if self._pays(maps):
            return transform.convolve(maps, self.weight, self.bias)
        return [super(Conv3x3, self).forward(one) for one in maps]

    def _pays(self, maps: Sequence[Tensor]) -> bool:
        if not (
            self.training
            and torch.is_grad_enabled()
            and all(one.device.type == "cpu" and one.dtype == self.weight.dtype == torch.float32 for one in maps)
            and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling()
        ):
            return False
        plain, fast = transform.cost([one.shape for one in maps], self.in_channels, self.out_channels)
        return plain >= SMALLEST and plain >= PAYS_FROM * fast


def use_conv3x3(module: nn.Module) -> None:
    """Replace every plain convolution of that kind below a module by a :class:`Conv3x3` of the same parameters."""
    for name, child in module.named_children():
        if type(child) is nn.Conv2d and _is_plain(child):
            with torch.device("meta"):
                replacement = Conv3x3(child.in_channels, child.out_channels, bias=child.bias is not None)
            replacement.weight, replacement.bias = child.weight, child.bias
            module.add_module(name, replacement)
        else:
            use_conv3x3(child)


def _is_plain(layer: nn.Conv2d) -> bool:
    return (
        layer.kernel_size == (3, 3)
        and layer.stride == layer.padding == layer.dilation == (1, 1)
        and layer.groups == 1
        and layer.padding_mode == "zeros"
    )
