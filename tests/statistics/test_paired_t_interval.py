"""The paired t interval over seeds, against a worked case, scipy's own test, and its coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import ttest_rel

from retinaflow.statistics.intervals import paired_t_interval


def test_the_worked_case_of_the_docstring() -> None:
    found = paired_t_interval(np.array([0.05, 0.03, 0.04]))
    assert (found.estimate, found.low, found.high) == pytest.approx((0.04, 0.01516, 0.06484), abs=1e-5)


@pytest.mark.parametrize("number", [2, 5, 40])
def test_it_is_the_interval_of_a_paired_t_test(number: int) -> None:
    rng = np.random.default_rng(number)
    before, after = rng.normal(0.3, 0.1, number), rng.normal(0.35, 0.1, number)
    found, expected = paired_t_interval(after - before), ttest_rel(after, before).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_it_covers_the_true_difference_in_about_95_of_100_cases() -> None:
    rng = np.random.default_rng(0)
    intervals = [paired_t_interval(rng.normal(0.1, 0.05, 5)) for _ in range(2000)]
    assert np.mean([found.low <= 0.1 <= found.high for found in intervals]) == pytest.approx(0.95, abs=0.015)


def test_one_difference_has_no_interval_and_none_no_mean() -> None:
    one, none = paired_t_interval(np.array([0.1])), paired_t_interval(np.array([]))
    assert one.estimate == 0.1
    assert all(map(math.isnan, (one.low, one.high, none.estimate, none.low)))


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95.0])
def test_a_confidence_outside_0_and_1_is_refused(confidence: float) -> None:
    with pytest.raises(ValueError, match=r"`0 < confidence < 1` must hold, but got"):
        paired_t_interval(np.array([0.1, 0.2]), confidence=confidence)
