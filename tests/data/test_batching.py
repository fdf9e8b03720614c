"""Aspect buckets, and batches of one shape that hold every image of the plan once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retinaflow.data.batching import MULTIPLE, AspectBuckets, PlannedBatch, plan_batches

BUCKETS = AspectBuckets(((32, 96), (64, 64), (96, 32)))


def sizes_of(count: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(40, 1200, (count, 2))


def test_shapes_are_height_and_width_from_wide_to_tall() -> None:
    # 100 images of 480 x 960 and 100 of 960 x 480 (height, width): log aspect -0.69 and 0.69.
    sizes = np.array([(480, 960)] * 100 + [(960, 480)] * 100)
    # Area 200^2 and aspect 1/2 is 141.4 x 282.8; the multiples of 32 around it are 128 or 160 x 256 or 288. Errors in
    # log area + log aspect: 128 x 256: 0.200 + 0; 128 x 288: 0.082 + 0.118; 160 x 256: 0.024 + 0.223; 160 x 288: 0.142
    # + 0.105. The least, by rounding both sides down or one up, is 0.200, and of two as good the first is taken.
    buckets = AspectBuckets.fit(sizes, image_size=200, num_buckets=2)
    wide, tall = buckets.shapes
    assert wide[0] < wide[1], "the first bucket is wide: its height is less than its width"
    assert tall == wide[::-1]
    assert wide == (128, 256)
    assert buckets.assign(sizes).tolist() == [0] * 100 + [1] * 100


def test_one_bucket_takes_the_median_shape() -> None:
    sizes = np.array([(300, 300), (300, 600), (300, 600), (300, 600), (3000, 30)])
    # The mean aspect would be that of a tall image; the median is 1 / 2: 64 x 128 has exactly the area 90.5^2.
    assert AspectBuckets.fit(sizes, image_size=90, num_buckets=1).shapes == ((64, 128),)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(20, 5000), st.integers(20, 5000)), min_size=1, max_size=40),
    image_size=st.sampled_from([64, 128, 320, 640]),
    num_buckets=st.integers(1, 9),
)
def test_buckets_are_distinct_multiples_of_32_in_order_and_every_image_gets_the_nearest(
    sizes: list[tuple[int, int]], image_size: int, num_buckets: int
) -> None:
    array = np.array(sizes)
    buckets = AspectBuckets.fit(array, image_size=image_size, num_buckets=num_buckets)
    assert 1 <= len(buckets.shapes) <= num_buckets
    assert all(side > 0 and side % MULTIPLE == 0 for shape in buckets.shapes for side in shape)
    aspects = [np.log(height / width) for height, width in buckets.shapes]
    assert aspects == sorted(set(aspects)), "from wide to tall, no two alike"
    for (height, width), chosen in zip(sizes, buckets.assign(array), strict=True):
        distance = [abs(np.log(height / width) - aspect) for aspect in aspects]
        assert distance[chosen] == min(distance)


@pytest.mark.parametrize("num_buckets", [3, 5, 9])
def test_buckets_have_about_the_asked_area(num_buckets: int) -> None:
    aspect = np.linspace(-1, 1, 500)
    sizes = np.stack([1000 * np.exp(aspect / 2), 1000 * np.exp(-aspect / 2)], axis=1).astype(int)
    buckets = AspectBuckets.fit(sizes, image_size=640, num_buckets=num_buckets)
    assert len(buckets.shapes) == num_buckets
    assert all(0.9 < height * width / 640**2 < 1.1 for height, width in buckets.shapes)


def test_one_odd_image_in_a_thousand_moves_no_bucket() -> None:
    sizes = np.array([(480, 640)] * 500 + [(640, 480)] * 500)
    odd = np.concatenate([sizes, [(10, 5000)]])
    assert (
        AspectBuckets.fit(odd, image_size=320, num_buckets=3).shapes
        == AspectBuckets.fit(sizes, image_size=320, num_buckets=3).shapes
    )


def test_an_empty_plan_makes_no_batches() -> None:
    assert plan_batches(np.zeros(0, np.int64), np.zeros(3, np.int64), BUCKETS, batch_size=2) == []


def test_batches_by_hand_stand_where_their_last_image_was_drawn_and_leftovers_come_last() -> None:
    # Buckets of images 0 to 5: 0 1 0 1 2 0. Plan 5 1 0 4 3 2: bucket 0 has draws 0, 2 and 5; bucket 1 draws 1 and 4;
    # bucket 2 draw 3. Batches of two: (draws 0, 2), (1, 4); left over: 5 of bucket 0 and 3 of bucket 2, in this order
    # of shape; the bucket of the middle one (of two: the second) is 2.
    plan = np.array([5, 1, 0, 4, 3, 2])
    batches = plan_batches(plan, np.array([0, 1, 0, 1, 2, 0]), BUCKETS, batch_size=2)
    assert [(batch.shape, batch.images.tolist(), batch.positions.tolist()) for batch in batches] == [
        ((32, 96), [5, 0], [0, 2]),
        ((64, 64), [1, 3], [1, 4]),
        ((96, 32), [2, 4], [5, 3]),
    ]


def batches_of_all_ranks(
    plan: np.ndarray, bucket_of_image: np.ndarray, batch_size: int, world_size: int
) -> list[list[PlannedBatch]]:
    return [
        plan_batches(plan, bucket_of_image, BUCKETS, batch_size=batch_size, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]


@settings(max_examples=120, deadline=None)
@given(
    buckets=st.lists(st.integers(0, 2), min_size=1, max_size=12),
    draws=st.lists(st.integers(0, 11), max_size=60),
    batch_size=st.integers(1, 5),
    world_size=st.integers(1, 4),
)
def test_the_union_of_all_ranks_is_the_plan_and_all_have_equally_many_batches(
    buckets: list[int], draws: list[int], batch_size: int, world_size: int
) -> None:
    plan = np.array([draw % len(buckets) for draw in draws], dtype=np.int64)
    if 0 < len(plan) < world_size:
        return
    bucket_of_image = np.array(buckets)
    ranks = batches_of_all_ranks(plan, bucket_of_image, batch_size, world_size)
    every = [batch for own in ranks for batch in own]
    assert sorted(position for batch in every for position in batch.positions.tolist()) == list(range(len(plan)))
    assert all(batch.images.tolist() == plan[batch.positions].tolist() for batch in every)
    assert len({len(own) for own in ranks}) == 1
    assert all(0 < len(batch.images) <= batch_size + 1 for batch in every)
    # Ranks together: batch norm has more than one image, unless one is all that there is or was asked for.
    least = min(len(plan), 2 if batch_size * world_size > 1 else 1)
    assert all(sum(len(batch.images) for batch in together) >= least for together in zip(*ranks, strict=True))
    for together in zip(*ranks, strict=True):
        assert len({batch.shape for batch in together}) == 1, "the ranks do the same work at the same time"
        lengths = [len(batch.images) for batch in together]
        assert max(lengths) - min(lengths) <= 1
    # All but the left-over batches are full and of their images' own bucket.
    mixed = [
        batch
        for batch in every
        if len(batch.images) != batch_size
        or any(BUCKETS.shapes[bucket_of_image[image]] != batch.shape for image in batch.images)
    ]
    assert len(mixed) <= 4 * world_size


@pytest.mark.parametrize(
    ("images", "batch_size", "expected"),
    [(5, 4, [3, 2]), (6, 5, [3, 3]), (3, 2, [3]), (7, 2, [2, 2, 3]), (3, 1, [1, 1, 1]), (1, 4, [1]), (6, 4, [4, 2])],
)
def test_an_odd_image_is_trained_on_with_others(images: int, batch_size: int, expected: list[int]) -> None:
    batches = plan_batches(np.arange(images), np.zeros(images, np.int64), BUCKETS, batch_size=batch_size)
    assert [len(batch.images) for batch in batches] == expected


def test_an_epoch_of_fewer_images_than_ranks_is_refused() -> None:
    with pytest.raises(ValueError, match="an epoch must have an image per rank, but got images=2, nproc=3"):
        plan_batches(np.array([0, 1]), np.zeros(2, np.int64), BUCKETS, batch_size=4, rank=0, world_size=3)


def test_a_repeated_image_stands_once_for_every_draw() -> None:
    plan = np.array([7, 7, 7, 7, 7])
    batches = plan_batches(plan, np.zeros(8, np.int64), BUCKETS, batch_size=2)
    assert sorted(position for batch in batches for position in batch.positions.tolist()) == [0, 1, 2, 3, 4]
    assert all((batch.images == 7).all() for batch in batches)


def test_the_same_plan_makes_the_same_batches() -> None:
    plan = np.random.default_rng(0).integers(0, 500, 500)
    bucket_of_image = BUCKETS.assign(sizes_of(500))
    first, second = (plan_batches(plan, bucket_of_image, BUCKETS, batch_size=8) for _ in range(2))
    assert len(first) == 63, "500 = 62 x 8 + 4"
    for a, b in zip(first, second, strict=True):
        assert a.shape == b.shape
        np.testing.assert_array_equal(a.positions, b.positions)
