"""The two losses of a batch: focal loss over classes, a box loss over the anchors that are matched to a box.

``detection_loss`` matches anchors, decides what each (image, anchor, class) learns, and sums both losses, divided by
the number of positive anchors of the batch (Lin et al. 2017, section 4.1). Torchvision divides by the positives of each
image and averages over images, which gives a box on an image with few boxes more weight; ours weighs all boxes alike.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import generalized_box_iou_loss

from retinaflow.detector.anchors import decode, encode
from retinaflow.detector.focal_loss import ClassTargets, Pairs, equalized_focal_loss, focal_loss
from retinaflow.detector.fused_loss import PairRules, bounds, fused_focal_loss, is_fused, match, regions_of
from retinaflow.detector.gradient_ratio import equalized
from retinaflow.detector.network import RawOutput, check_ancestors
from retinaflow.detector.targets import BETWEEN, FOREGROUND, Targets, ignore_masks, match_anchors
from retinaflow.settings.training_settings import BoxLoss


@dataclass(frozen=True, eq=False)
class LossConfig:
    """The loss of a training, from its :class:`~retinaflow.settings.training_settings.LossSettings` and bins.

    gamma: focusing of the focal loss, >= 0; 0 is weighted cross-entropy. A number, or ``[K]`` float.
    alpha: weight of positives in [0, 1], negatives get 1 - alpha; None weighs neither. A number, or ``[K]`` float.
    equalized_scale: largest addition to gamma by the equalized focal loss, which needs gamma > 0; None: focal loss.
    learn_ancestors: True makes a box positive for its class and every ancestor; False only keeps the ancestors from
        being negatives there. Without ``ancestors`` both are the same.
    box_loss: "l1" (torchvision's v1), "smooth_l1" (on the box code), or "giou" (Rezatofighi et al. 2019, on boxes).
    box_beta: where smooth L1 turns from square to straight, in units of the box code; 0.1 is detectron2's.
    box_weight: factor of the box loss.
    match_high, match_low: IoU from which an anchor is foreground, and below which it is background.
    ignore_ioa: fraction of an anchor inside a group-of region from which it gives no negative loss for that class.
    """

    gamma: float | Tensor = 2.0
    alpha: float | Tensor | None = 0.25
    equalized_scale: float | None = None
    learn_ancestors: bool = False
    box_loss: BoxLoss = "smooth_l1"
    box_beta: float = 0.1
    box_weight: float = 1.0
    match_high: float = FOREGROUND
    match_low: float = 0.4
    ignore_ioa: float = 0.5

    def to(self, device: torch.device) -> LossConfig:
        """The same loss with its tensors on a device."""
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)


@dataclass(frozen=True, eq=False)
class Losses:
    """Scalars, float32: ``class_loss`` and ``box_loss``, both divided by the normaliser, and ``num_positives``, the
    positive anchors of this batch on this rank (a tensor without gradient; reading it waits for the device).

    class_gradients: ``[2, K]`` float64, the sums of the absolute gradients of ``class_loss`` by the logits of each
    class, over its positives and over its negatives; zeros unless the loss is the equalized focal loss.
    """

    class_loss: Tensor
    box_loss: Tensor
    num_positives: Tensor
    class_gradients: Tensor

    @property
    def total(self) -> Tensor:
        return self.class_loss + self.box_loss


def detection_loss(
    output: RawOutput,
    anchors: Tensor,
    targets: Targets,
    *,
    config: LossConfig,
    ancestors: Tensor | None = None,
    normaliser: Tensor | float | None = None,
    ratio: Tensor | None = None,
) -> Losses:
    """Both losses of a batch, divided by ``normaliser``, or by max(1, number of positive anchors) if that is None.

    output: of the network, for B images. anchors: ``[A, 4]`` xyxy pixels, ``AnchorGrid.boxes``. All on one device.
    ancestors: ``[K, K]`` bool, row c marks the strict ancestors of class c; None for classes without a hierarchy.
    ratio: ``[K]``, g of the equalized focal loss (:mod:`retinaflow.detector.gradient_ratio`); None: 1, its start.

    Under DistributedDataParallel over W ranks (which averages gradients) pass ``normaliser=1`` and divide the losses by
    max(1, sum of num_positives over ranks) / W. Raises ValueError where shapes disagree.
    """
    _check_shapes(output, anchors, targets, config, ancestors)
    if is_fused(output.class_logits):
        return _fused_loss(output, anchors, targets, config, ancestors, normaliser, ratio)
    matched = match_anchors(anchors, targets, high=config.match_high, low=config.match_low)
    positive = (matched >= 0).flatten().nonzero().squeeze(1)
    box = matched.flatten()[positive]
    class_targets = _class_targets(matched, positive, box, anchors, targets, config, ancestors)
    class_loss, class_gradients = _class_loss(output.class_logits, class_targets, config, ratio)
    box_loss = _box_loss(
        output.box_deltas.flatten(0, 1)[positive], anchors[positive % len(anchors)], targets.boxes[box], config=config
    )
    count = torch.tensor(float(len(positive)), device=anchors.device)
    divisor = count.clamp(min=1) if normaliser is None else normaliser
    return Losses(class_loss / divisor, config.box_weight * box_loss / divisor, count, class_gradients / divisor)


def _fused_loss(
    output: RawOutput,
    anchors: Tensor,
    targets: Targets,
    config: LossConfig,
    ancestors: Tensor | None,
    normaliser: Tensor | float | None,
    ratio: Tensor | None,
) -> Losses:
    """The same on a GPU, in shapes that do not depend on the matches: the host waits for nothing."""
    # One row more, so that an anchor without a box has a row to read in a batch without boxes too.
    boxes = torch.cat([targets.boxes.to(anchors.dtype), anchors.new_zeros(1, 4)])
    labels = torch.cat([targets.labels, targets.labels.new_zeros(1)])
    owners = bounds(targets.owner, targets.batch_size)
    matched = match(anchors, boxes, owners, config.match_high, config.match_low)
    is_positive = matched >= 0
    box = matched.clamp(min=0)
    count = is_positive.sum().float()
    scale = 1 / count.clamp(min=1) if normaliser is None else torch.ones_like(count) / normaliser
    regions = regions_of(targets, ancestors, ioa=config.ignore_ioa)
    own = torch.eye(targets.num_classes, dtype=torch.bool, device=anchors.device)
    rules = PairRules(
        torch.where(is_positive, labels[box].int(), matched),
        targets.negatives,
        None if ancestors is None else ancestors | own,
        config.learn_ancestors,
        anchors,
        regions,
    )
    class_loss, sums = fused_focal_loss(
        output.class_logits,
        rules,
        _tables(config, ratio, count.new_ones(targets.num_classes)),
        scale,
        with_sums=config.equalized_scale is not None,
    )
    box_loss = _dense_box_loss(output.box_deltas, anchors, boxes[box], is_positive, config=config)
    return Losses(class_loss, config.box_weight * box_loss * scale, count, sums * scale)


def _tables(config: LossConfig, ratio: Tensor | None, ones: Tensor) -> Tensor:
    """``[3, K]`` float32: the exponent of each class, the weight of its positives and of its negatives."""
    gamma: Tensor | float = config.gamma
    factor: Tensor | float = 1.0
    if config.equalized_scale is not None:
        ratio = ones if ratio is None else ratio
        gamma, factor = equalized(config.gamma, ratio, scale=config.equalized_scale)
    alpha = config.alpha
    positive, negative = (factor, factor) if alpha is None else (factor * alpha, factor * (1 - alpha))
    return torch.stack([ones * value for value in (gamma, positive, negative)]).float()


def _dense_box_loss(
    deltas: Tensor, anchors: Tensor, boxes: Tensor, is_positive: Tensor, *, config: LossConfig
) -> Tensor:
    """The sum of :func:`_box_loss` over the positive anchors. deltas, boxes: ``[B, A, 4]``.

    The other anchors are given themselves as box and no offset, whatever the network gives: their loss is nothing.
    """
    chosen = is_positive[..., None]
    deltas = torch.where(chosen, deltas.to(torch.promote_types(deltas.dtype, torch.float32)), 0.0)
    boxes = torch.where(chosen, boxes, anchors)
    if config.box_loss == "giou":
        losses = generalized_box_iou_loss(decode(deltas, anchors), boxes, reduction="none")
        return torch.where(is_positive, losses, 0.0).sum()
    return _offset_loss(deltas, boxes, anchors, config)


def _class_loss(
    logits: Tensor, targets: ClassTargets, config: LossConfig, ratio: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The sum over all pairs, and the sums of its absolute gradients by class ``[2, K]``."""
    none = torch.zeros(2, logits.shape[2], dtype=torch.float64, device=logits.device)
    if config.equalized_scale is None:
        return focal_loss(logits, targets, alpha=config.alpha, gamma=config.gamma), none
    ratio = torch.ones_like(none[0]) if ratio is None else ratio
    gamma, factor = equalized(config.gamma, ratio, scale=config.equalized_scale)
    return equalized_focal_loss(logits, targets, alpha=config.alpha, gamma=gamma, factor=factor)


def _class_targets(
    matched: Tensor,
    positive: Tensor,
    box: Tensor,
    anchors: Tensor,
    targets: Targets,
    config: LossConfig,
    ancestors: Tensor | None,
) -> ClassTargets:
    """positive: ``[n]`` rows of the flattened ``matched`` that are foreground, ascending. box: ``[n]``, their boxes."""
    positives = silent = Pairs(positive, targets.labels[box])
    if ancestors is not None:
        lineage = ancestors | torch.eye(targets.num_classes, dtype=torch.bool, device=ancestors.device)
        nth, label = lineage[positives.label].nonzero(as_tuple=True)
        silent = Pairs(positive[nth], label)
        positives = silent if config.learn_ancestors else positives
    regions = ignore_masks(anchors, targets, ancestors=ancestors, ioa=config.ignore_ioa)
    return ClassTargets(positives, silent, matched != BETWEEN, targets.negatives, regions)


def _box_loss(deltas: Tensor, anchors: Tensor, boxes: Tensor, *, config: LossConfig) -> Tensor:
    """The sum over rows (and over the four offsets); all arguments ``[n, 4]``.

    Computed in float32 at least: exp() of an offset soon leaves the range of half precision.
    """
    deltas = deltas.to(torch.promote_types(deltas.dtype, torch.float32))
    anchors, boxes = anchors.to(deltas.dtype), boxes.to(deltas.dtype)
    if config.box_loss == "giou":
        return cast(Tensor, generalized_box_iou_loss(decode(deltas, anchors), boxes, reduction="sum"))
    return _offset_loss(deltas, boxes, anchors, config)


def _offset_loss(deltas: Tensor, boxes: Tensor, anchors: Tensor, config: LossConfig) -> Tensor:
    beta = config.box_beta if config.box_loss == "smooth_l1" else 0.0
    return F.smooth_l1_loss(deltas, encode(boxes, anchors), reduction="sum", beta=beta)


def _check_shapes(
    output: RawOutput, anchors: Tensor, targets: Targets, config: LossConfig, ancestors: Tensor | None
) -> None:
    batch, num_classes = targets.batch_size, targets.num_classes
    expected = (batch, len(anchors), num_classes)
    if output.class_logits.shape != expected or output.box_deltas.shape != (batch, len(anchors), 4):
        raise ValueError(
            f"class_logits must be {expected} (images and classes of targets.negatives, anchors) "
            f"and box_deltas {(batch, len(anchors), 4)}, "
            f"but got {tuple(output.class_logits.shape)} and {tuple(output.box_deltas.shape)}."
        )
    check_ancestors(ancestors, num_classes)
    gamma = torch.as_tensor(config.gamma)
    # To read it on a GPU would be to wait for the device; the settings have been checked.
    if config.equalized_scale is not None and gamma.device.type == "cpu" and not torch.all(gamma > 0):
        raise ValueError(f"gamma > 0 must hold for the equalized focal loss, but got {config.gamma}.")
    for name, value in (("gamma", config.gamma), ("alpha", config.alpha)):
        if isinstance(value, Tensor) and value.shape not in ((), (num_classes,)):
            raise ValueError(f"{name} must be a number or [{num_classes}], but got shape {tuple(value.shape)}.")
