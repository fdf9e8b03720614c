"""The metric of COCO by its exact rules: AP over IoU 0.5 to 0.95, AP by area, average recall.

The rules, and where they differ from those of the Open Images Challenge:

1. Annotated boxes are taken as they are: nothing is expanded to parent classes, and every class counts as annotated on
   every image. A group-of box is a crowd (``iscrowd``).
2. Of an image and class the 100 detections of highest score count.
3. Matching, at each IoU threshold, highest score first: a detection takes, of the boxes that are not yet matched, the
   one that it overlaps most (of equals the last). So it has a *second choice*. Boxes that are not ignored come first.
   With a crowd the overlap is the intersection over the area of the detection, and a crowd may be taken many times.
4. A detection that is matched to an ignored box (a crowd, or one outside the range of areas) counts neither way; nor
   does one without a match whose own area is outside the range.
5. AP is the mean of the precision, made non-increasing, at 101 recalls 0, 0.01 to 1.
6. AP of a class without boxes is NaN and left out of means. Equal scores: the order of the images, then of the rows.

Areas are those of boxes in pixels. COCO's own files give an area by the object's outline, which is smaller; there AP by
area differs from the published one, while everything over all areas is the same.

Only detections that overlap a box by 0.5 can be matched, so the rules run on these pairs, all thresholds and all
images at once: turn k takes the k-th such detection of every image and class. Cost: ``benchmarks/coco_metric.py``.

Source: ``cocoeval.py`` and ``maskApi.c`` of pycocotools 2.0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from retinaflow.detections import Detections
from retinaflow.metric.challenge import COCO_THRESHOLDS, mean_of_classes
from retinaflow.metric.ground_truth import Annotations

MAX_DETECTIONS = (1, 10, 100)
"""Detections of an image and class that count; AP is that of the last."""
AREAS = {"all": (0.0, 1e10), "small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, 1e10)}
"""Ranges of areas in square pixels, both ends included."""
MAIN_METRICS = ("val/coco_AP", "val/coco_AP50", "val/coco_AP75")
RECALLS = np.linspace(0, 1, 101)
BLOCK = 1 << 16
"""Detections that are compared with the boxes at once."""
_THRESHOLDS = np.minimum(np.array(COCO_THRESHOLDS), 1 - 1e-10)
_SNAP, _DIGITS = 1e-6, 3

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class CocoScores:
    """``ap [A, T, K]`` and ``recall [A, T, K]`` by range of areas, IoU threshold and class, in [0, 1], NaN for a class
    without boxes in the range; ``recall_of_first [2, T, K]``: recall of the first 1 and 10 detections, all areas."""

    areas: tuple[str, ...]
    ap: FloatArray
    recall: FloatArray
    recall_of_first: FloatArray

    def of_classes(self, classes: NDArray[np.integer]) -> CocoScores:
        """Those of some classes, which are the same beside others."""
        chosen = {name: getattr(self, name)[:, :, classes] for name in ("ap", "recall", "recall_of_first")}
        return CocoScores(self.areas, **chosen)

    @property
    def mean_ap(self) -> float:
        """AP over all areas, thresholds and classes; NaN without a box."""
        return mean_of_classes(self.class_ap)

    @property
    def main_metrics(self) -> dict[str, float]:
        """``val/coco_AP``, ``val/coco_AP50`` and ``val/coco_AP75``, which are tracked; without those without a box."""
        return {name: value for name, value in self.metrics().items() if name in MAIN_METRICS}

    @property
    def class_ap(self) -> FloatArray:
        """``[K]`` AP of each class, the mean over the thresholds."""
        return np.asarray(self.ap[0].mean(axis=0))

    def metrics(self, *, prefix: str = "val/") -> dict[str, float]:
        """``coco_AP``, ``coco_AP50``, ``coco_AP75``, and so on; without those that have no box."""
        rows = {f"coco_AP{percent}": self.ap[0, COCO_THRESHOLDS.index(percent / 100)] for percent in (50, 75)}
        rows = {"coco_AP": self.class_ap, **rows}
        for number, area in enumerate(self.areas[1:], 1):
            rows[f"coco_AP_{area}"] = self.ap[number].mean(axis=0)
        for number, most in enumerate(MAX_DETECTIONS[:-1]):
            rows[f"coco_AR_{most}"] = self.recall_of_first[number].mean(axis=0)
        rows[f"coco_AR_{MAX_DETECTIONS[-1]}"] = self.recall[0].mean(axis=0)
        for number, area in enumerate(self.areas[1:], 1):
            rows[f"coco_AR_{area}"] = self.recall[number].mean(axis=0)
        means = {f"{prefix}{name}": mean_of_classes(row) for name, row in rows.items()}
        return {name: value for name, value in means.items() if not np.isnan(value)}


def coco_scores(detections: Detections, ground_truth: Annotations, *, by_area: bool = True) -> CocoScores:
    """The metric over all images of ``ground_truth``; detections of image -1 are left out.

    Where the size of an image is not known, or with ``by_area=False``, there is the range of all areas only.
    """
    sizes = np.asarray(ground_truth.sizes)
    known = len(sizes) == len(ground_truth.image_ids) and bool((sizes > 0).all())
    scale = sizes.astype(np.float64) if known else None
    boxes = _Boxes.of(ground_truth, scale)
    found = _Found.of(detections, ground_truth, scale)
    overlaps = _Overlaps.of(found, boxes)
    areas = tuple(AREAS) if known and by_area else ("all",)
    shape = (len(_THRESHOLDS), len(ground_truth.taxonomy))
    ap, recall = np.full((len(areas), *shape), np.nan), np.full((len(areas), *shape), np.nan)
    of_first = np.full((len(MAX_DETECTIONS) - 1, *shape), np.nan)
    for number, area in enumerate(areas):
        curves = _Curves.of(found, boxes, overlaps, AREAS[area])
        for c in np.flatnonzero(curves.num_boxes).tolist():
            ap[number, :, c] = curves.average_precision(c)
            recall[number, :, c] = curves.recall(c, MAX_DETECTIONS[-1])
            for row, most in enumerate(MAX_DETECTIONS[:-1] if area == "all" else ()):
                of_first[row, :, c] = curves.recall(c, most)
    return CocoScores(areas, ap, recall, of_first)


@dataclass(frozen=True)
class _Boxes:
    """Annotated boxes, ascending by pair (image * K + class), in their order inside a pair. ``boxes [G, 4]``: x, y,
    width and height."""

    pair: NDArray[np.int64]
    boxes: FloatArray
    is_crowd: NDArray[np.bool_]
    num_classes: int

    @classmethod
    def of(cls, ground_truth: Annotations, scale: FloatArray | None) -> _Boxes:
        image = np.repeat(np.arange(len(ground_truth.image_ids)), np.diff(ground_truth.box_start))
        pair = image * len(ground_truth.taxonomy) + np.asarray(ground_truth.labels, dtype=np.int64)
        order = np.argsort(pair, kind="stable")
        boxes = _sides(np.asarray(ground_truth.boxes, dtype=np.float64), None if scale is None else scale[image])
        is_crowd = np.asarray(ground_truth.is_group_of, dtype=bool)
        return cls(pair[order], boxes[order], is_crowd[order], len(ground_truth.taxonomy))


@dataclass(frozen=True)
class _Found:
    """The detections that count (rule 2), ascending by pair, then by descending score. ``rank``: position in the pair;
    ``in_class``: their indices by class, then by descending score (rule 6)."""

    pair: NDArray[np.int64]
    rank: NDArray[np.int64]
    boxes: FloatArray
    in_class: NDArray[np.int64]

    @classmethod
    def of(cls, detections: Detections, ground_truth: Annotations, scale: FloatArray | None) -> _Found:
        image, num_classes = detections.image_index.astype(np.int64), len(ground_truth.taxonomy)
        pair = image * num_classes + detections.class_index
        score = -np.asarray(detections.score, dtype=np.float64)
        order = np.lexsort((score, pair))
        order = order[np.searchsorted(pair[order], 0) :]
        first = np.searchsorted(pair[order], pair[order])
        rank = np.arange(len(order)) - first
        counts = rank < MAX_DETECTIONS[-1]
        order, rank = order[counts], rank[counts]
        image = image[order]
        boxes = _sides(np.asarray(detections.boxes[order], dtype=np.float64), None if scale is None else scale[image])
        by_class = np.lexsort((_order_of(ground_truth.image_ids)[image], score[order], detections.class_index[order]))
        return cls(pair[order], rank, boxes, by_class)


@dataclass(frozen=True)
class _Overlaps:
    """Pairs of a detection and a box that it may take. The detections ``found [C]`` (indices into :class:`_Found`) are
    ordered by turn; those of turn k are ``turns[k]`` to ``turns[k + 1]``. The boxes of detection c are the rows
    ``start[c]`` to ``start[c + 1]`` of ``box`` and ``overlap``, those that it prefers last."""

    found: NDArray[np.int64]
    turns: NDArray[np.int64]
    start: NDArray[np.int64]
    box: NDArray[np.int64]
    overlap: FloatArray

    @classmethod
    def of(cls, found: _Found, boxes: _Boxes) -> _Overlaps:
        parts = [*_overlapping(found, boxes)]
        detection, box, overlap = (np.concatenate(column) for column in zip(*parts, strict=True))
        candidates = np.unique(detection)
        pair = found.pair[candidates]
        turn = np.arange(len(candidates)) - np.searchsorted(pair, pair)
        by_turn = np.argsort(turn, kind="stable")
        place = np.empty(len(candidates), dtype=np.int64)
        place[by_turn] = np.arange(len(candidates))
        owner = place[np.searchsorted(candidates, detection)]
        order = np.lexsort((box, overlap, owner))
        return cls(
            found=candidates[by_turn],
            turns=np.searchsorted(turn[by_turn], np.arange(turn.max(initial=-1) + 2)),
            start=np.searchsorted(owner[order], np.arange(len(candidates) + 1)),
            box=box[order],
            overlap=overlap[order],
        )

    def taken(self, boxes: _Boxes, is_ignored: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Rule 3: ``[C, T]`` the box that each detection takes at each threshold, -1: none."""
        result = np.full((len(self.found), len(_THRESHOLDS)), -1, dtype=np.int64)
        is_free = np.ones((len(boxes.pair), len(_THRESHOLDS)), dtype=bool)
        # Boxes that are not ignored come before all others; then the last row wins.
        preference = np.arange(1, len(self.box) + 1) + np.where(is_ignored[self.box], 0, len(self.box))
        for begin, end in pairwise(self.turns):
            rows = slice(self.start[begin], self.start[end])
            box = self.box[rows]
            may_take = (self.overlap[rows, None] >= _THRESHOLDS) & is_free[box]
            of_detection = np.where(may_take, preference[rows, None], 0)
            best = np.maximum.reduceat(of_detection, self.start[begin:end] - self.start[begin], axis=0)
            chosen = np.where(best > 0, self.box[(best - 1) % len(self.box)], -1)
            result[begin:end] = chosen
            detection, threshold = np.nonzero((chosen >= 0) & ~boxes.is_crowd[chosen])
            is_free[chosen[detection, threshold], threshold] = False
        return result


