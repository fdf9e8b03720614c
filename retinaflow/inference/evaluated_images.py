"""Settings of ``evaluate`` -> the images with annotations to evaluate on; needs neither torch nor a model's weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from retinaflow.data.index import AnnotationIndex
from retinaflow.data.openimages import read_image_ids
from retinaflow.data.training_data import has_images, load_training_data, read_split
from retinaflow.errors import DataError, SettingError
from retinaflow.inference.image_selection import settings_of_training
from retinaflow.settings.commands import EvaluateConfig
from retinaflow.settings.value_types import as_text
from retinaflow.taxonomy import Taxonomy

_CHOICE_OF_DATA = ("eval_split", "eval_ids", "boxes", "image_labels", "classes", "hierarchy", "images", "class_group")


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
        _refuse_choice_of_data(config, trained)
        own = settings_of_training(trained)
        data = load_training_data(own)
        return EvaluatedImages(data.evaluated, data.dropped, own.model_dump())
    labels = None if config.image_labels == "none" else config.image_labels
    loaded = read_split(config, [config.eval_split], boxes=config.boxes, image_labels=labels)
    index_of = loaded.index.taxonomy.index_of
    missing = [mid for mid in taxonomy.ids if mid not in index_of]
    if missing:
        raise DataError(f"the class list must hold the model's classes, but lacks {', '.join(missing[:5])}")
    index = loaded.index.with_classes(np.array([index_of[mid] for mid in taxonomy.ids]))
    return EvaluatedImages(_listed_only(index, config), loaded.dropped, config.model_dump())


def images_for_predictions(config: EvaluateConfig) -> EvaluatedImages:
    """The images that a file of predictions is evaluated on. Image files are opened for predictions in pixels only.

    Raises SettingError where the settings name no annotations.
    """
    assert config.predictions is not None
    in_pixels = config.predictions.suffix.lower() == ".json"
    labels = None if config.image_labels == "none" else config.image_labels
    if config.data == "trained" and (not config.boxes or labels == () or config.classes is None):
        raise SettingError(
            "predictions need annotations to be evaluated on: data must be a folder, or boxes, image_labels and "
            "classes must be given, but got data=trained"
        )
    loaded = read_split(
        config,
        [config.eval_split],
        boxes=config.boxes,
        image_labels=labels,
        with_images=in_pixels and _has_images(config),
        allow_repeats=True,
    )
    return EvaluatedImages(_listed_only(loaded.index, config), loaded.dropped, config.model_dump())


def _has_images(config: EvaluateConfig) -> bool:
    return bool(config.images) or (config.data != "trained" and has_images(config, [config.eval_split]))


def _refuse_choice_of_data(config: EvaluateConfig, trained: Mapping[str, Any]) -> None:
    """The images that the training evaluated on leave nothing to choose."""
    same = {name: getattr(EvaluateConfig(), name) for name in _CHOICE_OF_DATA}
    if config.eval_split == trained["eval_split"]:
        same["eval_split"] = config.eval_split
    given = [name for name, value in same.items() if getattr(config, name) != value]
    if given:
        name = given[0]
        raise SettingError(
            f"data must be given for {name} to apply, but got data=trained, {name}={as_text(getattr(config, name))}"
        )


def _listed_only(index: AnnotationIndex, config: EvaluateConfig) -> AnnotationIndex:
    if config.eval_ids is None:
        return index
    chosen = np.flatnonzero(np.isin(index.image_ids, read_image_ids(config.eval_ids)))
    if len(chosen) == 0:
        raise SettingError(f"eval_ids={config.eval_ids}: at least one listed image must be in the split, but none is")
    return index.take(chosen)
