"""Which boxes match an anchor, by class, and which ``anchor_scale`` would match more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from retinaflow.data.batching import AspectBuckets
from retinaflow.data.index import AnnotationIndex
from retinaflow.detector.anchors import LEVEL_STRIDES, best_overlaps
from retinaflow.detector.targets import FOREGROUND

SCALES = (1.5, 2.0, 3.0, 4.0)
"""Scales that are tried; below 1.5 the rounding of anchors to pixels opens gaps between them."""
FEW = 0.5
"""A class is named when a smaller fraction of its boxes matches an anchor."""
_NAMED = 5
_SAMPLE = 1000


@dataclass(frozen=True)
class BoxSample:
    """At most 1,000 boxes of each class that are no group-of boxes, sampled at random.

    ``names [K]`` of the classes, ``boxes [N, 4]`` xyxy in [0, 1], ``labels [N]`` class, ``sizes [N, 2]`` (height,
    width) of the stored image.
    """

    names: Sequence[str]
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    sizes: NDArray[np.int64]

    @staticmethod
    def draw(index: AnnotationIndex, *, seed: int = 0) -> BoxSample:
        """From an index whose image sizes are known."""
        single = np.flatnonzero(~np.asarray(index.is_group_of))
        rows = np.random.default_rng(seed).permutation(single)
        labels = np.asarray(index.labels)[rows]
        rows = np.sort(rows[pd.Series(labels).groupby(labels).cumcount().to_numpy() < _SAMPLE])
        return BoxSample(
            index.taxonomy.labels,
            np.asarray(index.boxes)[rows].astype(np.float32),
            np.asarray(index.labels)[rows].astype(np.int64),
            np.asarray(index.sizes)[np.asarray(index.box_image)[rows]].astype(np.int64),
        )

    def reached(self, buckets: AspectBuckets, anchor_scale: float) -> NDArray[np.bool_]:
        """``[N]`` bool: whether a box has an anchor whose IoU with it makes that anchor a positive."""
        found = np.zeros(len(self.boxes), dtype=bool)
        bucket = buckets.assign(self.sizes)
        for number, (height, width) in enumerate(buckets.shapes):
            here = bucket == number
            pixels = self.boxes[here] * np.array([width, height] * 2, dtype=np.float32)
            found[here] = best_overlaps(pixels, (height, width), anchor_scale=anchor_scale) >= FOREGROUND
        return found

    def by_class(self, values: NDArray[np.generic]) -> NDArray[np.float64]:
        """``[K]`` mean of ``values [N]`` over the boxes of each class; NaN without a box."""
        means = pd.Series(values).groupby(self.labels).mean().reindex(range(len(self.names)))
        return means.to_numpy(dtype=np.float64)


def class_reach(sample: BoxSample, buckets: AspectBuckets, anchor_scale: float) -> pd.DataFrame:
    """One row per class with boxes, the worst first: label, median_side (pixels after resizing), reached (fraction
    of its boxes that match an anchor)."""
    extent = sample.boxes[:, 2:] - sample.boxes[:, :2]
    area = np.prod(np.array(buckets.shapes, dtype=np.float64), axis=1)[buckets.assign(sample.sizes)]
    sides = pd.Series(np.sqrt(extent[:, 0] * extent[:, 1] * area)).groupby(sample.labels).median()
    table = pd.DataFrame(
        {
            "label": sample.names,
            "median_side": sides.reindex(range(len(sample.names))),
            "reached": sample.by_class(sample.reached(buckets, anchor_scale)),
        }
    )
    return table.dropna().sort_values(["reached", "label"], ignore_index=True)


def reach_of_settings(
    sample: BoxSample, sizes: NDArray[np.integer], *, image_size: int, num_buckets: int
) -> pd.DataFrame:
    """Mean over classes of the fraction of boxes that match an anchor: a row for ``image_size``, 1.5 times and twice
    it, a column for each of ``SCALES``. ``sizes``: ``[I, 2]`` of all images."""
    rows = {}
    for factor in (1, 1.5, 2):
        side = round(image_size * factor)
        buckets = AspectBuckets.fit(sizes, image_size=side, num_buckets=num_buckets)
        rows[side] = {f"anchor_scale={scale:g}": mean_reach(sample, buckets, scale) for scale in SCALES}
    return pd.DataFrame.from_dict(rows, orient="index")


def advice(
    table: pd.DataFrame,
    sample: BoxSample,
    buckets: AspectBuckets,
    anchor_scale: float,
    *,
    scales: Sequence[float] = SCALES,
) -> str | None:
    """A line for the user when most boxes of a class match no anchor, else None.

    ``table``: :func:`class_reach` of the others. ``scales``: what may be recommended; none for a published detector,
    which has its own.
    """
    missed = table[table["reached"] < FEW]
    if missed.empty:
        return None
    shown = [
        f"{row.label} ({row.reached:.0%}, median side {row.median_side:.0f} pixels)"
        for row in missed[:_NAMED].itertuples()
    ]
    more = f" and {len(missed) - _NAMED} more" if len(missed) > _NAMED else ""
    means = {scale: mean_reach(sample, buckets, scale) for scale in scales}
    means[anchor_scale] = float(table["reached"].mean())
    best = max(means, key=lambda scale: (means[scale], scale))
    other = f" or anchor_scale={best:g} (a mean over classes of {means[best]:.0%} instead of {means[anchor_scale]:.0%})"
    return (
        f"anchors, the smallest of {anchor_scale * LEVEL_STRIDES[0]:g} pixels, match few boxes of {len(missed)} of "
        f"{len(table)} classes, which will hardly be learned: {', '.join(shown)}{more}; use a larger image_size"
        f"{other if best != anchor_scale else ''}"
    )


def mean_reach(sample: BoxSample, buckets: AspectBuckets, anchor_scale: float) -> float:
    """Fraction of the boxes of a class that match an anchor, mean over the classes with boxes."""
    return float(np.nanmean(sample.by_class(sample.reached(buckets, anchor_scale))))
