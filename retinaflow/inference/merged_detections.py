"""The detections of several models as those of one: renamed, fused, copied to parents, the best of each image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from retinaflow.boxes import iou
from retinaflow.detections import Detections
from retinaflow.inference.fusion import fuse
from retinaflow.settings.model_settings import JoinSettings
from retinaflow.taxonomy import Taxonomy, expand_to_ancestors


def merge_detections(
    parts: Sequence[Detections], classes: Sequence[NDArray[np.int64]], taxonomy: Taxonomy, settings: JoinSettings
) -> Detections:
    """The detections of all models in the classes of ``taxonomy``, with shared classes fused.

    ``parts``: of each model, in its own classes, with scores that can be compared; ``classes``: the class index in
    ``taxonomy`` of each class of each model. With ``expand_predictions``, copies for parents are added. At most
    ``max_detections`` of an image, and ``max_detections_per_class`` of a class of it, remain.
    """
    renamed = [
        replace(found, class_index=own[found.class_index].astype(np.int32))
        for found, own in zip(parts, classes, strict=True)
    ]
    num_models = np.bincount(np.concatenate(classes), minlength=len(taxonomy))
    found = fuse(renamed, num_models, iou_threshold=settings.fusion_iou)
    if settings.expand_predictions:
        found = expand_to_parents(found, taxonomy, nms_iou=settings.nms_iou)
    return best_of_each_image(found, settings.max_detections, of_class=settings.max_detections_per_class)


def expand_to_parents(found: Detections, taxonomy: Taxonomy, *, nms_iou: float) -> Detections:
    """Adds a copy of each detection for each ancestor of its class.

    In the classes that got copies the best of those that overlap by more than ``nms_iou`` remains, so a
    parent gets the score of its best child. Scores of different classes are compared, so they should be calibrated.
    """
    both = expand_to_ancestors(found, taxonomy)
    with_copies = np.unique(both.class_index[_copied(found, taxonomy)])
    has_copies = np.isin(both.class_index, with_copies)
    rows = np.flatnonzero(has_copies)
    keep = ~has_copies
    keep[rows[_best_of_overlapping(both.take(rows), len(taxonomy), nms_iou)]] = True
    return both.take(keep)


def _copied(found: Detections, taxonomy: Taxonomy) -> NDArray[np.bool_]:
    """Rows of the expanded detections that are copies; each detection comes before its own copies."""
    repeats = 1 + taxonomy.is_ancestor[found.class_index].sum(axis=1)
    copied = np.ones(int(repeats.sum()), dtype=bool)
    copied[np.cumsum(repeats) - repeats] = False
    return copied


def _best_of_overlapping(found: Detections, num_classes: int, nms_iou: float) -> NDArray[np.int64]:
    """Rows that no better one of the same image and class overlaps by more than ``nms_iou``."""
    key = found.image_index.astype(np.int64) * num_classes + found.class_index
    order = np.lexsort((-found.score, key))
    first = np.flatnonzero(np.diff(key[order], prepend=-1))
    best: list[NDArray[np.int64]] = [np.zeros(0, dtype=np.int64)]
    for group in np.split(order, first[1:]) if len(order) else ():
        left = group
        while len(left):
            best.append(left[:1])
            left = left[1:][iou(found.boxes[left[:1]], found.boxes[left[1:]])[0] <= nms_iou]
    return np.concatenate(best)


def best_of_each_image(found: Detections, most: int, *, of_class: int = 0) -> Detections:
    """At most ``most`` detections of each image, and ``of_class`` of a class of it (0: no such limit), those of highest
    score; by image, best first.

    Equal scores are ordered by class, then by row, so that the order of models with different classes does not matter.
    """
    if of_class:
        order = np.lexsort((-found.score, found.class_index, found.image_index))
        group = np.stack([found.image_index[order], found.class_index[order]])
        is_first = np.append(True, (group[:, 1:] != group[:, :-1]).any(axis=0))[: len(order)]
        start = np.maximum.accumulate(np.where(is_first, np.arange(len(order)), 0))
        found = found.take(np.sort(order[np.arange(len(order)) - start < of_class]))
    order = np.lexsort((found.class_index, -found.score, found.image_index))
    image = found.image_index[order]
    rank = np.arange(len(order)) - np.searchsorted(image, image)
    return found.take(order[rank < most])
