"""Logits and offsets -> detections: thresholds, top-k, suppression of duplicates, parent classes, normalised boxes.

``detect`` with the default settings gives torchvision's RetinaNet detections (up to the limits of float32 in its
suppression, which is done in float64 here: torchvision moves the boxes of class k by k image widths, at 500 classes
that leaves a twentieth of a pixel). Candidates are picked image by image, so no [B, A, K] score tensor is made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from retinaflow.detector.anchors import AnchorGrid, decode
from retinaflow.detector.class_settings import check_ancestors, check_per_class
from retinaflow.detector.network import RawOutput
from retinaflow.detector.nms import hard_nms, soft_nms, support_nms
from retinaflow.settings.suppression import Suppression

TopKScope = Literal["level", "class"]


@dataclass(frozen=True, eq=False)
class PostprocessConfig:
    """How raw outputs become detections. The defaults are torchvision's.

    score_threshold: a detection's score must exceed it; a number in [0, 1), or ``[K]`` float for one per class.
        It holds for the class that was detected, not again for copies made for parents.
    top_k: candidates kept before suppression, per image and ``top_k_scope``: pyramid "level" (torchvision) or "class"
        (a frequent class cannot crowd out a rare one).
    nms: "nms" drops boxes of one class that overlap a better one; "soft-nms" lowers their scores instead;
        "support-nms" lowers those for which few raw boxes speak (for crowds). One for all classes, or a tuple of K.
    nms_iou: overlap above which "nms" drops and "support-nms" lowers; also for the copies made for parent classes. A
        number, or ``[K]``, as the two below.
    soft_sigma: width of the Gaussian of "soft-nms": a box of overlap IoU keeps exp(-IoU^2 / sigma) of its score.
    support_power: a box keeps its support over that of the better one, to this power, of its score (support-nms).
    max_detections: most detections of one image, over all classes, copies for parent classes among them.
    """

    score_threshold: float | Tensor = 0.05
    top_k: int = 1000
    top_k_scope: TopKScope = "level"
    nms: Suppression | tuple[Suppression, ...] = "nms"
    nms_iou: float | Tensor = 0.5
    soft_sigma: float | Tensor = 0.5
    support_power: float | Tensor = 1.0
    max_detections: int = 300

    def __post_init__(self) -> None:
        threshold = torch.as_tensor(self.score_threshold)
        if not bool(((threshold >= 0) & (threshold < 1)).all()):
            raise ValueError(f"`0 <= score_threshold < 1` must hold, but got {self.score_threshold}.")
        if self.top_k < 1 or self.max_detections < 1:
            raise ValueError(
                f"top_k and max_detections must be at least 1, but got {self.top_k}, {self.max_detections}."
            )
        if not set(self.nms if isinstance(self.nms, tuple) else (self.nms,)) <= set(get_args(Suppression)):
            raise ValueError(f"nms must be one of {get_args(Suppression)}, but got {self.nms!r}.")
        if self.top_k_scope not in get_args(TopKScope):
            raise ValueError(f"top_k_scope must be one of {get_args(TopKScope)}, but got {self.top_k_scope!r}.")
        iou, sigma, power = map(torch.as_tensor, (self.nms_iou, self.soft_sigma, self.support_power))
        if not bool(((iou >= 0) & (iou <= 1)).all() and (sigma > 0).all() and (power > 0).all()):
            raise ValueError(
                "`0 <= nms_iou <= 1`, `soft_sigma > 0` and `support_power > 0` must hold, but got "
                f"{self.nms_iou}, {self.soft_sigma} and {self.support_power}."
            )


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
    output: RawOutput, grid: AnchorGrid, *, config: PostprocessConfig, ancestors: Tensor | None = None
) -> BatchDetections:
    """The detections of a batch, on the device of ``output``.

    grid: anchors of the images' shape (``RetinaNet.anchors``). ancestors: ``[K, K]`` bool, row c marks the strict
    ancestors of class c; given, each detection is also one of every ancestor, with the same score, and of duplicates the
    best stays. Raises ValueError where shapes disagree.
    """
    _check_shapes(output, grid, config, ancestors)
    found = suppressed(candidates(output, grid, config=config), output.class_logits.shape[2], config)
    if ancestors is not None:
        found = _with_ancestors(found, ancestors, config)
    found = _best_of_each_image(found, config.max_detections)
    height, width = grid.image_size
    scale = torch.tensor([width, height, width, height], dtype=found.boxes.dtype, device=found.boxes.device)
    return BatchDetections(found.owner, found.label, found.score, found.boxes / scale)


@torch.no_grad()
def candidates(output: RawOutput, grid: AnchorGrid, *, config: PostprocessConfig) -> BatchDetections:
    """What ``detect`` thins out: pairs of anchor and class above their threshold, boxes in pixels, image by image."""
    # Scores and boxes of half-precision outputs are float32.
    output = RawOutput(output.class_logits, _at_least_float32(output.box_deltas))
    device = output.class_logits.device
    dtype = torch.promote_types(output.class_logits.dtype, torch.float32)
    threshold = _thresholds(config, output.class_logits.shape[2], dtype, device)
    images = [_candidates(output, grid, image, threshold, config) for image in range(len(output.class_logits))]
    return _concatenated(images, device)


def _thresholds(config: PostprocessConfig, num_classes: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.as_tensor(config.score_threshold, dtype=dtype, device=device).expand(num_classes)


def _candidates(
    output: RawOutput, grid: AnchorGrid, image: int, threshold: Tensor, config: PostprocessConfig
) -> BatchDetections:
    """Anchor-class pairs of one image above their threshold, at most top_k per scope, boxes in pixels, clipped."""
    logits, num_classes = output.class_logits[image], output.class_logits.shape[2]
    if config.top_k_scope == "level":
        scopes = torch.split(logits, list(grid.level_counts))
        firsts = [sum(grid.level_counts[:level]) for level in range(len(scopes))]
        chosen = [_top(scope, threshold, config.top_k, first) for scope, first in zip(scopes, firsts, strict=True)]
    else:
        # Columns become rows of their own, so that top-k is per class.
        rows = logits.topk(min(config.top_k, len(logits)), dim=0).indices
        pairs = (rows * num_classes + torch.arange(num_classes, device=rows.device)).flatten()
        scores = _at_least_float32(logits.flatten()[pairs]).sigmoid()
        keep = scores > threshold[pairs % num_classes]
        chosen = [(scores[keep], pairs[keep])]
    score, pair = (torch.cat(parts) for parts in zip(*chosen, strict=True))
    anchor, label = pair // num_classes, pair % num_classes
    boxes = decode(output.box_deltas[image, anchor], grid.boxes[anchor])
    height, width = grid.image_size
    boxes = torch.stack([boxes[:, 0::2].clamp(0, width), boxes[:, 1::2].clamp(0, height)], dim=2).flatten(1)
    return BatchDetections(torch.full_like(label, image), label, score, boxes)


def _top(logits: Tensor, threshold: Tensor, k: int, first_anchor: int) -> tuple[Tensor, Tensor]:
    """The k best scores above their threshold of logits ``[a, K]``, and their (anchor * K + class) in the image."""
    # Most are far below: comparing logits spares their sigmoid. The margin, above bfloat16's rounding of the threshold,
    # leaves the verdict to the scores.
    hopeful = (logits > (threshold.logit() - 0.1).to(logits.dtype)).flatten().nonzero().squeeze(1)
    scores = _at_least_float32(logits.flatten()[hopeful]).sigmoid()
    keep = scores > threshold[hopeful % logits.shape[1]]
    scores, pairs = scores[keep], hopeful[keep]
    scores, order = scores.topk(min(k, len(scores)))
    return scores, pairs[order] + first_anchor * logits.shape[1]


def _at_least_float32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _concatenated(parts: list[BatchDetections], device: torch.device) -> BatchDetections:
    if not parts:
        index = torch.zeros(0, dtype=torch.int64, device=device)
        return BatchDetections(index, index, torch.zeros(0, device=device), torch.zeros(0, 4, device=device))
    columns = ((part.owner, part.label, part.score, part.boxes) for part in parts)
    return BatchDetections(*(torch.cat(column) for column in zip(*columns, strict=True)))


@torch.no_grad()
def suppressed(found: BatchDetections, num_classes: int, config: PostprocessConfig) -> BatchDetections:
    """What is left of candidates when each of K classes is suppressed in its way."""
    threshold = _thresholds(config, num_classes, found.score.dtype, found.score.device)
    if not isinstance(config.nms, tuple):
        return _SUPPRESS[config.nms](found, threshold, config)
    number = {way: n for n, way in enumerate(dict.fromkeys(config.nms))}
    way_of = torch.tensor([number[way] for way in config.nms], device=found.label.device)[found.label]
    parts = [_SUPPRESS[way](found.take(way_of == n), threshold, config) for way, n in number.items()]
    return _concatenated(parts, found.score.device)


def _hard(found: BatchDetections, threshold: Tensor, config: PostprocessConfig) -> BatchDetections:
    del threshold
    return _suppressed(found, torch.ones_like(found.label, dtype=torch.bool), config)


def _suppressed(found: BatchDetections, contested: Tensor, config: PostprocessConfig) -> BatchDetections:
    """Hard suppression, by image and class, among the ``contested [D]`` rows; the others stay. Order is kept."""
    keep = ~contested
    # Image by image: the GPU's overlap matrix grows with the square of the boxes.
    for image in torch.unique(found.owner).tolist():
        rows = (contested & (found.owner == image)).nonzero().squeeze(1)
        boxes, score, label = found.boxes[rows].double(), found.score[rows].double(), found.label[rows]
        keep[rows[hard_nms(boxes, score, label, iou=_of_rows(config.nms_iou, label))]] = True
    return found.take(keep)


def _support(found: BatchDetections, threshold: Tensor, config: PostprocessConfig) -> BatchDetections:
    scores = torch.zeros_like(found.score)
    for image in torch.unique(found.owner).tolist():
        rows = (found.owner == image).nonzero().squeeze(1)
        boxes, score, label = found.boxes[rows].double(), found.score[rows].double(), found.label[rows]
        iou, power = _of_rows(config.nms_iou, label), _of_rows(config.support_power, label)
        scores[rows] = support_nms(boxes, score, label, iou=iou, power=power).to(scores.dtype)
    return _rescored(found, scores, scores > threshold[found.label])


def _soft(found: BatchDetections, threshold: Tensor, config: PostprocessConfig) -> BatchDetections:
    groups = found.owner * len(threshold) + found.label
    scores = soft_nms(
        found.boxes,
        found.score,
        groups,
        sigma=_of_rows(config.soft_sigma, found.label),
        threshold=threshold[found.label],
        max_per_group=config.max_detections,
    )
    return _rescored(found, scores, scores > 0)


def _rescored(found: BatchDetections, scores: Tensor, keep: Tensor) -> BatchDetections:
    return BatchDetections(found.owner[keep], found.label[keep], scores[keep], found.boxes[keep])


_SUPPRESS = {"nms": _hard, "soft-nms": _soft, "support-nms": _support}


def _of_rows(value: float | Tensor, label: Tensor) -> float | Tensor:
    """A setting per class as one per row; a number stays one."""
    return value.to(label.device)[label] if isinstance(value, Tensor) and value.dim() else value


def _with_ancestors(found: BatchDetections, ancestors: Tensor, config: PostprocessConfig) -> BatchDetections:
    """Adds a copy of each detection for each ancestor of its class; in the classes that got copies the best stays."""
    nth, parent = ancestors[found.label].nonzero(as_tuple=True)
    copies = BatchDetections(found.owner[nth], parent, found.score[nth], found.boxes[nth])
    both = _concatenated([found, copies], found.score.device)
    group = both.owner * len(ancestors) + both.label
    # Classes without a copy are left as they are: soft suppression may have kept overlapping boxes there on purpose.
    return _suppressed(both, torch.isin(group, group[len(found) :]), config)


def _best_of_each_image(found: BatchDetections, most: int) -> BatchDetections:
    by_score = found.score.argsort(descending=True, stable=True)
    found = found.take(by_score[found.owner[by_score].argsort(stable=True)])
    starts = torch.searchsorted(found.owner, found.owner)
    rank = torch.arange(len(found), device=found.owner.device) - starts
    return found.take(rank < most)


def _check_shapes(output: RawOutput, grid: AnchorGrid, config: PostprocessConfig, ancestors: Tensor | None) -> None:
    batch, count, num_classes = output.class_logits.shape
    if count != len(grid.boxes) or output.box_deltas.shape != (batch, count, 4):
        raise ValueError(
            f"The outputs and anchors of one image shape must agree, but got {len(grid.boxes)} anchors, "
            f"class_logits {tuple(output.class_logits.shape)} and box_deltas {tuple(output.box_deltas.shape)}."
        )
    check_ancestors(ancestors, num_classes)
    for name in ("score_threshold", "nms_iou", "soft_sigma", "support_power"):
        check_per_class(name, getattr(config, name), num_classes)
    if isinstance(config.nms, tuple) and len(config.nms) != num_classes:
        raise ValueError(f"nms must be one way or one for each of {num_classes} classes, but got {len(config.nms)}.")
