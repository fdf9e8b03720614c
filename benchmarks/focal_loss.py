"""The focal loss of this project beside ``torchvision.ops.sigmoid_focal_loss`` and the equalized focal loss, with the
ratio of a class from 0 to 1: time, peak memory, value.

    python benchmarks/focal_loss.py --anchors 40000 --classes 500

Forward and backward in float32 on one CPU thread, each side in a process of its own so that peaks do not mix; median
CPU time of the repeats after a first call. Peak memory is resident memory above what stands before the call (the
logits).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from torch import Tensor

POSITIVES = 300
SIDES = ("torchvision", "retinaflow", "equalized")


def main() -> None:
    arguments = parse()
    if arguments.side:
        print(json.dumps(measure(arguments.side, arguments.anchors, arguments.classes, arguments.repeats)))
        return
    found = {side: run_side(side, arguments) for side in SIDES}
    for side, result in found.items():
        print(
            f"{side:<12} {result['seconds']:.3f} s, peak {result['peak_mib']:.0f} MiB above the logits, "
            f"loss {result['loss']:.6f}"
        )
    peer, ours, equalized = (found[side] for side in SIDES)
    faster, smaller = peer["seconds"] / ours["seconds"], peer["peak_mib"] / ours["peak_mib"]
    print(f"{faster:.1f} times as fast, {smaller:.1f} times less extra memory")
    print(f"equalized: {equalized['seconds'] / ours['seconds']:.2f} of the focal loss's time")


def run_side(side: str, arguments: argparse.Namespace) -> dict[str, float]:
    size = ["--anchors", str(arguments.anchors), "--classes", str(arguments.classes)]
    command = [sys.executable, __file__, "--side", side, *size, "--repeats", str(arguments.repeats)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, float] = json.loads(done.stdout)
    return result


def measure(side: str, anchors: int, classes: int, repeats: int) -> dict[str, float]:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    leaf = torch.randn(1, anchors, classes, generator=generator).sub_(4).requires_grad_()
    rows = torch.randperm(anchors, generator=generator)[:POSITIVES].sort().values
    labels = torch.randint(0, classes, (POSITIVES,), generator=generator)
    # As in training the logits are not a leaf.
    logits = leaf * 1.0
    before, peak, done = resident(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.0005):
            peak[0] = max(peak[0], resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    _, value = step(side, logits, rows, labels)
    done.set()
    watcher.join()
    seconds = [step(side, logits, rows, labels)[0] for _ in range(repeats)]
    return {"seconds": statistics.median(seconds), "peak_mib": (peak[0] - before) / 2**20, "loss": value}


def step(side: str, logits: Tensor, rows: Tensor, labels: Tensor) -> tuple[float, float]:
    start = time.thread_time()
    if side == "torchvision":
        from torchvision.ops import sigmoid_focal_loss

        dense = torch.zeros_like(logits)
        dense[0, rows, labels] = 1
        loss = sigmoid_focal_loss(logits, dense, reduction="sum")
    else:
        from retinaflow.detector.focal_loss import ClassTargets, Pairs, equalized_focal_loss, focal_loss
        from retinaflow.detector.gradient_ratio import equalized

        pairs = Pairs(rows, labels)
        anchors = torch.ones(1, logits.shape[1], dtype=torch.bool)
        classes = torch.ones(1, logits.shape[2], dtype=torch.bool)
        targets = ClassTargets(pairs, pairs, anchors, classes)
        if side == "retinaflow":
            loss = focal_loss(logits, targets)
        else:
            gamma, factor = equalized(2.0, torch.linspace(0, 1, logits.shape[2]), scale=8.0)
            loss, _ = equalized_focal_loss(logits, targets, alpha=0.25, gamma=gamma, factor=factor)
    torch.autograd.grad(loss, logits)
    return time.thread_time() - start, loss.item()


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--anchors", type=int, default=40_000)
    parser.add_argument("--classes", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
