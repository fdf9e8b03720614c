"""Seeds, p-values and the correction for many classes, by hand and by simulation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_runs import run, runs, world

from retinaflow.comparison.comparison import Comparison, Resampling, Side, compare_runs
from retinaflow.statistics.significance import SeedSpread, benjamini_hochberg, p_values, seed_spread, widen

NO_SEEDS = SeedSpread(np.zeros(1), np.full(1, np.inf))


def test_one_run_per_setting_has_no_spread_over_seeds() -> None:
    spread = seed_spread(np.array([[0.4, 0.5]]), np.array([[0.6, 0.1]]))
    assert spread.error.tolist() == [0.0, 0.0]
    assert np.isinf(spread.freedom).all()


def test_the_spread_of_a_difference_is_pooled_from_both_settings() -> None:
    # Squares 0.02 (0.4, 0.5, 0.6) and 0.02 (0.1, 0.3) over 2 + 1 degrees of freedom: s^2 = 0.04 / 3;
    # error sqrt(0.04 / 3 * (1/3 + 1/2)) = sqrt(0.1 / 9) = 0.105409.
    spread = seed_spread(np.array([[0.4], [0.5], [0.6]]), np.array([[0.1], [0.3]]))
    assert spread.error[0] == pytest.approx(0.105409, abs=1e-6)
    assert spread.freedom[0] == 3


def test_a_single_training_is_taken_to_scatter_like_the_other_setting() -> None:
    # Squares 0.02 over 2 degrees of freedom, s^2 = 0.01: error sqrt(0.01 * (1/3 + 1)) = 0.11547.
    spread = seed_spread(np.array([[0.4], [0.5], [0.6]]), np.array([[0.9]]))
    assert spread.error[0] == pytest.approx(0.11547, abs=1e-5)
    assert spread.freedom[0] == 2


def test_without_seeds_an_interval_stays_as_it_is() -> None:
    low, high = widen(np.array([0.1]), np.array([0.02]), np.array([0.2]), NO_SEEDS, confidence=0.95)
    assert (low[0], high[0]) == (0.02, 0.2)


def test_images_and_seeds_add_in_quadrature() -> None:
    # t(0.975, 4) = 2.7764, so the seeds reach 0.03 / 2.7764 * 2.7764 = 0.03; sqrt(0.04^2 + 0.03^2) = 0.05.
    seeds = SeedSpread(np.array([0.03 / 2.776445]), np.array([4.0]))
    low, high = widen(np.array([0.1]), np.array([0.06]), np.array([0.14]), seeds, confidence=0.95)
    assert low[0] == pytest.approx(0.05, abs=1e-6)
    assert high[0] == pytest.approx(0.15, abs=1e-6)


def _p(estimate: float, low: float, high: float, *, images: int = 10**6, seeds: SeedSpread = NO_SEEDS) -> float:
    arrays = (np.array([value]) for value in (estimate, low, high))
    return float(p_values(*arrays, seeds, num_images=np.array([images]), confidence=0.95)[0])


def test_an_interval_that_ends_at_zero_has_p_one_minus_confidence() -> None:
    assert _p(0.1, 0.0, 0.2) == pytest.approx(0.05, abs=1e-4)
    assert _p(-0.1, -0.2, 0.0) == pytest.approx(0.05, abs=1e-4)


def test_the_wider_side_counts() -> None:
    # Nearer to 0 the interval is short (0.01), in all 0.2 wide: half of that is what is believed.
    assert _p(0.1, 0.09, 0.29) == pytest.approx(0.05, abs=1e-4)


def test_no_difference_has_p_one_and_an_unknown_one_none() -> None:
    assert _p(0.0, 0.0, 0.0) == 1.0
    assert np.isnan(_p(np.nan, np.nan, np.nan))


@pytest.mark.parametrize(("images", "least"), [(0, 1.0), (1, 1.0), (2, 0.5), (5, 0.0625), (6, 0.03125)])
def test_few_images_never_rule_chance_out(images: int, least: float) -> None:
    # One run finds every object, the other none: no resample varies, and yet five tosses of a coin can fall alike.
    assert _p(1.0, 1.0, 1.0, images=images) == least


def test_seeds_that_differ_as_much_as_the_settings_take_the_certainty_away() -> None:
    sure = _p(0.1, 0.06, 0.14)
    unsure = _p(0.1, 0.06, 0.14, seeds=SeedSpread(np.array([0.08]), np.array([4.0])))
    assert sure < 1e-5
    assert unsure > 0.2


def test_adjusted_p_values_by_hand() -> None:
    # Ordered 0.005, 0.01, 0.03, 0.9, times 4 / rank: 0.02, 0.02, 0.04, 0.9.
    adjusted = benjamini_hochberg(np.array([0.03, 0.01, np.nan, 0.005, 0.9]))
    np.testing.assert_allclose(adjusted, [0.04, 0.02, np.nan, 0.02, 0.9])


@given(st.lists(st.floats(0, 1), max_size=40))
@settings(max_examples=50, deadline=None)
def test_adjusting_never_makes_a_p_value_smaller_and_keeps_their_order(values: list[float]) -> None:
    p = np.array(values, dtype=np.float64)
    adjusted = benjamini_hochberg(p)
    assert (adjusted >= p).all()
    assert (adjusted <= 1).all()
    assert (np.diff(adjusted[np.argsort(p, kind="stable")]) >= 0).all()


def _compared(number: int, *, seeds: int, jitter: float) -> Comparison:
    """Two settings that are equally good; each training's skill in each class varies by ``jitter``."""
    made, rng = world(12, 80, seed=number), np.random.default_rng([number, 9])
    sides = [
        Side(
            letter,
            letter,
            tuple(run(made, 0.5 + rng.normal(size=12) * jitter, seed=1000 * k + s) for s in range(seeds)),
        )
        for k, letter in enumerate("AB")
    ]
    return compare_runs(sides, Resampling(resamples=120))


