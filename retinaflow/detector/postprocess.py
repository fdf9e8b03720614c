"""Logits and offsets -> detections: thresholds, top-k, suppression of duplicates, parent classes, normalised boxes.

``detect`` with a ``score_threshold`` of 0.05 gives torchvision's RetinaNet detections (up to the limits of float32 in
its suppression, which is done in float64 here: torchvision moves the boxes of class k by k image widths, which at 500
classes leaves a twentieth of a pixel). Candidates are picked image by image, so no [B, A, K] score tensor is made.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from retinaflow.detector.anchors import AnchorGrid, decode
from retinaflow.detector.network import RawOutput, check_ancestors
from retinaflow.detector.nms import hard_nms, soft_nms
from retinaflow.settings.model_settings import PostprocessSettings

TOP_K = 1000
"""Candidates before suppression, per image and level (as in torchvision), or per image, level and class."""


@dataclass(frozen=True, eq=False)
class BatchDetections:
    """One row per detection; images in order, best score first within an image.

    owner ``[D]`` int64 (image in the batch), label ``[D]`` int64 (class), score ``[D]`` float in (0, 1),
    boxes ``[D, 4]`` float xyxy, normalised to [0, 1] of the image, possibly without area at its border.
    Float32, or float64 where the outputs were.
    """

    owner: Tensor
    label: Tensor
    score: Tensor
    boxes: Tensor

    def __len__(self) -> int:
        return len(self.score)

    def take(self, rows: Tensor) -> BatchDetections:
        """The rows chosen by an index or a boolean tensor, in that order."""
        return BatchDetections(self.owner[rows], self.label[rows], self.score[rows], self.boxes[rows])


@torch.no_grad()
def detect(
    output: RawOutput,
    grid: AnchorGrid,
    *,
    config: PostprocessSettings,
    ancestors: Tensor | None = None,
    top_k: int = TOP_K,
) -> BatchDetections:
    """The detections of a batch, on the device of ``output``.

    grid: anchors of the images' shape (``RetinaNet.anchors``). ancestors: ``[K, K]`` bool, row c marks the strict
    ancestors of class c; given, each detection is also one of every ancestor, with the same score, and of duplicates
    the best stays. top_k: candidates before suppression, per image and ``candidates_per``: pyramid "level"
    (torchvision), or "class" of a level, where a frequent class cannot crowd out a rare one. Raises ValueError where
    shapes disagree.
    """
    _check_shapes(output, grid, ancestors)
    num_classes = output.class_logits.shape[2]
    found = _suppressed(_candidates(output, grid, config, top_k), num_classes, config)
    if ancestors is not None:
        found = _with_ancestors(found, ancestors, config)
    found = _best_of_each_image(found, num_classes, config)
    height, width = grid.image_size
    scale = torch.tensor([width, height, width, height], dtype=found.boxes.dtype, device=found.boxes.device)
    return BatchDetections(found.owner, found.label, found.score, found.boxes / scale)


def _candidates(output: RawOutput, grid: AnchorGrid, config: PostprocessSettings, top_k: int) -> BatchDetections:
    """Pairs of anchor and class above the threshold, the best ``top_k`` of each level or of each class of it, boxes in
    pixels, image by image."""
    # Scores and boxes of half-precision outputs are float32.
    output = RawOutput(output.class_logits, _at_least_float32(output.box_deltas))
    dtype = torch.promote_types(output.class_logits.dtype, torch.float32)
    threshold = torch.tensor(config.score_threshold, dtype=dtype, device=output.class_logits.device)
    images = [_of_image(output, grid, image, threshold, top_k, config) for image in range(len(output.class_logits))]
    return _concatenated(images, output.class_logits.device)


def _of_image(
    output: RawOutput, grid: AnchorGrid, image: int, threshold: Tensor, top_k: int, config: PostprocessSettings
) -> BatchDetections:
    logits, num_classes = output.class_logits[image], output.class_logits.shape[2]
    levels = torch.split(logits, list(grid.level_counts))
    firsts = [sum(grid.level_counts[:level]) for level in range(len(levels))]
    by_class = config.candidates_per == "class"
    chosen = [
        _top(level, threshold, top_k, first, by_class=by_class) for level, first in zip(levels, firsts, strict=True)
    ]
    score, pair = (torch.cat(parts) for parts in zip(*chosen, strict=True))
    anchor, label = pair // num_classes, pair % num_classes
    boxes = decode(output.box_deltas[image, anchor], grid.boxes[anchor])
    height, width = grid.image_size
    boxes = torch.stack([boxes[:, 0::2].clamp(0, width), boxes[:, 1::2].clamp(0, height)], dim=2).flatten(1)
    return BatchDetections(torch.full_like(label, image), label, score, boxes)


def _top(logits: Tensor, threshold: Tensor, k: int, first_anchor: int, *, by_class: bool) -> tuple[Tensor, Tensor]:
    """The k best scores above the threshold of logits ``[a, K]``, or of each of its columns, and their
    (anchor * K + class) in the image."""
    # Most are far below: comparing logits spares their sigmoid. The margin, above bfloat16's rounding of the threshold,
    # leaves the decision to the scores.
    hopeful = (logits > (threshold.logit() - 0.1).to(logits.dtype)).flatten().nonzero().squeeze(1)
    scores = _at_least_float32(logits.flatten()[hopeful]).sigmoid()
    keep = scores > threshold
    scores, pairs = scores[keep], hopeful[keep]
    if by_class:
        order = _best_of_groups(scores, pairs % logits.shape[1], k)
        scores = scores[order]
    else:
        scores, order = scores.topk(min(k, len(scores)))
    return scores, pairs[order] + first_anchor * logits.shape[1]


def _best_of_groups(scores: Tensor, groups: Tensor, most: int) -> Tensor:
    """Rows of the ``most`` best scores of each group, by group, best first; equal scores in their order."""
    by_score = scores.argsort(descending=True, stable=True)
    order = by_score[groups[by_score].argsort(stable=True)]
    ordered = groups[order]
    rank = torch.arange(len(order), device=order.device) - torch.searchsorted(ordered, ordered)
    return order[rank < most]


def _at_least_float32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _concatenated(parts: list[BatchDetections], device: torch.device) -> BatchDetections:
    if not parts:
        index = torch.zeros(0, dtype=torch.int64, device=device)
        return BatchDetections(index, index, torch.zeros(0, device=device), torch.zeros(0, 4, device=device))
    columns = ((part.owner, part.label, part.score, part.boxes) for part in parts)
    return BatchDetections(*(torch.cat(column) for column in zip(*columns, strict=True)))


def _suppressed(found: BatchDetections, num_classes: int, config: PostprocessSettings) -> BatchDetections:
    """What is left of candidates by the suppression of the settings."""
    if config.nms == "nms":
        return _without_overlaps(found, torch.ones_like(found.label, dtype=torch.bool), config)
    scores = soft_nms(
        found.boxes,
        found.score,
        found.owner * num_classes + found.label,
        threshold=config.score_threshold,
        max_per_group=_most_of_a_class(config),
    )
    keep = scores > 0
    return BatchDetections(found.owner[keep], found.label[keep], scores[keep], found.boxes[keep])


def _most_of_a_class(config: PostprocessSettings) -> int:
    return min(config.max_detections, config.max_detections_per_class or config.max_detections)


def _without_overlaps(found: BatchDetections, contested: Tensor, config: PostprocessSettings) -> BatchDetections:
    """Plain NMS, by image and class, among the ``contested [D]`` rows; the others stay, and so does the order."""
    keep = ~contested
    # Image by image: the GPU's overlap matrix grows with the square of the boxes.
    for image in torch.unique(found.owner).tolist():
        rows = (contested & (found.owner == image)).nonzero().squeeze(1)
        boxes, score, label = found.boxes[rows].double(), found.score[rows].double(), found.label[rows]
        keep[rows[hard_nms(boxes, score, label, iou=config.nms_iou)]] = True
    return found.take(keep)


def _with_ancestors(found: BatchDetections, ancestors: Tensor, config: PostprocessSettings) -> BatchDetections:
    """Adds a copy of each detection for each ancestor of its class; in the classes that got copies the best stays."""
    nth, parent = ancestors[found.label].nonzero(as_tuple=True)
    copies = BatchDetections(found.owner[nth], parent, found.score[nth], found.boxes[nth])
    both = _concatenated([found, copies], found.score.device)
    group = both.owner * len(ancestors) + both.label
    # Classes without a copy are left as they are: Soft-NMS may have left overlapping boxes there on purpose.
    return _without_overlaps(both, torch.isin(group, group[len(found) :]), config)


def _best_of_each_image(found: BatchDetections, num_classes: int, config: PostprocessSettings) -> BatchDetections:
    if config.max_detections_per_class:
        group = found.owner * num_classes + found.label
        found = found.take(_best_of_groups(found.score, group, config.max_detections_per_class).sort().values)
    return found.take(_best_of_groups(found.score, found.owner, config.max_detections))


def _check_shapes(output: RawOutput, grid: AnchorGrid, ancestors: Tensor | None) -> None:
    batch, count, num_classes = output.class_logits.shape
    if count != len(grid.boxes) or output.box_deltas.shape != (batch, count, 4):
        raise ValueError(
            f"The outputs and anchors of one image shape must agree, but got {len(grid.boxes)} anchors, "
            f"class_logits {tuple(output.class_logits.shape)} and box_deltas {tuple(output.box_deltas.shape)}."
        )
    check_ancestors(ancestors, num_classes)
