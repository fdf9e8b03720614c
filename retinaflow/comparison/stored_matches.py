"""What later comparisons need of a evaluated run: ``matches.npz``, written when it is evaluated, read when it is compared."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retinaflow.comparison.match_file import (
    FILE_NAME,
    StoredMatches,
    TrainingCounts,
    ground_truth_digest,
    load_matches,
    save_matches,
)
from retinaflow.data.bins import ClassBins
from retinaflow.data.index import AnnotationIndex
from retinaflow.data.openimages import read_image_ids
from retinaflow.data.training_data import load_training_data, read_split
from retinaflow.detections import Detections
from retinaflow.reports.evaluation import EvaluationResult
from retinaflow.runs import tracking
from retinaflow.runs.run import Run
from retinaflow.settings.commands import EvaluateConfig, TrainConfig
from retinaflow.settings.model_groups import EvaluationSettings
from retinaflow.settings.resolve import resolve


def store_matches(
    targets: Sequence[Run],
    evaluation: EvaluationResult,
    detections: Detections,
    index: AnnotationIndex,
    bins: ClassBins,
    config: TrainConfig | EvaluateConfig,
    *,
    trained: Mapping[str, Any] | None = None,
) -> None:
    """Write ``matches.npz`` with every target. ``trained``: settings that the evaluated model was trained with."""
    own = config.model_dump(mode="json")
    on_trained_data = own["data"] == "trained" and trained is not None
    write_matches(
        targets,
        evaluation,
        detections,
        index,
        bins,
        settings=own if isinstance(config, TrainConfig) else _settings(config, trained),
        evaluated_from={
            "command": "train" if isinstance(config, TrainConfig) or on_trained_data else "evaluate",
            "settings": trained if on_trained_data else own,
        },
    )


def write_matches(
    targets: Sequence[Run],
    evaluation: EvaluationResult,
    detections: Detections,
    index: AnnotationIndex,
    bins: ClassBins,
    *,
    settings: Mapping[str, Any],
    evaluated_from: Mapping[str, Any],
) -> None:
    """Write ``matches.npz`` with every target; ``settings`` and ``evaluated_from`` as :class:`StoredMatches` has them."""
    matches = evaluation.scores.matches
    kept = StoredMatches(
        matches=matches,
        boxes=detections.boxes[matches.detection_row].astype(np.float32),
        class_ids=index.taxonomy.ids,
        class_names=index.taxonomy.labels,
        training=TrainingCounts(
            bins.images_per_class.astype(np.int64), bins.boxes_per_class.astype(np.int64), bins.bin_of_class
        ),
        ground_truth=ground_truth_digest(index),
        settings=settings,
        evaluated_from=evaluated_from,
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / FILE_NAME
        save_matches(kept, path)
        for target in targets:
            target.log_file(path)


def _settings(config: EvaluateConfig, trained: Mapping[str, Any] | None) -> dict[str, Any]:
    """How detections were made: the training's settings, with what ``evaluate`` does otherwise."""
    own = config.model_dump(mode="json")
    names = [*EvaluationSettings.model_fields, *(["expand_predictions"] if config.expand_predictions else [])]
    names += [] if config.data == "trained" else ["data", "eval_split"]
    names += [] if config.image_size == "trained" else ["image_size"]
    names += [] if config.predictions is None else ["predictions"]
    return {**(trained or {}), **{name: own[name] for name in names}}


def read_matches(run_id: str) -> StoredMatches:
    """The matches of a run in the store, or of a folder written with track=false.

    Raises ValueError, with the way out, when it has none.
    """
    if (Path(run_id) / FILE_NAME).is_file():
        return load_matches(Path(run_id) / FILE_NAME)
    try:
        path = tracking.fetch(run_id, FILE_NAME)
    except ValueError as error:
        next_step = f"evaluate the model again with evaluate from_run={run_id}"
        raise ValueError(f"{error}; train and evaluate keep it: {next_step}") from None
    return load_matches(path)


def evaluated_images(kept: StoredMatches) -> AnnotationIndex:
    """The images that a run was evaluated on, read again from where they were then.

    Raises ValueError or OSError when they are not there, or are others by now.
    """
    index = _read_evaluated(kept, {})
    place = index.taxonomy.index_of
    if any(mid not in place for mid in kept.class_ids):
        raise ValueError("the class list has changed since the run was evaluated")
    if index.taxonomy.ids != kept.class_ids:
        index = index.with_classes(np.array([place[mid] for mid in kept.class_ids]))
    if ground_truth_digest(index) != kept.ground_truth:
        raise ValueError("the images or annotations have changed since the run was evaluated")
    return index


def evaluated_images_of_all_classes(kept: StoredMatches) -> AnnotationIndex:
    """The same images with all classes of the class list, whatever group of them the run evaluated. Errors likewise.

    That the images and annotations are those of then is for the caller to see (:func:`ground_truth_digest`).
    """
    return _read_evaluated(kept, {"class_group": "all"})


def _read_evaluated(kept: StoredMatches, changes: Mapping[str, Any]) -> AnnotationIndex:
    settings = {**kept.evaluated_from["settings"], "config": None, **changes}
    if kept.evaluated_from["command"] == "train":
        return load_training_data(resolve(TrainConfig, settings)).evaluated
    return _evaluated(resolve(EvaluateConfig, settings))


def _evaluated(config: EvaluateConfig) -> AnnotationIndex:
    labels = None if config.image_labels == "none" else config.image_labels
    index = read_split(config, [config.eval_split], boxes=config.boxes, image_labels=labels).index
    if config.eval_ids is None:
        return index
    return index.take(np.flatnonzero(np.isin(index.image_ids, read_image_ids(config.eval_ids))))
