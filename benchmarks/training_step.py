"""A training step of this project beside torchvision's ``retinanet_resnet50_fpn``: images a second, peak memory, and
the share of the machine's measured matrix-product speed that the step reaches.

    python benchmarks/training_step.py --classes 500,3 --steps 3

Same ResNet-50, heads, image size, batch, boxes and optimizer (AdamW, clipped gradients). torchvision as people use it:
a list of images in, a dict of losses out, matching and losses image by image. Each side is a process of its own, and
they take turns step by step, so that other work on the machine meets both. Printed per arm: the fastest step and the
least processor time of a step (which other work disturbs less), images a second by both, peak resident memory above
what stands before the first step (weights, inputs), and the matrix-product share: the floating-point operations of
plain convolutions, forward and backward, over the fastest step, relative to the fastest float32 (or bfloat16) matrix
product in the same process (more than 1 is possible for a side that needs fewer, as
``retinaflow.detector.winograd``). ``--precisions`` names the arms; ``shipped`` is torchvision in float32 and
this project with ``precision=auto``.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from retinaflow.detector import winograd
from retinaflow.detector.detection_loss import LossConfig, detection_loss
from retinaflow.detector.device import Precision, autocast, fast_precision
from retinaflow.detector.network import RetinaNet
from retinaflow.detector.targets import Targets
from retinaflow.inference.checkpoint import on_device
from retinaflow.settings.training_settings import NetworkSettings

CPU = torch.device("cpu")
BOXES_PER_IMAGE = 8
SIDES = ("torchvision", "retinaflow")
Step = Callable[[], float]


def main() -> None:
    arguments = parse()
    if arguments.side:
        serve(arguments.side, int(arguments.classes), arguments.precisions, arguments)
        return
    print(f"{torch.get_num_threads()} threads, {machine()}, precision=auto is {fast_precision(CPU)} here")
    for classes in map(int, arguments.classes.split(",")):
        for precision in arguments.precisions.split(","):
            found = compare(classes, precision, arguments)
            report(classes, precision, found, arguments.batch_size)


def compare(classes: int, precision: str, arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Both sides, a step of each in turn; the first one of each is for warming up."""
    size = ["--image_size", str(arguments.image_size), "--batch_size", str(arguments.batch_size)]
    command = [sys.executable, __file__, "--classes", str(classes), "--precisions", precision, *size, "--side"]
    children = {
        side: subprocess.Popen([*command, side], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for side in SIDES
    }
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(arguments.steps + 1):
        for side, child in children.items():
            assert child.stdin is not None
            assert child.stdout is not None
            child.stdin.write("step\n")
            child.stdin.flush()
            found[side].append(json.loads(child.stdout.readline()))
    last = {}
    for side, child in children.items():
        out, _ = child.communicate()
        last[side] = json.loads(out)
    return {
        side: {
            "seconds": min(step["seconds"] for step in steps[1:]),
            "cpu": min(step["cpu"] for step in steps[1:]),
            "loss": steps[0]["loss"],
            **last[side],
        }
        for side, steps in found.items()
    }


def report(classes: int, precision: str, found: dict[str, dict[str, float]], batch: int) -> None:
    print(f"\n{classes} classes, {precision}")
    for side, result in found.items():
        share = result["flops"] / result["seconds"] / result["matmul"]
        print(
            f"  {side:<12} {result['seconds']:6.2f} s a step ({result['cpu']:6.2f} s of processor), "
            f"{batch / result['seconds']:5.2f} images/s, peak {result['peak_mib']:6.0f} MiB above weights and inputs, "
            f"{result['flops'] / 1e9:.0f} GFLOP, {share:.0%} of the matrix-product speed "
            f"({result['matmul'] / 1e9:.0f} GFLOP/s), first loss {result['loss']:.3f}"
        )
    peer, ours = (found[side] for side in SIDES)
    print(
        f"  {peer['seconds'] / ours['seconds']:.2f} times the images a second "
        f"({peer['cpu'] / ours['cpu']:.2f} times by processor time), "
        f"{peer['peak_mib'] / ours['peak_mib']:.1f} times less memory"
    )


def serve(side: str, classes: int, precision: str, arguments: argparse.Namespace) -> None:
    """Build one side, then answer each line of the input with a step."""
    size, batch = arguments.image_size, arguments.batch_size
    arithmetic = arithmetic_of(side, precision)
    step = BUILD[side](classes, size, batch, arithmetic)
    before = resident()
    for _ in sys.stdin:
        start, cpu = time.perf_counter(), time.process_time()
        loss = step()
        print(
            json.dumps({"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu, "loss": loss}),
            flush=True,
        )
    # Linux counts kilobytes.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    print(json.dumps({"peak_mib": peak / 2**20, "flops": flops(step), "matmul": matmul_speed(arithmetic)}), flush=True)


def arithmetic_of(side: str, precision: str) -> Precision:
    if precision == "shipped":
        return fast_precision(CPU) if side == "retinaflow" else "float32"
    return "bfloat16" if precision == "bfloat16" else "float32"


def build_torchvision(classes: int, size: int, batch: int, precision: Precision) -> Step:
    from torchvision.models.detection import retinanet_resnet50_fpn

    torch.manual_seed(0)
    model = retinanet_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=classes, min_size=size, max_size=size
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    images, boxes, labels = inputs(classes, size, batch)
    listed = [image.float() / 255 for image in images]
    ground_truth = [{"boxes": own, "labels": label} for own, label in zip(boxes, labels, strict=True)]

    def step() -> float:
        with autocast(CPU, precision):
            losses: dict[str, Tensor] = model(listed, ground_truth)
        # Where torchvision's reference script does it.
        optimizer.zero_grad(set_to_none=True)
        return update(torch.stack(list(losses.values())).sum(), model, optimizer)

    return step


def build_retinaflow(
    classes: int, size: int, batch: int, precision: Precision, network: NetworkSettings | None = None
) -> Step:
    """network: other than the one that is compared with torchvision's."""
    settings = network or NetworkSettings(backbone="resnet50", head_norm="none")
    model = on_device(RetinaNet(settings, classes), CPU).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    images, boxes, labels = inputs(classes, size, batch)
    images = images.contiguous(memory_format=torch.channels_last)
    nothing = torch.zeros(0, dtype=torch.int64)
    targets = Targets(
        boxes=boxes.flatten(0, 1),
        labels=labels.flatten(),
        owner=torch.arange(batch).repeat_interleave(BOXES_PER_IMAGE),
        ignore_boxes=torch.zeros(0, 4),
        ignore_labels=nothing,
        ignore_owner=nothing,
        negatives=torch.ones(batch, classes, dtype=torch.bool),
    )
    config = LossConfig(box_loss="l1")

    def step() -> float:
        # Before the forward pass, as ``training.step`` does, so that the last step's gradients are no part of the peak.
        optimizer.zero_grad(set_to_none=True)
        with autocast(CPU, precision):
            output = model(images)
        anchors = model.anchors((size, size)).boxes
        return update(detection_loss(output, anchors, targets, config=config).total, model, optimizer)

    return step


BUILD = {"torchvision": build_torchvision, "retinaflow": build_retinaflow}


def update(loss: Tensor, model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 5.0)
    optimizer.step()
    return loss.item()


def inputs(classes: int, size: int, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images ``[B, 3, S, S]`` uint8, boxes ``[B, n, 4]`` xyxy pixels, labels ``[B, n]``."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=generator)
    corner = torch.rand(batch, BOXES_PER_IMAGE, 2, generator=generator) * size * 0.7
    side = size * (0.05 + 0.25 * torch.rand(batch, BOXES_PER_IMAGE, 2, generator=generator))
    labels = torch.randint(0, classes, (batch, BOXES_PER_IMAGE), generator=generator)
    return images, torch.cat([corner, corner + side], dim=2), labels


def flops(step: Step) -> float:
    """Of the convolutions and matrix products of one step, done the plain way, whichever way they are done; a
    multiplication and an addition counted as two."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, mock.patch.object(winograd, "SMALLEST", float("inf")):
        step()
    return float(counter.get_total_flops())


def matmul_speed(precision: Precision, side: int = 2048, repeats: int = 5) -> float:
    """The fastest of some products of square matrices, operations a second."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    a, b = torch.ones(side, side, dtype=dtype), torch.ones(side, side, dtype=dtype)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown processor")
    flags = next((line for line in lines if line.startswith("flags")), "")
    found = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags.split()]
    return f"{name} ({', '.join(found)})"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", default="500,3")
    parser.add_argument("--precisions", default="float32,shipped", help="of float32, bfloat16, shipped")
    parser.add_argument("--image_size", type=int, default=320)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    arguments: Any = parser.parse_args()
    return arguments


if __name__ == "__main__":
    main()