@pytest.mark.slow
@pytest.mark.parametrize(("seeds", "jitter"), [(1, 0.0), (3, 0.6)], ids=["one run each", "three seeds each"])
def test_settings_that_are_equally_good_are_seldom_told_apart(seeds: int, jitter: float) -> None:
    found = [_compared(number, seeds=seeds, jitter=jitter) for number in range(40)]
    classes = [table.classes for table in found]
    p = np.concatenate([table["B_p"].dropna() for table in classes])
    # Of 480 p-values 5% are expected below 0.05, with a standard deviation of 1%.
    assert (p < 0.05).mean() < 0.08
    # Marks by chance: the rule allows one in twenty comparisons, 2 of 40; 6 or more would be a chance of 1 in 70.
    assert sum(bool(table["B_sure"].any()) for table in classes) < 6
    means = [table.group("mAP") for table in found]
    held = [row["B_difference_low"] <= 0 <= row["B_difference_high"] for row in means]
    assert np.mean(held) >= 0.85


@pytest.mark.slow
def test_without_seeds_the_luck_of_a_training_passes_for_a_difference() -> None:
    """Why runs can be pooled: with one run each, the intervals do not hold for the settings."""
    alone = [_compared(number, seeds=1, jitter=0.6).classes["B_p"].dropna() for number in range(20)]
    assert (np.concatenate(alone) < 0.05).mean() > 0.08


def test_a_real_gain_is_found_with_seeds_too() -> None:
    made = world(3, 200)
    first, second = runs(made, 0.0, range(3)), runs(made, 1.5, range(10, 13))
    found = compare_runs([Side("A", "a", tuple(first)), Side("B", "b", tuple(second))], Resampling(resamples=100))
    assert found.group("mAP")["B_difference_low"] > 0
    assert found.classes["B_sure"].any()
