"""Forward and backward of the detector's wide 3 x 3 layers: ``Conv3x3`` beside ``torch.nn.Conv2d``, CPU seconds.

    python benchmarks/weight_gradient.py

Channels-last maps of batch 4 in float32; the sides take turns, the least of some rounds counts. In the last two rows,
with less than twice as many outputs as inputs, ``Conv3x3`` leaves the work to ``nn.Conv2d``: there the products are
taken on purpose.
"""

from __future__ import annotations

import time

import torch
from torch import nn

from retinaflow.detector.convolution import Conv3x3, weight_gradient

LAYERS = ((256, 4500, 40), (256, 720, 40), (128, 180, 14), (256, 36, 40))
"""Inputs, outputs, side of the map: 500 and 80 classes at 320 pixels, the demo set's 20 at 112, boxes at 320."""
BATCH, ROUNDS = 4, 5


class Always(Conv3x3):
    """By matrix products whatever the width."""

    def _pays(self, maps: torch.Tensor) -> bool:
        del maps
        return True


def main() -> None:
    print(f"{torch.get_num_threads()} threads")
    for inputs, outputs, side in LAYERS:
        peer, ours = measure(inputs, outputs, side)
        print(
            f"{inputs} -> {outputs} channels, {side} x {side}: nn.Conv2d {peer:.4f}, Conv3x3 {ours:.4f} CPU s, "
            f"{peer / ours:.2f} times as fast"
        )


def measure(inputs: int, outputs: int, side: int) -> list[float]:
    """The least CPU seconds of each side; raises AssertionError when their gradients differ."""
    last = torch.channels_last
    torch.manual_seed(0)
    maps = torch.randn(BATCH, inputs, side, side).to(memory_format=last).requires_grad_()
    gradient = torch.randn(BATCH, outputs, side, side).to(memory_format=last)
    layers = [
        layer.to(memory_format=last) for layer in (nn.Conv2d(inputs, outputs, 3, padding=1), Always(inputs, outputs))
    ]
    spent: list[list[float]] = [[], []]
    for _ in range(ROUNDS + 1):
        for layer, times in zip(layers, spent, strict=True):
            layer.zero_grad()
            maps.grad = None
            start = time.process_time()
            layer(maps).backward(gradient)
            times.append(time.process_time() - start)
    expected = layers[0].weight.grad
    assert expected is not None
    torch.testing.assert_close(
        weight_gradient(maps.detach(), gradient, layers[1].weight), expected, rtol=1e-3, atol=1e-2
    )
    return [min(times[1:]) for times in spent]


if __name__ == "__main__":
    main()
