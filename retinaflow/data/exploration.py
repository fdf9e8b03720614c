"""Statistics of a set of annotations, for the report of ``explore``. No image is opened.

Boxes are counted as given, a group-of box as one; ``tree_images`` counts a box for the ancestors of its class too, as
bins and sampling do with ``parents=learn``. Cost: a few passes over the columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from retinaflow.data.batching import AspectBuckets
from retinaflow.data.frequency_bins import ClassBins
from retinaflow.data.image_class_pairs import ImageClassPairs
from retinaflow.data.index import FLAGS, AnnotationIndex

FloatArray = NDArray[np.float64]


def class_table(index: AnnotationIndex, given: ImageClassPairs, bins: ClassBins) -> pd.DataFrame:
    """One row per class, rarest first.

    class, class_id, bin (1 the rarest), images, boxes, tree_images, boxes_per_image, group_of (fraction of the boxes),
    median_side (of its boxes: square root of the area as a fraction of the image's), verified_present and
    verified_absent (images), known (fraction of the images on which it is verified or boxed; 1 for an exhaustive set).
    """
    width = index.num_classes
    labels, count = np.asarray(index.labels), given.boxes_per_class
    present = np.asarray(index.verified_present)
    group_of = np.bincount(labels, weights=index.is_group_of, minlength=width)
    table = pd.DataFrame(
        {
            "class": index.taxonomy.labels,
            "class_id": index.taxonomy.ids,
            "bin": bins.number_of_class,
            "images": given.images_per_class,
            "boxes": count,
            "tree_images": bins.images_per_class,
            "boxes_per_image": _ratio(count, given.images_per_class),
            "group_of": _ratio(group_of, count),
            "median_side": pd.Series(box_sides(index)).groupby(labels).median().reindex(range(width)),
            "verified_present": np.bincount(np.asarray(index.verified_class)[present], minlength=width),
            "verified_absent": np.bincount(np.asarray(index.verified_class)[~present], minlength=width),
            "known": 1.0 if index.all_known else _known_images(index, given) / max(len(index), 1),
        }
    )
    return table.sort_values(["tree_images", "images", "class_id"], ignore_index=True)


def _known_images(index: AnnotationIndex, given: ImageClassPairs) -> NDArray[np.int64]:
    """``[K]`` images on which the class is labelled or boxed itself."""
    width = np.int64(index.num_classes)
    keys = np.concatenate(
        [
            index.label_image.astype(np.int64) * width + index.verified_class,
            given.image.astype(np.int64) * width + given.class_index,
        ]
    )
    return np.bincount(np.unique(keys) % width, minlength=int(width))


def _ratio(part: NDArray[np.number], whole: NDArray[np.number]) -> FloatArray:
    out = np.full(len(whole), np.nan)
    return np.asarray(np.divide(part, whole, out=out, where=whole > 0, dtype=np.float64))


def box_sides(index: AnnotationIndex) -> FloatArray:
    """``[N]`` square root of a box's area as a fraction of the image's."""
    extent = np.asarray(index.boxes[:, 2:] - index.boxes[:, :2])
    return np.sqrt(extent[:, 0] * extent[:, 1])


def box_aspects(index: AnnotationIndex) -> FloatArray:
    """``[N]`` height / width of each box in pixels of the stored image; NaN where its size is unknown."""
    extent = np.asarray(index.boxes[:, 2:] - index.boxes[:, :2])
    sizes = np.asarray(index.sizes, dtype=np.float64)[index.box_image]
    known = sizes[:, 1] > 0
    aspect = np.full(len(extent), np.nan)
    aspect[known] = extent[known, 1] * sizes[known, 0] / (extent[known, 0] * sizes[known, 1])
    return aspect


def flag_fractions(index: AnnotationIndex) -> dict[str, float]:
    """Fraction of the boxes with each published flag; the key is its name without ``Is``."""
    flags = np.asarray(index.flags)
    return {
        name.removeprefix("Is"): float(np.mean((flags >> bit) & 1)) if len(flags) else 0.0
        for bit, name in enumerate(FLAGS)
    }


@dataclass(frozen=True)
class Cooccurrence:
    """``fraction [R, C]``: of the images with class ``rows[r]``, the fraction that holds class ``columns[c]`` too."""

    rows: NDArray[np.int64]
    columns: NDArray[np.int64]
    fraction: FloatArray


def cooccurrence(
    pairs: ImageClassPairs, rows: NDArray[np.integer], columns: NDArray[np.integer] | None = None, *, most: int = 20
) -> Cooccurrence:
    """The classes that are on images of the classes ``rows``.

    Without ``columns``: the ``most`` other classes with the greatest mean fraction. Classes of ``rows`` without an
    image are left out. Cost: one pass over the pairs per row.
    """
    rows = np.array([row for row in rows if pairs.images_per_class[row] > 0], dtype=np.int64)
    fraction = np.zeros((len(rows), pairs.num_classes))
    for number, row in enumerate(rows):
        holds = np.zeros(pairs.num_images, dtype=bool)
        holds[pairs.image[pairs.class_index == row]] = True
        counts = np.bincount(pairs.class_index[holds[pairs.image]], minlength=pairs.num_classes)
        fraction[number] = counts / pairs.images_per_class[row]
    if columns is None:
        mean = fraction.mean(axis=0) if len(rows) else np.zeros(pairs.num_classes)
        mean[rows] = 0
        found = np.argsort(-mean, kind="stable")[:most]
        columns = found[mean[found] > 0]
    chosen = columns.astype(np.int64)
    return Cooccurrence(rows.astype(np.int64), chosen, fraction[:, chosen])


@dataclass(frozen=True)
class Shapes:
    """The aspect buckets of a set, and how they change its images."""

    buckets: AspectBuckets
    images: NDArray[np.int64]
    """``[B]`` images in each bucket."""
    squeeze: FloatArray
    """``[I]`` factor by which an image's height / width is changed, 1 or more."""


def fit_shapes(index: AnnotationIndex, *, image_size: int, num_buckets: int) -> Shapes:
    """The buckets that a training with these settings would use."""
    sizes = np.asarray(index.sizes)
    buckets = AspectBuckets.fit(sizes, image_size=image_size, num_buckets=num_buckets)
    bucket = buckets.assign(sizes)
    shapes = np.array(buckets.shapes, dtype=np.float64)
    change = np.log(shapes[bucket, 0] / shapes[bucket, 1]) - np.log(sizes[:, 0] / sizes[:, 1])
    return Shapes(buckets, np.bincount(bucket, minlength=len(shapes)), np.exp(np.abs(change)))


def tail_fractions(boxes_per_class: NDArray[np.integer]) -> FloatArray:
    """``[K + 1]`` fraction of all boxes that belong to the rarest 0, 1, ... K classes."""
    ordered = np.sort(np.asarray(boxes_per_class, dtype=np.float64))
    return np.concatenate([[0.0], np.cumsum(ordered) / max(ordered.sum(), 1.0)])
