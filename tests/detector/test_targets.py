from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

from retinaflow import boxes as numpy_boxes
from retinaflow.detector import targets as targets_module
from retinaflow.detector.anchors import anchor_grid
from retinaflow.detector.targets import BACKGROUND, BETWEEN, Targets, ignore_masks, match_anchors

ANCHORS = anchor_grid((96, 160)).boxes


def with_boxes(boxes: Tensor, owner: list[int], *, batch: int) -> Targets:
    labels = torch.zeros(len(boxes), dtype=torch.int64)
    return replace(Targets.empty(batch, 1), boxes=boxes, labels=labels, owner=torch.tensor(owner, dtype=torch.int64))


def torchvisions_matches(targets: Targets, anchors: Tensor) -> Tensor:
    """Image by image with torchvision's Matcher; indices shifted to rows of the batch."""
    matcher = Matcher(0.5, 0.4, allow_low_quality_matches=True)
    rows = []
    for image in range(targets.batch_size):
        own = (targets.owner == image).nonzero().squeeze(1)
        if len(own) == 0:
            rows.append(torch.full((len(anchors),), -1))
            continue
        match = matcher(box_iou(targets.boxes[own], anchors))
        rows.append(torch.where(match >= 0, own[match.clamp(min=0)], match))
    return torch.stack(rows)


@pytest.mark.parametrize("block", [1, 20_000, 1 << 24], ids=["one column at a time", "a few columns", "all at once"])
def test_matching_a_batch_is_torchvisions_matcher_on_each_image(
    block: int, targets: Targets, random_boxes: Callable[[int], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets_module, "CPU_BLOCK", block)
    crowd = with_boxes(random_boxes(60), [0] * 3 + [2] * 1 + [3] * 56, batch=5)
    for batch in (targets, crowd):
        assert torch.equal(match_anchors(ANCHORS, batch), torchvisions_matches(batch, ANCHORS))


def test_equal_boxes_go_to_the_first_of_them() -> None:
    boxes = torch.tensor([[10.0, 10.0, 60.0, 60.0]]).repeat(3, 1)
    matched = match_anchors(ANCHORS, with_boxes(boxes, [0, 0, 0], batch=1))
    assert torch.equal(matched, torchvisions_matches(with_boxes(boxes, [0, 0, 0], batch=1), ANCHORS))
    assert set(matched.unique().tolist()) <= {0, BACKGROUND, BETWEEN}


def test_a_batch_without_boxes_is_all_background() -> None:
    assert (match_anchors(ANCHORS, Targets.empty(2, 3)) == BACKGROUND).all()


def test_an_overlap_of_one_half_is_foreground_of_two_fifths_is_between_and_less_is_background() -> None:
    # Box 10 x 10; anchors 10 x 10 (IoU 1), 10 x 5 inside (0.5), 10 x 4 (0.4), 10 x 3 (0.3).
    anchors = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 10, 4], [0, 0, 10, 3]])
    matched = match_anchors(anchors, with_boxes(torch.tensor([[0.0, 0.0, 10.0, 10.0]]), [0], batch=1))
    assert matched.tolist() == [[0, 0, BETWEEN, BACKGROUND]]


def test_a_box_that_no_anchor_fits_gets_the_anchor_it_overlaps_most() -> None:
    anchors = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 20], [50, 50, 60, 60]])
    matched = match_anchors(anchors, with_boxes(torch.tensor([[0.0, 0.0, 2.0, 2.0]]), [0], batch=1))
    assert matched.tolist() == [[0, BACKGROUND, BACKGROUND]]


def test_a_box_that_overlaps_no_anchor_matches_none() -> None:
    anchors = torch.tensor([[0.0, 0, 10, 10], [50, 50, 60, 60]])
    matched = match_anchors(anchors, with_boxes(torch.tensor([[20.0, 20.0, 22.0, 22.0]]), [0], batch=1))
    assert (matched == BACKGROUND).all()


def test_the_order_of_boxes_changes_nothing_but_their_numbers(random_boxes: Callable[[int], Tensor]) -> None:
    boxes = random_boxes(9)
    order = torch.tensor([3, 1, 0, 8, 2, 5, 4, 7, 6])
    plain = match_anchors(ANCHORS, with_boxes(boxes, [0] * 9, batch=1))
    mixed = match_anchors(ANCHORS, with_boxes(boxes[order], [0] * 9, batch=1))
    assert torch.equal(torch.where(mixed >= 0, order[mixed.clamp(min=0)], mixed), plain)


@pytest.mark.parametrize("block", [1, 1 << 24], ids=["one region at a time", "all at once"])
def test_anchors_in_group_of_regions_silence_the_class_its_ancestors_and_its_descendants(
    block: int, targets: Targets, ancestors: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets_module, "CPU_BLOCK", block)
    masks = ignore_masks(ANCHORS, targets, ancestors=ancestors)
    assert masks is not None
    got = torch.einsum("bra,brk->bak", masks.anchors.float(), masks.classes.float()) > 0
    # Class 4 has the ancestors 0 and 1; class 1 has the ancestor 0 and the descendant 4.
    related = {4: [0, 1, 4], 1: [0, 1, 4]}
    expected = np.zeros(got.shape, dtype=bool)
    inside = numpy_boxes.ioa(ANCHORS.double().numpy(), targets.ignore_boxes.double().numpy()) >= 0.5
    for region, (image, label) in enumerate(
        zip(targets.ignore_owner.tolist(), targets.ignore_labels.tolist(), strict=True)
    ):
        expected[np.ix_([image], np.flatnonzero(inside[:, region]), related[label])] = True
    assert np.array_equal(got.numpy(), expected)


def test_without_a_hierarchy_a_region_silences_its_own_class_only(targets: Targets) -> None:
    masks = ignore_masks(ANCHORS, targets)
    assert masks is not None
    assert masks.classes[0].nonzero()[:, 1].tolist() == [4]


def test_a_batch_without_regions_has_no_mask() -> None:
    assert ignore_masks(ANCHORS, Targets.empty(2, 3)) is None


def test_targets_travel_through_pickle_and_to_a_device_unchanged(targets: Targets) -> None:
    for copy in (pickle.loads(pickle.dumps(targets)), targets.to("cpu")):
        assert all(torch.equal(getattr(copy, f.name), getattr(targets, f.name)) for f in fields(Targets))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"boxes": torch.zeros(7, 4)}, r"x1 < x2 and y1 < y2.*boxes\[0\]"),
        ({"boxes": torch.full((7, 4), torch.nan)}, "x1 < x2"),
        ({"boxes": torch.zeros(7, 5)}, r"\[P, 4\] float"),
        ({"labels": torch.full((7,), 6)}, "labels must lie in 0..5, but got 6"),
        ({"labels": torch.zeros(6, dtype=torch.int64)}, r"labels must be \[7\] int64"),
        ({"owner": torch.tensor([0, 0, 2, 1, 0, 2, 2])}, "ascending"),
        ({"ignore_owner": torch.tensor([0, 1, 3])}, "ignore_owner must lie in 0..2, but got 3"),
        ({"negatives": torch.ones(3, 6)}, r"\[B, K\] bool"),
    ],
)
def test_targets_that_cannot_be_are_an_error_that_names_the_rule(
    change: dict[str, Tensor], words: str, targets: Targets
) -> None:
    with pytest.raises(ValueError, match=words):
        replace(targets, **change)
