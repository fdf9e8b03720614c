"""A detector over all images of an index, batch by batch, into columns of detections.

Images are visited bucket by bucket in their own order, never augmented; every image is seen exactly once and in the
shape of its own bucket, so its detections depend neither on its neighbours in the batch nor on the batch size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest

import numpy as np
import torch

from retinaflow.data.batching import AspectBuckets, PlannedBatch
from retinaflow.data.dataset import BatchLoader, DetectionDataset
from retinaflow.data.images import BadImage
from retinaflow.data.index import AnnotationIndex
from retinaflow.detections import Detections
from retinaflow.detector import postprocess
from retinaflow.detector.network import RetinaNet
from retinaflow.detector.precision import Precision, autocast
from retinaflow.settings.model_groups import PostprocessSettings


def detect(
    model: RetinaNet,
    index: AnnotationIndex,
    buckets: AspectBuckets,
    *,
    config: PostprocessSettings,
    expand_to: torch.Tensor | None = None,
    batch_size: int = 16,
    workers: int = 0,
    device: torch.device,
    precision: Precision = "float32",
    rank: int = 0,
    world_size: int = 1,
    after_batch: Callable[[int], None] = lambda images: None,
    on_bad_image: Callable[[BadImage], None] | None = None,
) -> Iterator[Detections]:
    """Detections of every batch, normalised to the original images.

    ``rank``, ``world_size``: of several processes each takes every ``world_size``-th batch; :func:`merged` puts theirs
    together. ``expand_to``: ``[K, K]`` bool, row c marks the ancestors that detections of c are copied to, or None.
    ``after_batch`` is told the number of images done, for a progress bar or to stop by raising. ``on_bad_image`` is
    told of images that cannot be read, which get no detections; without it such an image is a ValueError. The model is
    left in the mode it was in.
    """
    loader = BatchLoader(DetectionDataset(index), workers=workers, pin_memory=device.type == "cuda")
    was_training = model.training
    model.eval()
    try:
        own = list(_batches(index, buckets, batch_size))[rank::world_size]
        for batch in loader.load(own, on_bad_image=on_bad_image):
            grid = model.anchors((batch.images.shape[2], batch.images.shape[3]))
            with torch.inference_mode(), autocast(device, precision):
                output = model(batch.images.to(device, non_blocking=True))
                found = postprocess.detect(output, grid, config=config, ancestors=expand_to)
            after_batch(len(batch))
            yield Detections(
                batch.image_index[found.owner.cpu()].numpy().astype(np.int32),
                found.label.cpu().numpy().astype(np.int32),
                found.score.cpu().numpy(),
                found.boxes.cpu().numpy(),
            )
    finally:
        model.train(was_training)


def merged(parts: Sequence[Sequence[Detections]]) -> Detections:
    """The detections that one process would have found, from those of each batch of each process, by rank."""
    rounds = zip_longest(*parts)
    return Detections.concatenate([found for batches in rounds for found in batches if found is not None])


def _batches(index: AnnotationIndex, buckets: AspectBuckets, batch_size: int) -> Iterator[PlannedBatch]:
    """Unlike those of training, batches are not filled up with images of other buckets, which would change shape."""
    bucket = buckets.assign(np.asarray(index.sizes))
    for number, shape in enumerate(buckets.shapes):
        images = np.flatnonzero(bucket == number)
        for start in range(0, len(images), batch_size):
            part = images[start : start + batch_size]
            yield PlannedBatch(shape, part, part)
