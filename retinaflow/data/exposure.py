"""The exposure of each class under a sampling strategy: samples per class, and the cost of balance.

Balance requires repetition, so a strategy is described by two figures: the ``imbalance`` of samples between classes,
and the remaining effective sample size. :func:`exposure_table` compares all strategies class by class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from retinaflow.data.frequency_bins import ClassBins
from retinaflow.data.image_class_pairs import ImageClassPairs
from retinaflow.data.sampling import (
    STRATEGIES,
    FloatArray,
    epoch_plan,
    expected_samples,
    image_weights,
)
from retinaflow.settings.data_settings import SamplingSettings, Strategy
from retinaflow.taxonomy import Taxonomy


@dataclass(frozen=True)
class Exposure:
    """An epoch of one strategy."""

    expected_per_class: FloatArray
    """``[K]`` expected samples of images that hold the class."""
    planned_per_class: NDArray[np.int64]
    """``[K]`` such samples in the plan of epoch 0."""
    imbalance: float
    """95th over 5th percentile of expected samples per class, among classes with images."""
    coverage: float
    """Fraction of the images that are in the plan of epoch 0."""
    effective_sample_size: float
    """(sum e)^2 / (I sum e^2): 1 when all images are sampled equally, 1 / I when only one image is sampled (Kish
    1965)."""


def measure_exposure(expected: FloatArray, pairs: ImageClassPairs, *, seed: int) -> Exposure:
    """The exposure of expected samples ``[I]`` and of their plan for epoch 0."""
    planned = np.bincount(epoch_plan(expected, seed=seed, epoch=0), minlength=pairs.num_images).astype(np.float64)
    return Exposure(
        pairs.sum_over_images(expected),
        pairs.sum_over_images(planned).astype(np.int64),
        imbalance(expected, pairs),
        float(np.count_nonzero(planned) / pairs.num_images),
        effective_sample_size(expected),
    )


def imbalance(expected: FloatArray, pairs: ImageClassPairs) -> float:
    """95th over 5th percentile of expected samples per class, among classes with images; infinite where the 5th is
    0."""
    per_class = pairs.sum_over_images(expected)
    low, high = np.percentile(per_class[pairs.images_per_class > 0], [5, 95])
    return float(high / low) if low > 0 else float("inf")


def effective_sample_size(expected: FloatArray) -> float:
    """(sum e)^2 / (I sum e^2) of expected samples ``[I]`` (Kish 1965)."""
    return float(expected.sum() ** 2 / (len(expected) * np.square(expected).sum()))


def compare_strategies(
    pairs: ImageClassPairs, bins: ClassBins, *, length: int, settings: SamplingSettings, seed: int
) -> dict[Strategy, Exposure]:
    """The exposure of all five strategies for one epoch of ``length`` samples."""
    result: dict[Strategy, Exposure] = {}
    for strategy in STRATEGIES:
        weights = image_weights(strategy, pairs, bins, settings)
        expected = expected_samples(weights, length, max_repeats=settings.max_repeats)
        result[strategy] = measure_exposure(expected, pairs, seed=seed)
    return result


def exposure_table(
    exposures: Mapping[Strategy, Exposure], pairs: ImageClassPairs, bins: ClassBins, taxonomy: Taxonomy
) -> pd.DataFrame:
    """One row per class, rarest first: class, class_id, bin, train_images, train_boxes, then for every strategy the
    columns ``{strategy}_expected`` and ``{strategy}_planned`` (samples per epoch) and ``{strategy}_repeats`` (samples
    per image)."""
    images = pairs.images_per_class
    number = pd.Series(bins.bin_of_class + 1, dtype="Int64")
    table = pd.DataFrame(
        {
            "class": taxonomy.labels,
            "class_id": taxonomy.ids,
            "bin": number.where(number > 0),
            "train_images": images,
            "train_boxes": pairs.boxes_per_class,
        }
    )
    for strategy, exposure in exposures.items():
        table[f"{strategy}_expected"] = exposure.expected_per_class
        table[f"{strategy}_planned"] = exposure.planned_per_class
        table[f"{strategy}_repeats"] = np.divide(
            exposure.expected_per_class, images, out=np.zeros(len(images)), where=images > 0
        )
    return table.sort_values(["train_images", "class_id"], ignore_index=True)


def exposure_summary(exposures: Mapping[Strategy, Exposure]) -> pd.DataFrame:
    """One row per strategy: imbalance, coverage, effective sample size (ess)."""
    return pd.DataFrame(
        [
            {
                "sampling": strategy,
                "imbalance": exposure.imbalance,
                "coverage": exposure.coverage,
                "ess": exposure.effective_sample_size,
            }
            for strategy, exposure in exposures.items()
        ]
    )
