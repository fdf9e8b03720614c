"""How often each image is sampled in an epoch: five strategies and the plan of an epoch.

With n_c images of class c among I images, f_c = n_c / I, and L samples per epoch:

- ``uniform``: every image has the same weight.
- ``repeat-factor`` (Gupta et al. 2019, LVIS, section 4.2): r_c = max(1, sqrt(t / f_c)); an image weighs the largest r_c
  of its classes; t = 0.001.
- ``instance-repeat-factor`` (Yaman et al. 2023): f_c is replaced by sqrt(fraction of images x fraction of boxes).
- ``class-aware`` (Shen et al. 2016): each class gets the same number of samples, spread evenly over its images;
  with a ``class_power`` q above 0 it gets samples in proportion to n_c^q (q = 0.5: Mahajan et al. 2018).
- ``binned``, introduced by this project: all classes of a frequency bin share the rate r_b = max(1, T / n_b), n_b the
  median n_c of the bin and T the exposure target, the ``balance`` quantile of n_c. An image weighs r + the sum over its
  classes of r_c - r, where r is the lowest rate: what each of its classes is raised by adds up. With
  ``bin_rates="smooth"`` r_b is the rate at n_b, and a class between two medians takes an interpolated rate (linear in
  log n and log r), so that there are no steps at the edges of bins. Seven bins then balance about as well as a rate for
  every class.

Weights become expected samples by scaling to L with no image above ``max_repeats`` (water-filling). One bin is exactly
uniform.

Worked example for ``binned``: bins with medians 10, 100 and 1000 images, T = 1000: rates 100, 10 and 1. An image with a
class of the first and one of the last bin weighs 1 + 99 + 0 = 100, one with a class of each bin 1 + 99 + 9 + 0 = 109.
With weights (100, 10, 1, 1), L = 4, max_repeats = 2: the first image is capped at 2, and the remaining 2 samples are
divided 10 : 1 : 1 into 1.67, 0.17, 0.17.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from retinaflow.data.frequency_bins import ClassBins
from retinaflow.data.image_class_pairs import ImageClassPairs
from retinaflow.errors import SettingError
from retinaflow.settings.data_settings import SamplingSettings, Strategy

STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)
FloatArray = NDArray[np.float64]


def image_weights(
    strategy: Strategy, pairs: ImageClassPairs, bins: ClassBins, settings: SamplingSettings
) -> FloatArray:
    """``[I]`` relative weights, > 0 except that an image without any class has weight 0 under ``class-aware``."""
    return _WEIGHTS[strategy](pairs, bins, settings)


def _uniform(pairs: ImageClassPairs, bins: ClassBins, settings: SamplingSettings) -> FloatArray:
    del bins, settings
    return np.ones(pairs.num_images)


def _repeat_factor(pairs: ImageClassPairs, bins: ClassBins, settings: SamplingSettings) -> FloatArray:
    del bins
    fraction = pairs.images_per_class / max(pairs.num_images, 1)
    return pairs.max_over_classes(_repeats(fraction, settings.repeat_threshold), empty=1.0)


def _instance_repeat_factor(pairs: ImageClassPairs, bins: ClassBins, settings: SamplingSettings) -> FloatArray:
    del bins
    image_fraction = pairs.images_per_class / max(pairs.num_images, 1)
    box_fraction = pairs.boxes_per_class / max(int(pairs.boxes_per_class.sum()), 1)
    return pairs.max_over_classes(
        _repeats(np.sqrt(image_fraction * box_fraction), settings.repeat_threshold), empty=1.0
    )


def _repeats(fraction: FloatArray, threshold: float) -> FloatArray:
    factor = np.sqrt(np.divide(threshold, fraction, out=np.ones_like(fraction), where=fraction > 0))
    return np.maximum(1.0, factor)


def _class_aware(pairs: ImageClassPairs, bins: ClassBins, settings: SamplingSettings) -> FloatArray:
    del bins
    count = pairs.images_per_class.astype(np.float64)
    power = settings.class_power - 1.0
    return pairs.sum_over_classes(np.power(count, power, out=np.zeros(len(count)), where=count > 0))


def _binned(pairs: ImageClassPairs, bins: ClassBins, settings: SamplingSettings) -> FloatArray:
    target = bins.exposure_target(settings.balance)
    rates = np.maximum(1.0, target / bins.medians())
    weights = _bin_weights(rates, pairs, bins, settings)
    for _ in range(settings.correction_steps):
        sampled = pairs.sum_over_images(weights)
        excess = np.array([np.median(sampled[bins.bin_of_class == b]) for b in range(bins.num_bins)])
        rates = np.maximum(1.0, rates * np.sqrt(np.maximum(target, bins.medians()) / excess))
        weights = _bin_weights(rates, pairs, bins, settings)
    return weights


def _bin_weights(rates: FloatArray, pairs: ImageClassPairs, bins: ClassBins, settings: SamplingSettings) -> FloatArray:
    if settings.bin_rates == "smooth":
        images = np.log(np.maximum(pairs.images_per_class, 1))
        of_class = np.exp(np.interp(images, np.log(bins.medians()), np.log(rates)))
    else:
        # A class without a bin (-1) has no image here, so the rate it would pick is never used.
        of_class = rates[np.maximum(bins.bin_of_class, 0)]
    lowest = float(of_class.min())
    # Not the sum of the rates themselves: with one bin, an image with two classes would weigh twice as much.
    weights = lowest + pairs.sum_over_classes(of_class - lowest)
    return np.where(pairs.has_class, weights, lowest * settings.empty_image_rate)


_WEIGHTS: dict[Strategy, Callable[[ImageClassPairs, ClassBins, SamplingSettings], FloatArray]] = {
    "uniform": _uniform,
    "repeat-factor": _repeat_factor,
    "instance-repeat-factor": _instance_repeat_factor,
    "class-aware": _class_aware,
    "binned": _binned,
}


def expected_samples(weights: FloatArray, length: int, *, max_repeats: float = 100.0) -> FloatArray:
    """``[I]`` expected samples of each image: proportional to its weight, at most ``max_repeats``, with sum ``length``.

    Water-filling: the excess over the cap is divided among the other images until there is none. Raises SettingError
    when the images with weight are too few for the length even if each is sampled ``max_repeats`` times.
    """
    open_images = weights > 0
    if length > max_repeats * np.count_nonzero(open_images) * (1 + 1e-12):
        raise SettingError(
            f"epoch_length <= max_repeats x images must hold, but got epoch_length={length}, "
            f"max_repeats={max_repeats:g}, images={np.count_nonzero(open_images)}"
        )
    expected = np.zeros(len(weights))
    # Relative to the largest, so that equal weights give exactly equal samples.
    weights = weights / weights.max() if open_images.any() else weights
    left = float(length)
    while left > 0:
        scaled = weights * (left / weights[open_images].sum())
        over = open_images & (scaled > max_repeats)
        if not over.any():
            expected[open_images] = scaled[open_images]
            break
        expected[over] = max_repeats
        open_images &= ~over
        left = float(length) - max_repeats * np.count_nonzero(expected >= max_repeats)
        if not open_images.any():
            break
    return expected


def epoch_plan(expected: FloatArray, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """``[L]`` image indices in the order of training, L = round(sum of expected): a pure function of its arguments.

    Low-variance (systematic) sampling: image i occurs floor(e_i) or ceil(e_i) times, with mean e_i, and the length is
    exact (Cochran 1977, chapter 8). The order in which the remainders are accumulated is shuffled, so neighbours are
    independent.
    """
    rng = np.random.default_rng([seed, epoch])
    length = round(float(expected.sum()))
    order = rng.permutation(len(expected))
    # Between 0 and the length, with the last one fixed: rounding in the sum must not lose or add a sample.
    marks = np.minimum(np.floor(np.cumsum(expected[order]) + rng.random()), length)
    marks[-1:] = length
    counts = np.diff(marks, prepend=0.0).astype(np.int64)
    return np.asarray(rng.permutation(np.repeat(order, counts)))


def first_balanced_epoch(epochs: int, *, balance_start: float) -> int:
    """The first epoch (from 0) with the sampling strategy and the stronger augmentation of rare classes.

    The round(balance_start x epochs) epochs before it sample uniformly: deferred re-balancing (Cao et al. 2019) in the
    hybrid form of Peng et al. 2020.
    """
    return round(balance_start * epochs)


def seed_of_position(seed: Sequence[int], position: int) -> int:
    """The seed of what is random about one sample. ``seed``: (seed, epoch); ``position``: in the plan of the epoch.

    It depends on the position and not on worker or rank, and a repeated image is augmented differently.
    """
    return int(np.random.SeedSequence([*seed, position]).generate_state(1)[0])
