"""Detections and scores of a detector on the validation images, made by all ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

from retinaflow.data.images import BadImage
from retinaflow.data.training_data import TrainingData
from retinaflow.detections import Detections
from retinaflow.errors import Interrupted
from retinaflow.inference.detector import Detector, by_image
from retinaflow.interrupts import StopRequest
from retinaflow.metric.chosen_metric import measured
from retinaflow.metric.result import EvaluationResult, score_detections
from retinaflow.settings.model_settings import EvaluationSettings
from retinaflow.training.distributed import World


@dataclass(frozen=True)
class Validated:
    """The detections of a detector and their scores."""

    detections: Detections
    evaluation: EvaluationResult


def known_metrics(data: TrainingData, settings: EvaluationSettings) -> dict[str, float]:
    """What can be measured on the validation images, as :func:`retinaflow.metric.chosen_metric.measured` names it."""
    bins = data.scored_bins or data.bins
    nothing = score_detections(Detections.empty(), data.evaluated, bins, group_of_weight=settings.group_of_weight)
    return measured(nothing)


def validate(
    detector: Detector,
    data: TrainingData,
    settings: EvaluationSettings,
    *,
    stop: StopRequest,
    world: World,
    on_bad_image: Callable[[BadImage], None] | None,
) -> Validated | None:
    """Each rank detects on its part of the images; rank 0 scores them all, and the others get None.

    Raises Interrupted on every rank when one was asked to stop.
    """
    index, own = data.evaluated, Detections.empty()
    with contextlib.suppress(Interrupted):
        own = detector.detect(
            index,
            rank=world.rank,
            world_size=world.size,
            after_batch=lambda images: stop.check(),
            on_bad_image=on_bad_image,
        )
    # All stop together: a rank that stopped alone would leave the others waiting for it.
    if world.any(stop.reason is not None):
        raise Interrupted(stop.reason or "another rank was asked to stop")
    gathered = world.gather(own)
    if gathered is None:
        return None
    detections = by_image(Detections.concatenate(gathered))
    bins = data.scored_bins or data.bins
    return Validated(detections, score_detections(detections, index, bins, group_of_weight=settings.group_of_weight))
