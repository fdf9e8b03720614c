"""The feature pyramid over a backbone: images -> maps P3 to P7, with the parameter names of torchvision's
``BackboneWithFPN``."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelP6P7

from retinaflow.detector.backbones import STRIDES, Body
from retinaflow.detector.timm_backbones import timm_body
from retinaflow.detector.torchvision_backbones import torchvision_body
from retinaflow.settings.backbone_names import TIMM
from retinaflow.settings.training_settings import NetworkSettings


class CoarseConv(nn.Conv2d):
    """The 3 x 3 convolution of stride 2 that makes P6 and P7: ``[B, in, h, w]`` -> ``[B, out, ceil(h/2), ceil(w/2)]``.

    On a CPU, a map one pixel wide is computed in float32 also under bfloat16 autocast: oneDNN's bfloat16 gradient of
    the weights of such a map is uninitialised memory (torch 2.14; width 2 and stride 1 are correct). The map is tiny,
    so this costs nothing.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=3, stride=2, padding=1)

    def forward(self, input: Tensor) -> Tensor:
        """input: ``[B, in, h, w]`` float."""
        if input.device.type == "cpu" and input.shape[-1] == 1 and torch.is_autocast_enabled("cpu"):
            with torch.autocast("cpu", enabled=False):
                return super().forward(input.float())
        return super().forward(input)


def body_of(config: NetworkSettings, generator: torch.Generator) -> Body:
    """The backbone of the settings, frozen as they demand, with initial values of its library from ``generator``.

    A ResNet of torchvision has no values: it is on the meta device. Raises SettingError for a network without stages
    at strides 8, 16 and 32.
    """
    is_timm = config.backbone.startswith(TIMM)
    body = (timm_body if is_timm else torchvision_body)(config.backbone, generator)
    body.freeze(trained=config.trainable_layers, batch_norms=config.batch_norm == "frozen")
    return body


class FeaturePyramid(nn.Module):
    """A backbone with a pyramid: ``[B, 3, H, W]``, any H and W -> five maps ``[B, fpn_channels, h, w]`` by name, P3 to
    P7, h and w the image's sides over 8 to 128, rounded up."""

    def __init__(self, body: Body, config: NetworkSettings) -> None:
        super().__init__()
        self.body = body.module
        width_c5 = body.channels[-1]
        top = LastLevelP6P7(config.fpn_channels if config.p6_from == "p5" else width_c5, config.fpn_channels)
        # Torchvision guesses the source from the channel numbers, wrongly where those of P5 and C5 agree.
        top.use_P5 = config.p6_from == "p5"
        top.p6, top.p7 = (CoarseConv(level.in_channels, level.out_channels) for level in (top.p6, top.p7))
        self.fpn = FeaturePyramidNetwork(list(body.channels), config.fpn_channels, extra_blocks=top)
        self._picks, self._channels_last, self._any_size = body.picks, body.channels_last, body.any_size

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """images: normalised by the mean and standard deviation of the backbone."""
        height, width = images.shape[2], images.shape[3]
        if not self._any_size:
            # Backbones round the sides of their maps up or down, or refuse some; multiples of 32 all divide alike.
            below, right = -height % STRIDES[-1], -width % STRIDES[-1]
            if below or right or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
                images = nn.functional.pad(images, (0, right, 0, below))
        maps = self.body(images)
        picked = zip(self._picks, self._channels_last, strict=True)
        maps = [maps[pick].permute(0, 3, 1, 2) if is_last else maps[pick] for pick, is_last in picked]
        if not self._any_size:
            sizes = [((height + stride - 1) // stride, (width + stride - 1) // stride) for stride in STRIDES]
            maps = [one[:, :, :rows, :columns] for one, (rows, columns) in zip(maps, sizes, strict=True)]
        levels: dict[str, Tensor] = self.fpn({str(number): one for number, one in enumerate(maps)})
        return levels
