"""The detections of several models as those of one: renamed, fused, copied to parents, the best of each image."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from retinaflow.data.predictions import predictions_frame
from retinaflow.detections import Detections
from retinaflow.ensemble.fusion import fuse
from retinaflow.ensemble.member_detections import PREDICTIONS
from retinaflow.ensemble.members import Ensemble
from retinaflow.ensemble.parents import best_of_each_image, expand_to_parents
from retinaflow.runs.run import Run
from retinaflow.settings.commands import MergeConfig


def merge_detections(ensemble: Ensemble, detections: Sequence[Detections], config: MergeConfig) -> Detections:
    """The detections of all members in the classes of the ensemble, with shared classes fused.

    With ``expand_predictions``, copies for parents are added. At most ``max_detections`` of an image, and
    ``max_detections_per_class`` of a class of it, remain.
    """
    renamed = [
        replace(found, class_index=member.classes[found.class_index].astype(np.int32))
        for member, found in zip(ensemble.members, detections, strict=True)
    ]
    found = fuse(renamed, ensemble.num_models, iou_threshold=config.fusion_iou)
    if config.expand_predictions:
        found = expand_to_parents(found, ensemble.evaluated.taxonomy, nms_iou=config.nms_iou)
    return best_of_each_image(found, config.max_detections, of_class=config.max_detections_per_class)


def log_detections(run: Run, detections: Detections, ensemble: Ensemble) -> str:
    """All detections as a file. Returns its name."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / PREDICTIONS
        predictions_frame(detections, ensemble.evaluated).to_parquet(path, index=False)
        run.log_file(path)
    return PREDICTIONS
