"""Aspect buckets and batches of one shape.

A bucket is a fixed (height, width), multiples of 32, of about ``image_size`` squared pixels; buckets are spaced evenly
in log(height / width) over the range of the training images. Every image is resized to exactly its bucket's shape, so
there is no padding and shapes repeat. A batch comes from one bucket; images left over at the end of an epoch are
batched by similarity of shape. Every image of the plan is in exactly one batch. All ranks get the
same number of batches, none of them empty, whose union is the plan.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from retinaflow.errors import SettingError

MULTIPLE = 32
"""Heights and widths are multiples of the stride of C5, so that feature maps of neighbouring levels line up."""


@dataclass(frozen=True)
class AspectBuckets:
    """``shapes``: (height, width) of each bucket, from wide to tall, no two alike."""

    shapes: tuple[tuple[int, int], ...]

    @staticmethod
    def fit(sizes: NDArray[np.integer], *, image_size: int, num_buckets: int) -> AspectBuckets:
        """Buckets for images of ``sizes [I, 2]`` (height, width). One bucket takes the median shape.

        The range runs from the 1st to the 99th percentile of log(height / width), so one odd image moves nothing.
        """
        aspect = np.log(sizes[:, 0] / sizes[:, 1])
        if num_buckets == 1:
            centres = np.array([np.median(aspect)])
        else:
            low, high = np.percentile(aspect, [1, 99])
            centres = np.linspace(low, high, num_buckets)
        return AspectBuckets(tuple(dict.fromkeys(_shape(float(centre), image_size) for centre in centres)))

    def assign(self, sizes: NDArray[np.integer]) -> NDArray[np.int64]:
        """``[I]`` bucket of each image: the nearest in log(height / width)."""
        own = np.log(sizes[:, 0] / sizes[:, 1])
        buckets = np.log([height / width for height, width in self.shapes])
        return np.asarray(np.abs(own[:, None] - buckets[None, :]).argmin(axis=1))


def _shape(log_aspect: float, image_size: int) -> tuple[int, int]:
    """Of the four shapes around the exact one, that with the least error in area and aspect (both in logarithms)."""
    exact = image_size * np.exp(log_aspect / 2), image_size * np.exp(-log_aspect / 2)
    floors = [max(int(side // MULTIPLE), 1) for side in exact]
    options = [(h * MULTIPLE, w * MULTIPLE) for h in (floors[0], floors[0] + 1) for w in (floors[1], floors[1] + 1)]

    def error(shape: tuple[int, int]) -> float:
        height, width = shape
        total = abs(np.log(height * width / image_size**2)) + abs(np.log(height / width) - log_aspect)
        # Rounded, so that the order decides between equally good shapes and a tall bucket mirrors a wide one.
        return round(float(total), 9)

    return min(options, key=error)


class PlannedBatch(NamedTuple):
    """Images of one batch, all resized to ``shape``; ``positions`` are their positions in the epoch plan."""

    shape: tuple[int, int]
    images: NDArray[np.int64]
    positions: NDArray[np.int64]


def plan_batches(
    plan: NDArray[np.int64],
    bucket_of_image: NDArray[np.int64],
    buckets: AspectBuckets,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
) -> list[PlannedBatch]:
    """The batches of one rank, in the order of the plan: a batch comes at the position of its last image.

    ``batch_size`` is per rank. Images left over in the buckets are ordered by shape and cut into batches that take the
    bucket of their middle image. No batch is of one image unless ``batch_size`` or the plan is: batch norm has little
    to normalise in it, and nothing in a map of one cell. So one of these may hold an image more than ``batch_size``.
    Raises SettingError when a plan has fewer images than there are ranks.
    """
    if 0 < len(plan) < world_size:
        raise SettingError(f"an epoch must have an image per rank, but got images={len(plan)}, nproc={world_size}")
    full = batch_size * world_size
    bucket = bucket_of_image[plan]
    ready: list[tuple[int, int, NDArray[np.int64]]] = []
    left = []
    for number in range(len(buckets.shapes)):
        positions = np.flatnonzero(bucket == number)
        whole = len(positions) // full * full
        ready += [(int(part[-1]), number, part) for part in positions[:whole].reshape(-1, full)]
        left.append(positions[whole:])
    ready.sort(key=lambda item: item[0])
    rest = np.concatenate(left)
    least = max(world_size, min(full, 2))
    if 0 < len(rest) < least and ready:
        rest = np.concatenate([ready.pop()[2], rest])
        rest = rest[np.argsort(bucket[rest], kind="stable")]
    # Parts of nearly equal size with an image for every rank.
    parts = min(-(-len(rest) // full), max(len(rest) // least, 1))
    for part in np.array_split(rest, parts) if len(rest) else ():
        ready.append((len(plan), int(bucket[part[len(part) // 2]]), part))
    own = [(number, part[rank::world_size]) for _, number, part in ready]
    return [PlannedBatch(buckets.shapes[number], plan[positions], positions) for number, positions in own]
