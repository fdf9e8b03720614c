"""A training step in the two memory orders of a convolution's input, side by side.

    python benchmarks/memory_format.py --image_size 128 --batch_size 16

Prints the median seconds of a step (forward, loss, backward) in both orders and their ratio, for the demo's detector.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from retinaflow.detector.detection_loss import LossConfig, detection_loss
from retinaflow.detector.network import RetinaNet
from retinaflow.detector.targets import Targets
from retinaflow.settings.training_settings import NetworkSettings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image_size", type=int, default=128)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5)
    arguments = parser.parse_args()
    formats = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
    seconds: dict[str, list[float]] = {name: [] for name in formats}
    for step in range(arguments.steps + 1):
        for name, order in formats.items():
            elapsed = time_step(order, arguments.image_size, arguments.batch_size)
            if step > 0:  # the first step of each order builds the kernels
                seconds[name].append(elapsed)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, value in medians.items():
        print(f"{name:<14} {value:.3f} s a step, {arguments.batch_size / value:.1f} images/s")
    print(f"channels_last is {medians['contiguous'] / medians['channels_last']:.1f} times as fast")


def time_step(order: torch.memory_format, size: int, batch: int) -> float:
    model = RetinaNet(NetworkSettings(backbone="resnet18", head_norm="group", fpn_channels=64, head_depth=2), 20)
    model = model.to(memory_format=order)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=generator)
    images = images.contiguous(memory_format=order)
    owner = torch.arange(batch).repeat_interleave(3)
    targets = Targets(
        boxes=torch.tensor([[10.0, 20.0, 60.0, 80.0]]).repeat(len(owner), 1),
        labels=owner % 20,
        owner=owner,
        ignore_boxes=torch.zeros(0, 4),
        ignore_labels=torch.zeros(0, dtype=torch.int64),
        ignore_owner=torch.zeros(0, dtype=torch.int64),
        negatives=torch.ones(batch, 20, dtype=torch.bool),
    )
    anchors = model.anchors((size, size)).boxes
    start = time.perf_counter()
    detection_loss(model(images), anchors, targets, config=LossConfig()).total.backward()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
