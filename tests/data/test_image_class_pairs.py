"""Which classes each image holds, against a loop over all boxes."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from made_index import make_index, parents_of, random_index

from retinaflow.data.image_class_pairs import image_class_pairs


def test_no_boxes_are_no_pairs() -> None:
    for index in (make_index([], classes=3), make_index([[], []], classes=3)):
        pairs = image_class_pairs(index, expand=True)
        assert len(pairs.image) == 0
        assert pairs.images_per_class.tolist() == pairs.boxes_per_class.tolist() == [0, 0, 0]
        assert pairs.max_over_classes(np.ones(3), empty=0.5).tolist() == [0.5] * len(index)


def test_images_and_boxes_of_a_class_are_counted_by_hand() -> None:
    # Class 1 has three boxes on image 0 (one of them group-of) and one on image 2; class 0 has one on image 2.
    pairs = image_class_pairs(make_index([[1, 1, 1], [], [0, 1]], classes=3, group_of=[2]))
    assert pairs.images_per_class.tolist() == [1, 2, 0]
    assert pairs.boxes_per_class.tolist() == [1, 4, 0]
    assert list(zip(pairs.image.tolist(), pairs.class_index.tolist(), pairs.boxes.tolist(), strict=True)) == [
        (0, 1, 3),
        (2, 0, 1),
        (2, 1, 1),
    ]


def test_expanded_a_box_counts_for_every_ancestor_once_and_an_image_once() -> None:
    # 0 > 1 > 3, 0 > 2 > 3. Image 0: boxes 3, 3, 1. Class 0 has 3 boxes there (not 5: two ways up are one ancestor).
    pairs = image_class_pairs(make_index([[3, 3, 1]], classes=4, links=[(0, 1), (0, 2), (1, 3), (2, 3)]), expand=True)
    assert pairs.boxes_per_class.tolist() == [3, 3, 2, 2]
    assert pairs.images_per_class.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("expand", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_pairs_agree_with_a_loop_over_all_boxes(seed: int, expand: bool) -> None:
    index = random_index(seed, classes=10)
    above = parents_of(index.taxonomy)
    expected: Counter[tuple[int, int]] = Counter()
    for row, label in enumerate(index.labels.tolist()):
        for shown in {label} | (above[label] if expand else set()):
            expected[int(index.box_image[row]), shown] += 1
    found = image_class_pairs(index, expand=expand)
    pairs = list(zip(found.image.tolist(), found.class_index.tolist(), strict=True))
    assert pairs == sorted(expected), "sorted by image, then class, each once"
    assert dict(zip(pairs, found.boxes.tolist(), strict=True)) == expected


@pytest.mark.parametrize("seed", range(3))
def test_sums_and_maxima_agree_with_a_dense_matrix(seed: int) -> None:
    pairs = image_class_pairs(random_index(seed))
    dense = np.zeros((pairs.num_images, pairs.num_classes), dtype=bool)
    dense[pairs.image, pairs.class_index] = True
    rng = np.random.default_rng(seed)
    of_class, of_image = rng.random(pairs.num_classes), rng.random(pairs.num_images)
    np.testing.assert_allclose(pairs.sum_over_classes(of_class), dense @ of_class)
    np.testing.assert_allclose(pairs.sum_over_images(of_image), dense.T @ of_image)
    largest = np.where(dense, of_class, -1.0).max(axis=1)
    np.testing.assert_array_equal(pairs.max_over_classes(of_class, empty=-1.0), largest)
