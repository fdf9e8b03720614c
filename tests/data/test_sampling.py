"""Image weights by every strategy, expected draws, and the epoch plan."""

from __future__ import annotations

import random
from math import sqrt

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_index import make_index, random_index

from retinaflow.data.frequency_bins import make_bins
from retinaflow.data.image_class_pairs import image_class_pairs
from retinaflow.data.sampling import (
    STRATEGIES,
    Strategy,
    epoch_plan,
    expected_samples,
    first_balanced_epoch,
    image_weights,
)
from retinaflow.settings.data_settings import SamplingSettings

# Ten images. Class 0 on images 0 to 7, one box each; class 1 on image 7 (three boxes) and 8 (one); nothing on image 9.
# n = (8, 2), f = (0.8, 0.2), boxes (8, 4) of 12. Log bins of (2, 8): the cut is at 4, so class 1 is rarer.
TEN = make_index([[0]] * 7 + [[0, 1, 1, 1], [1], []], classes=2)

BY_HAND = {
    "uniform": (SamplingSettings(), [1.0] * 10),
    # t = 0.5: r_0 = max(1, sqrt(0.5 / 0.8)) = 1, r_1 = sqrt(0.5 / 0.2) = sqrt 2.5.
    "repeat-factor": (SamplingSettings(repeat_threshold=0.5), [1.0] * 7 + [sqrt(2.5), sqrt(2.5), 1.0]),
    # f_1 becomes sqrt(0.2 x 4 / 12), f_0 sqrt(0.8 x 8 / 12) = 0.73, still above t.
    "instance-repeat-factor": (
        SamplingSettings(repeat_threshold=0.5),
        [1.0] * 7 + [sqrt(0.5 / sqrt(0.2 / 3))] * 2 + [1.0],
    ),
    # Every class gives 1 / n_c to each of its images.
    "class-aware": (SamplingSettings(), [1 / 8] * 7 + [1 / 8 + 1 / 2, 1 / 2, 0.0]),
    # T is the 0.75 quantile of (2, 8) = 2 + 0.75 x 6 = 6.5; rates 6.5 / 2 = 3.25 and max(1, 6.5 / 8) = 1.
    "binned": (SamplingSettings(empty_image_rate=0.5), [1.0] * 7 + [3.25, 3.25, 0.5]),
}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_weights_of_every_strategy_by_hand(strategy: Strategy) -> None:
    searchable, expected = BY_HAND[strategy]
    pairs = image_class_pairs(TEN)
    weights = image_weights(strategy, pairs, make_bins(pairs, num_bins=2), searchable)
    np.testing.assert_allclose(weights, expected, rtol=1e-12)


def test_what_the_classes_of_an_image_are_raised_by_adds_up_and_one_bin_is_uniform() -> None:
    # Classes 0, 1 and 2 on 8, 2 and 1 images, a bin each; T = the 1.0 quantile = 8, so the rates are 1, 4 and 8.
    index = make_index([[0]] * 6 + [[0, 1], [0, 1, 2], []], classes=3)
    pairs = image_class_pairs(index)
    for bin_rates in ("step", "smooth"):
        settings = SamplingSettings(balance=1.0, bin_rates=bin_rates)
        three = image_weights("binned", pairs, make_bins(pairs, num_bins=3), settings)
        np.testing.assert_allclose(three, [1.0] * 6 + [1 + 3, 1 + 3 + 7, 1.0])
        assert set(image_weights("binned", pairs, make_bins(pairs, num_bins=1), settings)) == {8 / 2}


