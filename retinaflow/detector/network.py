"""RetinaNet: a batch of images -> class logits and box offsets for every anchor.

ResNet + feature pyramid P3..P7 + two heads shared by all levels (Lin et al. 2017, "Focal Loss for Dense Object
Detection", section 4), put together from torchvision's parts with torchvision's parameter names, so that its published
weights fit (see ``weights``). Initial values have torchvision's distributions but come from a seed of ours; global
random state is neither read nor moved.

Cost: ``forward`` holds one [B, A, K] logits tensor. In the channels-last memory format the heads' outputs are already
in anchor order and are not copied but once, into that tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.misc import Conv2dNormActivation

from retinaflow.detector.anchors import ANCHORS_PER_CELL, AnchorGrid, anchor_grid
from retinaflow.detector.pyramid import FeaturePyramid, body_of
from retinaflow.detector.winograd import Conv3x3, use_conv3x3
from retinaflow.settings.training_settings import GROUPS, NetworkSettings


@dataclass(frozen=True, eq=False)
class RawOutput:
    """``class_logits [B, A, K]`` before the sigmoid and ``box_deltas [B, A, 4]`` for ``anchors.decode``.

    A is in the order of ``AnchorGrid.boxes``. Both have the dtype of the computation (half precision under autocast).
    """

    class_logits: Tensor
    box_deltas: Tensor


def check_ancestors(ancestors: Tensor | None, num_classes: int) -> None:
    """Raises ValueError unless ``ancestors`` is ``[K, K]`` bool: row c marks the strict ancestors of class c."""
    if ancestors is not None and (ancestors.shape != (num_classes, num_classes) or ancestors.dtype != torch.bool):
        raise ValueError(
            f"ancestors must be [{num_classes}, {num_classes}] bool, "
            f"but got {tuple(ancestors.shape)} {str(ancestors.dtype).removeprefix('torch.')}."
        )


class HeadNorm(nn.GroupNorm):
    """Group norm in the dtype of its input, on a GPU too. There autocast computes it in float32, and would keep maps of
    twice the size for the gradient; torch's kernel adds in float32 either way."""

    def forward(self, input: Tensor) -> Tensor:
        """``[B, C, h, w]`` -> the same shape and dtype."""
        if input.device.type == "cuda":
            with torch.autocast("cuda", enabled=False):
                return self.as_input(input)
        return super().forward(input)

    def as_input(self, input: Tensor) -> Tensor:
        """The norm with its parameters rounded to the dtype of ``input``."""
        return F.group_norm(input, self.num_groups, self.weight.to(input), self.bias.to(input), self.eps)


class Head(nn.Module):
    """``head_depth`` 3x3 layers with ReLU and one output layer, the same for every level.

    forward: feature maps ``[B, C, h, w]`` per level -> ``[B, A, outputs]``, A over all levels. The output layer is
    called ``name`` because published weights call it so.
    """

    def __init__(self, config: NetworkSettings, *, outputs: int, name: str) -> None:
        super().__init__()
        norm: Callable[..., nn.Module] | None = partial(HeadNorm, GROUPS) if config.head_norm == "group" else None
        width = config.fpn_channels
        self.conv = nn.Sequential(
            *(Conv2dNormActivation(width, width, norm_layer=norm) for _ in range(config.head_depth))
        )
        self.add_module(name, nn.Conv2d(width, ANCHORS_PER_CELL * outputs, kernel_size=3, padding=1))
        self.name = name
        self.outputs = outputs

    def forward(self, features: list[Tensor]) -> Tensor:
        maps = features
        for layer in (*(part for block in self.conv for part in block.children()), self.get_submodule(self.name)):
            # Weights are shared by the levels, so that their convolutions can be one.
            maps = layer.on_levels(maps) if isinstance(layer, Conv3x3) else [layer(level) for level in maps]
        # [B, 9 * outputs, h, w] -> [B, h * w * 9, outputs]: a view, not a copy, when the map is channels-last.
        return torch.cat([m.permute(0, 2, 3, 1).reshape(m.shape[0], -1, self.outputs) for m in maps], dim=1)


class RetinaNet(nn.Module):
    """The network of ``config`` for ``num_classes`` classes (at least 1; there is no background class), with initial
    values from ``seed`` (an int, or a CPU generator that is moved on).

    Parameters are named as in torchvision's RetinaNet; nothing else is in the state dict.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: NetworkSettings, num_classes: int, *, seed: int | torch.Generator = 0) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes >= 1 must hold, but got num_classes={num_classes}")
        self.config = config
        self.num_classes = num_classes
        generator = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
        body = body_of(config, generator)
        # Built without storage: the parts would draw their initial values from the global generator.
        with torch.device("meta"):
            self.backbone = FeaturePyramid(body, config)
            self.head = nn.ModuleDict(
                {
                    "classification_head": Head(config, outputs=num_classes, name="cls_logits"),
                    "regression_head": Head(config, outputs=4, name="bbox_reg"),
                }
            )
        use_conv3x3(self)
        own = {name for name, module in self.named_modules() if _is_empty(module)}
        self._apply(lambda values: torch.empty_like(values, device="cpu") if values.is_meta else values)  # type: ignore[no-untyped-call]
        self.register_buffer("mean", torch.tensor(body.mean, device="cpu").view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(body.std, device="cpu").view(1, 3, 1, 1), persistent=False)
        _initialise(self, own, generator)

    def forward(self, images: Tensor) -> RawOutput:
        """images: ``[B, 3, H, W]`` uint8 or float, RGB in 0..255, on the network's device; any H and W."""
        pixels = (images.to(self.mean.dtype) / 255 - self.mean) / self.std
        features = list(self.backbone(pixels).values())
        return RawOutput(self.head["classification_head"](features), self.head["regression_head"](features))

    def anchors(self, image_size: tuple[int, int]) -> AnchorGrid:
        """The anchors that the outputs for images of (height, width) pixels refer to, on the network's device."""
        return anchor_grid(image_size, anchor_scale=self.config.anchor_scale, device=self.mean.device)


def _is_empty(module: nn.Module) -> bool:
    values = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return any(value.is_meta for value in values)


@torch.no_grad()
def _initialise(model: RetinaNet, names: set[str], generator: torch.Generator) -> None:
    """Fills the parameters and buffers of these modules: torchvision's distributions, drawn in the modules' order."""
    for name, module in model.named_modules():
        if name not in names:
            continue
        if isinstance(module, nn.Conv2d):
            if name.startswith("backbone.body"):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu", generator=generator)
            elif name.startswith("backbone.fpn"):
                nn.init.kaiming_uniform_(module.weight, a=1, generator=generator)
            else:
                nn.init.normal_(module.weight, std=0.01, generator=generator)
            if module.bias is not None:
                # A small score for every class, so that the many negatives do not drown the first steps.
                score = model.config.class_prior
                prior = math.log((1 - score) / score) if name.endswith("cls_logits") else 0.0
                nn.init.constant_(module.bias, -prior)
        elif isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
            module.reset_parameters()
        elif isinstance(module, FrozenBatchNorm2d):
            for buffer, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
                getattr(module, buffer).fill_(value)
