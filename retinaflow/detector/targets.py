"""The ground truth of a batch, and which anchor is matched to which box.

``match_anchors`` does for a whole batch what torchvision's ``Matcher`` does for an image (IoU >= 0.5 foreground, < 0.4
background, between neither; every box also gets the anchors it overlaps most). ``ignore_masks`` marks the negatives
that group-of regions ignore. Both work on padded [B, columns, A] blocks of bounded size, so memory does not grow with
the number of boxes; each reads the number of boxes per image back to the CPU once.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

FOREGROUND = 0.5
"""IoU from which on an anchor is matched to a box."""
BACKGROUND = -1
BETWEEN = -2
# Elements of one [images, boxes, anchors] block, of which four or so float32 temporaries live at a time. 4 MiB each
# stay in a CPU's cache (measured: a quarter of the time that 64 MiB take), 64 MiB fill a GPU.
CPU_BLOCK, GPU_BLOCK = 1 << 20, 1 << 24


@dataclass(frozen=True, eq=False)
class Targets:
    """Ground truth of B images of one shape; K classes.

    boxes: ``[P, 4]`` float xyxy pixels of the resized image, x1 < x2 and y1 < y2. labels: ``[P]`` int64 class.
    owner: ``[P]`` int64, image in the batch, ascending.
    ignore_boxes ``[G, 4]``, ignore_labels ``[G]``, ignore_owner ``[G]``: group-of regions, the same way.
    negatives: ``[B, K]`` bool, True where the class may give negative loss on that image (it was verified present or
        absent there). B is taken from it.

    Raises ValueError for wrong shapes or types, and, while the tensors are on the CPU (where a loader makes them, and
    reading them costs nothing), for boxes without area, labels or owners out of range, and owners out of order.
    """

    boxes: Tensor
    labels: Tensor
    owner: Tensor
    ignore_boxes: Tensor
    ignore_labels: Tensor
    ignore_owner: Tensor
    negatives: Tensor

    def __post_init__(self) -> None:
        if self.negatives.dim() != 2 or self.negatives.dtype != torch.bool:
            raise ValueError(f"negatives must be [B, K] bool, but got {_describe(self.negatives)}.")
        _check_rows("", self.boxes, self.labels, self.owner, self.negatives)
        _check_rows("ignore_", self.ignore_boxes, self.ignore_labels, self.ignore_owner, self.negatives)

    @property
    def batch_size(self) -> int:
        return self.negatives.shape[0]

    @property
    def num_classes(self) -> int:
        return self.negatives.shape[1]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Targets:
        """The same targets on ``device``."""
        return Targets(*(getattr(self, f.name).to(device, non_blocking=non_blocking) for f in fields(self)))

    def pin_memory(self) -> Targets:
        """The same targets in page-locked memory (called by ``DataLoader(pin_memory=True)``)."""
        return Targets(*(getattr(self, f.name).pin_memory() for f in fields(self)))

    @staticmethod
    def empty(batch_size: int, num_classes: int) -> Targets:
        """Images without a box or region, every class verified."""
        boxes, index = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
        negatives = torch.ones(batch_size, num_classes, dtype=torch.bool)
        return Targets(boxes, index, index, boxes, index, index, negatives)


def _describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _check_rows(prefix: str, boxes: Tensor, labels: Tensor, owner: Tensor, negatives: Tensor) -> None:
    rows = len(boxes)
    if boxes.shape != (rows, 4) or not boxes.is_floating_point():
        raise ValueError(f"{prefix}boxes must be [P, 4] float, but got {_describe(boxes)}.")
    for name, column in ((f"{prefix}labels", labels), (f"{prefix}owner", owner)):
        if column.shape != (rows,) or column.dtype != torch.int64:
            raise ValueError(f"{name} must be [{rows}] int64, one per box, but got {_describe(column)}.")
    if rows == 0 or any(column.device.type != "cpu" for column in (boxes, labels, owner)):
        return
    valid = (boxes[:, :2] < boxes[:, 2:]).all(dim=1) & boxes.isfinite().all(dim=1)
    if not valid.all():
        row = int(valid.logical_not().nonzero()[0])
        raise ValueError(f"`x1 < x2 and y1 < y2` must hold, but got {prefix}boxes[{row}] = {boxes[row].tolist()}.")
    for name, column, limit in (
        (f"{prefix}labels", labels, negatives.shape[1]),
        (f"{prefix}owner", owner, len(negatives)),
    ):
        low, high = int(column.min()), int(column.max())
        if low < 0 or high >= limit:
            raise ValueError(f"{name} must lie in 0..{limit - 1}, but got {low if low < 0 else high}.")
    if bool((owner[1:] < owner[:-1]).any()):
        raise ValueError(
            f"{prefix}owner must be ascending: the boxes of an image stand together, in the batch's order."
        )


@torch.no_grad()
def match_anchors(anchors: Tensor, targets: Targets, *, high: float = FOREGROUND, low: float = 0.4) -> Tensor:
    """The box that each anchor is matched to: ``[B, A]`` int64, a row of ``targets.boxes``, or -1 (background), or -2
    (between).

    anchors: ``[A, 4]`` xyxy pixels. Equal to torchvision's ``Matcher(high, low, allow_low_quality_matches=True)`` on
    the IoU of each image, first box first among equals. One exception: a box that overlaps no anchor matches none,
    where torchvision turns every anchor that it does not overlap into foreground.

    Cost: time B' x P' x A over images B' with at least P' boxes; memory bounded by the block size.
    """
    batch, count = targets.batch_size, len(anchors)
    best = anchors.new_full((batch, count), -1.0)
    matched = torch.zeros(batch, count, dtype=torch.int64, device=anchors.device)
    is_best_of_box = torch.zeros(batch, count, dtype=torch.bool, device=anchors.device)
    per_image = torch.bincount(targets.owner, minlength=batch)
    first = per_image.cumsum(0) - per_image
    per_image_cpu = per_image.cpu()
    budget = _block_elements(anchors)
    most, column = int(per_image_cpu.max()) if batch else 0, 0
    while column < most:
        # Later columns belong to ever fewer images: one crowded image does not cost the others padding.
        images = (per_image_cpu > column).nonzero().squeeze(1).to(anchors.device)
        width = min(most - column, max(1, budget // (len(images) * count)))
        offset = torch.arange(column, column + width, device=anchors.device)
        is_box = offset < per_image[images, None]
        rows = (first[images, None] + offset).clamp(max=len(targets.boxes) - 1)
        overlap = _iou(targets.boxes[rows].to(anchors.dtype), anchors).masked_fill_(~is_box[..., None], -1.0)
        # All anchors are in the block, so the best overlap of each of its boxes is final.
        best_of_box = overlap.amax(dim=2, keepdim=True)
        is_best_of_box[images] |= ((overlap == best_of_box) & (best_of_box > 0)).any(dim=1)
        value, index = overlap.max(dim=1)
        better = value > best[images]
        matched[images] = torch.where(better, rows.gather(1, index), matched[images])
        best[images] = torch.where(better, value, best[images])
        column += width
    state = torch.where(best < low, BACKGROUND, torch.where(best < high, BETWEEN, matched))
    return torch.where(is_best_of_box, matched, state)


def _block_elements(anchors: Tensor) -> int:
    return CPU_BLOCK if anchors.device.type == "cpu" else GPU_BLOCK


def _iou(boxes: Tensor, anchors: Tensor) -> Tensor:
    """IoU ``[n, m, A]`` of boxes ``[n, m, 4]`` and anchors ``[A, 4]``, in torchvision's order of operations."""
    overlap = _intersection(boxes, anchors)
    return overlap.div_(_area(boxes)[..., None] + _area(anchors) - overlap)


