"""What later comparisons need of a judged run: ``matches.npz``, written when it is judged, read when it is compared."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retinaflow.comparison.match_file import (
    FILE_NAME,
    KeptMatches,
    TrainingCounts,
    load_matches,
    save_matches,
    truth_digest,
)
from retinaflow.data.bins import ClassBins
from retinaflow.data.index import AnnotationIndex
from retinaflow.data.openimages import read_image_ids
from retinaflow.data.training_data import load_training_data, read_split
from retinaflow.detections import Detections
from retinaflow.reports.evaluation import Judgement
from retinaflow.runs import tracking
from retinaflow.runs.run import Run
from retinaflow.settings.commands import EvaluateConfig, TrainConfig
from retinaflow.settings.groups import DetectionFields
from retinaflow.settings.resolve import resolve


def keep_matches(
    targets: Sequence[Run],
    judgement: Judgement,
    detections: Detections,
    index: AnnotationIndex,
    bins: ClassBins,
    config: TrainConfig | EvaluateConfig,
    *,
    trained: Mapping[str, Any] | None = None,
) -> None:
    """Write ``matches.npz`` with every target. ``trained``: settings that the judged model was trained with."""
    own = config.model_dump(mode="json")
    on_trained_data = own["data"] == "trained" and trained is not None
    write_matches(
        targets,
        judgement,
        detections,
        index,
        bins,
        settings=own if isinstance(config, TrainConfig) else _settings(config, trained),
        judged_from={
            "command": "train" if isinstance(config, TrainConfig) or on_trained_data else "evaluate",
            "settings": trained if on_trained_data else own,
        },
    )


def write_matches(
    targets: Sequence[Run],
    judgement: Judgement,
    detections: Detections,
    index: AnnotationIndex,
    bins: ClassBins,
    *,
    settings: Mapping[str, Any],
    judged_from: Mapping[str, Any],
) -> None:
    """Write ``matches.npz`` with every target; ``settings`` and ``judged_from`` as :class:`KeptMatches` has them."""
    matches = judgement.scores.matches
    kept = KeptMatches(
        matches=matches,
        boxes=detections.boxes[matches.detection_row].astype(np.float32),
        class_ids=index.taxonomy.ids,
        class_names=index.taxonomy.labels,
        training=TrainingCounts(
            bins.images_per_class.astype(np.int64), bins.boxes_per_class.astype(np.int64), bins.bin_of_class
        ),
        truth=truth_digest(index),
        settings=settings,
        judged_from=judged_from,
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / FILE_NAME
        save_matches(kept, path)
        for target in targets:
            target.log_file(path)


def _settings(config: EvaluateConfig, trained: Mapping[str, Any] | None) -> dict[str, Any]:
    """How detections were made: the training's settings, with what ``evaluate`` does otherwise."""
    own = config.model_dump(mode="json")
    names = [*DetectionFields.model_fields, *(["expand_predictions"] if config.expand_predictions else [])]
    names += [] if config.data == "trained" else ["data", "eval_split"]
    names += [] if config.image_size == "trained" else ["image_size"]
    names += [] if config.predictions is None else ["predictions"]
    return {**(trained or {}), **{name: own[name] for name in names}}


def read_kept(run_id: str) -> KeptMatches:
    """The matches of a run in the store, or of a folder written with track=false.

    Raises ValueError, with the way out, when it has none.
    """
    if (Path(run_id) / FILE_NAME).is_file():
        return load_matches(Path(run_id) / FILE_NAME)
    try:
        path = tracking.fetch(run_id, FILE_NAME)
    except ValueError as error:
        next_step = f"judge the model again with evaluate from_run={run_id}"
        raise ValueError(f"{error}; train and evaluate keep it: {next_step}") from None
    return load_matches(path)


def judged_images(kept: KeptMatches) -> AnnotationIndex:
    """The images that a run was judged on, read again from where they were then.

    Raises ValueError or OSError when they are not there, or are others by now.
    """
    index = _judged_from(kept, {})
    place = index.taxonomy.index_of
    if any(mid not in place for mid in kept.class_ids):
        raise ValueError("the class list has changed since the run was judged")
    if index.taxonomy.ids != kept.class_ids:
        index = index.with_classes(np.array([place[mid] for mid in kept.class_ids]))
    if truth_digest(index) != kept.truth:
        raise ValueError("the images or annotations have changed since the run was judged")
    return index


def judged_images_of_all_classes(kept: KeptMatches) -> AnnotationIndex:
    """The same images with all classes of the class list, whatever group of them the run judged. Errors likewise.

    That the images and annotations are those of then is for the caller to see (:func:`truth_digest`).
    """
    return _judged_from(kept, {"class_group": "all"})


def _judged_from(kept: KeptMatches, changes: Mapping[str, Any]) -> AnnotationIndex:
    settings = {**kept.judged_from["settings"], "config": None, **changes}
    if kept.judged_from["command"] == "train":
        return load_training_data(resolve(TrainConfig, settings)).judged
    return _evaluated(resolve(EvaluateConfig, settings))


def _evaluated(config: EvaluateConfig) -> AnnotationIndex:
    labels = None if config.image_labels == "none" else config.image_labels
    index = read_split(config, [config.eval_split], boxes=config.boxes, image_labels=labels).index
    if config.eval_ids is None:
        return index
    return index.take(np.flatnonzero(np.isin(index.image_ids, read_image_ids(config.eval_ids))))
