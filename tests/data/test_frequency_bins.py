"""Frequency bins by every strategy."""

from __future__ import annotations

import json
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_index import presence_of

from retinaflow.data.frequency_bins import ClassBins, make_bins
from retinaflow.data.image_class_pairs import ImageClassPairs
from retinaflow.settings.data_settings import BinStrategy

STRATEGIES: tuple[BinStrategy, ...] = ("log", "quantile", "jenks")


def numbers(bins: ClassBins) -> list[int]:
    return bins.bin_of_class.tolist()


counts_strategy = st.lists(st.integers(0, 300), min_size=1, max_size=12).filter(any)


@pytest.mark.parametrize(
    ("strategy", "num_bins", "expected"),
    [
        # The cut is at 10^((log10 4 + log10 1000) / 2) = sqrt(4 x 1000) = 63.2.
        ("log", 2, [0, 0, 0, 1, 1]),
        # 4 x 250^(1/3) = 25.2 and 4 x 250^(2/3) = 158.7.
        ("log", 3, [0, 0, 1, 1, 2]),
        # Five classes in two parts: three and two.
        ("quantile", 2, [0, 0, 0, 1, 1]),
        ("quantile", 3, [0, 0, 1, 1, 2]),
        # log10: 0.60, 0.95, 1.60, 2.00, 3.00. Cut after 2 classes: 0.062 + 1.04 = 1.10; after 3: 0.51 + 0.50 = 1.01;
        # after 4: 1.20 + 0 = 1.20. The least is after 3.
        ("jenks", 2, [0, 0, 0, 1, 1]),
        # Three bins: (4, 9) (40, 100) (1000): 0.062 + 0.079 + 0 is the least.
        ("jenks", 3, [0, 0, 1, 1, 2]),
        *((strategy, 1, [0] * 5) for strategy in STRATEGIES),
    ],
)
def test_five_classes_are_binned_by_hand(strategy: BinStrategy, num_bins: int, expected: list[int]) -> None:
    bins = make_bins(presence_of([4, 9, 40, 100, 1000]), num_bins=num_bins, strategy=strategy)
    assert numbers(bins) == expected
    assert bins.num_bins == bins.asked == num_bins
    assert bins.edges[0] == 4
    assert bins.edges[-1] == 1001


def test_bins_do_not_depend_on_the_order_of_the_classes() -> None:
    counts = [100, 4, 0, 1000, 9, 40]
    assert numbers(make_bins(presence_of(counts), num_bins=3)) == [1, 0, -1, 2, 0, 1]


def test_explicit_edges_override_strategy_and_number() -> None:
    # edges[b] <= n < edges[b + 1]: a class of exactly 40 images is in the bin that begins at 40.
    bins = make_bins(presence_of([4, 39, 40, 0, 500]), num_bins=7, edges=[40, 300])
    assert numbers(bins) == [0, 0, 1, -1, 2]
    assert bins.strategy == "edges"
    assert bins.asked == 3
    assert bins.edges.tolist() == [4, 40, 300, 501]


def test_bins_that_would_be_empty_are_merged_and_the_rest_numbered_on() -> None:
    # Edges 2, 10, 20, 100, 999 make the bins [.., 2) [2, 10) [10, 20) [20, 100) [100, 999) [999, ..): only the second,
    # the fourth and the fifth hold a class.
    bins = make_bins(presence_of([5, 50, 60, 200]), edges=[2, 10, 20, 100, 999])
    assert numbers(bins) == [0, 1, 1, 2]
    assert bins.num_bins == 3
    assert bins.asked == 6
    assert bins.edges.tolist() == [5, 20, 100, 201]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("num_bins", [1, 2, 7, 500])
def test_classes_of_one_frequency_make_one_bin(strategy: BinStrategy, num_bins: int) -> None:
    bins = make_bins(presence_of([7, 7, 0, 7]), num_bins=num_bins, strategy=strategy)
    assert numbers(bins) == [0, 0, -1, 0]
    assert bins.asked == num_bins
    assert bins.rarity(0.75).tolist() == [0, 0, 0, 0]


@settings(max_examples=80, deadline=None)
@given(counts=counts_strategy, num_bins=st.integers(1, 14), strategy=st.sampled_from(STRATEGIES))
def test_every_binning_is_a_partition_that_follows_its_edges(
    counts: list[int], num_bins: int, strategy: BinStrategy
) -> None:
    bins = make_bins(presence_of(counts), num_bins=num_bins, strategy=strategy)
    images = np.array(counts)
    assert set(bins.bin_of_class[images > 0].tolist()) == set(range(bins.num_bins)), "no bin is empty"
    assert 1 <= bins.num_bins <= min(num_bins, len(set(counts) - {0}))
    assert (bins.bin_of_class[images == 0] == -1).all()
    assert bins.empty_classes.tolist() == np.flatnonzero(images == 0).tolist()
    assert (np.diff(bins.edges) > 0).all()
    for count, number in zip(counts, numbers(bins), strict=True):
        if count:
            assert bins.edges[number] <= count < bins.edges[number + 1]
    held = [images[bins.bin_of_class == b] for b in range(bins.num_bins)]
    assert bins.medians().tolist() == [float(np.median(part)) for part in held]


