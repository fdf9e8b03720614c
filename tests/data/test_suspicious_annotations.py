"""Rows that look wrong: each rule by hand, and all of them against a double loop."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from made_index import SHARED, make_index, parents_of, random_index

from retinaflow.data.index import AnnotationIndex
from retinaflow.data.openimages import find_files, read_annotations
from retinaflow.data.suspicious_annotations import WHOLE, suspicions, suspicious_table
from retinaflow.data.tables import RowErrors


def found(index: AnnotationIndex) -> dict[str, list[int]]:
    return {suspicion.rule: suspicion.rows.tolist() for suspicion in suspicions(index)}


def with_boxes(index: AnnotationIndex, *boxes: tuple[float, float, float, float]) -> AnnotationIndex:
    return replace(index, boxes=np.array(boxes, dtype=np.float64).reshape(-1, 4))


def test_nothing_is_suspicious_in_an_empty_index() -> None:
    assert set(map(len, found(make_index([], classes=2)).values())) == {0}


def test_a_tiny_box_is_one_of_less_than_four_pixels_on_a_side() -> None:
    # Image of height 100 and width 400: 0.03 is 3 pixels high but 12 wide, 0.0075 is 3 wide.
    index = make_index([[0, 0, 0]], classes=1, sizes=[(100, 400)])
    index = with_boxes(index, (0.1, 0.1, 0.13, 0.5), (0.1, 0.1, 0.5, 0.13), (0.1, 0.1, 0.1075, 0.5))
    assert found(index)["tiny box"] == [1, 2]
    # Without sizes: a side below 0.004 of the image's.
    without = with_boxes(make_index([[0, 0]], classes=1), (0.1, 0.1, 0.1039, 0.5), (0.1, 0.1, 0.1041, 0.5))
    assert found(without)["tiny box"] == [0]


def test_a_box_that_comes_again_to_a_thousandth_is_repeated_in_its_class_and_image_only() -> None:
    index = make_index([[0, 0, 1], [0]], classes=2)
    place = (0.1, 0.2, 0.3, 0.4)
    index = with_boxes(index, place, (0.1001, 0.2, 0.3, 0.4), place, place)
    assert found(index)["repeated box"] == [1]


def test_the_same_place_as_a_child_and_its_ancestor_is_told_at_the_child() -> None:
    # 0 > 1 > 2; class 3 is related to none.
    index = make_index([[0, 2, 3], [2]], classes=4, links=[(0, 1), (1, 2)])
    index = with_boxes(index, *[(0.1, 0.2, 0.3, 0.4)] * 4)
    assert found(index)["child and parent"] == [1]


def test_a_box_over_the_whole_image_is_excused_by_group_of_and_inside() -> None:
    index = make_index([[0, 0, 0, 0]], classes=1, group_of=[1])
    index = with_boxes(index, *[(0.0, 0.0, 1.0, 1.0)] * 3, (0.0, 0.0, 1.0, WHOLE - 0.01))
    index.flags[2] = 1 << 4
    assert found(index)["whole image"] == [0]


def test_labels_and_boxes_that_contradict_each_other_are_told() -> None:
    # 0 > 1. Image 0: absent 0, box of its child 1. Image 1: absent 1 says nothing of a box of 0. Image 2: both labels.
    index = make_index(
        [[1], [0], []],
        classes=2,
        links=[(0, 1)],
        labelled=[[(0, False)], [(1, False)], [(1, True), (1, False), (0, True)]],
    )
    rules = found(index)
    assert rules["class verified absent"] == [0]
    assert rules["both present and absent"] == [3]
    # Nothing is boxed on image 2; on image 1 a box of 1 would do for the parent 0.
    assert rules["present without a box"] == [2, 4]


@pytest.mark.parametrize("seed", range(5))
def test_the_rules_about_classes_agree_with_a_double_loop(seed: int) -> None:
    index = random_index(seed)
    above = parents_of(index.taxonomy)
    absent = {
        (int(i), int(c))
        for i, c, present in zip(index.label_image, index.verified_class, index.verified_present, strict=True)
        if not present
    }
    boxed = {
        (int(i), c)
        for i, label in zip(index.box_image, index.labels.tolist(), strict=True)
        for c in {label} | above[label]
    }
    wrong = [
        row
        for row, (i, label) in enumerate(zip(index.box_image, index.labels.tolist(), strict=True))
        if any((int(i), c) in absent for c in {label} | above[label])
    ]
    without = [
        row
        for row, (i, c, present) in enumerate(
            zip(index.label_image, index.verified_class.tolist(), index.verified_present, strict=True)
        )
        if present and (int(i), c) not in boxed
    ]
    rules = found(index)
    assert rules["class verified absent"] == wrong
    assert rules["present without a box"] == without
    assert wrong or without


def test_the_table_names_image_class_and_corners_and_keeps_to_its_limit() -> None:
    index = with_boxes(make_index([[0], [1, 1]], classes=2), *[(0.0, 0.0, 1.0, 1.0)] * 3)
    whole = next(suspicion for suspicion in suspicions(index) if suspicion.rule == "whole image")
    table = suspicious_table(index, whole, most=2)
    assert table.to_numpy().tolist() == [
        ["whole image", "i0000", "c0", "/m/0", 0.0, 0.0, 1.0, 1.0],
        ["whole image", "i0001", "c1", "/m/1", 0.0, 0.0, 1.0, 1.0],
    ]


@pytest.mark.skipif(not (SHARED / "bccd").is_dir(), reason="the blood cell data is not here")
def test_the_blood_cells_hold_no_repeated_boxes() -> None:
    index = read_annotations(find_files(SHARED / "bccd", ["train"]), RowErrors(), progress=lambda text: None)
    assert found(index)["child and parent"] == found(index)["class verified absent"] == []
