from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import box_iou, generalized_box_iou_loss

from retinaflow.detector.anchors import anchor_grid, decode, encode
from retinaflow.detector.detection_loss import LossConfig, detection_loss
from retinaflow.detector.network import RawOutput, RetinaNet
from retinaflow.detector.targets import Targets, match_anchors
from retinaflow.settings.training_settings import NetworkSettings

ANCHORS = anchor_grid((96, 160)).boxes
L1 = LossConfig(box_loss="l1")


def raw_output(
    generator: torch.Generator, batch: int, num_classes: int, dtype: torch.dtype = torch.float32
) -> RawOutput:
    logits = torch.randn(batch, len(ANCHORS), num_classes, generator=generator) * 2
    deltas = torch.randn(batch, len(ANCHORS), 4, generator=generator) * 0.5
    return RawOutput(logits.to(dtype).requires_grad_(), deltas.to(dtype).requires_grad_())


def dense_reference(
    logits: Tensor, targets: Targets, ancestors: Tensor | None, *, learn: bool, alpha: float, gamma: float
) -> Tensor:
    """The class loss with a one-hot and a weight for every (image, anchor, class), decided one by one."""
    matched = match_anchors(ANCHORS, targets)
    onehot, weight = torch.zeros_like(logits), torch.ones_like(logits)
    above = ancestors if ancestors is not None else torch.zeros(logits.shape[2], logits.shape[2], dtype=torch.bool)
    area = (ANCHORS[:, 2] - ANCHORS[:, 0]) * (ANCHORS[:, 3] - ANCHORS[:, 1])
    for image in range(targets.batch_size):
        weight[image] *= targets.negatives[image].to(logits.dtype)
        for box, label, owner in zip(targets.ignore_boxes, targets.ignore_labels, targets.ignore_owner, strict=True):
            sides = torch.minimum(ANCHORS[:, 2:], box[2:]) - torch.maximum(ANCHORS[:, :2], box[:2])
            inside = sides.clamp(min=0).prod(dim=1) >= 0.5 * area
            for other in range(logits.shape[2]):
                if owner == image and (other == label or above[label, other] or above[other, label]):
                    weight[image, inside, other] = 0
        weight[image, matched[image] == -2] = 0
        for anchor in (matched[image] >= 0).nonzero().flatten().tolist():
            label = int(targets.labels[matched[image, anchor]])
            parents = above[label].nonzero().flatten().tolist()
            for positive in [label, *parents] if learn else [label]:
                onehot[image, anchor, positive] = 1
                weight[image, anchor, positive] = 1
            for parent in [] if learn else parents:
                weight[image, anchor, parent] = 0
    p = logits.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(logits, onehot, reduction="none")
    modulation = torch.where(onehot > 0, alpha * (1 - p) ** gamma, (1 - alpha) * p**gamma)
    return (weight * modulation * entropy).sum() / max(1, int((matched >= 0).sum()))


@pytest.mark.parametrize("learn", [True, False], ids=["ancestors learned", "ancestors silent"])
@pytest.mark.parametrize("hierarchy", [True, False], ids=["hierarchy", "flat"])
def test_class_loss_and_gradient_are_those_of_a_dense_one_hot_with_all_masks(
    learn: bool, hierarchy: bool, targets: Targets, ancestors: Tensor, generator: torch.Generator
) -> None:
    above = ancestors if hierarchy else None
    output = raw_output(generator, 3, 6, torch.float64)
    config = LossConfig(learn_ancestors=learn, alpha=0.3, gamma=1.5)
    losses = detection_loss(output, ANCHORS, targets, config=config, ancestors=above)
    expected = dense_reference(output.class_logits, targets, above, learn=learn, alpha=0.3, gamma=1.5)
    torch.testing.assert_close(losses.class_loss, expected)
    got, wanted = (torch.autograd.grad(loss, output.class_logits)[0] for loss in (losses.class_loss, expected))
    torch.testing.assert_close(got, wanted)


