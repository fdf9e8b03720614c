from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.models.detection import retinanet_resnet50_fpn
from torchvision.ops import batched_nms, box_iou

from retinaflow.detector.anchors import anchor_grid, encode
from retinaflow.detector.network import RawOutput, RetinaNet
from retinaflow.detector.nms import soft_nms
from retinaflow.detector.postprocess import BatchDetections, detect
from retinaflow.detector.weights import load_weights
from retinaflow.settings.model_settings import PostprocessSettings
from retinaflow.settings.training_settings import NetworkSettings

SIZE = (96, 160)
GRID = anchor_grid(SIZE)
OFF = -20.0  # a logit whose score is nothing
TORCHVISIONS = PostprocessSettings(score_threshold=0.05)


def output_of(found: list[tuple[int, int, float, list[float]]], *, batch: int = 1, num_classes: int = 3) -> RawOutput:
    """Outputs in which anchor 100 * n says exactly: on image b, class k with this score, this pixel box."""
    logits = torch.full((batch, len(GRID.boxes), num_classes), OFF)
    deltas = torch.zeros(batch, len(GRID.boxes), 4)
    for n, (image, label, score, box) in enumerate(found):
        anchor = 100 * n
        logits[image, anchor, label] = math.log(score / (1 - score))
        deltas[image, anchor] = encode(torch.tensor([box]), GRID.boxes[anchor : anchor + 1])[0]
    return RawOutput(logits, deltas)


def random_output(generator: torch.Generator, batch: int, num_classes: int) -> RawOutput:
    shape = (batch, len(GRID.boxes))
    logits = torch.randn(*shape, num_classes, generator=generator) * 2 - 3
    return RawOutput(logits, torch.randn(*shape, 4, generator=generator) * 0.3)


def test_detections_of_torchvisions_weights_are_torchvisions(generator: torch.Generator, tmp_path: Path) -> None:
    # In float64, so that the networks' rounding does not reorder detections.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=4, min_size=96, max_size=160)
    theirs.double().eval()
    images = torch.randint(0, 256, (2, 3, *SIZE), dtype=torch.uint8, generator=generator)
    with torch.no_grad():
        raw = theirs.head(list(theirs.backbone(images.double() / 255).values()))
        classes, boxes = theirs.head.classification_head.cls_logits, theirs.head.regression_head.bbox_reg
        # An untrained network says the same everywhere: make its scores and boxes differ.
        classes.weight *= 1.5 / raw["cls_logits"].std()
        boxes.weight *= 0.3 / raw["bbox_regression"].std()
        classes.bias.fill_(-3.0)
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    ours = RetinaNet(NetworkSettings(backbone="resnet50", head_norm="none"), 4).double().eval()
    load_weights(ours, str(tmp_path / "theirs.pth"))
    with torch.no_grad():
        expected = theirs(list(images.double() / 255))
        found = detect(ours(images), ours.anchors(SIZE), config=TORCHVISIONS)
    scale = torch.tensor([160.0, 96.0, 160.0, 96.0], dtype=torch.float64)
    for image, wanted in enumerate(expected):
        own = found.take(found.owner == image)
        assert len(own) > 20
        assert torch.equal(own.label, wanted["labels"])
        torch.testing.assert_close(own.score, wanted["scores"], rtol=1e-5, atol=0)
        torch.testing.assert_close(own.boxes * scale, wanted["boxes"], rtol=1e-4, atol=1e-3)


def test_suppression_of_the_same_raw_outputs_is_torchvisions(generator: torch.Generator) -> None:
    theirs = retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=5)
    output = random_output(generator, 2, 5)
    split = {
        "cls_logits": list(output.class_logits.split(list(GRID.level_counts), dim=1)),
        "bbox_regression": list(output.box_deltas.split(list(GRID.level_counts), dim=1)),
    }
    anchors = [list(GRID.boxes.split(list(GRID.level_counts)))] * 2
    expected = theirs.postprocess_detections(split, anchors, [SIZE, SIZE])
    found = detect(output, GRID, config=TORCHVISIONS)
    scale = torch.tensor([160.0, 96.0, 160.0, 96.0])
    for image, wanted in enumerate(expected):
        own = found.take(found.owner == image)
        assert len(own) == 300
        assert torch.equal(own.label, wanted["labels"])
        torch.testing.assert_close(own.score, wanted["scores"])
        torch.testing.assert_close(own.boxes * scale, wanted["boxes"])


