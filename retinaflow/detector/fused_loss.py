"""The parts of the loss that a GPU computes in kernels of its own, without a list of positives.

A list has a length that only the device knows, so making one lets the host wait, twice a step and more. Here every
anchor has a label, and the kernels (:mod:`retinaflow.detector.kernels`) decide pair by pair. The results are those of
:mod:`~retinaflow.detector.focal_loss` and :func:`~retinaflow.detector.targets.match_anchors` in float32, but for the
order of summation. They are operations of torch, so that a training can be traced without a GPU.
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from retinaflow.detector.targets import Targets


@lru_cache(maxsize=1)
def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def is_fused(logits: Tensor) -> bool:
    """Whether the loss of these logits is computed by the kernels: on a GPU of NVIDIA or AMD, up to float32."""
    return logits.device.type == "cuda" and logits.dtype != torch.float64 and has_triton()


def bounds(owner: Tensor, batch: int) -> Tensor:
    """``[B + 1]`` int32: the rows of image b are bounds[b] to bounds[b + 1]. owner: ``[P]`` int64, ascending."""
    images = torch.arange(batch + 1, device=owner.device)
    return torch.searchsorted(owner, images, out_int32=True)


@torch.library.custom_op("retinaflow::match", mutates_args=())
def match(anchors: Tensor, boxes: Tensor, box_bounds: Tensor, high: float, low: float) -> Tensor:
    """:func:`retinaflow.detector.targets.match_anchors`, as ``[B, A]`` int32; see :func:`bounds`."""
    from retinaflow.detector import kernels

    return kernels.match(anchors, boxes, box_bounds, high, low)


@match.register_fake
def _(anchors: Tensor, boxes: Tensor, box_bounds: Tensor, high: float, low: float) -> Tensor:
    del boxes, high, low
    return anchors.new_empty(len(box_bounds) - 1, len(anchors), dtype=torch.int32)


class Regions(NamedTuple):
    """Group-of regions: boxes ``[G, 4]``, classes ``[G]``, their :func:`bounds`, ``related [K, K]`` bool (row c marks
    the classes that a region of c silences), and the fraction of an anchor inside one from which it is silent."""

    boxes: Tensor
    classes: Tensor
    bounds: Tensor
    related: Tensor
    ioa: float


class PairRules(NamedTuple):
    """What is learned from each (image, anchor, class).

    labels: ``[B, A]`` int32: the class of a foreground anchor, -1 background, -2 between: no negative loss.
    negatives: ``[B, K]`` bool, False where a class gives no negative loss on an image.
    lineage: ``[K, K]`` bool, row c marks c and its ancestors, which give no negative loss at an anchor of c; None: each
        class alone. learn_ancestors: they are positive there.
    anchors: ``[A, 4]`` float32, for the regions.
    """

    labels: Tensor
    negatives: Tensor
    lineage: Tensor | None
    learn_ancestors: bool
    anchors: Tensor
    regions: Regions


@torch.library.custom_op("retinaflow::focal_pass", mutates_args=())
def focal_pass(
    logits: Tensor,
    labels: Tensor,
    negatives: Tensor,
    tables: Tensor,
    scale: Tensor,
    lineage: Tensor | None,
    related: Tensor,
    anchors: Tensor,
    region_boxes: Tensor,
    region_classes: Tensor,
    region_bounds: Tensor,
    learn_ancestors: bool,
    ioa: float,
    with_gradient: bool,
    with_sums: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The focal loss times ``scale []``, its gradient, and the sums of the absolute unscaled gradients ``[2, K]``
    float64 over the positives and the negatives of each class.

    logits: ``[B, A, K]`` contiguous. tables: ``[3, K]`` float32: gamma, weight of positives, weight of negatives. The
    gradient has the type of the logits (float32 for float16); what is not asked for is empty or zero. The other
    arguments: :class:`PairRules` and :class:`Regions`.
    """
    from retinaflow.detector import kernels

    return kernels.focal(
        logits,
        labels,
        negatives,
        tables,
        scale,
        lineage,
        related,
        anchors,
        region_boxes,
        region_classes,
        region_bounds,
        learn_ancestors=learn_ancestors,
        ioa=ioa,
        with_gradient=with_gradient,
        with_sums=with_sums,
    )