@dataclass(frozen=True)
class _Curves:
    """The detections that may match, by class, then by descending score: whether each is a true positive ``[C, T]``,
    and how many detections count up to it ``[C, T]`` (rule 4)."""

    num_boxes: NDArray[np.int64]
    start: NDArray[np.int64]
    is_true: NDArray[np.bool_]
    counted: NDArray[np.int64]
    rank: NDArray[np.int64]

    @classmethod
    def of(cls, found: _Found, boxes: _Boxes, overlaps: _Overlaps, area: tuple[float, float]) -> _Curves:
        low, high = area
        is_ignored = boxes.is_crowd | ~_inside(boxes.boxes, low, high)
        box = overlaps.taken(boxes, is_ignored)
        inside = _inside(found.boxes, low, high)
        num_classes = boxes.num_classes
        position = np.empty(len(found.pair), dtype=np.int64)
        position[found.in_class] = np.arange(len(found.pair))
        order = np.argsort(position[overlaps.found], kind="stable")
        candidate, box = overlaps.found[order], box[order]
        has_match = box >= 0
        counts = np.where(has_match, ~is_ignored[box], inside[candidate, None])
        # Of those that match nothing, the ones inside the range count at every threshold.
        alone = inside.copy()
        alone[candidate] = False
        before = np.cumsum(alone[found.in_class])[position[candidate]]
        class_of_found = found.pair[found.in_class] % num_classes
        start = np.searchsorted(found.pair[candidate] % num_classes, np.arange(num_classes + 1))
        first = np.searchsorted(class_of_found, np.arange(num_classes))
        sums = np.append(0, np.cumsum(alone[found.in_class]))[first]
        counted = np.cumsum(counts, axis=0, dtype=np.int64)
        offsets = np.concatenate([np.zeros((1, counted.shape[1]), dtype=np.int64), counted])[start[:-1]]
        owner = found.pair[candidate] % num_classes
        return cls(
            num_boxes=np.bincount(boxes.pair[~is_ignored] % max(num_classes, 1), minlength=num_classes),
            start=start,
            is_true=has_match & counts,
            counted=counted - offsets[owner] + (before - sums[owner])[:, None],
            rank=found.rank[candidate],
        )

    def average_precision(self, c: int) -> FloatArray:
        """Rule 5: ``[T]`` AP of a class that has boxes."""
        rows = slice(self.start[c], self.start[c + 1])
        is_true = self.is_true[rows]
        number = np.cumsum(is_true, axis=0)
        # Precision at the n-th true positive; 0 where there is none.
        precision = np.zeros((int(self.num_boxes[c]), is_true.shape[1]))
        row, threshold = np.nonzero(is_true)
        nth = number[row, threshold]
        precision[nth - 1, threshold] = nth / (self.counted[rows][row, threshold] + np.spacing(1))
        precision = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
        needed = np.searchsorted(np.arange(1, len(precision) + 1) / len(precision), RECALLS)
        return np.asarray(precision[needed].mean(axis=0))

    def recall(self, c: int, most: int) -> FloatArray:
        """``[T]`` recall of a class that has boxes, by the first ``most`` detections of each image."""
        rows = slice(self.start[c], self.start[c + 1])
        return np.asarray(self.is_true[rows][self.rank[rows] < most].sum(axis=0) / self.num_boxes[c])