def test_boxes_are_normalised_by_width_and_height_and_clipped_to_the_image() -> None:
    # Image of height 96 and width 160: x / 160, y / 96.
    found = detect(output_of([(0, 2, 0.9, [40.0, 24.0, 200.0, 48.0])]), GRID, config=PostprocessSettings())
    torch.testing.assert_close(found.boxes, torch.tensor([[0.25, 0.25, 1.0, 0.5]]), rtol=1e-4, atol=1e-4)
    assert (found.owner.tolist(), found.label.tolist()) == ([0], [2])
    torch.testing.assert_close(found.score, torch.tensor([0.9]))


def test_rows_come_by_image_and_best_score_first(generator: torch.Generator) -> None:
    found = detect(random_output(generator, 3, 4), GRID, config=PostprocessSettings(max_detections=50))
    assert torch.bincount(found.owner).tolist() == [50, 50, 50]
    assert torch.equal(found.owner, found.owner.sort().values)
    for image in range(3):
        score = found.score[found.owner == image]
        assert torch.equal(score, score.sort(descending=True).values)


@pytest.mark.parametrize("nms", ["nms", "soft-nms"])
@pytest.mark.parametrize("scope", ["level", "class"])
def test_outputs_without_a_score_above_the_threshold_give_no_detection(nms: Any, scope: Any) -> None:
    config, ancestors = PostprocessSettings(nms=nms, candidates_per=scope), torch.zeros(3, 3, dtype=torch.bool)
    for batch in (0, 2):
        found = detect(output_of([], batch=batch), GRID, config=config, ancestors=ancestors)
        assert (len(found), tuple(found.boxes.shape)) == (0, (0, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_threshold_is_decided_by_the_score_and_not_by_the_rounded_logit(
    dtype: torch.dtype, generator: torch.Generator
) -> None:
    raw = random_output(generator, 1, 3)
    output = RawOutput(raw.class_logits.to(dtype), raw.box_deltas.to(dtype))
    config = PostprocessSettings(score_threshold=0.001, nms_iou=1.0, max_detections=10**6)
    assert len(detect(output, GRID, config=config, top_k=10**6)) == int(
        (output.class_logits.float().sigmoid() > 0.001).sum()
    )


def test_candidates_per_class_keep_rare_classes_that_those_per_level_lose() -> None:
    frequent = [(0, 0, 0.9 - 0.01 * n, [10.0 * n, 0.0, 10.0 * n + 9, 9.0]) for n in range(10)]
    output = output_of([*frequent, (0, 1, 0.1, [0.0, 50.0, 20.0, 70.0])])
    per_level = detect(output, GRID, config=PostprocessSettings(), top_k=5)
    per_class = detect(output, GRID, config=PostprocessSettings(candidates_per="class"), top_k=5)
    assert per_level.label.tolist() == [0] * 5
    assert per_class.label.tolist() == [0] * 5 + [1]


def test_with_room_for_all_candidates_both_scopes_agree(generator: torch.Generator) -> None:
    output = random_output(generator, 2, 3)
    level, by_class = (
        detect(output, GRID, config=PostprocessSettings(candidates_per=scope), top_k=10**6)
        for scope in ("level", "class")
    )
    assert torch.equal(level.score, by_class.score)
    assert torch.equal(level.boxes, by_class.boxes)


@pytest.mark.parametrize("nms", ["nms", "soft-nms"])
def test_a_limit_per_class_keeps_the_best_of_each_class(nms: Any, generator: torch.Generator) -> None:
    output = random_output(generator, 2, 5)
    free = detect(output, GRID, config=PostprocessSettings(nms=nms, max_detections=10**4))
    limited = detect(output, GRID, config=PostprocessSettings(nms=nms, max_detections=12, max_detections_per_class=4))
    for image in range(2):
        best = []
        for label in range(5):
            scores = free.score[(free.owner == image) & (free.label == label)]
            assert len(scores) > 4
            best += scores[:4].tolist()
        assert limited.score[limited.owner == image].tolist() == sorted(best, reverse=True)[:12]


def test_of_500_classes_the_tail_has_room_when_the_head_is_limited() -> None:
    """A scene of 40 head classes with ten sure boxes each, and 20 rare classes with a score of 0.1."""
    scores = torch.full((1, len(GRID.boxes), 500), 1e-4)
    anchors = torch.randperm(len(GRID.boxes), generator=torch.Generator().manual_seed(0))
    for label in range(40):
        scores[0, anchors[10 * label : 10 * label + 10], label] = 0.6
    rare = range(480, 500)
    for label in rare:
        scores[0, anchors[-label], label] = 0.1
    output = RawOutput(scores.logit(), torch.zeros(1, len(GRID.boxes), 4))

    def found(**given: Any) -> int:
        labels = detect(output, GRID, config=PostprocessSettings(nms_iou=1.0, **given)).label.tolist()
        assert len(labels) <= 300
        return len(set(labels) & set(rare))

    assert found() == 0
    assert found(max_detections_per_class=7) == 20


def test_duplicates_are_dropped_within_a_class_and_an_image_only() -> None:
    box, near = [20.0, 20.0, 60.0, 60.0], [22.0, 20.0, 62.0, 60.0]
    rows = [(0, 0, 0.9, box), (0, 0, 0.8, near), (0, 1, 0.7, near), (1, 0, 0.6, near)]
    found = detect(output_of(rows, batch=2), GRID, config=PostprocessSettings())
    assert list(zip(found.owner.tolist(), found.label.tolist(), strict=True)) == [(0, 0), (0, 1), (1, 0)]


def slow_soft_nms(boxes: Tensor, scores: Tensor, sigma: float, threshold: float) -> dict[int, float]:
    """Bodla et al. 2017, figure 2, one class, one box at a time."""
    left = {row: float(score) for row, score in enumerate(scores) if score > threshold}
    kept = {}
    while left:
        best = max(left, key=lambda row: left[row])
        kept[best] = left.pop(best)
        for row in list(left):
            left[row] *= math.exp(-(float(box_iou(boxes[best : best + 1], boxes[row : row + 1])) ** 2) / sigma)
            if left[row] <= threshold:
                del left[row]
    return kept


def test_soft_nms_of_many_groups_at_once_is_soft_nms_of_each(
    random_boxes: Callable[[int], Tensor], generator: torch.Generator
) -> None:
    boxes, scores = random_boxes(60), torch.rand(60, generator=generator)
    groups = torch.randint(0, 4, (60,), generator=generator) * 10
    threshold = 0.05
    got = soft_nms(boxes, scores, groups, sigma=0.5, threshold=threshold, max_per_group=60)
    for group in groups.unique().tolist():
        rows = (groups == group).nonzero().squeeze(1)
        expected = slow_soft_nms(boxes[rows], scores[rows], 0.5, 0.05)
        assert set(got[rows].nonzero().squeeze(1).tolist()) == set(expected)
        for row, score in expected.items():
            assert float(got[rows[row]]) == pytest.approx(score, rel=1e-4)


def test_soft_nms_lowers_the_score_of_an_overlapping_box_by_the_gaussian() -> None:
    # IoU 30 / 50 = 0.6: the second box keeps exp(-0.36 / 0.5) of 0.8; the third overlaps nothing.
    boxes = torch.tensor([[0.0, 0.0, 40.0, 10.0], [10.0, 0.0, 50.0, 10.0], [100.0, 0.0, 120.0, 10.0]])
    got = soft_nms(
        boxes, torch.tensor([0.9, 0.8, 0.3]), torch.zeros(3, dtype=torch.int64),
        sigma=0.5, threshold=0.05, max_per_group=9,
    )  # fmt: skip
    torch.testing.assert_close(got, torch.tensor([0.9, 0.8 * math.exp(-0.72), 0.3]))


def test_soft_nms_with_few_picks_keeps_the_best_of_all_picks(
    random_boxes: Callable[[int], Tensor], generator: torch.Generator
) -> None:
    boxes, scores, groups = random_boxes(40), torch.rand(40, generator=generator), torch.zeros(40, dtype=torch.int64)
    threshold = 0.01
    every = soft_nms(boxes, scores, groups, sigma=0.3, threshold=threshold, max_per_group=40)
    some = soft_nms(boxes, scores, groups, sigma=0.3, threshold=threshold, max_per_group=5)
    assert torch.equal(some.sort(descending=True).values[:5], every.sort(descending=True).values[:5])
    assert int((some > 0).sum()) == 5


def test_soft_nms_keeps_both_of_a_crowded_pair_and_nms_drops_one() -> None:
    output = output_of([(0, 0, 0.9, [20.0, 20.0, 60.0, 60.0]), (0, 0, 0.8, [28.0, 20.0, 68.0, 60.0])])
    assert len(detect(output, GRID, config=PostprocessSettings())) == 1
    soft = detect(output, GRID, config=PostprocessSettings(nms="soft-nms"))
    # IoU 32 / 48: exp(-(4 / 9) / 0.5) = exp(-8 / 9).
    torch.testing.assert_close(soft.score, torch.tensor([0.9, 0.8 * math.exp(-8 / 9)]), rtol=1e-3, atol=0)


ABOVE = torch.zeros(3, 3, dtype=torch.bool)
ABOVE[0, 1] = True  # class 1 is the parent of class 0


def pairs_of(found: BatchDetections) -> list[tuple[int, float]]:
    return [(label, round(score, 3)) for label, score in zip(found.label.tolist(), found.score.tolist(), strict=True)]


def test_a_detection_is_also_one_of_its_ancestors() -> None:
    output = output_of([(0, 0, 0.9, [20.0, 20.0, 60.0, 60.0])])
    found = detect(output, GRID, config=PostprocessSettings(), ancestors=ABOVE)
    assert pairs_of(found) == [(0, 0.9), (1, 0.9)]
    assert torch.equal(found.boxes[0], found.boxes[1])


@pytest.mark.parametrize("nms", ["nms", "soft-nms"])
@pytest.mark.parametrize(("child", "parent"), [(0.9, 0.6), (0.6, 0.9)], ids=["child better", "parent better"])
def test_of_a_copy_and_a_detection_of_the_parent_the_best_stays(nms: Any, child: float, parent: float) -> None:
    box, near = [20.0, 20.0, 60.0, 60.0], [22.0, 20.0, 62.0, 60.0]
    found = detect(
        output_of([(0, 0, child, box), (0, 1, parent, near)]),
        GRID,
        config=PostprocessSettings(nms=nms),
        ancestors=ABOVE,
    )
    assert sorted(pairs_of(found)) == [(0, child), (1, 0.9)]


def test_parents_change_nothing_in_classes_without_children_even_after_soft_nms(generator: torch.Generator) -> None:
    output = random_output(generator, 2, 3)
    config = PostprocessSettings(nms="soft-nms", score_threshold=0.3, max_detections=10**4)
    plain, expanded = detect(output, GRID, config=config), detect(output, GRID, config=config, ancestors=ABOVE)
    for label in (0, 2):
        assert torch.equal(plain.score[plain.label == label], expanded.score[expanded.label == label])
    parents = expanded.take((expanded.label == 1) & (expanded.owner == 0))
    assert len(batched_nms(parents.boxes, parents.score, parents.label, 0.5)) == len(parents)


def test_outputs_of_another_image_shape_are_an_error(generator: torch.Generator) -> None:
    with pytest.raises(ValueError, match="one image shape must agree"):
        detect(random_output(generator, 1, 3), anchor_grid((64, 64)), config=PostprocessSettings())
