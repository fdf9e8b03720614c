"""From resampled scores, or a few seeds, to an interval that covers the true value as often as its confidence.

Percentiles of resamples cover badly where AP rests on few ground-truth boxes (``benchmarks/interval_coverage.py``
measures how badly, docs/decisions.md has the table), for two reasons:

1. **Nothing varies.** A class of five ground-truth boxes that are all found has AP 1 in every resample, though the next
   five images may miss one. :func:`score_interval` takes only the standard error from the resamples. It computes the
   number n of independent ground-truth boxes that would have the same error, ``n = AP (1 - AP) / se^2``, at most the
   number of ground-truth boxes, and returns Wilson's interval for a proportion of n. For large n that is the usual
   -+ 1.96 se; for 5 of 5 found it is 0.57 to 1.
2. **AP of few images is too high**, since the curve is made non-increasing by raising it to its highest later point.
   Half-samples show how AP grows from n images to n/2. The excess of a hull falls as n^(-2/3), so the sample itself has
   ``1 / (2^(2/3) - 1) = 1.70`` times that growth (:data:`EXCESS`). The centre of the interval is lowered by that much,
   and the interval is extended to the estimate where it would not reach it. In a mean over many classes this matters
   most: its standard error shrinks with the number of classes, its excess does not.

A difference of two runs (:func:`difference_interval`) needs no 2, since both are too high by the same amount. Against
1, half an image on which the runs differ is added to each class, as Agresti and Min add half an observation to each
cell.

:func:`paired_t_interval` is for two ways of training with the same seeds: the training varies, not the images.

Sources: Wilson (JASA 1927); Korn and Graubard, Confidence intervals for proportions with small expected number of
positive counts (Survey Methodology 1998), effective sample size; Groeneboom, Estimating a monotone density (1985), the
rate of hulls; Agresti and Min, Simple improved confidence intervals for comparing matched proportions (2005); Student,
The Probable Error of a Mean (1908); Bouthillier et al., Accounting for Variance in Machine Learning Benchmarks (2021).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

FloatArray = NDArray[np.float64]

EXCESS = 1 / (2 ** (2 / 3) - 1)
"""Excess of AP on n images, in units of its growth from n to n/2 images."""

DISAGREEMENT = 0.5
"""Images on which two runs differ that are added to each class."""


@dataclass(frozen=True)
class Interval:
    """A value and its interval; NaN where it is not defined, such as AP without ground truth."""

    estimate: float
    low: float
    high: float


def score_interval(
    estimate: FloatArray, *, error: FloatArray, excess: FloatArray, num_truths: FloatArray, confidence: float
) -> tuple[FloatArray, FloatArray]:
    """Both ends ``[N]`` for scores in [0, 1]: Wilson's interval, centred at ``estimate - excess``, estimate included.

    ``error``: standard errors; ``num_truths``: largest number of independent observations of a score. NaN where the
    estimate is NaN. Example: estimate 0.5, error 0.1, many ground-truth boxes: n = 0.25 / 0.01 = 25 and 0.32 to 0.68.
    """
    z = normal_quantile(confidence)
    spread = estimate * (1 - estimate)
    informed = (error > 0) & (spread > 0)
    size = np.divide(spread, error**2, out=np.full_like(estimate, np.inf), where=informed)
    size = np.minimum(size, np.maximum(num_truths, 1e-9))
    centre = np.clip(estimate - excess, 0, 1)
    middle = (centre + z**2 / (2 * size)) / (1 + z**2 / size)
    half = z / (1 + z**2 / size) * np.sqrt(centre * (1 - centre) / size + z**2 / (4 * size**2))
    return np.minimum(np.maximum(middle - half, 0), estimate), np.maximum(np.minimum(middle + half, 1), estimate)


def difference_interval(estimate: FloatArray, *, error: FloatArray, confidence: float) -> tuple[FloatArray, FloatArray]:
    """Both ends ``[N]`` for differences of scores, in [-1, 1]: estimate -+ z x error."""
    half = normal_quantile(confidence) * error
    return np.maximum(estimate - half, -1), np.minimum(estimate + half, 1)


def disagreement_variance(num_images: NDArray[np.integer]) -> FloatArray:
    """``[K]`` variance that half an image of disagreement adds; ``num_images [K]``: those with ground truth."""
    added: FloatArray = DISAGREEMENT / (num_images.astype(np.float64) + 2)
    return added**2


def normal_quantile(confidence: float) -> float:
    """Number of standard errors, to each side, that hold the fraction ``confidence`` of a normal distribution."""
    return NormalDist().inv_cdf((1 + confidence) / 2)


def paired_t_interval(differences: NDArray[np.float64], *, confidence: float = 0.95) -> Interval:
    """Mean of the differences ``[n]``, seed by seed, and Student's interval of it; NaN ends for fewer than two.

    The differences are assumed to be normal. Worked: 0.05, 0.03, 0.04 have mean 0.04 and standard deviation 0.01; with
    two degrees of freedom t = 4.303, so the 95% interval is 0.04 +- 4.303 * 0.01 / sqrt(3) = 0.015 to 0.065.
    Raises ValueError for a confidence that is not between 0 and 1.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"`0 < confidence < 1` must hold, but got {confidence}")
    number = len(differences)
    mean = float(np.mean(differences)) if number else math.nan
    if number < 2:
        return Interval(mean, math.nan, math.nan)
    # scipy.stats would take half a second to load in every command that evaluates.
    quantile = float(stdtrit(number - 1, 0.5 + confidence / 2))
    half = quantile * float(np.std(differences, ddof=1)) / math.sqrt(number)
    return Interval(mean, mean - half, mean + half)
