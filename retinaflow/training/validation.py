"""Detections and scores of a detector on the validation images, made by all ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from retinaflow.data.batching import AspectBuckets
from retinaflow.data.images import BadImage
from retinaflow.data.training_data import TrainingData
from retinaflow.detections import Detections
from retinaflow.detector.network import RetinaNet
from retinaflow.errors import Interrupted
from retinaflow.inference.batches import detect, merged
from retinaflow.interrupts import StopRequest
from retinaflow.metric.result import EvaluationResult, score_detections
from retinaflow.settings.commands import TrainConfig
from retinaflow.training.distributed import World
from retinaflow.training.loop import Trainer


@dataclass(frozen=True)
class Validated:
    """The detections of a detector and their scores."""

    detections: Detections
    evaluation: EvaluationResult


def validate(
    model: RetinaNet,
    trainer: Trainer,
    data: TrainingData,
    config: TrainConfig,
    buckets: AspectBuckets,
    *,
    stop: StopRequest,
    world: World,
    on_bad_image: Callable[[BadImage], None] | None,
) -> Validated | None:
    """Each rank detects on its part of the images; rank 0 scores them all, and the others get None.

    Raises Interrupted on every rank when one was asked to stop.
    """
    index = data.evaluated
    ancestors = torch.from_numpy(index.taxonomy.is_ancestor).to(trainer.device)
    parts: list[Detections] = []
    try:
        for found in detect(
            model,
            index,
            buckets,
            config=config,
            expand_to=ancestors if config.parents == "expand" else None,
            workers=trainer.workers,
            device=trainer.device,
            precision=trainer.precision,
            rank=world.rank,
            world_size=world.size,
            after_batch=lambda images: stop.check(),
            on_bad_image=on_bad_image,
        ):
            parts.append(found)
    except Interrupted:
        pass
    # All stop together: a rank that stopped alone would leave the others waiting for it.
    if world.any(stop.reason is not None):
        raise Interrupted(stop.reason or "another rank was asked to stop")
    gathered = world.gather(parts)
    if gathered is None:
        return None
    detections = merged(gathered)
    bins = data.scored_bins or data.bins
    return Validated(detections, score_detections(detections, index, bins, group_of_weight=config.group_of_weight))
