"""How sure a difference between two ways of training is: a paired t interval over seeds.

Both ways are trained with the same seeds; the differences, seed by seed, are taken for normal. Unlike the bootstrap
over images (:mod:`retinaflow.statistics.bootstrap`), what varies here is the training, not the choice of the images.

Source: Student, The Probable Error of a Mean (1908); see also Bouthillier et al., Accounting for Variance in Machine
Learning Benchmarks (2021). Worked: differences 0.05, 0.03, 0.04 have mean 0.04 and standard deviation 0.01; with two
degrees of freedom t = 4.303, so the 95% interval is 0.04 +- 4.303 * 0.01 / sqrt(3) = 0.015 .. 0.065.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from retinaflow.statistics.bootstrap import Interval


def paired_t_interval(differences: NDArray[np.float64], *, confidence: float = 0.95) -> Interval:
    """Mean of the differences ``[n]`` and the interval of that mean; NaN ends for fewer than two differences.

    Raises ValueError for a confidence that is not between 0 and 1.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"`0 < confidence < 1` must hold, but got {confidence}")
    number = len(differences)
    mean = float(np.mean(differences)) if number else math.nan
    if number < 2:
        return Interval(mean, math.nan, math.nan)
    quantile = float(stdtrit(number - 1, 0.5 + confidence / 2))
    half = quantile * float(np.std(differences, ddof=1)) / math.sqrt(number)
    return Interval(mean, mean - half, mean + half)
