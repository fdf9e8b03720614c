"""Whether a difference between two settings is more than chance: over images, over seeds, and for many classes at once.

Three steps, each from a published method:

1. **Images.** The interval of the paired bootstrap (:mod:`~retinaflow.statistics.bootstrap`) covers the choice of the
   validation images.
2. **Seeds.** With several trainings per setting, the difference of the means varies with the seeds too: its standard
   error is s sqrt(1 / n1 + 1 / n2), s the standard deviation over seeds pooled from both settings, with Student's
   n1 + n2 - 2 degrees of freedom. (Welch's form, a spread for each setting, has hardly more than one degree of freedom
   with two or three seeds, and intervals several times as wide.) Both parts are independent, so the distances of the
   interval's ends from the estimate are added in quadrature (the method of variance estimates recovery, Zou and Donner
   2008). With one run per setting nothing is added: the interval then holds for these trained weights, not for another
   training with the same settings.
3. **Many classes.** Of 500 classes 25 would fall outside their 95% intervals by chance alone. Each class gets a
   two-sided p-value, and the rule of Benjamini and Hochberg (1995) marks classes so that the expected fraction of false
   marks among the marked classes is at most 1 - confidence.

The p-value is the tail of Student's t beyond |difference| / standard error. The standard error over images is the
larger of half the interval and its part on the side of 0, over the normal quantile; degrees of freedom: images with
ground truth - 1, combined with those of the seeds (Satterthwaite 1946). The tail is used instead of a count of
resamples because 1,000 resamples cannot give the p-values below 0.0001 that 500 classes need. A class on n images never
gets a p-value below 2^(1-n), the smallest of an exact test that swaps the two settings image by image: with five images
or fewer no difference is significant at 95%, however large.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class SeedSpread:
    """Standard error ``[N]`` over seeds, and its degrees of freedom ``[N]``; 0 and inf with one seed."""

    error: FloatArray
    freedom: FloatArray


def seed_spread(*settings: FloatArray) -> SeedSpread:
    """Spread of a mean (one setting) or a difference of means (two) over the seeds: each ``[seeds, N]``."""
    freedom = sum(len(values) - 1 for values in settings)
    size = settings[0].shape[1]
    if freedom == 0:
        return SeedSpread(np.zeros(size), np.full(size, np.inf))
    squares = sum((((values - values.mean(axis=0)) ** 2).sum(axis=0) for values in settings), np.zeros(size))
    error = np.sqrt(squares / freedom * sum(1 / len(values) for values in settings))
    return SeedSpread(error, np.full(size, float(freedom)))


def widen(
    estimate: FloatArray, low: FloatArray, high: FloatArray, seeds: SeedSpread, *, confidence: float
) -> tuple[FloatArray, FloatArray]:
    """An interval over images widened by the spread over seeds (step 2). ``[N]`` each."""
    reach = stats.t.ppf(0.5 + confidence / 2, seeds.freedom) * seeds.error
    below, above = (np.maximum(side, 0) for side in (estimate - low, high - estimate))
    moved = reach > 0
    return (
        np.where(moved, estimate - np.hypot(below, reach), low),
        np.where(moved, estimate + np.hypot(above, reach), high),
    )


def p_values(
    estimate: FloatArray,
    low: FloatArray,
    high: FloatArray,
    seeds: SeedSpread,
    *,
    num_images: NDArray[np.integer],
    confidence: float,
) -> FloatArray:
    """Two-sided p-value of each difference (step 3); ``low``, ``high``: the interval over images. NaN stays NaN."""
    half = (high - low) / 2
    towards_zero = np.where(estimate > 0, estimate - low, high - estimate)
    images = np.maximum(half, towards_zero) / stats.norm.ppf(0.5 + confidence / 2)
    variance = images**2 + seeds.error**2
    free = np.maximum(np.asarray(num_images, dtype=np.float64) - 1, 1)
    weight = images**4 / free + _ratio(seeds.error**4, seeds.freedom, otherwise=0.0)
    freedom = _ratio(variance**2, weight, otherwise=np.inf)
    distance = _ratio(np.abs(estimate), np.sqrt(variance), otherwise=np.inf)
    tail = np.where(estimate == 0, 1.0, 2 * stats.t.sf(distance, freedom))
    return np.where(np.isnan(estimate), np.nan, np.clip(tail, np.minimum(np.exp2(1.0 - num_images), 1.0), 1.0))


def benjamini_hochberg(p: FloatArray) -> FloatArray:
    """Adjusted p-values: marking those up to q keeps the expected fraction of false marks at q or below.

    NaN stays NaN and is not counted. Example: p = 0.01, 0.02, 0.9 of three classes give 0.03, 0.03, 0.9 (p times
    3 / rank, made non-decreasing).
    """
    result = np.full(len(p), np.nan)
    known = ~np.isnan(p)
    result[known] = stats.false_discovery_control(p[known], method="bh")
    return result


def _ratio(above: FloatArray, below: FloatArray, *, otherwise: float) -> FloatArray:
    """``above / below``, and ``otherwise`` where ``below`` is 0."""
    result = np.full(np.broadcast_shapes(np.shape(above), np.shape(below)), otherwise)
    np.divide(above, below, out=result, where=np.asarray(below) > 0)
    return result
