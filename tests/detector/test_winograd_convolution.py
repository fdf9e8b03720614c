"""The 3 x 3 layer: which way it computes, and where it stands in the network."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from retinaflow.detector.network import RetinaNet
from retinaflow.detector.winograd import transform
from retinaflow.detector.winograd.convolution import Conv3x3, use_conv3x3
from retinaflow.settings.training_settings import NetworkSettings


def _by_winograd(layer: Conv3x3, maps: Tensor) -> bool:
    return "_Convolution" in type(layer(maps).grad_fn).__name__


def test_it_computes_as_the_plain_layer_does() -> None:
    torch.manual_seed(0)
    ours, peer = Conv3x3(64, 128), nn.Conv2d(64, 128, 3, padding=1)
    peer.load_state_dict(ours.state_dict())
    maps = torch.randn(2, 64, 32, 32)
    assert _by_winograd(ours, maps)
    torch.testing.assert_close(ours(maps), peer(maps), rtol=1e-4, atol=1e-4)
    # Outside training it is the same to the last bit.
    assert torch.equal(ours.eval()(maps), peer(maps))


def test_small_work_is_left_to_the_plain_layer() -> None:
    assert not _by_winograd(Conv3x3(8, 8), torch.randn(1, 8, 16, 16))
    assert not _by_winograd(Conv3x3(512, 512), torch.randn(4, 512, 1, 1))


def test_only_training_in_single_precision_takes_the_other_way(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, maps = Conv3x3(128, 128), torch.randn(2, 128, 32, 32)
    assert _by_winograd(layer, maps)
    monkeypatch.setattr(transform, "convolve", lambda *_: pytest.fail("not here"))
    with torch.autocast("cpu", torch.bfloat16):
        layer(maps)
    with torch.no_grad():
        layer(maps)
    layer.double()(maps.double())
    layer.float().eval()(maps)


def test_levels_are_the_maps_one_by_one() -> None:
    torch.manual_seed(0)
    layer = Conv3x3(128, 128)
    maps = [torch.randn(2, 128, side, side) for side in (32, 16, 3)]
    together = layer.on_levels(maps)
    assert all("_Convolution" in type(one.grad_fn).__name__ for one in together)
    for found, one in zip(together, maps, strict=True):
        torch.testing.assert_close(found, layer.eval()(one), rtol=1e-4, atol=1e-4)


def test_it_replaces_what_it_can_stand_for_and_keeps_what_is_frozen() -> None:
    with torch.device("meta"):
        module = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1),
            nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False)),
            nn.Conv2d(4, 4, 3, padding=1, stride=2),
            nn.Conv2d(4, 4, 1),
            nn.Conv2d(4, 4, 3, padding=1, groups=2),
        )
    module[0].weight.requires_grad_(False)
    before = {name: value.shape for name, value in module.state_dict().items()}
    use_conv3x3(module)
    replaced = [name for name, child in module.named_modules() if isinstance(child, Conv3x3)]
    assert replaced == ["0", "1.0"]
    assert {name: value.shape for name, value in module.state_dict().items()} == before
    assert not module.get_submodule("0").get_parameter("weight").requires_grad
    assert module.get_submodule("0").get_parameter("bias").requires_grad


def test_every_such_layer_of_the_network_is_one() -> None:
    network = RetinaNet(NetworkSettings(backbone="resnet18", head_norm="none", fpn_channels=64, head_depth=1), 3)
    plain = [name for name, part in network.named_modules() if type(part) is nn.Conv2d and part.kernel_size == (3, 3)]
    strides = {network.get_submodule(name).stride for name in plain}
    assert strides == {(2, 2)}
    frozen = RetinaNet(NetworkSettings(backbone="resnet18", head_norm="none", fpn_channels=64, trainable_layers=3), 3)
    assert not frozen.get_submodule("backbone.body.layer1.0.conv1").get_parameter("weight").requires_grad