@focal_pass.register_fake
def _(
    logits: Tensor,
    labels: Tensor,
    negatives: Tensor,
    tables: Tensor,
    scale: Tensor,
    lineage: Tensor | None,
    related: Tensor,
    anchors: Tensor,
    region_boxes: Tensor,
    region_classes: Tensor,
    region_bounds: Tensor,
    learn_ancestors: bool,
    ioa: float,
    with_gradient: bool,
    with_sums: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    del labels, negatives, lineage, related, anchors, region_boxes, region_classes, region_bounds
    del learn_ancestors, ioa, with_sums
    kind = torch.float32 if logits.dtype == torch.float16 else logits.dtype
    gradient = logits.new_empty(logits.shape if with_gradient else (0,), dtype=kind)
    return torch.empty_like(scale), gradient, tables.new_empty(2, tables.shape[1], dtype=torch.float64)


@torch.library.custom_op("retinaflow::multiply", mutates_args=("values",))
def multiply(values: Tensor, factor: Tensor) -> None:
    """``values`` times a scalar of the device, in place; by 1 at no cost."""
    from retinaflow.detector import kernels

    kernels.multiply(values, factor)


@multiply.register_fake
def _(values: Tensor, factor: Tensor) -> None:
    del values, factor


def fused_focal_loss(
    logits: Tensor, rules: PairRules, tables: Tensor, scale: Tensor, *, with_sums: bool
) -> tuple[Tensor, Tensor]:
    """The sum of the focal loss over all pairs that count, times ``scale []``; differentiable once, by the logits; and
    the sums of its absolute gradients without ``scale`` (zeros unless ``with_sums``). Arguments: :func:`focal_pass`."""
    sums = torch.zeros(2, logits.shape[2], dtype=torch.float64, device=logits.device)
    return cast(Tensor, _FusedFocalLoss.apply(logits, rules, tables, scale, sums if with_sums else None)), sums


def _pass(
    logits: Tensor, rules: PairRules, tables: Tensor, scale: Tensor, *, with_gradient: bool, with_sums: bool
) -> tuple[Tensor, Tensor, Tensor]:
    regions = rules.regions
    done: tuple[Tensor, Tensor, Tensor] = focal_pass(
        logits.detach().contiguous(),
        rules.labels,
        rules.negatives,
        tables,
        scale,
        rules.lineage,
        regions.related,
        rules.anchors,
        regions.boxes,
        regions.classes,
        regions.bounds,
        rules.learn_ancestors,
        regions.ioa,
        with_gradient,
        with_sums,
    )
    return done


class _FusedFocalLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, rules: PairRules, tables: Tensor, scale: Tensor, sums: Tensor | None
    ) -> Tensor:
        needed = ctx.needs_input_grad[0]
        loss, gradient, of_classes = _pass(
            logits, rules, tables, scale, with_gradient=needed, with_sums=needed and sums is not None
        )
        if sums is not None and needed:
            sums.copy_(of_classes)
        ctx.save_for_backward(logits)
        ctx.arguments = (rules, tables, scale)
        ctx.gradient = gradient if needed else None
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None, None]:
        # As in ``focal_loss``: handed on without a second tensor of this size; a second backward makes it anew.
        (logits,) = ctx.saved_tensors
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            _, gradient, _ = _pass(logits, *ctx.arguments, with_gradient=True, with_sums=False)
        multiply(gradient, grad_output)
        return gradient.to(logits.dtype), None, None, None, None


def regions_of(targets: Targets, ancestors: Tensor | None, *, ioa: float) -> Regions:
    """The group-of regions of a batch: they silence their class, its ancestors and its descendants."""
    related = torch.eye(targets.num_classes, dtype=torch.bool, device=targets.negatives.device)
    if ancestors is not None:
        related = related | ancestors | ancestors.T
    owners = bounds(targets.ignore_owner, targets.batch_size)
    return Regions(targets.ignore_boxes.float(), targets.ignore_labels, owners, related, ioa)
