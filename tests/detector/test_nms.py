"""Every way to suppress overlapping boxes: hand-worked, against a double loop, and what they have in common."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou

from retinaflow.detector.nms import MODE_IOU, hard_nms, soft_nms, support_nms

Way = Callable[[Tensor, Tensor, Tensor], Tensor]


def _support(boxes: Tensor, scores: Tensor, groups: Tensor) -> Tensor:
    return (support_nms(boxes, scores, groups, iou=0.4, power=1.0) > 0.05).nonzero().squeeze(1)


def _soft(boxes: Tensor, scores: Tensor, groups: Tensor) -> Tensor:
    threshold = torch.full_like(scores, 0.05)
    left = soft_nms(boxes, scores, groups, sigma=0.3, threshold=threshold, max_per_group=len(boxes))
    return left.nonzero().squeeze(1)


WAYS: dict[str, Way] = {
    "nms": lambda boxes, scores, groups: hard_nms(boxes, scores, groups, iou=0.5),
    "soft-nms": _soft,
    "support-nms": _support,
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


def slow_support_nms(boxes: Tensor, scores: Tensor, iou: float, power: float) -> dict[int, float]:
    """The three steps, one box at a time, for one group."""
    order = sorted(range(len(boxes)), key=lambda row: -float(scores[row]))
    between = box_iou(boxes, boxes)
    modes: list[int] = []
    for row in order:
        if all(between[row, mode] <= MODE_IOU for mode in modes):
            modes.append(row)
    support = dict.fromkeys(modes, 0.0)
    for row in order:
        support[max(modes, key=lambda mode: float(between[row, mode]))] += float(scores[row])
    kept = {}
    for place, mode in enumerate(modes):
        parts = [support[mode] / support[better] for better in modes[:place] if between[mode, better] > iou]
        kept[mode] = float(scores[mode]) * min([1.0, *parts]) ** power
    return kept


@pytest.mark.parametrize(("iou", "power"), [(0.5, 1.0), (0.3, 2.0)])
def test_support_nms_of_many_groups_at_once_is_that_of_each_box_by_box(
    iou: float, power: float, generator: torch.Generator
) -> None:
    boxes, scores, groups = crowd(generator, 120)
    got = support_nms(boxes, scores, groups, iou=iou, power=power)
    for group in groups.unique():
        rows = (groups == group).nonzero().squeeze(1)
        expected = slow_support_nms(boxes[rows], scores[rows], iou, power)
        assert set(got[rows].nonzero().squeeze(1).tolist()) == set(expected)
        assert len(expected) < len(rows)
        for row, score in expected.items():
            assert float(got[rows[row]]) == pytest.approx(score, rel=1e-4)


def test_a_box_beside_a_better_one_keeps_score_by_how_many_raw_boxes_speak_for_it() -> None:
    # IoU of the two places is 70 / 130 = 0.54. Support is 0.9 + 0.8 + 0.7 = 2.4 and 0.6 + 0.5 = 1.1.
    here, there = [0.0, 0.0, 10.0, 10.0], [3.0, 0.0, 13.0, 10.0]
    boxes = torch.tensor([here, here, here, there, there])
    scores, groups = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5]), torch.zeros(5, dtype=torch.int64)
    got = support_nms(boxes, scores, groups, iou=0.5, power=1.0)
    torch.testing.assert_close(got, torch.tensor([0.9, 0.0, 0.0, 0.6 * 1.1 / 2.4, 0.0]))
    # Where the overlap is allowed, support is not asked for.
    torch.testing.assert_close(
        support_nms(boxes, scores, groups, iou=0.55, power=1.0), torch.tensor([0.9, 0.0, 0.0, 0.6, 0.0])
    )


def test_a_box_with_more_support_than_a_better_one_keeps_its_score() -> None:
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], *([[3.0, 0.0, 13.0, 10.0]] * 3)])
    got = support_nms(boxes, torch.tensor([0.9, 0.8, 0.7, 0.6]), torch.zeros(4, dtype=torch.int64), iou=0.5, power=2.0)
    torch.testing.assert_close(got, torch.tensor([0.9, 0.8, 0.0, 0.0]))


def test_nms_takes_a_threshold_for_each_group() -> None:
    # The same pair of IoU 7 / 13 in two groups.
    pair = torch.tensor([[0.0, 0.0, 10.0, 10.0], [3.0, 0.0, 13.0, 10.0]])
    groups = torch.tensor([0, 0, 1, 1])
    kept = hard_nms(
        pair.repeat(2, 1), torch.tensor([0.9, 0.8, 0.7, 0.6]), groups, iou=torch.tensor([0.5, 0.5, 0.6, 0.6])
    )
    assert sorted(kept.tolist()) == [0, 2, 3]


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
