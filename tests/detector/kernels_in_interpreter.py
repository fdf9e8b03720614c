"""The loss by the kernels and the loss by the operations of torch on the same batches. Prints one JSON object.

Run by ``test_kernels.py`` in a process of its own: Triton reads ``TRITON_INTERPRET`` when it is imported.
"""

from __future__ import annotations

import json
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from retinaflow.detector import detection_loss as module
from retinaflow.detector import fused_loss
from retinaflow.detector.anchors import anchor_grid
from retinaflow.detector.detection_loss import LossConfig, Losses, detection_loss
from retinaflow.detector.network import RawOutput
from retinaflow.detector.targets import Targets, match_anchors

SIZE = (32, 64)
ANCHORS = anchor_grid(SIZE).boxes
CHAIN = torch.tensor([[False, True, True, False], [False, False, True, False], [False] * 4, [False] * 4])
"""Class 0 below 1 below 2; 3 alone."""


def targets(batch: int, classes: int, *, boxes: int = 4, regions: int = 0, seed: int = 0) -> Targets:
    generator = torch.Generator().manual_seed(seed)

    def some(count: int) -> tuple[Tensor, Tensor, Tensor]:
        corner = torch.rand(count, 2, generator=generator) * 30
        side = 4 + 40 * torch.rand(count, 2, generator=generator)
        owner = torch.randint(batch, (count,), generator=generator).sort().values
        return torch.cat([corner, corner + side], 1), torch.randint(classes, (count,), generator=generator), owner

    known = torch.rand(batch, classes, generator=generator) < 0.8
    return Targets(*some(boxes), *some(regions), known)


def output(batch: int, classes: int, *, seed: int = 1, spread: float = 3.0, kind: torch.dtype = torch.float32) -> Any:
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(batch, len(ANCHORS), classes, generator=generator) - 2
    deltas = torch.randn(batch, len(ANCHORS), 4, generator=generator)
    return logits.to(kind).requires_grad_(), deltas.to(kind).requires_grad_()


def both(given: Targets, made: Any, **options: Any) -> dict[str, Any]:
    """Losses, gradients and sums of the two ways."""
    found = []
    for fused in (False, True):
        logits, deltas = (value.detach().clone().requires_grad_() for value in made)
        with mock.patch.object(module, "is_fused", lambda _, fused=fused: fused):
            losses = detection_loss(RawOutput(logits, deltas), ANCHORS, given, **options)
        (2.0 * losses.class_loss + losses.box_loss).backward()
        found.append((losses, logits.grad, deltas.grad))
    return compared(*found)


def compared(plain: tuple[Losses, Tensor, Tensor], fused: tuple[Losses, Tensor, Tensor]) -> dict[str, Any]:
    values = {}
    for name in ("class_loss", "box_loss", "num_positives"):
        values[name] = [float(getattr(one[0], name).detach()) for one in (plain, fused)]
    for name, a, b in (
        ("class_gradient", plain[1], fused[1]),
        ("box_gradient", plain[2], fused[2]),
        ("class_gradients", plain[0].class_gradients, fused[0].class_gradients),
    ):
        values[name] = [float((a.double() - b.double()).abs().max()), float(a.abs().max()), str(b.dtype)]
    return values


def matching() -> dict[str, Any]:
    """Whether the matches agree, anchor by anchor, and how many anchors are positive."""
    found = {}
    for name, given in {
        "some boxes": targets(3, 4, boxes=9),
        "crowded": targets(2, 4, boxes=60, seed=3),
        "no box": targets(2, 4, boxes=0),
        "small boxes": shrunk(targets(2, 4, boxes=12, seed=5)),
    }.items():
        plain = match_anchors(ANCHORS, given)
        boxes = torch.cat([given.boxes, torch.zeros(1, 4)])
        kernel = fused_loss.match(ANCHORS, boxes, fused_loss.bounds(given.owner, given.batch_size), 0.5, 0.4)
        found[name] = [bool(torch.equal(plain, kernel.long())), int((plain >= 0).sum())]
    return found


def shrunk(given: Targets) -> Targets:
    """Boxes of 3 pixels, which match by being the best of a box alone."""
    boxes = torch.cat([given.boxes[:, :2], given.boxes[:, :2] + 3], 1)
    rest = (given.ignore_boxes, given.ignore_labels, given.ignore_owner, given.negatives)
    return Targets(boxes, given.labels, given.owner, *rest)


def with_nan(made: Any) -> Any:
    logits, deltas = (value.detach().clone() for value in made)
    logits[0, 0, 0] = float("nan")
    return logits, deltas


def main() -> None:
    everything = Targets.empty(2, 4)
    gammas, alphas = torch.tensor([0.0, 0.5, 1.0, 3.0]), torch.tensor([0.1, 0.25, 0.5, 0.9])
    ratio = torch.tensor([0.0, 0.3, 0.7, 1.0], dtype=torch.float64)
    equalized = LossConfig(equalized_scale=8.0)
    cases = {
        "focal": both(targets(3, 4), output(3, 4), config=LossConfig()),
        "more classes than a tile": both(targets(2, 70), output(2, 70), config=LossConfig(box_loss="l1")),
        "cross-entropy": both(targets(3, 4), output(3, 4, spread=8), config=LossConfig(gamma=0.0, alpha=None)),
        "by class": both(targets(3, 4), output(3, 4), config=LossConfig(gamma=gammas, alpha=alphas)),
        "equalized": both(targets(3, 4), output(3, 4), config=equalized, ratio=ratio),
        "ancestors known": both(targets(3, 4), output(3, 4), config=LossConfig(), ancestors=CHAIN),
        "ancestors learned": both(
            targets(3, 4), output(3, 4), config=LossConfig(learn_ancestors=True), ancestors=CHAIN
        ),
        "regions": both(targets(3, 4, regions=5), output(3, 4), config=LossConfig(), ancestors=CHAIN),
        "giou": both(targets(3, 4), output(3, 4), config=LossConfig(box_loss="giou")),
        "normaliser": both(targets(3, 4), output(3, 4), config=LossConfig(), normaliser=torch.tensor(7.0)),
        "no box": both(everything, output(2, 4), config=LossConfig()),
        "bfloat16": both(targets(3, 4), output(3, 4, kind=torch.bfloat16), config=LossConfig()),
        "float16": both(targets(3, 4), output(3, 4, kind=torch.float16), config=LossConfig()),
    }
    nan = both(everything, with_nan(output(2, 4)), config=LossConfig())
    print(json.dumps({"cases": cases, "matching": matching(), "nan": nan["class_loss"]}))


if __name__ == "__main__":
    main()
