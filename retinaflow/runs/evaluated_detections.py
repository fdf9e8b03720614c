"""What ``evaluate`` evaluates: the detections of a trained model or of a file, on which annotated images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from retinaflow.data.class_groups import select_classes
from retinaflow.data.frequency_bins import ClassBins
from retinaflow.data.index import AnnotationIndex
from retinaflow.data.openimages import read_image_ids
from retinaflow.data.predictions import read_predictions
from retinaflow.data.skipped_images import SkippedImages
from retinaflow.data.tables import RowErrors
from retinaflow.data.training_data import has_images, load_training_data, read_split
from retinaflow.detections import Detections
from retinaflow.errors import DataError, SettingError
from retinaflow.inference.image_selection import settings_of_training
from retinaflow.interrupts import StopRequest
from retinaflow.runs.datasets import TRAINING_DIGEST, training_digest
from retinaflow.settings.commands import EvaluateConfig, TrainConfig
from retinaflow.settings.data_settings import DataSettings, EvalSplitSettings
from retinaflow.settings.model_settings import refuse_settings_of_model
from retinaflow.settings.resolve import changed
from retinaflow.settings.value_types import as_text
from retinaflow.taxonomy import Taxonomy

# torch and MLflow are imported where they are needed: a file of predictions is evaluated in seconds, with track=false.


@dataclass(frozen=True)
class EvaluatedDetections:
    """Where detections come from, the images they are evaluated on, and the settings with those of the training."""

    name: str
    config: EvaluateConfig
    images: EvaluatedImages
    """With all classes of the model or of the class list."""
    all_bins: ClassBins
    """Of the same classes."""
    detect: Callable[[SkippedImages], Detections]
    """Detections of the same classes."""
    trained: Mapping[str, Any] | None = None
    model_id: str | None = None
    """Of the logged model that is evaluated."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Tags that link the run to its model."""

    @cached_property
    def classes(self) -> NDArray[np.int64]:
        """The classes of ``class_group``, which are evaluated. Raises SettingError for a group without any."""
        taxonomy, bins = self.images.index.taxonomy, self.all_bins
        return select_classes(self.config.class_group, taxonomy, bins if bins.num_bins else None)

    @cached_property
    def index(self) -> AnnotationIndex:
        """The images with the classes that are evaluated. A box of another class counts for its ancestors here."""
        whole = self.images.index
        return whole if len(self.classes) == whole.num_classes else whole.with_classes(self.classes)

    @property
    def bins(self) -> ClassBins:
        """Of the classes that are evaluated; they have the numbers of all."""
        return self.all_bins.of_classes(self.classes)


def detections_to_evaluate(config: EvaluateConfig) -> EvaluatedDetections:
    """The detections of the file that the settings name, else of their model. Raises SettingError or DataError."""
    refuse_settings_of_model(config, "from_run")
    return _of_predictions(config) if config.predictions is not None else _of_model(config)


def _of_model(config: EvaluateConfig) -> EvaluatedDetections:
    from retinaflow.inference.detector import Detector, as_trained
    from retinaflow.runs.models import TrainedModel
    from retinaflow.runs.tracking import launched_by_mlflow

    model = TrainedModel.find(config.from_run)
    checkpoint = model.checkpoint
    config = as_trained(config, checkpoint)
    images = images_for_model(config, checkpoint.taxonomy, checkpoint.settings)

    model_id = model.model_id if config.track else None

    stop = StopRequest(watch_parent=launched_by_mlflow())

    def detect(skipped: SkippedImages) -> Detections:
        detector = Detector.load(checkpoint, config, sizes=images.index.sizes)
        with stop:
            found = detector.detect(
                images.index,
                after_batch=lambda images: stop.check(),
                on_bad_image=skipped.add if images.settings["on_bad_image"] == "skip" else None,
            )
        stop.check()
        return found

    tags = model.tags()
    trained_on = training_digest({"retinaflow.data_digest": checkpoint.data_digest})
    tags |= {TRAINING_DIGEST: trained_on} if trained_on else {}
    return EvaluatedDetections(model.name, config, images, checkpoint.bins, detect, checkpoint.settings, model_id, tags)


def _of_predictions(config: EvaluateConfig) -> EvaluatedDetections:
    assert config.predictions is not None
    images = images_for_predictions(config)
    errors = RowErrors(config.on_bad_row)
    found = read_predictions(config.predictions, images.index, errors, ids=config.prediction_ids, explain=True)
    images = replace(images, dropped=pd.concat([images.dropped, errors.frame()], ignore_index=True))
    bins = ClassBins.unknown(images.index.num_classes)
    # Another command that reads the file again may run in another folder.
    return EvaluatedDetections(str(config.predictions.absolute()), config, images, bins, lambda skipped: found)


