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

from retinaflow.data.copy_paste import CopyPaste
from retinaflow.data.frequency_bins import ClassBins
from retinaflow.data.image_class_pairs import ImageClassPairs
from retinaflow.data.sampling import (
    STRATEGIES,
    FloatArray,
    epoch_plan,
    expected_samples,
    image_weights,
    seed_of_position,
)
from retinaflow.errors import SettingError
from retinaflow.progress import report
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
    """The exposure of all five strategies for one epoch of ``length`` samples.

    One that cannot fill the epoch (few images have a box) is left out, with a line. Raises SettingError for the chosen
    one.
    """
    result: dict[Strategy, Exposure] = {}
    for strategy in STRATEGIES:
        weights = image_weights(strategy, pairs, bins, settings)
        try:
            expected = expected_samples(weights, length, max_repeats=settings.max_repeats)
        except SettingError as error:
            if strategy == settings.sampling:
                raise
            report(f"exposure without {strategy}, which this data does not allow: {error}")
            continue
        result[strategy] = measure_exposure(expected, pairs, seed=seed)
    return result


COUNTED = 2_000
"""Samples of a plan whose pastes are counted."""


@dataclass(frozen=True)
class PasteExposure:
    """Boxes that pasted crops add and cover in an epoch; a box counts for the ancestors of its class as in
    ``train_boxes``."""

    pasted_expected: FloatArray
    """``[K]`` expected boxes of pasted crops, those that come along with a crop included."""
    pasted_planned: FloatArray
    """``[K]`` such boxes in the plan of an epoch."""
    covered_planned: FloatArray
    """``[K]`` boxes that these crops cover, so that they are dropped."""


def measure_pastes(
    copy_paste: CopyPaste,
    plan: NDArray[np.int64],
    shapes: NDArray[np.int64],
    *,
    seed: int,
    epoch: int,
    expand: bool,
) -> PasteExposure:
    """What is pasted in the plan ``[L]`` of an epoch (from 0), in images of ``shapes [I, 2]`` (height, width).

    The first ``COUNTED`` samples of a longer plan are counted and scaled up: a plan is in random order.
    """
    index, counted = copy_paste.index, plan[:COUNTED]
    pasted, covered = np.zeros(index.num_classes), np.zeros(index.num_classes)
    for position, image in enumerate(counted):
        height, width = shapes[image]
        own = seed_of_position((seed, epoch), position)
        paste = copy_paste.choose(int(image), (int(height), int(width)), seed=own)
        if paste is not None:
            np.add.at(pasted, index.labels[paste.rows], 1)
            own_rows = slice(index.box_start[image], index.box_start[image + 1])
            np.add.at(covered, index.labels[own_rows][paste.covered], 1)
    lineage = np.eye(index.num_classes) + (index.taxonomy.is_ancestor if expand else 0)
    scale = len(plan) / max(len(counted), 1)
    expected = copy_paste.expected_boxes(len(plan))
    return PasteExposure(expected @ lineage, scale * pasted @ lineage, scale * covered @ lineage)


def exposure_table(
    exposures: Mapping[Strategy, Exposure],
    pairs: ImageClassPairs,
    bins: ClassBins,
    taxonomy: Taxonomy,
    *,
    pastes: PasteExposure | None = None,
) -> pd.DataFrame:
    """One row per class, rarest first: class, class_id, bin, train_images, train_boxes, then for every strategy the
    columns ``{strategy}_expected`` and ``{strategy}_planned`` (samples per epoch) and ``{strategy}_repeats`` (samples
    per image). With ``pastes`` also pasted_expected, pasted_planned and covered_planned (boxes per epoch)."""
    images = pairs.images_per_class
    table = pd.DataFrame(
        {
            "class": taxonomy.labels,
            "class_id": taxonomy.ids,
            "bin": bins.number_of_class,
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
    for name, boxes in ({} if pastes is None else vars(pastes)).items():
        table[name] = boxes
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
