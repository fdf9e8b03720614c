"""Networks of torchvision as backbones: their stages are read off a run without values.

The stages are the fewest modules that form a chain, where each takes what the one before it gives, with a map at each
of the strides of the feature pyramid. Nothing is known of a family of networks beforehand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import get_model, get_model_builder, get_model_weights, resnet

from retinaflow.detector.backbones import IMAGENET_MEAN, IMAGENET_STD, STRIDES, Body, stage_at, unfit, with_seed
from retinaflow.errors import first_line

# Unequal sides, which over any stride are no usual number of channels.
_PROBE = (224, 352)
INCEPTION = (0.5, 0.5, 0.5)


def torchvision_body(name: str, generator: torch.Generator) -> Body:
    """The backbone of that name with initial values of its library, from ``generator``.

    A ResNet of torchvision has no values. Raises SettingError for a network without stages at strides 8, 16 and 32.
    """
    is_resnet = get_model_builder(name).__module__ == resnet.__name__
    if is_resnet:
        with torch.device("meta"):
            network = get_model(name, weights=None)
    else:
        network = with_seed(lambda: get_model(name, weights=None), generator)
    chain = _chain_of(name)
    module = _Chain(network, chain)
    ends = [next(link for link in reversed(chain) if link.stride == stride) for stride in STRIDES]
    # Published weights of such a network were trained on images in -1..1, which it makes of normalised ones.
    changes_images = hasattr(network, "transform_input")
    published = next((weights.transforms() for weights in get_model_weights(name).__members__.values()), None)
    return Body(
        module,
        channels=tuple(link.channels for link in ends),
        stage_of={
            key: stage_at(next(link for link in chain if key.startswith(f"{link.path}.")).stride)
            for key, _ in module.named_parameters()
        },
        channels_last=tuple(link.channels_last for link in ends),
        any_size=is_resnet,
        mean=INCEPTION if changes_images else tuple(getattr(published, "mean", IMAGENET_MEAN)),
        std=INCEPTION if changes_images else tuple(getattr(published, "std", IMAGENET_STD)),
    )


@dataclass(frozen=True)
class _Link:
    """A module of a chain: its name, and the stride and channels of its output."""

    path: str
    stride: int
    channels: int
    channels_last: bool


class _Chain(nn.ModuleDict):
    """The modules of a chain by the names they have in their network; gives the last map of each stride of interest."""

    def __init__(self, network: nn.Module, chain: tuple[_Link, ...]) -> None:
        super().__init__(_trimmed(network, [link.path.split(".") for link in chain]))
        self._paths = [link.path for link in chain]
        strides = [link.stride for link in chain]
        self._ends = {len(strides) - 1 - strides[::-1].index(stride) for stride in STRIDES}

    def forward(self, x: Tensor) -> list[Tensor]:
        """``[B, 3, H, W]`` -> three maps."""
        maps = []
        for number, path in enumerate(self._paths):
            x = self.get_submodule(path)(x)
            if number in self._ends:
                maps.append(x)
        return maps


def _trimmed(network: nn.Module, paths: list[list[str]]) -> dict[str, nn.Module]:
    """The children of a network that are on the paths, containers with what is on the paths of them only."""
    kept: dict[str, nn.Module] = {}
    for name, child in network.named_children():
        below = [path[1:] for path in paths if path[0] == name]
        if below:
            kept[name] = nn.ModuleDict(_trimmed(child, below)) if below[0] else child
    return kept


@cache
def _chain_of(name: str) -> tuple[_Link, ...]:
    """The modules of a network up to its last map at stride 32. Raises SettingError where they form no chain."""
    network = with_seed(lambda: get_model(name, weights=None), torch.Generator()).to("meta").eval()
    calls: dict[str, tuple[Any, Any]] = {}
    for path, module in network.named_modules():
        module.register_forward_hook(partial(_note, calls, path))
    image = torch.empty(1, 3, *_PROBE, device="meta")
    try:
        with torch.no_grad():
            network(image)
    except (RuntimeError, ValueError, AssertionError) as error:
        raise unfit(name, f"it takes images of certain sizes only ({first_line(error)})") from None
    paths = _expanded(network, [child for child, _ in network.named_children()], calls)
    links = [_link(path, calls[path][1]) for path in paths]
    found = {link.stride for link in links if link is not None}
    if not found.issuperset(STRIDES):
        shown = ", ".join(map(str, sorted(found)))
        raise unfit(name, f"its maps have strides {shown}" if shown else "no side of its maps divides the image's")
    last = max(number for number, link in enumerate(links) if link is not None and link.stride == STRIDES[-1])
    before = image
    for path, link in zip(paths[: last + 1], links, strict=False):
        if calls[path][0] is not before or link is None:
            raise unfit(name, f"its module {path} does not take what the one before it gives")
        before = calls[path][1]
    return tuple(link for link in links[: last + 1] if link is not None)


def _note(calls: dict[str, tuple[Any, Any]], path: str, _: nn.Module, inputs: Any, output: Any) -> None:
    calls.setdefault(path, (inputs[0], output))


def _expanded(network: nn.Module, paths: list[str], calls: Mapping[str, tuple[Tensor, Tensor]]) -> list[str]:
    """Names of the modules that are called, where a sequence is replaced by its parts if they add a missing stride."""
    paths = [path for path in paths if path in calls]
    found = {link.stride for path in paths if (link := _link(path, calls[path][1]))}
    for number, path in enumerate(paths):
        module = network.get_submodule(path)
        if isinstance(module, nn.Sequential):
            parts = [f"{path}.{name}" for name, _ in module.named_children()]
            more = {link.stride for part in parts if part in calls and (link := _link(part, calls[part][1]))}
            if more & set(STRIDES) - found:
                return _expanded(network, [*paths[:number], *parts, *paths[number + 1 :]], calls)
    return paths


def _link(path: str, output: Any) -> _Link | None:
    """None for an output that is no map at a power of two."""
    if not isinstance(output, Tensor) or output.dim() != 4:
        return None
    for rows, columns, channels in ((2, 3, 1), (1, 2, 3)):
        stride = _PROBE[0] // max(1, output.shape[rows])
        if stride in (1, 2, 4, 8, 16, 32) and tuple(stride * output.shape[side] for side in (rows, columns)) == _PROBE:
            return _Link(path, stride, output.shape[channels], channels == 3)
    return None
