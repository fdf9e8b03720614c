"""The figures behind the report about the data, by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from made_index import make_index

from retinaflow.data import exploration
from retinaflow.data.frequency_bins import make_bins
from retinaflow.data.image_class_pairs import image_class_pairs


def test_the_table_of_classes_by_hand() -> None:
    # 0 > 1; four images, one without a box.
    index = make_index(
        [[1, 1], [1, 2], [2], []],
        classes=3,
        links=[(0, 1)],
        labelled=[[(1, True)], [(2, True), (1, False)], [(1, False)], [(0, False)]],
        group_of=[0],
    )
    given = image_class_pairs(index)
    bins = make_bins(image_class_pairs(index, expand=True), num_bins=1)
    table = exploration.class_table(index, given, bins).set_index("class")
    assert table["boxes"].to_dict() == {"c0": 0, "c1": 3, "c2": 2}
    assert table["images"].to_dict() == {"c0": 0, "c1": 2, "c2": 2}
    assert table["tree_images"].to_dict() == {"c0": 2, "c1": 2, "c2": 2}
    assert table.loc["c1", "boxes_per_image"] == 1.5
    assert np.isnan(table.loc["c0", "boxes_per_image"])
    assert table.loc["c1", "group_of"] == pytest.approx(1 / 3)
    # Every box of make_index is 0.25 x 0.5: sqrt(0.125).
    assert table.loc["c2", "median_side"] == pytest.approx(0.125**0.5)
    assert table["verified_present"].to_dict() == {"c0": 0, "c1": 1, "c2": 1}
    assert table["verified_absent"].to_dict() == {"c0": 1, "c1": 2, "c2": 0}
    # c1: boxed on 0 and 1, labelled on 0, 1, 2; c2: boxed on 1 and 2; c0: labelled on 3.
    assert table["known"].to_dict() == {"c0": 0.25, "c1": 0.75, "c2": 0.5}


def test_shares_of_images_that_classes_have_in_common() -> None:
    pairs = image_class_pairs(make_index([[0, 1], [0], [0, 1, 2], [3]], classes=5))
    found = exploration.cooccurrence(pairs, np.arange(5), np.arange(4))
    assert found.rows.tolist() == [0, 1, 2, 3], "class 4 has no image"
    np.testing.assert_allclose(found.fraction, [[1, 2 / 3, 1 / 3, 0], [1, 1, 0.5, 0], [1, 1, 1, 0], [0, 0, 0, 1]])
    # The others that are most often on the images of 2 and 3: 0 and 1, each on all images of 2 and none of 3.
    others = exploration.cooccurrence(pairs, np.array([2, 3]), most=2)
    assert others.columns.tolist() == [0, 1]
    assert exploration.cooccurrence(pairs, np.array([3])).columns.tolist() == []


def test_sides_and_aspects_of_boxes_on_a_wide_image() -> None:
    index = make_index([[0]], classes=1, sizes=[(100, 400)])
    index = replace(index, boxes=np.array([[0.0, 0.0, 0.25, 0.5]]))
    # 100 pixels wide and 50 high.
    assert exploration.box_aspects(index).tolist() == [0.5]
    np.testing.assert_allclose(exploration.box_sides(index), [0.125**0.5])
    assert np.isnan(exploration.box_aspects(make_index([[0]], classes=1))).all()


def test_the_tail_is_the_share_of_boxes_from_the_rarest_class_on() -> None:
    np.testing.assert_allclose(exploration.tail_fractions(np.array([6, 1, 3])), [0, 0.1, 0.4, 1])
    assert exploration.tail_fractions(np.zeros(2, dtype=np.int64)).tolist() == [0, 0, 0]


def test_flags_are_shares_of_the_boxes() -> None:
    shares = exploration.flag_fractions(make_index([[0, 0], [0, 0]], classes=1, group_of=[3]))
    none = dict.fromkeys(("Occluded", "Truncated", "Depiction", "Inside", "NotExhaustive"), 0)
    assert shares == {"GroupOf": 0.25, **none}


def test_buckets_count_every_image_and_say_how_far_it_is_squeezed() -> None:
    index = make_index([[0]] * 4, classes=1, sizes=[(100, 100), (100, 200), (200, 100), (100, 110)])
    shapes = exploration.fit_shapes(index, image_size=128, num_buckets=3)
    assert shapes.images.sum() == 4
    height, width = shapes.buckets.shapes[int(shapes.buckets.assign(np.array([[100, 110]]))[0])]
    assert shapes.squeeze[3] == pytest.approx(max(height / width * 1.1, width / height / 1.1))
    assert (shapes.squeeze >= 1).all()
