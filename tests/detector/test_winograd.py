"""Convolution by Winograd's way: values and gradients are those of ``conv2d``; and the layer that decides which way
it computes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from retinaflow.detector import winograd
from retinaflow.detector.network import RetinaNet
from retinaflow.detector.winograd import Conv3x3, use_conv3x3
from retinaflow.settings.training_settings import NetworkSettings

FORMATS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
SIZES = {
    "whole tiles": [(8, 12)],
    "one pixel": [(1, 1)],
    "parts of tiles": [(5, 7)],
    "one row": [(1, 9)],
    "a pyramid": [(8, 12), (4, 6), (2, 3), (1, 2)],
}


def _by_conv2d(maps: Sequence[Tensor], weight: Tensor, bias: Tensor | None) -> list[Tensor]:
    return [functional.conv2d(one, weight, bias, padding=1) for one in maps]


def _inputs(
    sizes: Sequence[tuple[int, int]],
    *,
    outputs: int = 5,
    memory: torch.memory_format = torch.channels_last,
    dtype: torch.dtype = torch.float64,
) -> tuple[list[Tensor], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, generator=generator)

    maps = [drawn(2, 3, *size).to(memory_format=memory).requires_grad_() for size in sizes]
    weight = drawn(outputs, 3, 3, 3).to(memory_format=memory).requires_grad_()
    return maps, weight, drawn(outputs).requires_grad_()


@pytest.mark.parametrize("memory", FORMATS)
@pytest.mark.parametrize("sizes", SIZES)
def test_values_and_gradients_are_those_of_conv2d(sizes: str, memory: str) -> None:
    maps, weight, bias = _inputs(SIZES[sizes], memory=FORMATS[memory])
    values, expected = winograd.convolve(maps, weight, bias), _by_conv2d(maps, weight, bias)
    gradients = [torch.randn_like(value) for value in expected]
    found = torch.autograd.grad(values, [*maps, weight, bias], gradients)
    wanted = torch.autograd.grad(expected, [*maps, weight, bias], gradients)
    for one, other in zip([*values, *found], [*expected, *wanted], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_outputs_in_several_blocks_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    maps, weight, bias = _inputs(SIZES["a pyramid"], outputs=150)
    whole = winograd.convolve(maps, weight, bias)
    found = torch.autograd.grad(whole, [*maps, weight], [value.sin() for value in whole])
    monkeypatch.setattr(winograd, "_BLOCK", 1)
    parts = winograd.convolve(maps, weight, bias)
    again = torch.autograd.grad(parts, [*maps, weight], [value.sin() for value in parts])
    for one, other in zip([*whole, *found], [*parts, *again], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_a_layer_without_bias() -> None:
    maps, weight, _ = _inputs([(5, 6)])
    torch.testing.assert_close(winograd.convolve(maps, weight, None), _by_conv2d(maps, weight, None))


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1)], ids=["maps", "weight", "bias", "maps and weight"])
def test_what_is_frozen_gets_no_gradient_and_the_others_theirs(frozen: tuple[int, ...]) -> None:
    (maps, *_), weight, bias = _inputs([(5, 6)])
    leaves = [maps, weight, bias]
    for number in frozen:
        leaves[number].requires_grad_(False)
    for way in (winograd.convolve, _by_conv2d):
        way([maps], weight, bias)[0].square().sum().backward()
    for number, leaf in enumerate(leaves):
        if number in frozen:
            assert leaf.grad is None
        else:
            assert leaf.grad is not None
            (expected,) = torch.autograd.grad(_by_conv2d([maps], weight, bias)[0].square().sum(), leaf)
            torch.testing.assert_close(leaf.grad, 2 * expected)


def test_single_precision_rounds_to_about_five_digits() -> None:
    torch.manual_seed(0)
    maps = torch.randn(2, 128, 16, 16, requires_grad=True)
    weight = (0.05 * torch.randn(192, 128, 3, 3)).requires_grad_()
    (value,), (expected,) = winograd.convolve([maps], weight, None), _by_conv2d([maps], weight, None)
    gradient = torch.randn_like(expected)
    found = torch.autograd.grad(value, [maps, weight], gradient)
    wanted = torch.autograd.grad(expected, [maps, weight], gradient)
    for one, other in zip([value, *found], [expected, *wanted], strict=True):
        assert (one - other).abs().max() < 3e-5 * other.abs().max()


@pytest.mark.parametrize("size", [(8, 8), (5, 6)], ids=str)
def test_what_follows_may_work_in_place(size: tuple[int, int]) -> None:
    maps, weight, bias = _inputs([size, size])
    values = winograd.convolve(maps, weight, bias)
    assert all(value.is_contiguous(memory_format=torch.channels_last) for value in values)
    torch.relu_(values[0]).sum().backward()
    (expected,) = torch.autograd.grad(torch.relu(_by_conv2d(maps, weight, bias)[0]).sum(), weight)
    torch.testing.assert_close(weight.grad, expected)


def test_the_cost_counts_multiplications() -> None:
    plain, fast = winograd.cost([(4, 256, 40, 40)], 256, 4500)
    assert plain == 9 * 4 * 1600 * 256 * 4500
    # 36 products per tile of 16 outputs in place of 144, and the transforms.
    assert 0.25 * plain < fast < 0.4 * plain
    # A map of one pixel takes a whole tile.
    small, whole = winograd.cost([(1, 8, 1, 1)], 8, 8)
    assert small < whole


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
    monkeypatch.setattr(winograd, "convolve", lambda *_: pytest.fail("not here"))
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
