"""Backbones of timm (``backbone=timm:NAME``): its ``features_only`` networks, which publish strides and channels."""

from __future__ import annotations

from http.client import HTTPException
from typing import Any

import torch
from torch import Tensor, nn

from retinaflow.detector.backbones import STRIDES, Body, stage_at, unfit, with_seed
from retinaflow.errors import DataError, SettingError, first_line
from retinaflow.settings.backbone_names import TIMM, import_timm

_PROBE = (64, 96)


def timm_body(backbone: str, generator: torch.Generator) -> Body:
    """The backbone of that name, with initial values from ``generator``.

    Raises SettingError without timm, and for a network without stages at strides 8, 16 and 32.
    """
    import_timm()
    try:
        module = with_seed(lambda: timm_network(backbone), generator)
    except (RuntimeError, AssertionError, AttributeError) as error:
        raise unfit(backbone, f"timm gives no maps of it ({first_line(error)})") from None
    strides = list(module.feature_info.reduction())
    if not set(STRIDES).issubset(strides):
        raise unfit(backbone, f"its maps have strides {', '.join(map(str, sorted(set(strides))))}")
    picks = tuple(len(strides) - 1 - strides[::-1].index(stride) for stride in STRIDES)
    channels = tuple(int(module.feature_info.channels(pick)) for pick in picks)
    channels_last = str(getattr(module, "output_fmt", "NCHW")).endswith("NHWC")
    _check_maps(backbone, module, picks, channels, channels_last)
    return Body(
        module,
        picks=picks,
        channels=channels,
        stage_of=_stages(module, strides),
        channels_last=(channels_last,) * len(picks),
        mean=tuple(module.pretrained_cfg["mean"]),
        std=tuple(module.pretrained_cfg["std"]),
    )


def timm_network(backbone: str, **more: Any) -> nn.Module:
    """A ``features_only`` network of timm: ``[B, 3, H, W]`` -> a list of maps. Raises what timm raises."""
    network: nn.Module = import_timm().create_model(backbone.removeprefix(TIMM), features_only=True, **more)
    return network


def published_values(backbone: str, source: str) -> dict[str, Tensor]:
    """The ImageNet weights that timm publishes for a backbone, by the names of its ``features_only`` network.

    Raises SettingError where there are none, and DataError where they cannot be fetched.
    """
    if source != "imagenet":
        raise SettingError(
            f"weights={source} is a recipe of torchvision, but got backbone={backbone}; use weights=imagenet, and "
            "choose a recipe by a tag of timm: timm:resnet50.a1_in1k"
        )
    try:
        return timm_network(backbone, pretrained=True).state_dict()
    except (OSError, RuntimeError, ValueError, HTTPException) as error:
        raise DataError(
            f"The weights that timm publishes for {backbone} are not on this machine and could not be fetched "
            f"({first_line(error)}). Fetch them elsewhere{_place(backbone)} and give their file (.safetensors or "
            ".pth) as weights=PATH, or use weights=none (training from nothing)."
        ) from error


def _place(backbone: str) -> str:
    config = import_timm().get_pretrained_cfg(backbone.removeprefix(TIMM))
    return f" (https://huggingface.co/{config.hf_hub_id})" if config is not None and config.hf_hub_id else ""


def _check_maps(
    backbone: str, module: nn.Module, picks: tuple[int, ...], channels: tuple[int, ...], channels_last: bool
) -> None:
    """Raises SettingError unless the network takes images of any multiples of 32 and gives what it publishes."""
    try:
        with torch.no_grad():
            maps = module.eval()(torch.zeros(1, 3, *_PROBE))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise unfit(backbone, f"it takes images of certain sizes only ({first_line(error)})") from None
    for pick, stride, count in zip(picks, STRIDES, channels, strict=True):
        size = [side // stride for side in _PROBE]
        wanted = (1, *size, count) if channels_last else (1, count, *size)
        if maps[pick].shape != wanted:
            raise unfit(backbone, f"its map at stride {stride} has shape {tuple(maps[pick].shape)}, not {wanted}")
    module.train()


def _stages(module: Any, strides: list[int]) -> dict[str, int]:
    """Each parameter's stage: that of the first published map that is made after it, in the order of the modules."""
    order = {plain_name(path): number for number, (path, _) in enumerate(module.named_modules())}
    ends = []
    for name, stride in zip(module.feature_info.module_name(), strides, strict=True):
        end = plain_name(name)
        own = [number for path, number in order.items() if path == end or path.startswith(f"{end}_")]
        ends.append((max(own, default=-1), stride))
    last = max(strides)
    stages = {}
    for parameter, _ in module.named_parameters():
        place = order[plain_name(parameter.rpartition(".")[0])]
        stride = next((stride for end, stride in ends if place <= end), last)
        stages[parameter] = min(5, stage_at(stride))
    return stages


def plain_name(path: str) -> str:
    """A module's name however timm has nested it: ``stages.0`` is also ``stages_0`` and ``model.stages.0``."""
    return path.removeprefix("model.").replace(".", "_")