def test_both_losses_are_torchvisions_up_to_the_normalisation(
    random_boxes: Callable[[int], Tensor], generator: torch.Generator
) -> None:
    owner = torch.tensor([0, 0, 0, 1, 1])
    labels = torch.tensor([2, 0, 3, 1, 1])
    targets = replace(Targets.empty(2, 4), boxes=random_boxes(5), labels=labels, owner=owner)
    output = raw_output(generator, 2, 4)
    head = RetinaNetHead(8, 9, 4)
    matched = match_anchors(ANCHORS, targets)
    total_class, total_box = torch.tensor(0.0), torch.tensor(0.0)
    for image in range(2):
        own = {"boxes": targets.boxes[owner == image], "labels": labels[owner == image]}
        index = torch.where(matched[image] >= 0, matched[image] - 3 * image, matched[image])
        outputs = {
            "cls_logits": output.class_logits[image : image + 1],
            "bbox_regression": output.box_deltas[image : image + 1],
        }
        theirs = head.compute_loss([own], outputs, [ANCHORS], [index])
        positives = int((index >= 0).sum())
        total_class += theirs["classification"].detach() * positives
        total_box += theirs["bbox_regression"].detach() * positives
    ours = detection_loss(output, ANCHORS, targets, config=L1)
    assert int(ours.num_positives) == int((matched >= 0).sum())
    torch.testing.assert_close(ours.class_loss.detach() * ours.num_positives, total_class)
    torch.testing.assert_close(ours.box_loss.detach() * ours.num_positives, total_box)


@pytest.mark.parametrize("kind", ["l1", "smooth_l1", "giou"])
def test_the_box_loss_is_the_published_one_over_the_positive_anchors(
    kind: Any, targets: Targets, generator: torch.Generator
) -> None:
    output = raw_output(generator, 3, 6)
    config = LossConfig(box_loss=kind, box_beta=0.2, box_weight=3.0)
    losses = detection_loss(output, ANCHORS, targets, config=config)
    matched = match_anchors(ANCHORS, targets)
    image, anchor = (matched >= 0).nonzero(as_tuple=True)
    deltas, anchors, boxes = output.box_deltas[image, anchor], ANCHORS[anchor], targets.boxes[matched[image, anchor]]
    error = deltas - encode(boxes, anchors)
    expected = {
        "l1": error.abs().sum(),
        "smooth_l1": torch.where(error.abs() < 0.2, 0.5 * error**2 / 0.2, error.abs() - 0.1).sum(),
        "giou": generalized_box_iou_loss(decode(deltas, anchors), boxes, reduction="sum"),
    }[kind]
    torch.testing.assert_close(losses.box_loss, 3.0 * expected / len(anchor))
    (gradient,) = torch.autograd.grad(losses.box_loss, output.box_deltas)
    assert (gradient[matched < 0] == 0).all()


@pytest.mark.parametrize("kind", ["l1", "smooth_l1", "giou"])
def test_a_perfect_box_costs_nothing(kind: Any, targets: Targets, generator: torch.Generator) -> None:
    output = raw_output(generator, 3, 6)
    matched = match_anchors(ANCHORS, targets)
    perfect = encode(targets.boxes[matched.clamp(min=0)], ANCHORS.expand(3, -1, 4))
    losses = detection_loss(RawOutput(output.class_logits, perfect), ANCHORS, targets, config=LossConfig(box_loss=kind))
    assert float(losses.box_loss) < 1e-5


def test_a_class_not_evaluated_on_an_image_gives_no_negative_loss_there_and_its_boxes_still_count(
    random_boxes: Callable[[int], Tensor], generator: torch.Generator
) -> None:
    negatives = torch.tensor([[True, False], [True, True]])
    targets = replace(
        Targets.empty(2, 2),
        boxes=random_boxes(1),
        labels=torch.tensor([1]),
        owner=torch.tensor([0]),
        negatives=negatives,
    )
    output = raw_output(generator, 2, 2)
    losses = detection_loss(output, ANCHORS, targets, config=L1)
    (gradient,) = torch.autograd.grad(losses.class_loss, output.class_logits)
    positive = match_anchors(ANCHORS, targets)[0] >= 0
    assert torch.equal(gradient[0, :, 1] < 0, positive)
    assert torch.equal(gradient[0, :, 1] == 0, ~positive)
    assert (gradient[1] > 0).all()


@pytest.mark.parametrize("num_classes", [1, 6])
@pytest.mark.parametrize("kind", ["l1", "smooth_l1", "giou"])
def test_a_batch_without_any_box_has_a_class_loss_and_a_box_loss_of_zero(
    kind: Any, num_classes: int, generator: torch.Generator
) -> None:
    output = raw_output(generator, 2, num_classes)
    losses = detection_loss(output, ANCHORS, Targets.empty(2, num_classes), config=LossConfig(box_loss=kind))
    losses.total.backward()
    assert (float(losses.num_positives), float(losses.box_loss.detach())) == (0.0, 0.0)
    assert float(losses.class_loss.detach()) > 0
    assert (output.box_deltas.grad == 0).all()


