"""Backbones: networks whose stages at strides 8, 16 and 32 feed the feature pyramid (Lin et al. 2017, "Feature Pyramid
Networks for Object Detection"). The library that defines a network determines which stages those are.

Parameters keep the names of their library, so that its published weights fit.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torchvision.ops import FrozenBatchNorm2d, StochasticDepth

from retinaflow.errors import SettingError

STRIDES = (8, 16, 32)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, eq=False)
class Body:
    """A backbone without its classifier.

    module: ``[B, 3, H, W]``, H and W multiples of 32 unless ``any_size`` -> a list of maps, of which those of
    ``picks`` have strides 8, 16 and 32: ``[B, C, h, w]`` or, where ``channels_last``, ``[B, h, w, C]``. channels: of
    these maps. stage_of: the name of each parameter -> its stage, from 5 (stride 32) to 1 (stride 2 and less). mean,
    std: of images in 0..1, as the published weights were trained.
    """

    module: nn.Module
    channels: tuple[int, ...]
    stage_of: Mapping[str, int]
    picks: tuple[int, ...] = (0, 1, 2)
    channels_last: tuple[bool, ...] = (False, False, False)
    any_size: bool = False
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def freeze(self, *, trained: int, batch_norms: bool) -> None:
        """Train the last ``trained`` of the five stages only; with ``batch_norms``, make constants of batch norms.

        Nothing is dropped at random either way: a training is a function of its seed and its images.
        """
        for module in self.module.modules():
            if isinstance(module, _DropoutNd | StochasticDepth):
                module.p = 0.0
        for name, parameter in self.module.named_parameters():
            parameter.requires_grad_(self.stage_of[name] > 5 - trained)
        if batch_norms:
            freeze_batch_norms(self.module)


def with_seed(build: Callable[[], Any], generator: torch.Generator) -> Any:
    """What ``build`` makes with a global CPU generator seeded from ``generator``, whose state is put back."""
    seed = int(torch.randint(2**62, (1,), generator=generator))
    state = torch.get_rng_state()
    try:
        with warnings.catch_warnings():
            # Of how later versions of the library will draw these values.
            warnings.simplefilter("ignore")
            torch.default_generator.manual_seed(seed)
            return build()
    finally:
        torch.set_rng_state(state)


class FrozenNorm(FrozenBatchNorm2d):  # type: ignore[misc]
    """A batch norm as constants, which keeps its epsilon; what the norm held (timm: its activation) comes after it."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__(norm.num_features, eps=norm.eps)
        for part in ("weight", "bias", "running_mean", "running_var"):
            setattr(self, part, getattr(norm, part).detach())
        for name, child in norm.named_children():
            self.add_module(name, child)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, h, w]`` -> the same."""
        # With constants in float32 the maps of a half-precision network would be float32 too: twice the memory traffic.
        is_half = x.device.type != "cpu" and x.dtype in (torch.float16, torch.bfloat16)
        x = self.in_its_type(x) if is_half else super().forward(x)
        for child in self.children():
            x = child(x)
        return x

    def in_its_type(self, x: Tensor) -> Tensor:
        """The norm alone, with constants rounded to the type of ``x``: one pass over it."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        scale, shift = (value.to(x.dtype).view(1, -1, 1, 1) for value in (scale, shift))
        return torch.addcmul(shift, x, scale)


def freeze_batch_norms(module: nn.Module) -> None:
    """Make constants of every batch norm below a module, in place. Names and values stay; other norms do too."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, FrozenNorm(child))
        else:
            freeze_batch_norms(child)


def stage_at(stride: int) -> int:
    """5 for stride 32 to 1 for stride 2 and less."""
    return max(1, stride.bit_length() - 1)


def unfit(name: str, reason: str) -> SettingError:
    """The error for a network that no feature pyramid can stand on."""
    return SettingError(
        f"backbone: the feature pyramid needs stages at strides 8, 16 and 32, but {name} has none: {reason}; "
        "try resnet50, mobilenet_v3_large, efficientnet_b0 or convnext_tiny"
    )
