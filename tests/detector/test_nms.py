"""What plain NMS and Soft-NMS have in common; ``test_postprocess`` works them by hand and against a double loop."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from retinaflow.detector.nms import hard_nms, soft_nms

Way = Callable[[Tensor, Tensor, Tensor], Tensor]


def _soft(boxes: Tensor, scores: Tensor, groups: Tensor) -> Tensor:
    left = soft_nms(boxes, scores, groups, sigma=0.3, threshold=0.05, max_per_group=len(boxes))
    return left.nonzero().squeeze(1)


WAYS: dict[str, Way] = {
    "nms": lambda boxes, scores, groups: hard_nms(boxes, scores, groups, iou=0.5),
    "soft-nms": _soft,
}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


def crowd(generator: torch.Generator, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes of three groups, crowded around a few places; scores that differ."""
    centre = torch.tensor([[30.0, 30.0], [36.0, 31.0], [80.0, 40.0]])[
        torch.randint(0, 3, (count,), generator=generator)
    ]
    low = centre - 15 + 3 * torch.randn(count, 2, generator=generator)
    side = 30 + 3 * torch.randn(count, 2, generator=generator)
    scores = 0.1 + 0.8 * torch.randperm(count, generator=generator) / count
    return torch.cat([low, low + side], dim=1), scores, 5 * torch.randint(0, 3, (count,), generator=generator)


@every_way
def test_the_order_of_rows_changes_nothing(way: Way, generator: torch.Generator) -> None:
    boxes, scores, groups = crowd(generator, 80)
    order = torch.randperm(80, generator=generator)
    kept = way(boxes[order], scores[order], groups[order])
    assert set(order[kept].tolist()) == set(way(boxes, scores, groups).tolist())


@every_way
def test_a_group_does_not_see_the_others(way: Way, generator: torch.Generator) -> None:
    boxes, scores, groups = crowd(generator, 80)
    together = set(way(boxes, scores, groups).tolist())
    for group in groups.unique():
        rows = (groups == group).nonzero().squeeze(1)
        alone = rows[way(boxes[rows], scores[rows], groups[rows])]
        assert set(alone.tolist()) == together & set(rows.tolist())


@every_way
def test_of_the_same_box_twice_one_stays(way: Way) -> None:
    box = torch.tensor([[5.0, 5.0, 25.0, 45.0]])
    assert way(box.repeat(3, 1), torch.tensor([0.3, 0.9, 0.2]), torch.zeros(3, dtype=torch.int64)).tolist() == [1]


@every_way
def test_boxes_that_do_not_overlap_stay(way: Way) -> None:
    boxes = torch.tensor([[20.0 * n, 0.0, 20.0 * n + 10, 10.0] for n in range(5)])
    scores = torch.tensor([0.5, 0.1, 0.9, 0.3, 0.7])
    assert sorted(way(boxes, scores, torch.zeros(5, dtype=torch.int64)).tolist()) == [0, 1, 2, 3, 4]


@every_way
def test_of_no_box_none_stays(way: Way) -> None:
    assert len(way(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))) == 0
