"""Triton kernels of the loss on a GPU: anchors matched to boxes, and the class loss with its gradient.

What is data-dependent (the boxes of an image, its group-of regions) is a loop inside a kernel, whose bounds are read on
the device: no list of positives is made and the host waits for nothing. The only file that imports triton;
:mod:`retinaflow.detector.fused_loss` calls it. With ``TRITON_INTERPRET=1`` set before triton is imported the kernels
run on tensors of the CPU, which is how they are tested.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ANCHORS_MATCHED, ANCHORS_LOST = 256, 32
"""Anchors of a program: of the matching, and of the loss."""
WIDTHS = (128, 64, 32)
"""Classes that a program of the loss reads at a time, of which the one with the least padding is used."""


@triton.jit
def _corners(boxes, rows, inside):
    x1 = tl.load(boxes + rows * 4, mask=inside, other=0.0)
    y1 = tl.load(boxes + rows * 4 + 1, mask=inside, other=0.0)
    x2 = tl.load(boxes + rows * 4 + 2, mask=inside, other=0.0)
    y2 = tl.load(boxes + rows * 4 + 3, mask=inside, other=0.0)
    return x1, y1, x2, y2


@triton.jit
def _intersection(x1, y1, x2, y2, boxes, box):
    left, top = tl.load(boxes + box * 4), tl.load(boxes + box * 4 + 1)
    right, bottom = tl.load(boxes + box * 4 + 2), tl.load(boxes + box * 4 + 3)
    width = tl.maximum(tl.minimum(right, x2) - tl.maximum(left, x1), 0.0)
    height = tl.maximum(tl.minimum(bottom, y2) - tl.maximum(top, y1), 0.0)
    return width * height, (right - left) * (bottom - top)


@triton.jit
def _best_of_box(anchors, boxes, bounds, best_of_box, num_anchors, BLOCK: tl.constexpr):
    """The largest IoU of each box with an anchor, 0 for none; ``best_of_box`` holds zeros before."""
    image = tl.program_id(1)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < num_anchors
    x1, y1, x2, y2 = _corners(anchors, row, inside)
    area = (x2 - x1) * (y2 - y1)
    for box in range(tl.load(bounds + image), tl.load(bounds + image + 1)):
        shared, own = _intersection(x1, y1, x2, y2, boxes, box)
        overlap = tl.div_rn(shared, own + area - shared)
        tl.atomic_max(best_of_box + box, tl.max(tl.where(inside, overlap, 0.0), axis=0))


@triton.jit
def _match(anchors, boxes, bounds, best_of_box, matched, num_anchors, high, low, BLOCK: tl.constexpr):
    image = tl.program_id(1)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < num_anchors
    x1, y1, x2, y2 = _corners(anchors, row, inside)
    area = (x2 - x1) * (y2 - y1)
    best = tl.full([BLOCK], -1.0, tl.float32)
    index = tl.zeros([BLOCK], tl.int32)
    is_best_of_box = tl.zeros([BLOCK], tl.int32)
    for box in range(tl.load(bounds + image), tl.load(bounds + image + 1)):
        shared, own = _intersection(x1, y1, x2, y2, boxes, box)
        overlap = tl.div_rn(shared, own + area - shared)
        index = tl.where(overlap > best, box, index)
        best = tl.where(overlap > best, overlap, best)
        most = tl.load(best_of_box + box)
        # A box that overlaps no anchor is the best of none: no IoU is 2.
        most = tl.where(most > 0.0, most, 2.0)
        is_best_of_box = tl.where(overlap == most, 1, is_best_of_box)
    state = tl.where(best < low, -1, tl.where(best < high, -2, index))
    state = tl.where(is_best_of_box > 0, index, state)
    tl.store(matched + image.to(tl.int64) * num_anchors + row, state, mask=inside)


def match(anchors: Tensor, boxes: Tensor, bounds: Tensor, high: float, low: float) -> Tensor:
    """The box of each anchor ``[B, A]`` int32, as :func:`retinaflow.detector.targets.match_anchors` gives it.

    anchors ``[A, 4]``, boxes ``[P, 4]``: float32 xyxy pixels. bounds: ``[B + 1]`` int32, the boxes of image b are
    bounds[b] to bounds[b + 1].
    """
    count, batch = len(anchors), len(bounds) - 1
    matched = torch.empty(batch, count, dtype=torch.int32, device=anchors.device)
    best_of_box = torch.zeros(max(1, len(boxes)), device=anchors.device)
    grid = (triton.cdiv(count, ANCHORS_MATCHED), batch)
    # A fused multiplication and addition rounds differently from the two steps that the CPU takes.
    options = {"BLOCK": ANCHORS_MATCHED, "enable_fp_fusion": False}
    _best_of_box[grid](anchors, boxes, bounds, best_of_box, count, **options)
    _match[grid](anchors, boxes, bounds, best_of_box, matched, count, high, low, **options)
    return matched


@triton.jit
def _log1p(x):
    """log(1 + x) for x in [0, 1], in float32 exact to its last bits: 2 artanh(x / (2 + x)) as a series.

    The processor's logarithm is not exact near 1, where most pairs lie.
    """
    s = x / (2.0 + x)
    q = s * s
    series = 0.0666666667 + q * 0.0588235294
    series = 0.0909090909 + q * (0.0769230769 + q * series)
    series = 0.1428571429 + q * (0.1111111111 + q * series)
    series = 0.3333333333 + q * (0.2 + q * series)
    return 2.0 * s * (1.0 + q * series)


@triton.jit
def _in_a_region(counts, corners, boxes, classes, start, end, related, k, is_class, ioa, K: tl.constexpr):
    """``counts`` without the pairs that a group-of region of the image ignores."""
    x1, y1, x2, y2 = corners
    least = ioa * ((x2 - x1) * (y2 - y1))
    for region in range(start, end):
        shared, _ = _intersection(x1, y1, x2, y2, boxes, region)
        inside = (shared >= least).to(tl.int32)
        if tl.max(inside, axis=0) > 0:
            label = tl.load(classes + region)
            same = tl.load(related + label * K + k, mask=is_class, other=0).to(tl.int32)
            counts = counts & (inside[:, None] * same[None, :] == 0)
    return counts


@triton.jit
def _focal(
    logits,
    gradient,
    losses,
    sums,
    labels,
    negatives,
    gamma,
    positive_weight,
    negative_weight,
    scale,
    lineage,
    related,
    anchors,
    region_boxes,
    region_classes,
    region_bounds,
    num_anchors,
    ioa,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_LINEAGE: tl.constexpr,
    LEARN_ANCESTORS: tl.constexpr,
    HAS_REGIONS: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
    WITH_SUMS: tl.constexpr,
):
    tile, image = tl.program_id(0), tl.program_id(1)
    row = tile * ROWS + tl.arange(0, ROWS)
    is_anchor = row < num_anchors
    at = image.to(tl.int64) * num_anchors + row
    label = tl.load(labels + at, mask=is_anchor, other=-2)
    factor_of_gradient = tl.load(scale)
    program = (image.to(tl.int64) * tl.num_programs(0) + tile) * 2 * K
    if HAS_REGIONS:
        corners = _corners(anchors, row, is_anchor)
        start, end = tl.load(region_bounds + image), tl.load(region_bounds + image + 1)
    total = tl.zeros([ROWS], tl.float32)
    for first in range(0, K, WIDTH):
        k = first + tl.arange(0, WIDTH)
        is_class = k < K
        is_pair = is_anchor[:, None] & is_class[None, :]
        pair = at[:, None] * K + k[None, :]
        x = tl.load(logits + pair, mask=is_pair, other=0.0).to(tl.float32)
        positive = label[:, None] == k[None, :]
        silent = positive
        if HAS_LINEAGE:
            foreground = is_pair & (label >= 0)[:, None]
            silent = tl.load(lineage + label[:, None] * K + k[None, :], mask=foreground, other=0).to(tl.int32) > 0
            if LEARN_ANCESTORS:
                positive = silent
        known = tl.load(negatives + image * K + k, mask=is_class, other=0).to(tl.int32) > 0
        counts = (label != -2)[:, None] & known[None, :] & (silent == 0)
        if HAS_REGIONS:
            counts = _in_a_region(
                counts, corners, region_boxes, region_classes, start, end, related, k, is_class, ioa, K
            )
        g = tl.load(gamma + k, mask=is_class, other=1.0)[None, :]
        w_positive = tl.load(positive_weight + k, mask=is_class, other=0.0)[None, :]
        w_negative = tl.load(negative_weight + k, mask=is_class, other=0.0)[None, :]
        # z of equation 5, -1e4 where nothing is learned: comparisons that are false for NaN keep it.
        z = tl.where(positive, -x, tl.where(counts, x, -1e4))
        z = tl.where(z < -1e30, -1e30, z)
        small = tl.exp(-tl.abs(z))
        softplus = tl.where(z > 0.0, z, 0.0) + _log1p(small)
        weight = tl.where(positive, w_positive, w_negative)
        factor = weight * tl.exp(g * (z - softplus))
        total += tl.sum(tl.where(is_pair, softplus * factor, 0.0), axis=1)
        if WITH_GRADIENT:
            larger, smaller = 1.0 / (1.0 + small), small / (1.0 + small)
            p, rest = tl.where(z > 0.0, larger, smaller), tl.where(z > 0.0, smaller, larger)
            slope = factor * (g * rest * softplus + p)
            signed = tl.where(positive, -slope, slope) * factor_of_gradient
            tl.store(gradient + pair, signed.to(gradient.dtype.element_ty), mask=is_pair)
            if WITH_SUMS:
                own = tl.sum(tl.where(is_pair & positive, slope, 0.0), axis=0)
                others = tl.sum(tl.where(is_pair & (positive == 0), slope, 0.0), axis=0)
                tl.store(sums + program + k, own, mask=is_class)
                tl.store(sums + program + K + k, others, mask=is_class)
    tl.store(losses + image * tl.num_programs(0) + tile, tl.sum(total, axis=0))


def focal(
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
    *,
    learn_ancestors: bool,
    ioa: float,
    with_gradient: bool,
    with_sums: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operation :func:`retinaflow.detector.fused_loss.focal_pass`, which describes arguments and results."""
    batch, count, classes = logits.shape
    device = logits.device
    tiles = triton.cdiv(count, ANCHORS_LOST)
    losses = torch.empty(batch * tiles, device=device)
    kind = torch.float32 if logits.dtype == torch.float16 else logits.dtype
    gradient = torch.empty(logits.shape if with_gradient else (0,), dtype=kind, device=device)
    sums = torch.empty((batch * tiles, 2, classes) if with_sums else (0, 2, classes), device=device)
    gamma, positive_weight, negative_weight = tables
    _focal[(tiles, batch)](
        logits,
        gradient,
        losses,
        sums,
        labels,
        negatives.view(torch.uint8),
        gamma,
        positive_weight,
        negative_weight,
        scale,
        related.view(torch.uint8) if lineage is None else lineage.view(torch.uint8),
        related.view(torch.uint8),
        anchors,
        region_boxes,
        region_classes,
        region_bounds,
        count,
        ioa,
        K=classes,
        ROWS=ANCHORS_LOST,
        WIDTH=min(WIDTHS, key=lambda width: triton.cdiv(classes, width) * width),
        HAS_LINEAGE=lineage is not None,
        LEARN_ANCESTORS=learn_ancestors,
        HAS_REGIONS=len(region_boxes) > 0,
        WITH_GRADIENT=with_gradient,
        WITH_SUMS=with_sums,
        enable_fp_fusion=True,
    )
    return losses.sum(dtype=torch.float64).float() * scale, gradient, sums.sum(0, dtype=torch.float64)


@triton.jit
def _multiply(values, factor, count, BLOCK: tl.constexpr):
    by = tl.load(factor)
    if by != 1.0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        product = tl.load(values + at, mask=at < count, other=0.0).to(tl.float32) * by
        tl.store(values + at, product.to(values.dtype.element_ty), mask=at < count)


def multiply(values: Tensor, factor: Tensor) -> None:
    """Multiply ``values`` in place by a scalar of the device. By 1, the ordinary one, costs no memory traffic."""
    block = 8192
    _multiply[(triton.cdiv(values.numel(), block),)](values, factor, values.numel(), BLOCK=block, enable_fp_fusion=True)