def test_one_correction_step_by_hand_lowers_the_rate_of_a_bin_that_rarer_classes_lift() -> None:
    # Twenty images: class 0 on 0 to 15, class 1 on 15 to 18, class 2 on 18. Bins (1) (4) (16), T = 0.75 quantile = 10.
    # Rates 10, 2.5, 1; image 18, with classes 1 and 2, weighs 1 + 9 + 1.5 = 11.5. Draws of weight: class 2: 11.5;
    # class 1: 3 x 2.5 + 11.5 = 19; class 0: 15 + 2.5 = 17.5. Goals max(T, n) = 10, 10, 16. New rates:
    # 10 x sqrt(10 / 11.5) = 9.33; 2.5 x sqrt(10 / 19) = 1.81; max(1, sqrt(16 / 17.5)) = 1.
    index = make_index([[0]] * 15 + [[0, 1], [1], [1], [1, 2], []], classes=3)
    pairs = image_class_pairs(index)
    bins = make_bins(pairs, num_bins=3)
    assert bins.bin_of_class.tolist() == [2, 1, 0]
    weights = image_weights("binned", pairs, bins, SamplingSettings(correction_steps=1))
    rare, middle = 10 * sqrt(10 / 11.5), 2.5 * sqrt(10 / 19)
    np.testing.assert_allclose(weights, [1.0] * 15 + [middle] * 3 + [rare + middle - 1, 1.0])


@pytest.mark.parametrize("seed", range(4))
def test_one_bin_is_exactly_uniform(seed: int) -> None:
    pairs = image_class_pairs(random_index(seed))
    bins = make_bins(pairs, num_bins=1)
    for balance in (0.0, 0.5, 0.75, 1.0):
        weights = image_weights("binned", pairs, bins, SamplingSettings(balance=balance))
        np.testing.assert_array_equal(expected_samples(weights, len(weights)), np.ones(len(weights)))


@pytest.mark.parametrize("seed", range(4))
def test_repeat_factor_agrees_with_a_plain_loop(seed: int) -> None:
    index = random_index(seed, images=60)
    threshold = 0.4
    holds = [set(index.labels[index.box_start[i] : index.box_start[i + 1]].tolist()) for i in range(len(index))]
    expected = []
    for classes in holds:
        factors = [max(1.0, sqrt(threshold / (sum(c in other for other in holds) / 60))) for c in classes]
        expected.append(max(factors, default=1.0))
    pairs = image_class_pairs(index)
    weights = image_weights("repeat-factor", pairs, make_bins(pairs), SamplingSettings(repeat_threshold=threshold))
    assert max(expected) > 1
    np.testing.assert_allclose(weights, expected)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_more_images_of_a_rare_class_are_drawn_than_under_uniform(strategy: Strategy) -> None:
    pairs = image_class_pairs(TEN)
    weights = image_weights(strategy, pairs, make_bins(pairs, num_bins=2), SamplingSettings(repeat_threshold=0.5))
    share = weights[7:9].sum() / weights.sum()
    assert share == pytest.approx(0.2) if strategy == "uniform" else share > 0.25


def test_water_filling_by_hand_shares_what_is_over_the_cap() -> None:
    # (100, 10, 1, 1) to length 4 with at most 2: the first would get 3.57, is capped at 2; 2 are left for 10 : 1 : 1.
    expected = expected_samples(np.array([100.0, 10.0, 1.0, 1.0]), 4, max_repeats=2)
    np.testing.assert_allclose(expected, [2, 20 / 12, 2 / 12, 2 / 12])
    # (100, 50, 1, 1): first 2.63 and 1.32; then 2 left over 50 : 1 : 1 gives 1.92, under the cap.
    np.testing.assert_allclose(
        expected_samples(np.array([100.0, 50.0, 1, 1]), 4, max_repeats=2), [2, 100 / 52, 2 / 52, 2 / 52]
    )


def test_no_draws_and_no_images_are_no_expected_draws() -> None:
    assert expected_samples(np.ones(3), 0).tolist() == [0, 0, 0]
    assert len(expected_samples(np.zeros(0), 0)) == 0
    assert len(epoch_plan(np.zeros(0), seed=0, epoch=0)) == 0
    assert len(epoch_plan(np.zeros(5), seed=0, epoch=0)) == 0


weights_strategy = st.lists(st.sampled_from([0.0, 1e-9, 0.3, 1.0, 7.0, 1e9]), min_size=1, max_size=12).filter(any)