_HOW_TO_READ = ("size_table", "on_bad_image", "on_bad_row")
"""Settings that leave the choice of images and annotations as it is."""


@dataclass(frozen=True)
class EvaluatedImages:
    """An index of images with annotations, the rows that were left out of it (file, line, rule, value), and the
    settings that it was read by: those of the training for ``data=trained``."""

    index: AnnotationIndex
    dropped: pd.DataFrame
    settings: Mapping[str, Any]


def images_for_model(config: EvaluateConfig, taxonomy: Taxonomy, trained: Mapping[str, Any]) -> EvaluatedImages:
    """The images that a model is evaluated on, with its classes in its order.

    ``trained``: settings of its training, whose images they are with ``data=trained``. Raises SettingError for
    ``data=trained`` with another choice of images, and DataError for a class list that lacks a class of the model.
    """
    if config.data == "trained":
        own = settings_of_training(trained)
        _refuse_choice_of_data(config, own)
        own = changed(own, {name: getattr(config, name) for name in _HOW_TO_READ if name in config.model_fields_set})
        data = load_training_data(own)
        return EvaluatedImages(data.evaluated, data.dropped, own.model_dump())
    loaded = read_split(config, [config.eval_split])
    index_of = loaded.index.taxonomy.index_of
    missing = [mid for mid in taxonomy.ids if mid not in index_of]
    if missing:
        raise DataError(f"the class list must hold the model's classes, but lacks {', '.join(missing[:5])}")
    index = loaded.index.with_classes(np.array([index_of[mid] for mid in taxonomy.ids]))
    return EvaluatedImages(listed_only(index, config), loaded.dropped, config.model_dump())


def images_for_predictions(config: EvaluateConfig) -> EvaluatedImages:
    """The images that a file of predictions is evaluated on. Image files are opened for predictions in pixels only.

    Raises SettingError where the settings name no annotations.
    """
    assert config.predictions is not None
    in_pixels = config.predictions.suffix.lower() == ".json"
    if config.data == "trained" and (not config.boxes or config.image_labels == () or config.classes is None):
        raise SettingError(
            "predictions need annotations to be evaluated on: data must be a folder, or boxes, image_labels and "
            "classes must be given, but got data=trained"
        )
    loaded = read_split(
        config,
        [config.eval_split],
        with_images=in_pixels and has_image_files(config),
        allow_repeats=True,
    )
    return EvaluatedImages(listed_only(loaded.index, config), loaded.dropped, config.model_dump())


def has_image_files(config: EvaluateConfig) -> bool:
    """Whether a folder of images is given or found."""
    return bool(config.images) or (config.data != "trained" and has_images(config, [config.eval_split]))


def _refuse_choice_of_data(config: EvaluateConfig, trained: TrainConfig) -> None:
    """Raise SettingError for a given choice of images or annotations other than that of the training."""
    free = {"data", "class_group", *_HOW_TO_READ}
    for name in [*EvalSplitSettings.model_fields, *DataSettings.model_fields]:
        if name in free or name not in config.model_fields_set or _is_choice_of(trained, name, getattr(config, name)):
            continue
        raise SettingError(
            f"data must be given for {name} to apply, but got data=trained, {name}={as_text(getattr(config, name))}"
        )


def _is_choice_of(trained: TrainConfig, name: str, value: Any) -> bool:
    """Whether the images that a training was evaluated on were chosen by this setting. It may have taken them out of
    its training splits, or from files of their own."""
    if name == "eval_split":
        return value == trained.eval_split and trained.eval_ids is None
    if name in ("boxes", "image_labels") and value != "none":
        return bool(value == getattr(trained, f"eval_{name}"))
    return bool(value == getattr(trained, name))


def listed_only(index: AnnotationIndex, config: EvaluateConfig) -> AnnotationIndex:
    """The images that ``eval_ids`` lists. Raises SettingError when it lists none of them."""
    if config.eval_ids is None:
        return index
    chosen = np.flatnonzero(np.isin(index.image_ids, read_image_ids(config.eval_ids)))
    if len(chosen) == 0:
        raise SettingError(f"eval_ids={config.eval_ids}: at least one listed image must be in the split, but none is")
    return index.take(chosen)
