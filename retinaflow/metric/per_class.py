"""Scores as a table per class, and the few aggregate numbers that are tracked over time.

Runs are compared by this table, so its form is fixed: columns :data:`COLUMNS`, rows rarest class first. The aggregates
are few on purpose: hundreds of per-class metrics would fill a tracking page, so they are in the table instead.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from retinaflow.metric.challenge import Scores, mean_of_classes
from retinaflow.taxonomy import Taxonomy

COLUMNS = ("class", "ap", "class_id", "bin", "train_images", "train_boxes", "num_truths")
"""Class and AP come first: the table view of a tracking page groups by the first column and shows the second."""

THIRDS = ("mAP_rare", "mAP_common", "mAP_frequent")


def per_class_table(
    scores: Scores,
    *,
    taxonomy: Taxonomy,
    bin_of_class: NDArray[np.integer],
    images_per_class: NDArray[np.integer],
    boxes_per_class: NDArray[np.integer],
) -> pd.DataFrame:
    """One row per class with the columns :data:`COLUMNS`, by training images ascending, then class id.

    ``bin_of_class [K]``: 0 is the rarest bin, -1 no bin; the column ``bin`` counts from 1 and is missing for no bin.
    ``images_per_class``, ``boxes_per_class`` ``[K]`` are counts in the training set. ``ap`` is NaN without
    ground truth; ``num_truths`` is float because group-of boxes count with their weight. Raises ValueError when an
    array does not have one value per class.
    """
    arrays = {"bin_of_class": bin_of_class, "images_per_class": images_per_class, "boxes_per_class": boxes_per_class}
    for name, array in {**arrays, "scores.ap": scores.ap}.items():
        if np.shape(array) != (len(taxonomy),):
            raise ValueError(f"{name} must have one value for each of {len(taxonomy)} classes, got {np.shape(array)}")
    bins = pd.Series(np.asarray(bin_of_class, dtype=np.int64) + 1, dtype="Int64")
    table = pd.DataFrame(
        {
            "class": list(taxonomy.labels),
            "ap": scores.ap,
            "class_id": list(taxonomy.ids),
            "bin": bins.mask(bins == 0),
            "train_images": np.asarray(images_per_class, dtype=np.int64),
            "train_boxes": np.asarray(boxes_per_class, dtype=np.int64),
            "num_truths": scores.num_truths,
        },
        columns=list(COLUMNS),
    )
    return table.sort_values(["train_images", "class_id"], kind="stable", ignore_index=True)


def class_groups(
    images_per_class: NDArray[np.integer], bin_of_class: NDArray[np.integer], *, class_ids: Sequence[str]
) -> dict[str, NDArray[np.bool_]]:
    """The groups of classes for which a mean is reported: name -> bool ``[K]``, rarest first.

    ``mAP_rare``, ``mAP_common``, ``mAP_frequent``: thirds of the classes with training images, by training images
    ascending and then class id. When their number is not divisible by three, the rarer thirds get one class more
    (7 classes: 3, 2, 2). ``mAP_bin_1`` (rarest) and on: the bins, of which ``bin_of_class`` 0 is the rarest, -1 none.
    """
    images, bins = np.asarray(images_per_class), np.asarray(bin_of_class)
    order = np.lexsort((np.asarray(class_ids, dtype=np.str_), images))
    trained = order[images[order] > 0]
    groups = {}
    for name, members in zip(THIRDS, np.array_split(trained, 3), strict=True):
        groups[name] = np.isin(np.arange(len(images)), members)
    for number in range(int(bins.max(initial=-1)) + 1):
        groups[f"mAP_bin_{number + 1}"] = bins == number
    return groups


def summary(table: pd.DataFrame, *, prefix: str = "val/") -> dict[str, float]:
    """The tracked aggregates of a :func:`per_class_table`, e.g. ``val/mAP``, ``val/mAP_rare``, ``val/mAP_bin_1``.

    Each is the mean AP over the classes of its group that have ground truth. The groups (:func:`class_groups`) depend
    on the training counts alone, so they are the same for every evaluated split. A group without ground truth is left
    out. ``val/mAP`` is over all classes of the table, those without training images included.
    """
    ap = table["ap"].to_numpy(dtype=np.float64)
    groups = class_groups(
        table["train_images"].to_numpy(dtype=np.int64),
        table["bin"].fillna(0).to_numpy(dtype=np.int64) - 1,
        class_ids=table["class_id"].tolist(),
    )
    means = {"mAP": mean_of_classes(ap)} | {name: mean_of_classes(ap, members) for name, members in groups.items()}
    return {f"{prefix}{name}": value for name, value in means.items() if not np.isnan(value)}