def squared_deviations(parts: list[list[int]]) -> float:
    return sum(float(np.square(np.log10(part) - np.log10(part).mean()).sum()) for part in parts)


@settings(max_examples=60, deadline=None)
@given(counts=st.lists(st.integers(1, 400), min_size=1, max_size=9), num_bins=st.integers(1, 5))
def test_jenks_has_the_least_deviation_of_all_ways_to_cut(counts: list[int], num_bins: int) -> None:
    bins = make_bins(presence_of(counts), num_bins=num_bins, strategy="jenks")
    found = [[n for n, b in zip(counts, numbers(bins), strict=True) if b == number] for number in range(bins.num_bins)]
    ordered = sorted(counts)
    best = min(
        squared_deviations([ordered[a:b] for a, b in zip((0, *cuts), (*cuts, len(ordered)), strict=True)])
        for size in range(min(num_bins, len(counts)))
        for cuts in combinations(range(1, len(ordered)), size)
    )
    assert squared_deviations(found) == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize("num_bins", range(1, 10))
def test_quantile_bins_of_distinct_classes_differ_by_at_most_one_class(num_bins: int) -> None:
    bins = make_bins(presence_of([k * k + 1 for k in range(20)]), num_bins=num_bins, strategy="quantile")
    sizes = np.bincount(bins.bin_of_class)
    assert len(sizes) == num_bins
    assert sizes.max() - sizes.min() <= 1


@pytest.mark.parametrize(
    ("balance", "expected"),
    [
        # T = 100: log(100 / 10) / log(100 / 1) = 1/2.
        (1.0, [1.0, 0.5, 0.0, 0.0]),
        # T = 10, halfway in rank between 1 and 100: the second bin is not lifted.
        (0.5, [1.0, 0.0, 0.0, 0.0]),
        # T = 1 lifts nothing; the rarest bin stays the rarest.
        (0.0, [1.0, 0.0, 0.0, 0.0]),
    ],
)
def test_rarity_falls_from_1_for_the_rarest_bin_to_0_at_the_exposure_target(
    balance: float, expected: list[float]
) -> None:
    bins = make_bins(presence_of([1, 10, 100, 0]), num_bins=3)
    assert bins.rarity(balance) == pytest.approx(expected), "a class without an image has rarity 0"


def test_the_most_frequent_bin_has_rarity_0_even_if_classes_of_it_are_below_the_target() -> None:
    # Bins (1) (40, 100): median 70 below T = 100.
    bins = make_bins(presence_of([1, 40, 100]), num_bins=2)
    assert bins.rarity(1.0).tolist() == [1.0, 0.0, 0.0]


def test_images_and_boxes_per_class_are_kept() -> None:
    bins = make_bins(presence_of([1, 10, 0]))
    assert bins.images_per_class.tolist() == [1, 10, 0]
    assert bins.boxes_per_class.tolist() == [2, 20, 0]


@pytest.mark.parametrize(
    ("counts", "num_bins", "edges", "message"),
    [
        ([0, 0], 7, [], "at least one class must have a training image, but none has any"),
        ([], 7, [], "at least one class must have a training image"),
        ([3, 4], 0, [], "num_bins >= 1 must hold, but got num_bins=0"),
        ([3, 4], 7, [10.0, 5.0], "bin edges must ascend, but got 10.0, 5.0"),
        ([3, 4], 7, [5.0, 5.0], "bin edges must ascend, but got 5.0, 5.0"),
    ],
    ids=["no image", "no class", "no bins", "descending", "equal"],
)
def test_bins_that_cannot_be_made_are_refused(
    counts: list[int], num_bins: int, edges: list[float], message: str
) -> None:
    pairs = (
        presence_of(counts) if counts else ImageClassPairs(*(np.zeros(0, np.int32),) * 2, np.zeros(0, np.int64), 0, 0)
    )
    with pytest.raises(ValueError, match=message):
        make_bins(pairs, num_bins=num_bins, edges=edges)


def test_a_document_gives_the_same_bins_back_and_counts_from_1() -> None:
    bins = make_bins(presence_of([1, 0, 10, 100]), num_bins=3, strategy="jenks")
    document = json.loads(json.dumps(bins.to_document(["a", "b", "c", "d"])))
    assert [row["bin"] for row in document["classes"]] == [1, None, 2, 3]
    again = ClassBins.from_document(document)
    assert again.to_document(["a", "b", "c", "d"]) == document
    assert numbers(again) == numbers(bins)
