"""The detections of several models as those of one: renamed, fused, copied to parents, the best of each image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from retinaflow.detections import Detections
from retinaflow.inference.fusion import fuse
from retinaflow.inference.parents import best_of_each_image, expand_to_parents
from retinaflow.settings.model_settings import JoinSettings
from retinaflow.taxonomy import Taxonomy


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
