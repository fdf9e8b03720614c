"""Suppression of overlapping detections: :func:`hard_nms` drops the lower ones, :func:`soft_nms` lowers their scores.

Boxes compete within a group (an image and class). Both take boxes ``[N, 4]`` float xyxy, scores ``[N]`` float and
groups ``[N]`` int64; the result for a box depends neither on the order of the rows (except among equal scores, where
the first row comes first) nor on boxes of other groups.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import batched_nms

SOFT_SIGMA = 0.5
"""Width of the Gaussian of Soft-NMS: a box keeps exp(-IoU^2 / sigma) of its score (Bodla et al. 2017)."""


@torch.no_grad()
def hard_nms(boxes: Tensor, scores: Tensor, groups: Tensor, *, iou: float) -> Tensor:
    """Rows that plain NMS leaves: a box that overlaps a better one by more than ``iou`` is dropped."""
    rows: Tensor = batched_nms(boxes, scores, groups, iou)
    return rows


@torch.no_grad()
def soft_nms(
    boxes: Tensor, scores: Tensor, groups: Tensor, *, threshold: float, max_per_group: int, sigma: float = SOFT_SIGMA
) -> Tensor:
    """The scores after suppression ``[N]``: 0 where a box is dropped, the decayed score elsewhere.

    In each group: take the best box left; multiply the score of every other box left by exp(-IoU^2 / sigma); drop what
    fell to the threshold; repeat. All groups take a step together, so a batch costs as many steps as its largest group
    has survivors, each linear in the number of boxes; no matrix of overlaps is made. Source: Bodla et al. 2017,
    "Soft-NMS", Gaussian form.

    threshold: the score that a box must exceed. max_per_group: boxes are taken in order of their final scores, so a
    caller that needs at most m boxes needs only m of each group; later ones are dropped. sigma: above 0.
    """
    group_ids, group = torch.unique(groups, return_inverse=True)
    row = torch.arange(len(boxes), device=boxes.device)
    left = scores.clone()
    final = torch.zeros_like(scores)
    for _ in range(max_per_group):
        left = torch.where(left > threshold, left, 0.0)
        if not bool((left > 0).any()):
            break
        best = left.new_zeros(len(group_ids)).scatter_reduce_(0, group, left, "amax")
        # Rows that are no candidate point behind the last row, so that amin finds the first that is.
        candidate = torch.where((left > 0) & (left == best[group]), row, len(row))
        pick = candidate.new_full((len(group_ids),), len(row)).scatter_reduce_(0, group, candidate, "amin")
        pick = pick[pick < len(row)]
        final[pick] = left[pick]
        leader = torch.zeros(len(group_ids), dtype=torch.int64, device=boxes.device)
        leader[group[pick]] = pick
        left = left * torch.exp(-_paired_iou(boxes, boxes[leader[group]]).square() / sigma)
        left[pick] = 0.0
    return final


def _paired_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU ``[N]`` of the n-th boxes of ``a`` and ``b``, both ``[N, 4]``; 0 where neither has an area."""
    sides = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp(min=0)
    overlap = sides.prod(dim=1)
    union = (a[:, 2:] - a[:, :2]).prod(dim=1) + (b[:, 2:] - b[:, :2]).prod(dim=1) - overlap
    return torch.where(union > 0, overlap / union, 0.0)
