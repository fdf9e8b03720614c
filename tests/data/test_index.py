"""The index of annotations: selections against slow loops, what is known on an image, and the way to disk and back."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made_index import boxes_of, labels_of, make_index, make_taxonomy, parents_of, random_index

from retinaflow.data.column_store import FORMAT
from retinaflow.data.index import AnnotationIndex, row_starts
from retinaflow.data.known_classes import known_classes, with_absent_labels
from retinaflow.taxonomy import Hierarchy, Taxonomy

COLUMNS = ("image_ids", "files", "sizes", "box_start", "boxes", "labels", "flags", "label_start")
VERIFIED = ("verified_class", "verified_present")


def assert_same(a: AnnotationIndex, b: AnnotationIndex) -> None:
    assert a.taxonomy.to_document() == b.taxonomy.to_document()
    for name in COLUMNS + VERIFIED:
        first, second = getattr(a, name), getattr(b, name)
        assert first.dtype.kind == second.dtype.kind, name
        np.testing.assert_array_equal(first, second, err_msg=name)


def test_an_index_without_images_can_be_asked_everything() -> None:
    empty = make_index([], classes=3)
    assert len(empty) == 0
    assert len(empty.take(np.zeros(0, dtype=np.int64))) == 0
    assert empty.with_classes(np.array([2, 0])).num_classes == 2
    assert len(with_absent_labels(empty).verified_class) == 0
    assert len(empty.digest) == 64


def test_row_starts_by_hand_give_empty_owners_empty_ranges() -> None:
    assert row_starts(np.array([0, 0, 2]), 4).tolist() == [0, 2, 2, 3, 3]
    assert row_starts(np.zeros(0, dtype=np.int64), 0).tolist() == [0]


@pytest.mark.parametrize("seed", range(4))
def test_take_gives_the_chosen_images_with_their_rows_and_nothing_else(seed: int) -> None:
    index = random_index(seed)
    chosen = np.random.default_rng(seed).choice(len(index), 11, replace=False)
    taken = index.take(np.concatenate([chosen, chosen[:3]]))
    wanted = [str(index.image_ids[image]) for image in sorted(chosen)]
    assert taken.image_ids.tolist() == wanted, "ascending, each once"
    assert boxes_of(taken) == {name: boxes_of(index)[name] for name in wanted}
    assert labels_of(taken) == {name: labels_of(index)[name] for name in wanted}


@pytest.mark.parametrize("seed", range(4))
def test_taking_all_images_changes_nothing(seed: int) -> None:
    index = random_index(seed)
    assert_same(index.take(np.arange(len(index))), index)


@pytest.mark.parametrize("classes", [[0], [6, 2, 3], [7, 6, 5, 4, 3, 2, 1, 0]], ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_some_classes_alone_expand_to_what_they_are_in_the_whole(seed: int, classes: list[int]) -> None:
    index = random_index(seed)
    chosen = index.with_classes(np.array(classes))
    assert chosen.taxonomy.ids == tuple(f"/m/{number}" for number in classes), "class k is classes[k]"
    assert chosen.image_ids.tolist() == index.image_ids.tolist(), "every image stays"
    for image in range(len(index)):
        assert known_classes(chosen, image).tolist() == known_classes(index, image)[classes].tolist()
        whole = {row for row in slowly_expanded(index, image) if row[0] in chosen.taxonomy.index_of}
        assert slowly_expanded(chosen, image) == whole


def slowly_expanded(index: AnnotationIndex, image: int) -> set[tuple[str, tuple[float, ...]]]:
    """(class id, box) of every box of an image and of all ancestors of its class."""
    found = set()
    for row in range(index.box_start[image], index.box_start[image + 1]):
        label = int(index.labels[row])
        for of_class in [label, *index.taxonomy.ancestors(label)]:
            found.add((index.taxonomy.ids[of_class], tuple(index.boxes[row])))
    return found


def test_what_is_known_by_hand_goes_up_for_present_and_down_for_absent() -> None:
    # 0 > 1 > 2 and 3 > 4. Image 0: class 1 present, so 0 too. Image 1: class 1 absent, so 2 too. Image 2: a box of 2,
    # so 1 and 0. Image 3: nothing. Image 4: class 3 absent, so 4 too, and class 2 absent.
    index = make_index(
        [[], [], [2], [], []],
        classes=5,
        links=[(0, 1), (1, 2), (3, 4)],
        labelled=[[(1, True)], [(1, False)], [], [], [(3, False), (2, False)]],
    )
    known = [np.flatnonzero(known_classes(index, image)).tolist() for image in range(5)]
    assert known == [[0, 1], [1, 2], [0, 1, 2], [], [2, 3, 4]]


def test_a_class_that_is_not_exhaustive_and_its_ancestors_are_not_known() -> None:
    # 0 > 1 > 2 and 3 alone. Image 0: of its two boxes of 1 the second one has the flag. Image 1: a box of 2 without it.
    # Image 2: a box of 3 with it, and 2 is absent.
    index = make_index(
        [[1, 1, 3], [2], [3]], classes=4, links=[(0, 1), (1, 2)], labelled=[[(0, True), (2, False)], [], [(2, False)]]
    )
    index = replace(index, flags=np.array([0, 32, 0, 0, 32], dtype=np.uint8))
    known = [np.flatnonzero(known_classes(index, image)).tolist() for image in range(3)]
    assert known == [[2, 3], [0, 1, 2], [2]]
    assert index.is_not_exhaustive.tolist() == [False, True, False, False, True]
    # The flag stays with its box.
    for part in (index.take(np.array([0])), index.with_classes(np.array([0]))):
        assert np.flatnonzero(part.is_not_exhaustive).tolist() == [1]
    assert known_classes(index.with_classes(np.array([0])), 0).tolist() == [False]
    # Every object of an exhaustive set has a box.
    for full in (replace(index, all_known=True), with_absent_labels(index)):
        assert all(known_classes(full, image).all() for image in range(3))
        assert not full.is_not_exhaustive.any()
    assert len(with_absent_labels(index).verified_class) == 3 + 1 + 2, "boxed classes get no label"


def slowly_known(index: AnnotationIndex, image: int) -> set[int]:
    above = parents_of(index.taxonomy)
    known: set[int] = set()
    for row in range(index.box_start[image], index.box_start[image + 1]):
        known |= {int(index.labels[row])} | above[int(index.labels[row])]
    for row in range(index.label_start[image], index.label_start[image + 1]):
        label = int(index.verified_class[row])
        below = {child for child in above if label in above[child]}
        known |= {label} | (above[label] if index.verified_present[row] else below)
    return known


@pytest.mark.parametrize("seed", range(4))
def test_what_is_known_agrees_with_a_slow_loop(seed: int) -> None:
    index = random_index(seed)
    for image in range(len(index)):
        assert set(np.flatnonzero(known_classes(index, image)).tolist()) == slowly_known(index, image)


@pytest.mark.parametrize("seed", range(4))
def test_filling_in_adds_an_absent_label_for_every_unknown_class_and_no_other(seed: int) -> None:
    index = random_index(seed)
    full = with_absent_labels(index)
    assert all(known_classes(full, image).all() for image in range(len(full)))
    assert boxes_of(full) == boxes_of(index)
    before, after = labels_of(index), labels_of(full)
    for image, name in enumerate(before):
        unknown = set(range(index.num_classes)) - slowly_known(index, image)
        assert after[name] == before[name] + [(f"/m/{label}", False) for label in sorted(unknown)]


def test_box_image_and_label_image_name_the_owner_of_every_row() -> None:
    index = make_index([[0, 1], [], [1]], classes=2, labelled=[[], [(0, True)], [(1, False)]])
    assert index.box_image.tolist() == [0, 0, 2]
    assert index.label_image.tolist() == [1, 2]


def test_a_saved_index_opened_again_is_the_same_and_is_mapped(tmp_path: Path) -> None:
    index = replace(
        random_index(1),
        sizes=np.arange(60, dtype=np.int32).reshape(30, 2),
        files=np.array([f"sub/{number}.jpg" for number in range(30)]),
        images_folder="/somewhere",
    )
    index.save(tmp_path / "deep" / "index", notes={"dropped": [["a.csv", 3]]})
    again = AnnotationIndex.open(tmp_path / "deep" / "index")
    assert_same(again, index)
    assert again.digest == index.digest
    assert again.file_of(4) == Path("/somewhere/sub/4.jpg")
    assert again.notes == {"dropped": [["a.csv", 3]]}
    assert isinstance(again.boxes, np.memmap)
    assert not again.boxes.flags.writeable
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["index"], "nothing is left beside it"


def test_an_index_without_images_survives_the_way_to_disk(tmp_path: Path) -> None:
    empty = make_index([], classes=2)
    empty.save(tmp_path / "index")
    assert_same(AnnotationIndex.open(tmp_path / "index"), empty)


def test_saving_again_replaces_the_index_that_stands_there(tmp_path: Path) -> None:
    random_index(1).save(tmp_path / "index")
    random_index(2).save(tmp_path / "index")
    assert_same(AnnotationIndex.open(tmp_path / "index"), random_index(2))
    assert len(list(tmp_path.iterdir())) == 1


def test_a_failed_save_leaves_the_index_that_stands_there_alone(tmp_path: Path) -> None:
    random_index(1).save(tmp_path / "index")
    with pytest.raises(TypeError):
        random_index(2).save(tmp_path / "index", notes={"no JSON": object()})
    assert_same(AnnotationIndex.open(tmp_path / "index"), random_index(1))
    assert len(list(tmp_path.iterdir())) == 1


FILES = [*(f"{name}.npy" for name in COLUMNS + VERIFIED), "index.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("where", [0.3, 0.99], ids=["near the start", "near the end"])
def test_a_flipped_bit_in_any_file_is_noticed(name: str, where: float, tmp_path: Path) -> None:
    random_index(1).save(tmp_path / "index")
    file = tmp_path / "index" / name
    content = bytearray(file.read_bytes())
    content[int(where * len(content))] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged|not a saved index|not the 2 this version reads"):
        AnnotationIndex.open(tmp_path / "index")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", [None, b"", b"[]"], ids=["missing", "empty", "other"])
def test_a_missing_or_emptied_file_is_noticed(name: str, content: bytes | None, tmp_path: Path) -> None:
    random_index(1).save(tmp_path / "index")
    (tmp_path / "index" / name).unlink() if content is None else (tmp_path / "index" / name).write_bytes(content)
    with pytest.raises(ValueError, match=str(tmp_path / "index")):
        AnnotationIndex.open(tmp_path / "index")


def test_an_index_of_another_format_is_not_opened(tmp_path: Path) -> None:
    random_index(1).save(tmp_path / "index")
    document = json.loads((tmp_path / "index" / "index.json").read_text(encoding="utf-8"))
    (tmp_path / "index" / "index.json").write_text(json.dumps(document | {"format": 1}), encoding="utf-8")
    with pytest.raises(ValueError, match=f"index format 1 is not the {FORMAT} this version reads"):
        AnnotationIndex.open(tmp_path / "index")


def test_a_pickled_opened_index_is_its_path_and_maps_the_same_files(tmp_path: Path) -> None:
    random_index(1, images=2000).save(tmp_path / "index")
    opened = AnnotationIndex.open(tmp_path / "index")
    pickled = pickle.dumps(opened)
    assert len(pickled) < 1000
    again = pickle.loads(pickled)
    assert_same(again, opened)
    assert isinstance(again.boxes, np.memmap)
    assert again.boxes.filename == opened.boxes.filename


def test_a_pickled_index_in_memory_carries_its_columns(tmp_path: Path) -> None:
    random_index(1).save(tmp_path / "index")
    part = AnnotationIndex.open(tmp_path / "index").take(np.array([3, 4, 9]))
    (tmp_path / "index" / "boxes.npy").unlink()
    assert_same(pickle.loads(pickle.dumps(part)), part)


def changed(index: AnnotationIndex, name: str) -> AnnotationIndex:
    if name == "taxonomy":
        return replace(index, taxonomy=make_taxonomy(index.num_classes, [(0, 7)]))
    column = getattr(index, name).copy()
    if name in ("box_start", "label_start"):
        column[1] += 1 if column[1] < column[2] else -1
    elif name == "image_ids":
        column[0] = "h9999"
    else:
        column.flat[0] = not column.flat[0] if column.dtype == bool else column.flat[0] + 1
    return replace(index, **{name: column})


@pytest.mark.parametrize("name", ["taxonomy", "image_ids", *COLUMNS[3:], *VERIFIED])
def test_a_change_in_any_annotation_changes_the_digest(name: str) -> None:
    index = random_index(3)
    assert changed(index, name).digest != index.digest


def test_files_and_sizes_do_not_change_the_digest() -> None:
    index = random_index(3)
    other = replace(index, files=np.full(30, "x.jpg"), sizes=np.full((30, 2), 7, np.int32), images_folder="elsewhere")
    assert other.digest == index.digest


def test_ids_in_any_script_have_a_digest() -> None:
    index = replace(make_index([[0], [0]], classes=1), image_ids=np.array(["größe", "日本"]))
    other = replace(index, image_ids=np.array(["größe", "日木"]))
    assert index.digest != other.digest


def test_with_classes_hands_boxes_up_to_and_absences_down_to_the_nearest_chosen_class() -> None:
    # vehicle > car > taxi; vehicle > bus. Chosen: vehicle, car, bus.
    hierarchy = Hierarchy(subcategories=(("v", "c"), ("c", "t"), ("v", "b")), nodes=("v", "c", "t", "b"))
    taxonomy = Taxonomy(("v", "c", "t", "b"), ("Vehicle", "Car", "Taxi", "Bus"), hierarchy)
    index = AnnotationIndex(
        taxonomy=taxonomy,
        image_ids=np.array(["i1", "i2"]),
        files=np.array(["", ""]),
        sizes=np.zeros((2, 2), np.int32),
        box_start=np.array([0, 2, 2]),
        boxes=np.array([[0.0, 0.0, 0.5, 0.5], [0.5, 0.5, 1.0, 1.0]]),
        labels=np.array([2, 3], np.int32),
        flags=np.zeros(2, np.uint8),
        label_start=np.array([0, 1, 3]),
        verified_class=np.array([2, 0, 2], np.int32),
        verified_present=np.array([True, False, False]),
    )
    chosen = index.with_classes(np.array([0, 1, 3]))
    # The taxi is a car (index 1) and, by the hierarchy that is kept, a vehicle; it gets no second box for the vehicle.
    assert chosen.labels.tolist() == [1, 2]
    # i1: the present taxi is a present car. i2: the absent vehicle stays itself; the absent taxi says nothing of a car.
    assert chosen.label_start.tolist() == [0, 1, 2]
    assert chosen.verified_class.tolist() == [1, 0]
    assert chosen.verified_present.tolist() == [True, False]
    # Without the vehicle in the group its absence goes to what is nearest below it: car and bus, not taxi again.
    below = index.with_classes(np.array([1, 3]))
    assert below.verified_class[below.label_start[1] :].tolist() == [0, 1]


@pytest.mark.parametrize("seed", range(2))
def test_an_exhaustive_index_knows_as_much_as_one_filled_in_without_a_label(seed: int, tmp_path: Path) -> None:
    index = random_index(seed)
    full = replace(index, all_known=True)
    part = full.take(np.arange(3)).with_classes(np.array([1]))
    full.save(tmp_path / "index")
    opened = AnnotationIndex.open(tmp_path / "index")
    for known in (full, part, opened, pickle.loads(pickle.dumps(opened)), pickle.loads(pickle.dumps(full))):
        assert all(known_classes(known, image).all() for image in range(len(known)))
    assert len(full.verified_class) == len(index.verified_class)
    assert with_absent_labels(full).digest == with_absent_labels(index).digest
    assert full.digest == opened.digest != index.digest
