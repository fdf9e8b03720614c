"""Bootstrap intervals and paired differences: seeded, in the right place, and honest about what is not defined."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scoring_scenes import Found, Scene, Truth

from retinaflow.metric.challenge import average_precision, challenge_scores, match
from retinaflow.metric.matches import Matches
from retinaflow.statistics import resampling
from retinaflow.statistics.bootstrap import bootstrap_intervals, paired_differences
from retinaflow.statistics.resampling import half_of_images, resampled_ap

BOX, FAR = (0.0, 0.0, 0.4, 0.4), (0.6, 0.6, 0.9, 0.9)


def run(hits: list[bool], *, num_classes: int = 1) -> Matches:
    """One ground truth of class 0 per image; where ``hits`` is True its detection is right, elsewhere there is none."""
    scene = Scene(
        num_classes,
        tuple(Truth(f"i{k:03d}", 0, BOX) for k in range(len(hits))),
        found=tuple(Found(f"i{k:03d}", 0, 0.5, BOX) for k, hit in enumerate(hits) if hit),
    )
    return match(scene.detections(), scene.annotations())


def mixed_run(seed: int) -> Matches:
    rng = np.random.default_rng(seed)
    ground_truths = tuple(Truth(f"i{k:02d}", k % 3, BOX) for k in range(30))
    found = tuple(
        Found(row.image, row.label, float(rng.random()), BOX if rng.random() < 0.6 else FAR)
        for row in ground_truths * 2
    )
    scene = Scene(4, ground_truths, found=found)
    return match(scene.detections(), scene.annotations())


def test_the_same_seed_gives_the_same_intervals_whatever_the_global_seed() -> None:
    matches = mixed_run(0)
    np.random.seed(1)  # noqa: NPY002 - a foreign global seed must have no effect
    first = bootstrap_intervals(matches, resamples=50, seed=7)
    np.random.seed(2)  # noqa: NPY002
    again = bootstrap_intervals(matches, resamples=50, seed=7)
    other = bootstrap_intervals(matches, resamples=50, seed=8)
    np.testing.assert_array_equal(first.ap_low, again.ap_low)
    assert first.mean == again.mean
    assert first.mean != other.mean


@pytest.mark.parametrize(("size", "right", "threads"), [(1, 10_000, 1), (7, 10_000, 3), (64, 2, 2)])
def test_neither_blocks_nor_threads_change_a_number(
    size: int, right: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = bootstrap_intervals(mixed_run(0), resamples=40, seed=3, threads=1)
    monkeypatch.setattr(resampling, "RESAMPLES_AT_ONCE", size)
    monkeypatch.setattr(resampling, "TRUE_POSITIVES_AT_ONCE", right)
    other = bootstrap_intervals(mixed_run(0), resamples=40, seed=3, threads=threads)
    assert other.mean == whole.mean
    np.testing.assert_array_equal(other.ap_low, whole.ap_low)


def test_estimates_are_the_scores_of_the_images_as_they_are() -> None:
    matches = mixed_run(0)
    groups = {"first two": np.array([True, True, False, False])}
    intervals = bootstrap_intervals(matches, groups=groups, resamples=20)
    ap = average_precision(matches)
    np.testing.assert_array_equal(intervals.ap, ap)
    assert intervals.mean.estimate == pytest.approx(np.nanmean(ap))
    assert intervals.groups["first two"].estimate == pytest.approx(ap[:2].mean())


def test_an_interval_without_wrong_detections_is_wilsons_for_a_share() -> None:
    # AP is the share of ground-truth boxes found, 70 of 100. Halves of 100 images vary like 100 images do: standard
    # error sqrt(0.7 x 0.3 / 100) = 0.0458, so n = 0.21 / 0.0458^2 = 100. Wilson, z = 1.96, z^2 = 3.84: (0.7 + 1.92 /
    # 100 -+ 1.96 sqrt(0.0021 + 0.96 / 10,000)) / 1.0384 = 0.604 and 0.781.
    interval = bootstrap_intervals(run([True] * 70 + [False] * 30), resamples=4000, seed=0).mean
    assert interval.estimate == pytest.approx(0.7)
    assert interval.low == pytest.approx(0.604, abs=0.005)
    assert interval.high == pytest.approx(0.781, abs=0.005)


def test_more_confidence_means_a_wider_interval() -> None:
    matches = mixed_run(0)
    narrow = bootstrap_intervals(matches, resamples=200, confidence=0.5).mean
    wide = bootstrap_intervals(matches, resamples=200, confidence=0.99).mean
    assert wide.low < narrow.low < narrow.high < wide.high


def test_ten_of_ten_found_may_be_nine_of_the_next_ten() -> None:
    # No resample varies, so n is the number of ground-truth boxes: Wilson's lower end n / (n + z^2) = 10 / 13.84 =
    # 0.722.
    interval = bootstrap_intervals(run([True] * 10), resamples=50).mean
    assert (interval.estimate, interval.high) == (1.0, 1.0)
    assert interval.low == pytest.approx(0.7225, abs=1e-4)
    nothing = bootstrap_intervals(run([False] * 10), resamples=50).mean
    assert (nothing.low, nothing.estimate) == (0.0, 0.0)
    assert nothing.high == pytest.approx(1 - 0.7225, abs=1e-4)


def test_an_interval_holds_its_estimate() -> None:
    for seed in range(5):
        found = bootstrap_intervals(mixed_run(seed), resamples=60, seed=seed)
        known = ~np.isnan(found.ap)
        assert (found.ap_low[known] <= found.ap[known]).all()
        assert (found.ap[known] <= found.ap_high[known]).all()
        assert found.mean.low <= found.mean.estimate <= found.mean.high


def test_classes_and_groups_without_truth_are_nan_and_outside_the_mean() -> None:
    matches = run([True, False], num_classes=2)
    groups = {"empty": np.array([False, False]), "untruthed": np.array([False, True]), "both": np.array([True, True])}
    intervals = bootstrap_intervals(matches, groups=groups, resamples=20)
    assert np.isnan([intervals.ap[1], intervals.ap_low[1], intervals.ap_high[1]]).all()
    assert np.isnan(intervals.groups["empty"].estimate)
    assert np.isnan(intervals.groups["untruthed"].low)
    assert intervals.groups["both"] == intervals.mean


def test_a_class_is_left_out_of_the_resamples_in_which_it_has_no_truth() -> None:
    # Class 1 has its only ground truth, found, on one of two images. Half of the resamples miss that image, and there
    # the class is not defined rather than 0: every AP that counts is 1, and nothing varies.
    scene = Scene(2, (Truth("a", 0, BOX), Truth("b", 1, BOX)), found=(Found("a", 0, 0.5, BOX), Found("b", 1, 0.5, BOX)))
    (drawn,) = resampled_ap([match(scene.detections(), scene.annotations())], resamples=50, seed=0)
    assert np.isnan(drawn).sum(axis=0).tolist() == [25, 25]
    assert (drawn[~np.isnan(drawn)] == 1).all()


def test_no_images_give_nan_without_a_warning() -> None:
    intervals = bootstrap_intervals(run([]), resamples=5)
    assert np.isnan([intervals.mean.estimate, intervals.mean.low, intervals.ap_high[0]]).all()
    differences = paired_differences(run([]), run([]), resamples=5)
    assert np.isnan(differences.mean.fraction_above_zero)


def test_a_run_against_itself_differs_by_exactly_nothing() -> None:
    differences = paired_differences(mixed_run(0), mixed_run(0), resamples=50)
    assert (differences.mean.low, differences.mean.estimate, differences.mean.high) == (0.0, 0.0, 0.0)
    assert differences.mean.fraction_above_zero == 0.0


def test_classes_that_both_runs_find_alike_differ_by_nothing_and_those_that_neither_finds_may() -> None:
    # Class 0 is found alike. Class 1 is found by neither: one disagreeing image would change that.
    # Half an image of disagreement on 3 images with ground truth: -+ 1.96 x 0.5 / (3 + 2).
    ground_truths = tuple(Truth(f"i{k}", label, BOX) for k in range(3) for label in range(3))
    found = tuple(Found(f"i{k}", 0, 0.5, BOX) for k in range(2))
    runs = []
    for extra in ((), (Found("i0", 2, 0.5, BOX),)):
        scene = Scene(3, ground_truths, found=found + extra)
        runs.append(match(scene.detections(), scene.annotations()))
    differences = paired_differences(*runs, resamples=50)
    assert (differences.ap_low[0], differences.ap[0], differences.ap_high[0]) == (0, 0, 0)
    assert differences.ap_high[1] == pytest.approx(1.96 * 0.1, abs=1e-4)
    assert differences.ap_low[1] == -differences.ap_high[1]
    assert differences.ap_low[2] < 0 < differences.ap[2]


def test_swapping_the_runs_mirrors_the_differences() -> None:
    groups = {"one": np.array([True, False, False, False])}
    forth = paired_differences(mixed_run(0), mixed_run(1), groups=groups, resamples=100)
    back = paired_differences(mixed_run(1), mixed_run(0), groups=groups, resamples=100)
    assert forth.mean.low == pytest.approx(-back.mean.high)
    assert forth.groups["one"].high == pytest.approx(-back.groups["one"].low)
    np.testing.assert_allclose(forth.ap_low, -back.ap_high)


def test_the_estimate_of_a_difference_is_the_second_score_minus_the_first() -> None:
    worse, better = run([True] * 5 + [False] * 5), run([True] * 8 + [False] * 2)
    difference = paired_differences(worse, better, resamples=200).mean
    assert difference.estimate == pytest.approx(0.8 - 0.5)
    assert difference.fraction_above_zero > 0.9


def test_pairing_finds_a_small_steady_gain_that_two_intervals_cannot_tell_apart() -> None:
    first, second = run([True] * 45 + [False] * 55), run([True] * 50 + [False] * 50)
    apart = [bootstrap_intervals(matches, resamples=300).mean for matches in (first, second)]
    assert apart[0].high > apart[1].low
    # The second run finds five objects more and loses none: a resample is above 0 unless it misses those five images,
    # probability 2^-5 = 0.03.
    difference = paired_differences(first, second, resamples=300).mean
    assert difference.fraction_above_zero == pytest.approx(1 - 2**-5, abs=0.02)
    assert difference.low > 0


def test_classes_that_only_one_run_evaluated_are_left_out_of_the_difference() -> None:
    ground_truths = (Truth("a", 0, BOX), Truth("a", 1, BOX))
    scene = Scene(2, ground_truths, found=(Found("a", 0, 0.5, BOX),))
    both = match(scene.detections(), scene.annotations())
    one = match(scene.detections(), scene.annotations(), classes=np.array([True, False]))
    differences = paired_differences(both, one, resamples=10)
    np.testing.assert_array_equal(differences.ap, [0.0, np.nan])
    # Over the shared class only; the mean of all classes would go from 1/2 to 1.
    assert differences.mean.estimate == 0.0


def test_runs_on_other_images_or_other_truth_cannot_be_paired() -> None:
    three = run([True] * 3)
    with pytest.raises(ValueError, match=r"the same images in the same order, .* 3 and 2 images"):
        paired_differences(three, run([True] * 2))
    with pytest.raises(ValueError, match="different ground truth boxes"):
        paired_differences(three, replace(three, gt_count=three.gt_count + 1))
    with pytest.raises(ValueError, match="must share their classes, but got 1 and 2"):
        paired_differences(three, run([True] * 3, num_classes=2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"resamples": 0}, "`resamples >= 1` must hold, but got 0"),
        ({"confidence": 1.0}, "`0 < confidence < 1` must hold, but got 1.0"),
        (
            {"groups": {"rare": np.array([True, False])}},
            r"group rare must be bool \[1\] or indices of classes",
        ),
    ],
)
def test_settings_out_of_range_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bootstrap_intervals(run([True]), **arguments)


@pytest.mark.parametrize("group_of_weight", [0.0, 0.3, 1.0])
def test_a_resample_scores_as_the_metric_on_the_images_it_drew(group_of_weight: float) -> None:
    scene = random_scene(0)
    matches = match(scene.detections(), scene.annotations(), group_of_weight=group_of_weight)
    for draw in (half_of_images, some_twice):
        times = np.stack([draw(len(matches.image_ids), resample, seed=5) for resample in range(20)])
        plain = average_precision(matches, image_weights=times.astype(np.int64))
        (fast,) = resampled_ap([matches], resamples=20, seed=5, sample=draw)
        np.testing.assert_allclose(fast, plain, rtol=0, atol=1e-12)


def some_twice(num_images: int, resample: int, *, seed: int) -> np.ndarray:
    return np.random.default_rng([seed, resample]).integers(0, 3, num_images).astype(np.float64)


def random_scene(seed: int) -> Scene:
    """Ten images, three classes, equal scores, group-of boxes, classes that detections do not find."""
    rng = np.random.default_rng(seed)
    boxes = (BOX, FAR, (0.0, 0.5, 0.3, 0.9))
    images = [f"i{k}" for k in range(10)]
    ground_truths = tuple(
        Truth(image, int(rng.integers(3)), boxes[rng.integers(3)], group_of=bool(rng.random() < 0.3))
        for image in images * 4
    )
    found = tuple(
        Found(row.image, row.label, float(rng.integers(1, 9)) / 10, boxes[rng.integers(3)]) for row in ground_truths * 2
    )
    return Scene(4, ground_truths, found=found)


def test_a_half_and_its_complement_make_all_images() -> None:
    for num_images in (1, 2, 9, 10):
        halves = np.stack([half_of_images(num_images, resample, seed=1) for resample in range(8)])
        np.testing.assert_array_equal(halves[::2] + halves[1::2], 1)
        assert (halves[::2].sum(axis=1) == num_images // 2).all()
    assert len({tuple(half_of_images(20, resample, seed=1)) for resample in range(40)}) > 30


def test_the_mean_of_an_interval_is_the_mean_of_the_scores() -> None:
    ground_truths = (Truth("a", 0, BOX), Truth("b", 1, BOX))
    scene = Scene(3, ground_truths, found=(Found("a", 0, 0.5, BOX),))
    scores = challenge_scores(scene.detections(), scene.annotations())
    assert bootstrap_intervals(scores.matches, resamples=5).mean.estimate == scores.mean_ap == 0.5