@settings(max_examples=80, deadline=None)
@given(weights=weights_strategy, share=st.floats(0, 1), cap=st.sampled_from([1.0, 2.0, 3.5, 100.0]))
def test_expected_draws_sum_to_the_length_under_the_cap_in_proportion_to_weight(
    weights: list[float], share: float, cap: float
) -> None:
    array = np.array(weights)
    length = int(share * cap * np.count_nonzero(array))
    expected = expected_samples(array, length, max_repeats=cap)
    assert expected.sum() == pytest.approx(length)
    assert (expected <= cap).all()
    assert (expected[array == 0] == 0).all(), "weight 0 is never drawn"
    below = (expected < cap) & (array > 0)
    if below.any() and length:
        ratio = expected[below] / array[below]
        np.testing.assert_allclose(ratio, ratio[0])
        assert (expected[~below & (array > 0)] <= array[~below & (array > 0)] * ratio[0] * (1 + 1e-9)).all()


def test_all_images_at_the_cap_is_still_possible_and_one_more_draw_is_refused() -> None:
    assert expected_samples(np.array([1.0, 5.0, 0.0]), 6, max_repeats=3).tolist() == [3, 3, 0]
    with pytest.raises(
        ValueError,
        match="epoch_length <= max_repeats x images must hold, but got epoch_length=7, max_repeats=3, images=2",
    ):
        expected_samples(np.array([1.0, 5.0, 0.0]), 7, max_repeats=3)


@settings(max_examples=80, deadline=None)
@given(weights=weights_strategy, share=st.floats(0, 1), seed=st.integers(0, 2**32), epoch=st.integers(0, 1000))
def test_a_plan_has_its_exact_length_and_every_image_floor_or_ceil_of_its_expected_draws(
    weights: list[float], share: float, seed: int, epoch: int
) -> None:
    array = np.array(weights)
    length = int(share * 4 * np.count_nonzero(array))
    expected = expected_samples(array, length, max_repeats=4)
    plan = epoch_plan(expected, seed=seed, epoch=epoch)
    assert plan.dtype == np.int64
    assert len(plan) == length
    counts = np.bincount(plan, minlength=len(array))
    assert (counts >= np.floor(expected - 1e-9)).all()
    assert (counts <= np.ceil(expected + 1e-9)).all()


def test_a_plan_of_a_million_images_has_its_exact_length() -> None:
    weights = np.random.default_rng(0).pareto(1.2, 1_000_000) + 0.01
    expected = expected_samples(weights, 1_000_000, max_repeats=50)
    plan = epoch_plan(expected, seed=1, epoch=2)
    assert len(plan) == 1_000_000
    counts = np.bincount(plan, minlength=1_000_000)
    assert np.abs(counts - expected).max() < 1 + 1e-6


def test_a_uniform_plan_is_a_permutation_of_all_images() -> None:
    plan = epoch_plan(np.ones(1000), seed=0, epoch=0)
    assert sorted(plan.tolist()) == list(range(1000))
    assert plan.tolist() != list(range(1000)), "in a shuffled order"


def test_the_mean_over_many_epochs_is_the_expected_count() -> None:
    expected = expected_samples(np.array([9.0, 3.3, 1.0, 0.2, 0.2, 0.1, 4.4]), 9, max_repeats=3)
    epochs = 900
    counts = sum(np.bincount(epoch_plan(expected, seed=3, epoch=epoch), minlength=7) for epoch in range(epochs))
    # A count is floor or ceil, so its standard deviation is at most 1/2; five standard errors are 5 x 0.5 / 30 = 0.083.
    np.testing.assert_allclose(np.asarray(counts) / epochs, expected, atol=0.083)


def test_draws_of_two_images_are_not_tied_to_each_other() -> None:
    # Four images of 1/2 make 2 draws; by a shuffled order any of the six pairs may be drawn.
    pairs = {tuple(sorted(epoch_plan(np.full(4, 0.5), seed=0, epoch=epoch).tolist())) for epoch in range(200)}
    assert len(pairs) == 6


