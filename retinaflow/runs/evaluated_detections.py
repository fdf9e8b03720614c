"""What ``evaluate`` evaluates: the detections of a trained model or of a file, on which images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd

from retinaflow.data.frequency_bins import ClassBins
from retinaflow.data.predictions import read_predictions
from retinaflow.data.skipped_images import SkippedImages
from retinaflow.data.tables import RowErrors
from retinaflow.detections import Detections
from retinaflow.inference.evaluated_images import EvaluatedImages, images_for_model, images_for_predictions
from retinaflow.interrupts import StopRequest
from retinaflow.settings.commands import EvaluateConfig

# torch and MLflow are imported where they are needed: a file of predictions is evaluated in seconds, with track=false.


@dataclass(frozen=True)
class EvaluatedDetections:
    """Where detections come from, the images they are evaluated on, and the settings with those of the training."""

    name: str
    config: EvaluateConfig
    images: EvaluatedImages
    bins: ClassBins
    detect: Callable[[StopRequest, SkippedImages], Detections]
    trained: Mapping[str, Any] | None = None
    model_id: str | None = None
    """Of the logged model that is evaluated."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Tags that link the run to its model."""


def detections_to_evaluate(config: EvaluateConfig) -> EvaluatedDetections:
    """The detections of the file that the settings name, else of their model. Raises SettingError or DataError."""
    return _of_predictions(config) if config.predictions is not None else _of_model(config)


def _of_model(config: EvaluateConfig) -> EvaluatedDetections:
    from retinaflow.inference.detector import Detector, as_trained
    from retinaflow.runs.models import TrainedModel

    model = TrainedModel.find(config.from_run)
    checkpoint = model.checkpoint
    config = as_trained(config, checkpoint)
    images = images_for_model(config, checkpoint.taxonomy, checkpoint.settings)

    model_id = model.model_id if config.track else None

    def detect(stop: StopRequest, skipped: SkippedImages) -> Detections:
        return Detector.load(checkpoint, config, sizes=images.index.sizes).detect(
            images.index,
            after_batch=lambda images: stop.check(),
            on_bad_image=skipped.add if config.on_bad_image == "skip" else None,
        )

    return EvaluatedDetections(
        model.name, config, images, checkpoint.bins, detect, checkpoint.settings, model_id, model.tags()
    )


def _of_predictions(config: EvaluateConfig) -> EvaluatedDetections:
    assert config.predictions is not None
    images = images_for_predictions(config)
    errors = RowErrors(config.on_bad_row)
    found = read_predictions(config.predictions, images.index, errors, ids=config.prediction_ids, explain=True)
    images = replace(images, dropped=pd.concat([images.dropped, errors.frame()], ignore_index=True))
    bins = ClassBins.unknown(images.index.num_classes)
    return EvaluatedDetections(str(config.predictions), config, images, bins, lambda stop, skipped: found)
