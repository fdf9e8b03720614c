"""Backbones: the networks whose stages at strides 8, 16 and 32 feed the feature pyramid (Lin et al. 2017, "Feature
Pyramid Networks for Object Detection"), with torchvision's parameter names.

A further family is a new branch here, a name in the setting ``backbone`` and, for published values, in ``weights``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.models import resnet
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

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


def feature_pyramid(config: NetworkSettings) -> nn.Module:
    """The backbone of ``config`` with a pyramid: ``[B, 3, H, W]`` -> maps P3 to P7 ``[B, fpn_channels, h, w]`` by name.

    Its last ``trainable_layers`` stages are trained; values are not set yet.
    """
    norm_layer = nn.BatchNorm2d if config.batch_norm == "train" else FrozenBatchNorm2d
    body = getattr(resnet, config.backbone)(weights=None, norm_layer=norm_layer)
    learning = ("layer4", "layer3", "layer2", "layer1", "conv1")[: config.trainable_layers]
    # The stem's norm learns only together with everything else, as in torchvision.
    prefixes = learning if config.trainable_layers < 5 else (*learning, "bn1")
    for name, parameter in body.named_parameters():
        parameter.requires_grad_(name.startswith(prefixes) if prefixes else False)
    width_c5 = body.inplanes
    top = LastLevelP6P7(config.fpn_channels if config.p6_from == "p5" else width_c5, config.fpn_channels)
    # Torchvision guesses the source from the channel numbers, wrongly where those of P5 and C5 agree.
    top.use_P5 = config.p6_from == "p5"
    top.p6, top.p7 = (CoarseConv(level.in_channels, level.out_channels) for level in (top.p6, top.p7))
    pyramid: nn.Module = BackboneWithFPN(
        body,
        return_layers={"layer2": "0", "layer3": "1", "layer4": "2"},
        in_channels_list=[width_c5 // 4, width_c5 // 2, width_c5],
        out_channels=config.fpn_channels,
        extra_blocks=top,
    )
    return pyramid
