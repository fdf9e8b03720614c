"""The images and annotations that a run was evaluated on, read again from the same files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from retinaflow.comparison.ground_truth_digest import ground_truth_digest
from retinaflow.comparison.stored_matches import StoredMatches
from retinaflow.data.index import AnnotationIndex
from retinaflow.data.training_data import load_training_data, read_split
from retinaflow.errors import DataError
from retinaflow.runs.evaluated_detections import has_image_files, listed_only
from retinaflow.settings.commands import EvaluateConfig, TrainConfig
from retinaflow.settings.resolve import current_names, resolve


def images_of_run(stored: StoredMatches) -> AnnotationIndex:
    """The images that a run was evaluated on, read again from the same files.

    Raises DataError, or OSError, when they do not exist any more or have changed.
    """
    index = _read_evaluated(stored, {}, need_images=True)
    index_of = index.taxonomy.index_of
    if any(mid not in index_of for mid in stored.class_ids):
        raise DataError("the class list has changed since the run was evaluated")
    if index.taxonomy.ids != stored.class_ids:
        index = index.with_classes(np.array([index_of[mid] for mid in stored.class_ids]))
    if ground_truth_digest(index) != stored.ground_truth:
        raise DataError("the images or annotations have changed since the run was evaluated")
    return index


def images_of_run_with_all_classes(stored: StoredMatches) -> AnnotationIndex:
    """The same images with all classes of the class list, whichever of them the run evaluated. Errors likewise, but a
    file of predictions may have been evaluated without image files.

    The caller has to compare the digest of the images and annotations with the stored one.
    """
    return _read_evaluated(stored, {"class_group": "all"}, need_images=False)


def _read_evaluated(stored: StoredMatches, changes: Mapping[str, Any], *, need_images: bool) -> AnnotationIndex:
    settings = {**stored.evaluated_from["settings"], "config": None, **changes}
    if stored.evaluated_from["command"] == "train":
        return load_training_data(resolve(TrainConfig, settings)).evaluated
    # A run of an earlier version may have settings that evaluate has no longer.
    known = {name: value for name, value in current_names(settings).items() if name in EvaluateConfig.model_fields}
    config = resolve(EvaluateConfig, known)
    of_file = config.predictions is not None
    with_images = need_images or not of_file or has_image_files(config)
    # A file is evaluated on repeated boxes too.
    loaded = read_split(config, [config.eval_split], with_images=with_images, allow_repeats=of_file)
    return listed_only(loaded.index, config)
