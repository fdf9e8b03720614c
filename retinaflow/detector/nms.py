"""Ways to suppress detections that overlap: what is one object found twice, and what are two objects that overlap?

Boxes compete within a group (an image and class). Every way takes boxes ``[N, 4]`` float xyxy, scores ``[N]`` float and
groups ``[N]`` int64; what it says of a box depends neither on the order of the rows (but for equal scores, among which
the first row goes first) nor on boxes of other groups.

- :func:`hard_nms`: a box that overlaps a better kept one by more than a threshold is dropped.
- :func:`soft_nms`: it loses score instead.
- :func:`support_nms`: it loses score by how many fewer raw boxes speak for it than for the better one.

``docs/overlapping-boxes.md`` compares them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import batched_nms

MODE_IOU = 0.7
"""support-nms: raw boxes that overlap a better one by more than this are the same object, whatever their support."""


@torch.no_grad()
def hard_nms(boxes: Tensor, scores: Tensor, groups: Tensor, *, iou: float | Tensor) -> Tensor:
    """Rows that plain NMS keeps. iou: a number, or ``[N]`` float, one per box and the same within a group.

    Cost: one call of torchvision's kernel per distinct threshold.
    """
    if not isinstance(iou, Tensor):
        rows: Tensor = batched_nms(boxes, scores, groups, iou)
        return rows
    kept = [torch.zeros(0, dtype=torch.int64, device=boxes.device)]
    for threshold in torch.unique(iou).tolist():
        rows = (iou == threshold).nonzero().squeeze(1)
        kept.append(rows[batched_nms(boxes[rows], scores[rows], groups[rows], threshold)])
    return torch.cat(kept)


@torch.no_grad()
def soft_nms(
    boxes: Tensor, scores: Tensor, groups: Tensor, *, sigma: float | Tensor, threshold: Tensor, max_per_group: int
) -> Tensor:
    """The scores after suppression ``[N]``: 0 where a box is dropped, the decayed score elsewhere.

    In each group: take the best box left; multiply the score of every other box left by exp(-IoU^2 / sigma); drop what
    fell to the threshold; repeat. All groups take a step together, so a batch costs as many steps as its largest group
    has survivors, each linear in the number of boxes; no matrix of overlaps is made. Source: Bodla et al. 2017,
    "Soft-NMS", Gaussian form.

    sigma: above 0, a number or ``[N]``. threshold: ``[N]`` float, the score a box must exceed. max_per_group: picks are
    made in order of their final scores, so a caller that keeps at most m boxes needs only m picks per group; later ones
    are dropped.
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


@torch.no_grad()
def support_nms(boxes: Tensor, scores: Tensor, groups: Tensor, *, iou: float | Tensor, power: float | Tensor) -> Tensor:
    """The scores after suppression ``[N]``, 0 where a box is dropped: density-aware, without a head for density.

    An object is found by dozens of raw boxes around one place, a badly placed double by a few. So:

    1. Modes: plain NMS at ``MODE_IOU``; what it drops is dropped.
    2. Support: every raw box gives its score to the mode of its group that it overlaps most; a mode's support S is the
       sum.
    3. A mode that overlaps better ones by more than ``iou`` keeps min(1, S / S_better)^power of its score, by the one
       of them with the most support.

    iou: in (0, MODE_IOU], above it nothing is left to decide. power: above 0; both a number or ``[N]``, the same within
    a group. Cost: linear in pairs of a raw box and a mode of its group. After Adaptive-NMS (Liu et al. 2019, CVPR),
    whose threshold follows a density that a trained head predicts; here the raw boxes tell it, and score is lost in
    place of the box.
    """
    modes = batched_nms(boxes, scores, groups, MODE_IOU)
    modes = modes[groups[modes].argsort(stable=True)]  # by group, best first
    count = len(modes)
    raw, mode = _pairs_within(groups, groups[modes])
    overlap = _paired_iou(boxes[raw], boxes[modes[mode]])
    most = overlap.new_zeros(len(boxes)).scatter_reduce_(0, raw, overlap, "amax")
    # Pairs that are not the best point behind the last mode, so that amin finds the first that is.
    nearest = mode.new_full((len(boxes),), count)
    nearest.scatter_reduce_(0, raw, torch.where(overlap == most[raw], mode, count), "amin")
    support = scores.new_zeros(count).scatter_add_(0, nearest, scores)
    better, lower = _pairs_within(groups[modes], groups[modes])
    better, lower = better[better < lower], lower[better < lower]
    limit = torch.as_tensor(iou, dtype=boxes.dtype, device=boxes.device).expand(len(boxes))[modes]
    rivals = _paired_iou(boxes[modes[better]], boxes[modes[lower]]) > limit[lower]
    strongest = support.clone().scatter_reduce_(0, lower[rivals], support[better[rivals]], "amax")
    exponent = torch.as_tensor(power, dtype=scores.dtype, device=boxes.device).expand(len(boxes))[modes]
    final = torch.zeros_like(scores)
    final[modes] = scores[modes] * (support / strongest) ** exponent
    return final


def _pairs_within(groups: Tensor, ordered: Tensor) -> tuple[Tensor, Tensor]:
    """All pairs (row of ``groups``, row of ``ordered``) of equal group; ``ordered`` ascends."""
    first, behind = torch.searchsorted(ordered, groups), torch.searchsorted(ordered, groups, right=True)
    counts = behind - first
    row = torch.arange(len(groups), device=groups.device).repeat_interleave(counts)
    place = torch.arange(len(row), device=groups.device) - (counts.cumsum(0) - counts)[row]
    return row, first[row] + place


def _paired_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU ``[N]`` of the n-th boxes of ``a`` and ``b``, both ``[N, 4]``; 0 where neither has an area."""
    sides = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp(min=0)
    overlap = sides.prod(dim=1)
    union = (a[:, 2:] - a[:, :2]).prod(dim=1) + (b[:, 2:] - b[:, :2]).prod(dim=1) - overlap
    return torch.where(union > 0, overlap / union, 0.0)