def _overlapping(found: _Found, boxes: _Boxes) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], FloatArray]]:
    """(detection, box, overlap) of every pair of one image and class whose overlap reaches the lowest threshold."""
    yield np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64), np.zeros(0)
    for begin in range(0, len(found.pair), BLOCK):
        pair = found.pair[begin : begin + BLOCK]
        first, last = (np.searchsorted(boxes.pair, pair, side=side) for side in ("left", "right"))
        counts = last - first
        row = np.repeat(np.arange(len(pair)), counts)
        box = np.arange(len(row)) + np.repeat(first - (np.cumsum(counts) - counts), counts)
        overlap = _overlap(found.boxes[begin + row], boxes.boxes[box], boxes.is_crowd[box])
        near = np.flatnonzero(overlap >= _THRESHOLDS[0])
        yield begin + row[near], box[near], overlap[near]


def _overlap(found: FloatArray, boxes: FloatArray, is_crowd: NDArray[np.bool_]) -> FloatArray:
    """IoU row by row, of a crowd the intersection over the area of the detection; in the arithmetic of pycocotools."""
    low = np.maximum(found[:, :2], boxes[:, :2])
    sides = np.minimum(found[:, :2] + found[:, 2:], boxes[:, :2] + boxes[:, 2:]) - low
    shared = np.where((sides > 0).all(axis=1), sides[:, 0] * sides[:, 1], 0.0)
    own = found[:, 2] * found[:, 3]
    union = np.where(is_crowd, own, own + boxes[:, 2] * boxes[:, 3] - shared)
    return np.divide(shared, union, out=np.zeros_like(shared), where=shared > 0)


