"""The wide 3 x 3 convolution: values and gradients are those of ``torch.nn.Conv2d``."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from retinaflow.detector.convolution import Conv3x3, weight_gradient

FORMATS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}


def _pair(bias: bool, memory_format: torch.memory_format) -> tuple[nn.Conv2d, Conv3x3]:
    torch.manual_seed(0)
    ours = Conv3x3(5, 11, bias=bias).to(memory_format=memory_format)
    peer = nn.Conv2d(5, 11, 3, padding=1, bias=bias).to(memory_format=memory_format)
    peer.load_state_dict(ours.state_dict())
    return peer, ours


def _learnt(layer: nn.Module, maps: Tensor, gradient: Tensor) -> list[Tensor]:
    """Values, the gradient of the maps, and of each parameter."""
    maps = maps.clone().requires_grad_()
    out = layer(maps)
    out.backward(gradient)
    grads = [value.grad for value in (maps, *layer.parameters())]
    assert all(grad is not None for grad in grads)
    return [out.detach(), *(grad for grad in grads if grad is not None)]


@pytest.mark.parametrize("shape", [(2, 4, 6), (1, 1, 1), (3, 5, 2)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("memory", FORMATS)
def test_values_and_gradients_are_those_of_the_plain_layer(shape: tuple[int, ...], bias: bool, memory: str) -> None:
    batch, height, width = shape
    peer, ours = _pair(bias, FORMATS[memory])
    maps = torch.randn(batch, 5, height, width).to(memory_format=FORMATS[memory])
    gradient = torch.randn(batch, 11, height, width).to(memory_format=FORMATS[memory])
    for found, expected in zip(_learnt(ours, maps, gradient), _learnt(peer, maps, gradient), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_gradient_of_one_pixel_is_its_neighbourhood() -> None:
    """One output of one pixel in the middle of 3 x 3: its weights learn the nine inputs around it, in their places."""
    maps = torch.arange(9.0).reshape(1, 1, 3, 3)
    gradient = torch.zeros(1, 1, 3, 3)
    gradient[0, 0, 1, 1] = 2.0
    assert torch.equal(weight_gradient(maps, gradient, torch.zeros(1, 1, 3, 3)), 2.0 * maps)


def test_the_gradient_has_the_memory_format_of_the_weights() -> None:
    _, ours = _pair(True, torch.channels_last)
    found = _learnt(ours, torch.randn(2, 5, 4, 6), torch.randn(2, 11, 4, 6))[2]
    assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_a_frozen_parameter_gets_no_gradient(frozen: str) -> None:
    peer, ours = _pair(True, torch.contiguous_format)
    maps, gradient = torch.randn(1, 5, 4, 6, requires_grad=True), torch.randn(1, 11, 4, 6)
    for layer in (peer, ours):
        getattr(layer, frozen).requires_grad_(False)
        layer(maps).backward(gradient)
    assert getattr(ours, frozen).grad is None
    free = "bias" if frozen == "weight" else "weight"
    torch.testing.assert_close(getattr(ours, free).grad, getattr(peer, free).grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("outputs", [9, 10], ids=["narrow", "wide"])
def test_only_a_wide_layer_in_training_takes_matrix_products(outputs: int) -> None:
    layer = Conv3x3(5, outputs)
    maps = torch.randn(1, 5, 4, 6)
    by_products = "_ByMatrixProducts" in type(layer(maps).grad_fn).__name__
    assert by_products == (outputs >= 10)
    with torch.autocast("cpu", torch.bfloat16):
        assert "_ByMatrixProducts" not in type(layer(maps).grad_fn).__name__
    with torch.no_grad():
        assert layer(maps).grad_fn is None