def _intersection(boxes: Tensor, anchors: Tensor) -> Tensor:
    x1, y1, x2, y2 = boxes[..., None, :].unbind(-1)
    width = (torch.minimum(x2, anchors[:, 2]) - torch.maximum(x1, anchors[:, 0])).clamp_(min=0)
    height = (torch.minimum(y2, anchors[:, 3]) - torch.maximum(y1, anchors[:, 1])).clamp_(min=0)
    return width.mul_(height)


def _area(boxes: Tensor) -> Tensor:
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


@dataclass(frozen=True, eq=False)
class IgnoreMasks:
    """Negatives are silent at image b, anchor a, class k if ``anchors[b, r, a] and classes[b, r, k]`` for some r.

    anchors: ``[B, R, A]`` bool, classes: ``[B, R, K]`` bool; R is the largest number of group-of classes on one image.
    """

    anchors: Tensor
    classes: Tensor


@torch.no_grad()
def ignore_masks(
    anchors: Tensor, targets: Targets, *, ancestors: Tensor | None = None, ioa: float = 0.5
) -> IgnoreMasks | None:
    """Anchors that lie in group-of regions, and the classes silenced there; None when the batch has no region.

    An anchor lies in a region when their intersection is at least ``ioa`` of the anchor's area. Silenced are the
    region's class, its ancestors and its descendants. ancestors: ``[K, K]`` bool, row c marks c's strict ancestors.
    """
    if len(targets.ignore_boxes) == 0:
        return None
    batch, num_classes = targets.batch_size, targets.num_classes
    # Regions of one class on one image are one group: what they silence is the same.
    groups, group = torch.unique(targets.ignore_owner * num_classes + targets.ignore_labels, return_inverse=True)
    owner, label = groups // num_classes, groups % num_classes
    per_image = torch.bincount(owner, minlength=batch)
    slot = torch.arange(len(groups), device=owner.device) - (per_image.cumsum(0) - per_image)[owner]
    slots = int(per_image.max())
    inside = torch.zeros(batch, slots, len(anchors), dtype=torch.bool, device=anchors.device)
    step = max(1, _block_elements(anchors) // len(anchors))
    for start in range(0, len(targets.ignore_boxes), step):
        boxes = targets.ignore_boxes[start : start + step].to(anchors.dtype)
        region, anchor = (_intersection(boxes, anchors) >= ioa * _area(anchors)).nonzero(as_tuple=True)
        chosen = group[start : start + step][region]
        inside[owner[chosen], slot[chosen], anchor] = True
    related = torch.eye(num_classes, dtype=torch.bool, device=anchors.device)
    if ancestors is not None:
        related |= ancestors | ancestors.T
    classes = torch.zeros(batch, slots, num_classes, dtype=torch.bool, device=anchors.device)
    classes[owner, slot] = related[label]
    return IgnoreMasks(inside, classes)
