"""Class groups, and the images a sub-model trains on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made_index import SHARED, make_index, make_taxonomy

from retinaflow.data.class_files import read_taxonomy
from retinaflow.data.class_groups import CLOTHING, PERSON, limit_background, select_classes
from retinaflow.data.frequency_bins import make_bins
from retinaflow.data.image_class_pairs import image_class_pairs
from retinaflow.errors import SettingError
from retinaflow.taxonomy import Hierarchy, Taxonomy

META = SHARED / "oid_meta"
ids = ("/m/arm", CLOTHING, "/m/hat", "/m/car", PERSON, "/m/man", "/m/brim")
PEOPLE = Taxonomy(
    ids,
    ("Arm", "Clothing", "Hat", "Car", "Person", "Man", "Brim"),
    Hierarchy(((CLOTHING, "/m/hat"), (PERSON, "/m/man")), (("/m/man", "/m/arm"), ("/m/hat", "/m/brim")), ids),
)


@pytest.mark.parametrize(
    ("group", "names"),
    [
        ("all", ["Arm", "Clothing", "Hat", "Car", "Person", "Man", "Brim"]),
        # Parts count below Person (the arm of a man), not below Clothing (the brim of a hat).
        ("people-clothing", ["Arm", "Clothing", "Hat", "Person", "Man"]),
        ("rest", ["Car", "Brim"]),
        ("Hat", ["Hat"]),
        (" car , /m/arm ,", ["Arm", "Car"]),
        ("Car,car,/m/car", ["Car"]),
    ],
    ids=str,
)
def test_a_group_names_its_classes_in_ascending_order(group: str, names: list[str]) -> None:
    assert [PEOPLE.names[index] for index in select_classes(group, PEOPLE)] == names


@pytest.mark.parametrize(("group", "count"), [("people-clothing", 65), ("rest", 435), ("all", 500)])
@pytest.mark.skipif(not META.is_dir(), reason="the published class files are not here")
def test_people_and_clothing_are_65_of_the_500_published_classes(group: str, count: int) -> None:
    taxonomy = read_taxonomy(
        META / "challenge-2018-class-descriptions-500.csv", META / "bbox_labels_600_hierarchy.json"
    )
    assert len(select_classes(group, taxonomy)) == count


def test_a_group_may_be_a_file_with_one_class_a_line(tmp_path: Path) -> None:
    path = tmp_path / "group.txt"
    path.write_bytes(b"\xef\xbb\xbfHat\r\n\r\n/m/car\r\n")
    assert select_classes(str(path), PEOPLE).tolist() == [2, 3]
    path.write_text("Hat\n\nCarr\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"group\.txt line 3: no class has the id or name 'Carr'; did you mean Car"):
        select_classes(str(path), PEOPLE)


def test_a_list_longer_than_a_file_name_may_be_is_still_a_list() -> None:
    assert select_classes(",".join(["Hat", "Car"] * 2000), PEOPLE).tolist() == [2, 3]


def test_a_bin_is_a_group_counted_from_1_for_the_rarest() -> None:
    # Images per class: 1, 0, 3, 100; log bins between 1 and 100, cut at 10.
    pairs = image_class_pairs(make_index([[0], [2], [2], [2], *[[3]] * 100], classes=4))
    bins = make_bins(pairs, num_bins=2)
    taxonomy = make_taxonomy(4)
    assert select_classes("bin:1", taxonomy, bins).tolist() == [0, 2]
    assert select_classes("bin:2", taxonomy, bins).tolist() == [3]
    for group in ("bin:0", "bin:3", "bin:x", "bin:", "bin:-1", "bin:²", "bin:١"):
        with pytest.raises(ValueError, match=f"class_group={group}: bin:K must name a bin.*the bins are 1..2"):
            select_classes(group, taxonomy, bins)
    with pytest.raises(ValueError, match="the bins are none here"):
        select_classes("bin:1", taxonomy)


@pytest.mark.parametrize("group", ["x" * 100_000, "bin:" + "9" * 5000])
def test_a_long_group_is_cut_in_its_message(group: str) -> None:
    with pytest.raises(SettingError) as refused:
        select_classes(group, make_taxonomy(2))
    assert len(str(refused.value)) < 500


@pytest.mark.parametrize("group", ["people-clothing", "rest"])
def test_people_and_the_rest_need_people_or_clothing_among_the_classes(group: str) -> None:
    with pytest.raises(SettingError, match=rf"class_group={group}: the classes must hold Person .* but hold neither"):
        select_classes(group, make_taxonomy(2))
    only_person = Taxonomy(("/m/1", PERSON), ("Bench", "Person"))
    assert select_classes(group, only_person).tolist() == [1 if group == "people-clothing" else 0]


@pytest.mark.parametrize("group", ["", " , "])
def test_a_group_without_a_class_is_refused(group: str) -> None:
    with pytest.raises(ValueError, match="the group must hold at least one of the 2 classes"):
        select_classes(group, make_taxonomy(2))


def test_an_ambiguous_name_in_a_group_is_refused_with_its_ids() -> None:
    taxonomy = Taxonomy(("/m/1", "/m/2"), ("Bench", "Bench"))
    with pytest.raises(ValueError, match=r"class_group=Bench: .* is not unique; use one of the ids /m/1, /m/2"):
        select_classes("Bench", taxonomy)


def test_background_images_are_limited_and_verified_negatives_come_first() -> None:
    # Images 0 and 1 have boxes; 3 and 5 are verified absent, 2 is verified present without a box, 4 and 6 say nothing.
    index = make_index(
        [[0], [0, 0], [], [], [], [], []],
        classes=1,
        labelled=[[], [], [(0, True)], [(0, False)], [], [(0, False)], []],
    )
    chosen, images, seen = limit_background(index, ratio=1.0, seed=0)
    assert images.tolist() == [0, 1, 3, 5]
    assert chosen.image_ids.tolist() == ["i0000", "i0001", "i0003", "i0005"]
    assert (seen.boxed, seen.verified_absent, seen.verified_absent_in_all) == (2, 2, 2)
    assert (seen.others, seen.others_in_all, seen.background_ratio) == (0, 3, 1.0)
    assert str(seen) == (
        "2 images with boxes of the group; background 2 of 2 verified absent and 0 of 3 others, "
        "1.00 per image with boxes"
    )
    for seed in range(5):
        assert set(limit_background(index, ratio=1.5, seed=seed)[1].tolist()) > {0, 1, 3, 5}


def test_in_an_exhaustive_set_all_background_is_verified_absent() -> None:
    index = replace(make_index([[0], [0], [], [], []], classes=1), all_known=True)
    _, _, seen = limit_background(index, ratio=1.0, seed=0)
    assert (seen.verified_absent, seen.verified_absent_in_all, seen.others_in_all) == (2, 3, 0)


@pytest.mark.parametrize(("ratio", "background"), [(0.0, 0), (0.25, 5), (1.0, 20), (9.0, 100)])
def test_the_ratio_is_images_without_boxes_to_images_with(ratio: float, background: int) -> None:
    index = make_index([[0]] * 20 + [[]] * 100, classes=1)
    _, images, seen = limit_background(index, ratio=ratio, seed=3)
    assert seen.background_ratio == background / 20
    assert np.count_nonzero(images < 20) == 20
    assert np.count_nonzero(images >= 20) == background


def test_the_draw_of_background_images_goes_by_the_seed_alone() -> None:
    index = make_index([[0]] * 5 + [[]] * 100, classes=1)
    first = limit_background(index, ratio=2, seed=1)[1]
    np.random.seed(5)  # noqa: NPY002  (the point of the test)
    state = str(np.random.get_state())  # noqa: NPY002
    np.testing.assert_array_equal(limit_background(index, ratio=2, seed=1)[1], first)
    assert str(np.random.get_state()) == state  # noqa: NPY002
    assert limit_background(index, ratio=2, seed=2)[1].tolist() != first.tolist()
