"""Which classes each image holds: what bins count and sampling weighs.

A pair (image, class) stands once however many boxes it has. With ``expand`` a box counts for its class's ancestors too, which
is what a detector trained with ``parents=learn`` sees. Cost: one sort of N int64 keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from retinaflow.data.index import AnnotationIndex


@dataclass(frozen=True)
class Presence:
    """P pairs sorted by image, then class: ``image [P]``, ``class_index [P]`` int32, ``boxes [P]`` boxes of that class there."""

    image: NDArray[np.int32]
    class_index: NDArray[np.int32]
    boxes: NDArray[np.int64]
    num_images: int
    num_classes: int

    @cached_property
    def images_per_class(self) -> NDArray[np.int64]:
        """``[K]`` images with at least one box of the class (n_c)."""
        return np.bincount(self.class_index, minlength=self.num_classes)

    @cached_property
    def boxes_per_class(self) -> NDArray[np.int64]:
        """``[K]`` boxes of the class."""
        return np.bincount(self.class_index, weights=self.boxes, minlength=self.num_classes).astype(np.int64)

    def max_over_classes(self, value: NDArray[np.float64], empty: float) -> NDArray[np.float64]:
        """``[I]`` largest value among an image's classes; ``empty`` for an image without any."""
        result = np.full(self.num_images, -np.inf)
        np.maximum.at(result, self.image, value[self.class_index])
        result[np.isneginf(result)] = empty
        return result

    def sum_over_classes(self, value: NDArray[np.float64]) -> NDArray[np.float64]:
        """``[I]`` sum of the values of an image's classes."""
        return np.bincount(self.image, weights=value[self.class_index], minlength=self.num_images)

    def sum_over_images(self, value: NDArray[np.float64]) -> NDArray[np.float64]:
        """``[K]`` sum of the values of a class's images."""
        return np.bincount(self.class_index, weights=value[self.image], minlength=self.num_classes)


def class_presence(index: AnnotationIndex, *, expand: bool = False) -> Presence:
    """Count the boxes of every (image, class) pair of an index, group-of boxes as one."""
    image = index.box_image.astype(np.int64)
    labels = np.asarray(index.labels, dtype=np.int64)
    if expand:
        row, ancestor = np.nonzero(index.taxonomy.is_ancestor[labels])
        image, labels = np.concatenate([image, image[row]]), np.concatenate([labels, ancestor])
    keys, counts = np.unique(image * index.num_classes + labels, return_counts=True)
    return Presence(
        (keys // index.num_classes).astype(np.int32),
        (keys % index.num_classes).astype(np.int32),
        counts.astype(np.int64),
        len(index),
        index.num_classes,
    )
