"""Settings compared: figures that agree with the metric, shared classes, other data refused, seeds pooled."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from simulated_runs import World, run, runs, world

from retinaflow.comparison.comparison import (
    Comparison,
    Resampling,
    Side,
    compare_runs,
    with_classes,
    with_runs_as_classes,
)
from retinaflow.comparison.conclusion import conclusion, extremes
from retinaflow.comparison.stored_matches import StoredMatches
from retinaflow.metric.challenge import average_precision
from retinaflow.statistics.bootstrap import paired_differences

QUICK = Resampling(resamples=100)


@pytest.fixture(scope="module")
def made() -> World:
    return world(9, 160)


@pytest.fixture(scope="module")
def pair(made: World) -> tuple[StoredMatches, StoredMatches]:
    return run(made, 0.0, seed=1), run(made, np.linspace(-1.0, 2.0, 9), seed=2)


def _sides(*groups: list[StoredMatches]) -> list[Side]:
    return [Side(letter, f"setting {letter}", tuple(group)) for letter, group in zip("ABCDEFGH", groups, strict=False)]


@pytest.fixture(scope="module")
def compared(pair: tuple[StoredMatches, StoredMatches]) -> Comparison:
    return compare_runs(_sides([pair[0]], [pair[1]]), QUICK)


def test_scores_and_differences_are_those_of_the_metric_and_the_paired_bootstrap(
    compared: Comparison, pair: tuple[StoredMatches, StoredMatches]
) -> None:
    first, second = (average_precision(kept.matches) for kept in pair)
    place = [pair[0].class_ids.index(mid) for mid in compared.classes["class_id"]]
    np.testing.assert_allclose(compared.classes["A"], first[place])
    np.testing.assert_allclose(compared.classes["B_difference"], (second - first)[place])
    expected = paired_differences(pair[0].matches, pair[1].matches, resamples=100)
    np.testing.assert_allclose(compared.classes["B_difference_low"], expected.ap_low[place])
    np.testing.assert_allclose(compared.classes["B_share_above_zero"], expected.ap_fraction_above_zero[place])
    whole = compared.group("mAP")
    assert whole["B_difference"] == pytest.approx(np.nanmean(second) - np.nanmean(first))
    assert whole["B_difference_low"] == pytest.approx(expected.mean.low)


def test_classes_stand_rarest_first_and_groups_end_with_the_mean(compared: Comparison) -> None:
    assert compared.classes["train_images"].is_monotonic_increasing
    names = compared.groups["group"].tolist()
    assert names[-4:] == ["mAP_rare", "mAP_common", "mAP_frequent", "mAP"]
    assert names[0] == "mAP_bin_1"
    assert compared.groups["classes"].iloc[-1] == 9


def test_a_class_is_marked_only_outside_of_zero_and_below_the_corrected_threshold(compared: Comparison) -> None:
    table = compared.classes
    sure = table["B_sure"].astype(bool)
    assert sure.any()
    assert not sure.all()
    assert (table["B_p_adjusted"][sure] <= 0.05).all()
    assert ((table["B_difference_low"] > 0) | (table["B_difference_high"] < 0))[sure].all()


def test_a_setting_against_itself_shows_no_difference(pair: tuple[StoredMatches, StoredMatches]) -> None:
    found = compare_runs(_sides([pair[0]], [pair[0]]), QUICK)
    assert (found.classes["B_difference"] == 0).all()
    assert (found.classes["B_p"] == 1).all()
    assert not found.classes["B_sure"].any()
    assert conclusion(found, found.sides[1]).headline == "No significant difference between A and B on these images."


def _only(kept: StoredMatches, classes: list[int]) -> StoredMatches:
    """The run as if it had been evaluated on some classes only."""
    return replace(
        kept,
        matches=with_classes(kept.matches, np.array(classes)),
        class_ids=tuple(kept.class_ids[k] for k in classes),
        class_names=tuple(kept.class_names[k] for k in classes),
        training=type(kept.training)(*(column[classes] for column in vars(kept.training).values())),
        ground_truth=replace(kept.ground_truth, classes=tuple(kept.ground_truth.classes[k] for k in classes)),
    )


def test_runs_of_different_class_lists_are_compared_on_what_they_share(
    pair: tuple[StoredMatches, StoredMatches],
) -> None:
    first, second = pair
    found = compare_runs(_sides([_only(first, [0, 1, 2, 3])], [_only(second, [3, 5, 1])]), QUICK)
    assert set(found.classes["class_id"]) == {"/m/001", "/m/003"}
    assert set(found.left_out) == {first.class_names[k] for k in (0, 2, 5)}
    ap = average_precision(first.matches)
    assert found.group("mAP")["A"] == pytest.approx(np.nanmean(ap[[1, 3]]))
    np.testing.assert_allclose(found.classes.set_index("class_id")["A"], ap[[3, 1]][[0, 1]])


def test_choosing_and_stacking_classes_keep_their_scores(pair: tuple[StoredMatches, StoredMatches]) -> None:
    matches = pair[0].matches
    ap = average_precision(matches)
    np.testing.assert_array_equal(average_precision(with_classes(matches, np.array([4, 0, 7]))), ap[[4, 0, 7]])
    both = with_runs_as_classes([matches, pair[1].matches])
    np.testing.assert_array_equal(average_precision(both), np.concatenate([ap, average_precision(pair[1].matches)]))


def test_runs_evaluated_on_other_data_are_refused_with_the_digests(pair: tuple[StoredMatches, StoredMatches]) -> None:
    first, second = pair
    images = replace(second, ground_truth=replace(second.ground_truth, images="0123456789abcdef"))
    with pytest.raises(
        ValueError, match=rf"the same data.*A: 160 images {first.ground_truth.images}.*B: 160 .* 0123456789abcdef"
    ):
        compare_runs(_sides([first], [images]), QUICK)
    other = replace(
        second, ground_truth=replace(second.ground_truth, classes=("0" * 16, *second.ground_truth.classes[1:]))
    )
    with pytest.raises(ValueError, match="evaluate them on the same data with evaluate"):
        compare_runs(_sides([first], [other]), QUICK)
    # The class that differs is not shared: nothing stands in the way.
    assert len(compare_runs(_sides([_only(first, [1, 2])], [other]), QUICK).classes) == 2


def test_runs_evaluated_by_other_rules_are_refused(pair: tuple[StoredMatches, StoredMatches]) -> None:
    other = replace(pair[1], matches=replace(pair[1].matches, group_of_weight=0.0))
    with pytest.raises(ValueError, match=r"by the same rules.*A: group_of_weight=1.*B: group_of_weight=0"):
        compare_runs(_sides([pair[0]], [other]), QUICK)


def test_sides_without_a_shared_class_and_a_single_side_are_refused(pair: tuple[StoredMatches, StoredMatches]) -> None:
    with pytest.raises(ValueError, match="must share at least one class"):
        compare_runs(_sides([_only(pair[0], [0])], [_only(pair[1], [1])]), QUICK)
    with pytest.raises(ValueError, match="2 to 8 settings can be compared, but got 1"):
        compare_runs(_sides([pair[0]]), QUICK)


def test_pooled_seeds_are_averaged_whatever_their_number(made: World) -> None:
    first, second = runs(made, 0.0, range(2)), runs(made, 0.5, range(5, 8))
    found = compare_runs(_sides(first, second), QUICK)
    a, b = (np.mean([average_precision(kept.matches) for kept in group], axis=0) for group in (first, second))
    place = [first[0].class_ids.index(mid) for mid in found.classes["class_id"]]
    np.testing.assert_allclose(found.classes["A"], a[place])
    np.testing.assert_allclose(found.classes["B"], b[place])
    np.testing.assert_allclose(found.classes["B_difference"], (b - a)[place])
    assert found.group("mAP")["B_difference"] == pytest.approx(np.nanmean(b) - np.nanmean(a))


def test_trainings_that_scatter_widen_the_interval(made: World) -> None:
    steady = compare_runs(_sides(runs(made, 0.0, range(3)), runs(made, 0.5, range(5, 8))), QUICK)
    skills = (-1.0, 0.5, 2.0)
    scattered = [run(made, skill, seed=5 + k) for k, skill in enumerate(skills)]
    loose = compare_runs(_sides(runs(made, 0.0, range(3)), scattered), QUICK)

    def width(found: Comparison) -> float:
        row = found.group("mAP")
        return row["B_difference_high"] - row["B_difference_low"]

    assert width(loose) > 2 * width(steady)
    assert "other seeds too (3 and 3 were compared)" in str(conclusion(loose, loose.sides[1]))


def test_several_settings_are_each_compared_with_the_first(made: World) -> None:
    a, b, c = (run(made, skill, seed=seed) for seed, skill in enumerate((0.0, 1.0, -1.0)))
    found = compare_runs(_sides([a], [b], [c]), QUICK)
    whole = found.group("mAP")
    assert whole["B_difference"] > 0 > whole["C_difference"]
    # One family of tests: more comparisons, a stricter threshold.
    alone = compare_runs(_sides([a], [b]), QUICK)
    np.testing.assert_array_equal(alone.classes["B_p"], found.classes["B_p"])
    assert found.classes["B_sure"].sum() <= alone.classes["B_sure"].sum() + found.classes["C_sure"].sum()


def test_the_verdict_names_who_gains_and_who_pays(compared: Comparison) -> None:
    said = conclusion(compared, compared.sides[1])
    # Skill rises from the most frequent class to the rarest.
    assert "frequent third" in said.headline
    assert "One training each" in said.sentences[-1]
    helped, hurt = (extremes(compared.classes, "B", sign, 4) for sign in (1, -1))
    assert (helped["B_difference"] > 0).all()
    assert (hurt["B_difference"] < 0).all()
    assert helped["B_sure"].astype(int).is_monotonic_decreasing


def test_without_truth_nothing_can_be_said() -> None:
    empty = run(world(3, 1, boxes_per_image=1), 0.0, seed=0)
    nothing = replace(empty.matches, gt_image=np.zeros(0, int), gt_class=np.zeros(0, int), gt_count=np.zeros(0))
    kept = replace(empty, matches=nothing)
    found = compare_runs(_sides([kept], [kept]), QUICK)
    assert conclusion(found, found.sides[1]).headline == "No class has ground truth: there is nothing to compare."


@pytest.mark.slow
def test_memory_grows_with_the_classes_and_not_with_their_square() -> None:
    peaks = []
    for classes in (1000, 4000):
        first, second = (run(world(classes, 40), skill, seed=1) for skill in (0.0, 1.0))
        tracemalloc.start()
        compare_runs(_sides([first], [second]), QUICK)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 8 * peaks[0]
