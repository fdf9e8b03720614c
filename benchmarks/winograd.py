"""Forward and backward of 3 x 3 convolutions of a training step: ``retinaflow.detector.winograd`` beside
``torch.nn.functional.conv2d``, seconds.

    python benchmarks/winograd.py

Channels-last maps of a batch in float32; the sides take turns, the least of some rounds counts. Printed too: what
``winograd.cost`` says of the two, from which ``Conv3x3`` decides, and the greatest difference of values and gradients
over the greatest value.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from retinaflow.detector import winograd

PYRAMID = (40, 20, 10, 5, 3)
LAYERS: Sequence[tuple[str, int, int, Sequence[int]]] = (
    ("class logits, 500 classes", 256, 4500, PYRAMID),
    ("class logits, 80 classes", 256, 720, PYRAMID),
    ("class logits, 3 classes", 256, 27, PYRAMID),
    ("a layer of a head", 256, 256, PYRAMID),
    ("ResNet, first stage", 64, 64, (80,)),
    ("ResNet, second stage", 128, 128, (40,)),
    ("ResNet, third stage", 256, 256, (20,)),
    ("ResNet, last stage", 512, 512, (10,)),
    ("demo set, a layer of a head", 64, 64, (16, 8, 4, 2, 1)),
)
"""Name, inputs, outputs, sides of the maps; images of 320 pixels, in the last line of 128."""
BATCH, ROUNDS = 4, 4
Convolution = Callable[[Sequence[Tensor], Tensor, Tensor], Sequence[Tensor]]


def main() -> None:
    print(f"{torch.get_num_threads()} threads")
    for name, inputs, outputs, sides in LAYERS:
        plain, fast = winograd.cost([(BATCH, inputs, side, side) for side in sides], inputs, outputs)
        peer, ours, apart = measure(inputs, outputs, sides)
        print(
            f"{name:<28} {inputs:>3} -> {outputs:<4}  conv2d {peer:.4f}, winograd {ours:.4f} s: "
            f"{peer / ours:.2f} times as fast (expected {plain / fast:.1f}), differs by {apart:.0e} at most",
            flush=True,
        )


def measure(inputs: int, outputs: int, sides: Sequence[int]) -> tuple[float, float, float]:
    """The least seconds of each side, and how far their results are apart."""
    torch.manual_seed(0)
    maps = [_last(BATCH, inputs, side).requires_grad_() for side in sides]
    gradients = [_last(BATCH, outputs, side) for side in sides]
    weight = (0.05 * torch.randn(outputs, inputs, 3, 3)).to(memory_format=torch.channels_last).requires_grad_()
    bias = torch.randn(outputs, requires_grad=True)
    ways: tuple[Convolution, Convolution] = (_plain, winograd.convolve)
    spent: list[list[float]] = [[], []]
    results: list[list[Tensor]] = [[], []]
    for _ in range(ROUNDS + 1):
        for number, way in enumerate(ways):
            start = time.perf_counter()
            values = way(maps, weight, bias)
            learnt = torch.autograd.grad(values, [*maps, weight, bias], gradients)
            spent[number].append(time.perf_counter() - start)
            results[number] = [*values, *learnt]
    apart = max(float((a - b).detach().abs().max() / a.detach().abs().max()) for a, b in zip(*results, strict=True))
    return min(spent[0][1:]), min(spent[1][1:]), apart


def _plain(maps: Sequence[Tensor], weight: Tensor, bias: Tensor) -> Sequence[Tensor]:
    return [functional.conv2d(one, weight, bias, padding=1) for one in maps]


def _last(batch: int, channels: int, side: int) -> Tensor:
    return torch.randn(batch, channels, side, side).to(memory_format=torch.channels_last)


if __name__ == "__main__":
    main()
