"""Detections of one class by several models -> one set: weighted boxes fusion.

For each image and class, as in the paper:

1. all boxes of all models by descending score;
2. a box joins the cluster whose fused box it overlaps most, if that IoU is above the threshold, else it starts a new
   one;
3. a cluster's fused box is the mean of its boxes weighted by their scores, its score C their mean score;
4. at the end C becomes C * min(T, N) / N for T boxes in the cluster and N models: what few of them found counts less.

Worked example: two models, boxes (0, 0, 1, 1) of score 0.8 and (0, 0, 1, 0.5) of score 0.4 at a threshold of 0.4 (their
IoU is 0.5): one box (0, 0, 1, (0.8 * 1 + 0.4 * 0.5) / 1.2 = 0.833), score (0.8 + 0.4) / 2 * 2 / 2 = 0.6. A box of score
0.9 that only one of them found: 0.9 * 1 / 2 = 0.45.

The result does not depend on the order of the models. Scores must be comparable between the models: calibrate first.
Cost: a Python loop over the boxes of shared classes, about 50 microseconds of CPU each.

Source: Solovyev, Wang and Gabruseva, Weighted boxes fusion (Image and Vision Computing 2021), with ``conf_type='avg'``
of their library ``ensemble_boxes``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from retinaflow.boxes import iou
from retinaflow.detections import Detections

FloatArray = NDArray[np.float64]


def fuse(parts: Sequence[Detections], num_models: NDArray[np.integer], *, iou_threshold: float) -> Detections:
    """The detections of all parts, one per model; shared classes are fused, the rows of the others do not change.

    ``num_models [K]``: how many of the models have a class, whether they found something or not. Fused rows come last.
    """
    everything = Detections.concatenate(parts)
    shared = num_models[everything.class_index] > 1
    rows = np.flatnonzero(shared)
    if len(rows) == 0:
        return everything
    key = everything.image_index[rows].astype(np.int64) * len(num_models) + everything.class_index[rows]
    by_key = np.argsort(key, kind="stable")
    rows, key = rows[by_key], key[by_key]
    first = np.flatnonzero(np.diff(key, prepend=key[0] - 1))
    fused = [everything.take(~shared)]
    for group in np.split(rows, first[1:]):
        image, label = everything.image_index[group[0]], everything.class_index[group[0]]
        boxes, score = fuse_group(
            everything.boxes[group], everything.score[group], int(num_models[label]), iou_threshold=iou_threshold
        )
        fused.append(
            Detections(
                np.full(len(score), image, dtype=np.int32), np.full(len(score), label, dtype=np.int32), score, boxes
            )
        )
    return Detections.concatenate(fused)


def fuse_group(
    boxes: NDArray[np.floating], score: NDArray[np.floating], num_models: int, *, iou_threshold: float
) -> tuple[FloatArray, FloatArray]:
    """Fused ``boxes [M, 4]`` and ``score [M]`` of the boxes ``[N, 4]`` of one image and class, best first."""
    # Boxes decide among equal scores, so that the order of the models does not matter.
    order = np.lexsort((*np.asarray(boxes).T[::-1], -np.asarray(score)))
    boxes, score = np.asarray(boxes, dtype=np.float64)[order], np.asarray(score, dtype=np.float64)[order]
    # With scores of 0 alone, the mean of a cluster would be undefined.
    weight = np.maximum(score, np.finfo(np.float64).tiny)
    fused, weighted = np.empty_like(boxes), np.zeros_like(boxes)
    weights, sums, counts = (np.zeros(len(boxes)) for _ in range(3))
    clusters = 0
    for box, own_score, own_weight in zip(boxes, score, weight, strict=True):
        overlap = iou(box[None], fused[:clusters])[0]
        cluster = int(overlap.argmax()) if clusters else 0
        if clusters == 0 or overlap[cluster] <= iou_threshold:
            cluster = clusters
            clusters += 1
        weighted[cluster] += own_weight * box
        weights[cluster] += own_weight
        sums[cluster] += own_score
        counts[cluster] += 1
        fused[cluster] = weighted[cluster] / weights[cluster]
    agreement = np.minimum(counts[:clusters], num_models) / num_models
    final = sums[:clusters] / counts[:clusters] * agreement
    best_first = np.argsort(-final, kind="stable")
    return fused[:clusters][best_first], final[best_first]