def test_a_normaliser_of_1_gives_sums_that_ranks_can_divide_by_their_common_count(
    targets: Targets, generator: torch.Generator
) -> None:
    output = raw_output(generator, 3, 6)
    plain = detection_loss(output, ANCHORS, targets, config=L1)
    sums = detection_loss(output, ANCHORS, targets, config=L1, normaliser=1.0)
    torch.testing.assert_close(sums.class_loss / sums.num_positives, plain.class_loss)
    torch.testing.assert_close(sums.box_loss / sums.num_positives, plain.box_loss)


def test_the_order_of_the_boxes_of_an_image_changes_nothing(targets: Targets, generator: torch.Generator) -> None:
    output = raw_output(generator, 3, 6)
    order = torch.tensor([4, 2, 0, 1, 3, 6, 5])
    mixed = replace(targets, boxes=targets.boxes[order], labels=targets.labels[order])
    first, second = (detection_loss(output, ANCHORS, t, config=L1) for t in (targets, mixed))
    torch.testing.assert_close(first.class_loss, second.class_loss)
    torch.testing.assert_close(first.box_loss, second.box_loss)


def test_bfloat16_outputs_give_float32_losses_near_those_of_float32(
    targets: Targets, generator: torch.Generator
) -> None:
    half = raw_output(generator, 3, 6, torch.bfloat16)
    full = RawOutput(half.class_logits.detach().float(), half.box_deltas.detach().float())
    losses, expected = (detection_loss(o, ANCHORS, targets, config=LossConfig(box_loss="giou")) for o in (half, full))
    losses.total.backward()
    torch.testing.assert_close(losses.class_loss.detach(), expected.class_loss)
    torch.testing.assert_close(losses.box_loss.detach(), expected.box_loss)
    assert half.class_logits.grad is not None
    assert half.class_logits.grad.dtype == torch.bfloat16


def test_a_tiny_network_learns_one_image_by_heart(generator: torch.Generator) -> None:
    config = NetworkSettings(backbone="resnet18", fpn_channels=64, head_depth=1, head_norm="group")
    model = RetinaNet(config, 2, seed=1)
    image = torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8, generator=generator)
    box = torch.tensor([[16.0, 8.0, 56.0, 48.0]])
    targets = replace(Targets.empty(1, 2), boxes=box, labels=torch.tensor([1]), owner=torch.tensor([0]))
    anchors = model.anchors((64, 96)).boxes
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    history = []
    for _ in range(12):
        losses = detection_loss(model(image), anchors, targets, config=LossConfig())
        optimiser.zero_grad()
        losses.total.backward()
        optimiser.step()
        history.append(float(losses.total.detach()))
    assert history[-1] < 0.5 * history[0]
    with torch.no_grad():
        output = model(image)
    best = int(output.class_logits[0, :, 1].argmax())
    assert float(box_iou(decode(output.box_deltas[0, best : best + 1], anchors[best : best + 1]), box)) > 0.5


@pytest.mark.parametrize(
    ("settings", "table", "words"),
    [
        ({"gamma": torch.ones(5)}, None, r"gamma must be a number or \[6\]"),
        ({"alpha": torch.ones(7)}, None, r"alpha must be a number or \[6\]"),
        ({}, torch.zeros(6, 5, dtype=torch.bool), r"ancestors must be \[6, 6\] bool"),
        ({}, torch.zeros(6, 6), "but got .* float32"),
    ],
)
def test_tables_of_another_number_of_classes_are_an_error(
    settings: dict[str, Any], table: Tensor | None, words: str, targets: Targets, generator: torch.Generator
) -> None:
    with pytest.raises(ValueError, match=words):
        detection_loss(raw_output(generator, 3, 6), ANCHORS, targets, config=LossConfig(**settings), ancestors=table)


def test_outputs_of_another_image_shape_are_an_error(targets: Targets, generator: torch.Generator) -> None:
    with pytest.raises(ValueError, match="class_logits must be"):
        detection_loss(raw_output(generator, 3, 6), ANCHORS[:-9], targets, config=L1)
