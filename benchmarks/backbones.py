"""Training steps of several backbones, in float32 and bfloat16 on one CPU thread: images per second of CPU time.

    python benchmarks/backbones.py --backbones resnet18,timm:tf_efficientnet_lite0

All stages and batch norms are trained, from random values. The combinations take turns, step by step, in one process;
the least CPU time of the steps after the first counts.
"""

from __future__ import annotations

import argparse
import time

import torch
from training_step import build_retinaflow

from retinaflow.detector.device import Precision
from retinaflow.settings.training_settings import NetworkSettings

PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16")


def main() -> None:
    arguments = parse()
    torch.set_num_threads(1)
    names = arguments.backbones.split(",")
    steps = {
        (name, precision): build_retinaflow(
            arguments.classes,
            arguments.image_size,
            arguments.batch_size,
            precision,
            NetworkSettings(backbone=name, fpn_channels=64, head_depth=2),
        )
        for name in names
        for precision in PRECISIONS
    }
    times: dict[tuple[str, str], list[float]] = {key: [] for key in steps}
    for _ in range(arguments.steps + 1):
        for key, step in steps.items():
            start = time.process_time()
            step()
            times[key].append(time.process_time() - start)
    print(f"| backbone | {' | '.join(PRECISIONS)} |\n| --- | --- | --- |")
    for name in names:
        speeds = [arguments.batch_size / min(times[name, precision][1:]) for precision in PRECISIONS]
        print(f"| `{name}` | {' | '.join(f'{speed:.1f}' for speed in speeds)} |")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", default="resnet18,timm:tf_efficientnet_lite0")
    parser.add_argument("--classes", type=int, default=25)
    parser.add_argument("--image_size", type=int, default=160)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=6)
    return parser.parse_args()


if __name__ == "__main__":
    main()
