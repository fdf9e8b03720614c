"""Small batches of known ground truth for the detector's tests. All random values come from generators of their own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from retinaflow.detector.targets import Targets

SIZE = (96, 160)  # (height, width), not square on purpose


def boxes_in(size: tuple[int, int], count: int, generator: torch.Generator) -> Tensor:
    """``[count, 4]`` random xyxy pixel boxes of at least 4 pixels a side inside (height, width)."""
    height, width = size
    scale = torch.tensor([width, height], dtype=torch.float32)
    corner = torch.rand(count, 2, generator=generator) * (scale - 4)
    side = 4 + torch.rand(count, 2, generator=generator) * (scale - corner - 4)
    return torch.cat([corner, corner + side], dim=1)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


@pytest.fixture
def random_boxes(generator: torch.Generator) -> Callable[[int], Tensor]:
    return lambda count: boxes_in(SIZE, count, generator)


@pytest.fixture
def targets(generator: torch.Generator) -> Targets:
    """Three images of SIZE, six classes: 5, 0 and 2 boxes; group-of regions on the first and second."""
    owner = torch.tensor([0, 0, 0, 0, 0, 2, 2])
    return Targets(
        boxes=boxes_in(SIZE, 7, generator),
        labels=torch.randint(0, 6, (7,), generator=generator),
        owner=owner,
        ignore_boxes=torch.tensor([[10.0, 5.0, 120.0, 80.0], [0.0, 0.0, 90.0, 96.0], [40.0, 0.0, 160.0, 60.0]]),
        ignore_labels=torch.tensor([4, 1, 4]),
        ignore_owner=torch.tensor([0, 1, 1]),
        negatives=torch.rand(3, 6, generator=generator) < 0.7,
    )


@pytest.fixture
def ancestors() -> Tensor:
    """Six classes: 0 is above 1 and 2, 1 is above 4 (so 0 is above 4 too); 3 and 5 stand alone."""
    table = torch.zeros(6, 6, dtype=torch.bool)
    table[1, 0] = table[2, 0] = table[4, 1] = table[4, 0] = True
    return table