def test_a_plan_is_a_function_of_expected_draws_seed_and_epoch_alone() -> None:
    expected = np.random.default_rng(0).random(200)
    expected *= 100 / expected.sum()
    first = epoch_plan(expected, seed=1, epoch=2)
    np.random.seed(4)  # noqa: NPY002  (the point of the test)
    random.seed(4)
    torch.manual_seed(4)
    states = str(np.random.get_state()), random.getstate(), torch.get_rng_state().tolist()  # noqa: NPY002
    np.testing.assert_array_equal(epoch_plan(expected, seed=1, epoch=2), first)
    assert (str(np.random.get_state()), random.getstate(), torch.get_rng_state().tolist()) == states  # noqa: NPY002
    assert epoch_plan(expected, seed=2, epoch=2).tolist() != first.tolist()
    assert epoch_plan(expected, seed=1, epoch=3).tolist() != first.tolist()


@pytest.mark.parametrize(
    ("balance_start", "epochs", "uniform"), [(0.0, 4, 0), (0.5, 4, 2), (0.5, 1, 0), (0.75, 4, 3), (0.3, 10, 3)]
)
def test_the_first_share_of_the_epochs_is_uniform(balance_start: float, epochs: int, uniform: int) -> None:
    assert first_balanced_epoch(epochs, balance_start=balance_start) == uniform


def test_smooth_rates_by_hand_lie_between_those_of_the_bins_medians() -> None:
    # n = (2, 4, 8, 16) in two log bins, cut at sqrt(2 x 16) = 5.7: medians 3 and 12, T = 0.75 quantile = 10.
    # Rates 10 / 3 and 1. Class 0 is rarer than the first median and takes its rate, class 3 is beyond the last: 1.
    # Class 1 is ln(4 / 3) / ln(12 / 3) of the way in log n, so r = (10 / 3)^(1 - 0.2075); class 2: ln(8/3) / ln 4.
    index = make_index([[0]] * 2 + [[1]] * 4 + [[2]] * 8 + [[3]] * 16, classes=4)
    pairs = image_class_pairs(index)
    weights = image_weights("binned", pairs, make_bins(pairs, num_bins=2), SamplingSettings(bin_rates="smooth"))
    rates = [10 / 3, (10 / 3) ** (1 - np.log(4 / 3) / np.log(4)), (10 / 3) ** (1 - np.log(8 / 3) / np.log(4)), 1.0]
    np.testing.assert_allclose(weights, np.repeat(rates, [2, 4, 8, 16]), rtol=1e-12)


@pytest.mark.parametrize("balance", [0.0, 0.5, 1.0])
def test_smooth_rates_are_uniform_with_one_bin_and_per_class_with_a_bin_for_each(balance: float) -> None:
    pairs = image_class_pairs(random_index(6, images=200))
    smooth, step = (SamplingSettings(balance=balance, bin_rates=kind) for kind in ("smooth", "step"))
    one = image_weights("binned", pairs, make_bins(pairs, num_bins=1), smooth)
    assert (one == one[0]).all()
    each = make_bins(pairs, edges=sorted(set(pairs.images_per_class.tolist()))[1:])
    np.testing.assert_allclose(
        image_weights("binned", pairs, each, smooth), image_weights("binned", pairs, each, step), rtol=1e-12
    )


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_draws_of_a_class_go_by_its_images_to_the_class_power(power: float) -> None:
    # Classes on images of their own: 4 and 16 images. Draws 4^q to 16^q, so 1 to 4^q.
    pairs = image_class_pairs(make_index([[0]] * 4 + [[1]] * 16, classes=2))
    weights = image_weights("class-aware", pairs, make_bins(pairs), SamplingSettings(class_power=power))
    assert weights[4:].sum() / weights[:4].sum() == pytest.approx(4**power)