def _inside(boxes: FloatArray, low: float, high: float) -> NDArray[np.bool_]:
    area = boxes[:, 2] * boxes[:, 3]
    return (area >= low) & (area <= high)


def _sides(boxes: FloatArray, sizes: FloatArray | None) -> FloatArray:
    """Normalised xyxy -> x, y, width and height, in pixels where ``sizes`` (height, width) are known. Pixels within
    1e-6 of three decimals, as annotated ones are, become these: a box of 32 x 32 pixels then has an area of 1024, and
    an IoU of 0.5 reaches 0.5."""
    values = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
    if sizes is None:
        return values
    values *= np.tile(sizes[:, ::-1], 2)
    near = np.round(values, _DIGITS)
    return np.where(np.abs(values - near) < _SNAP, near, values)


def _order_of(image_ids: NDArray[np.str_]) -> NDArray[np.int64]:
    """``[I]`` position of each image by its id: as a number where all are numbers, else as a string."""
    ids = np.asarray(image_ids)
    if len(ids) and all(text.isdecimal() for text in ids.tolist()):
        ids = np.array([int(text) for text in ids.tolist()], dtype=object)
    position = np.empty(len(ids), dtype=np.int64)
    position[np.argsort(ids, kind="stable")] = np.arange(len(ids))
    return position
