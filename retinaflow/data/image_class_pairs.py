"""Image-class pairs: which classes each image holds. Bins count them, and sampling weighs them.

A pair (image, class) occurs once, with its number of boxes. With ``expand`` a box counts for the ancestors of its class
too, as in a training with ``parents=learn``. Cost: a pass over the N boxes, a sort of the runs of boxes
of one image and class (in the published order not many more than pairs), and with ``expand`` one more of the pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from retinaflow.data.index import AnnotationIndex, row_starts, rows_of


@dataclass(frozen=True)
class ImageClassPairs:
    """P pairs sorted by image, then class: ``image [P]`` and ``class_index [P]`` int32, and in ``boxes [P]`` how many
    boxes of that class the image has."""

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

    @cached_property
    def has_class(self) -> NDArray[np.bool_]:
        """``[I]`` whether an image has any class."""
        return np.bincount(self.image, minlength=self.num_images) > 0

    def max_over_classes(self, value: NDArray[np.float64], empty: float) -> NDArray[np.float64]:
        """``[I]`` largest value among an image's classes; ``empty`` for an image without any."""
        result = np.full(self.num_images, empty, dtype=np.float64)
        if len(self.image):
            first = np.flatnonzero(np.diff(self.image, prepend=-1))
            result[self.image[first]] = np.maximum.reduceat(value[self.class_index], first)
        return result

    def sum_over_classes(self, value: NDArray[np.float64]) -> NDArray[np.float64]:
        """``[I]`` sum of the values of an image's classes."""
        return np.bincount(self.image, value[self.class_index], self.num_images).astype(np.float64)

    def sum_over_images(self, value: NDArray[np.float64]) -> NDArray[np.float64]:
        """``[K]`` sum of the values of a class's images."""
        return np.bincount(self.class_index, value[self.image], self.num_classes).astype(np.float64)


def image_class_pairs(index: AnnotationIndex, *, expand: bool = False) -> ImageClassPairs:
    """Count the boxes of every (image, class) pair of an index, group-of boxes as one."""
    width = index.num_classes
    keys, boxes = _merged(index.box_image.astype(np.int64) * width + index.labels)
    if expand:
        # Pairs, not boxes, are copied to the ancestors: N boxes x K classes would be gigabytes at full size.
        child, ancestor = np.nonzero(index.taxonomy.is_ancestor)
        rows, start = rows_of(keys % width, row_starts(child, width))
        copied = np.repeat(np.arange(len(keys)), np.diff(start))
        implied = keys[copied] // width * width + ancestor[rows]
        keys, boxes = _merged(np.concatenate([keys, implied]), np.concatenate([boxes, boxes[copied]]))
    image, class_index = (keys // width).astype(np.int32), (keys % width).astype(np.int32)
    return ImageClassPairs(image, class_index, boxes.astype(np.int64), len(index), width)


def _merged(
    keys: NDArray[np.int64], counts: NDArray[np.int64] | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Each key once, ascending, and the sum of its counts (None: one for each)."""
    if counts is None:
        # Boxes of one class are mostly adjacent, so merging them first leaves less to sort.
        first = np.flatnonzero(np.diff(keys, prepend=-1))
        counts = np.diff(first, append=len(keys))
        keys = keys[first]
    order = np.argsort(keys, kind="stable")
    keys, counts = keys[order], counts[order]
    first = np.flatnonzero(np.diff(keys, prepend=-1))
    return keys[first], np.add.reduceat(counts, first) if len(first) else counts
