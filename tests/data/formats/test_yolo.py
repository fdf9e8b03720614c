"""YOLO: data.yaml in its many forms, rows, polygons, and images without labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retinaflow.data.formats.source import ClassNames, SourceSet, note
from retinaflow.data.formats.yolo import find_yolo, read_yolo
from retinaflow.data.tables import RowErrors
from retinaflow.errors import DataError
from retinaflow.settings.conversion_settings import ConvertConfig


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def read(folder: Path, errors: RowErrors | None = None, **given: Any) -> SourceSet:
    place = find_yolo(folder)
    assert place is not None
    return read_yolo(ConvertConfig(**given), place, errors or RowErrors(), classes=ClassNames())


SPLITS = {
    "folders": "train: images/train\nval: images/val\n",
    "path of another machine": "path: /no/such/folder\ntrain: images/train\nval: images/val\n",
    "Roboflow": "train: ../images/train\nval: ../images/val\n",
    "lists": "train: [images/train]\nval:\n - images/val\n",
    "text files": "train: train.txt\nval: val.txt\n",
}


@pytest.mark.parametrize("splits", SPLITS.values(), ids=SPLITS)
def test_images_of_the_splits_are_found_as_data_yaml_names_them(
    tmp_path: Path, write_image: Any, checked: Any, splits: str
) -> None:
    root = tmp_path / "set"
    write(root / "data.yaml", splits + "names: {0: cat, 1: 'dog, big'}\n")
    write(root / "train.txt", "./images/train/a.png\nimages/train/0.png\n")
    write(root / "val.txt", "images/val/0.png\n")
    write_image("set/images/train/a.png"), write_image("set/images/train/0.png"), write_image("set/images/val/0.png")
    write(root / "labels/train/a.txt", "1 0.5 0.5 0.5 0.2\n\n0 0.1 0.1 0.3 0.1 0.2 0.4\n")
    write(root / "labels/val/0.txt", "")
    found, _, _ = checked(read(root))
    assert dict(zip(found.images["image_id"], found.images["split"], strict=True)) == {
        "a": "train", "images__train__0": "train", "images__val__0": "validation",
    }  # fmt: skip
    assert found.taxonomy.names == ("cat", "dog, big")
    # The second row is a triangle (0.1, 0.1), (0.3, 0.1), (0.2, 0.4).
    np.testing.assert_allclose(found.corners, [[0.25, 0.4, 0.75, 0.6], [0.1, 0.1, 0.3, 0.4]])


@pytest.mark.parametrize("year", ["", "2017"])
def test_without_data_yaml_folders_and_classes_txt_will_do(tmp_path: Path, write_image: Any, year: str) -> None:
    write_image(f"images/train{year}/a.png"), write_image(f"images/val{year}/b.png")
    write(tmp_path / f"labels/train{year}/a.txt", "0 0.5 0.5 1 1\n")
    with pytest.raises(DataError, match=r"must hold the class names in data.yaml or classes.txt"):
        read(tmp_path)
    write(tmp_path / "classes.txt", "cat\n")
    assert [image.split for image in read(tmp_path).images] == ["train", "validation"]


def test_boxes_of_an_image_rotated_by_exif_are_rotated_back(tmp_path: Path, write_image: Any, checked: Any) -> None:
    write_image("images/a.jpg", orientation=3)
    write(tmp_path / "labels/a.txt", "0 0.1 0.1 0.2 0.2\n")
    write(tmp_path / "classes.txt", "cat\n")
    found, _, said = checked(read(tmp_path))
    np.testing.assert_allclose(found.corners, [[0.8, 0.8, 1, 1]])
    assert said == ["1 images are rotated by EXIF: their boxes were rotated to the stored pixels"]
    found, _, _ = checked(read(tmp_path), orientation="stored")
    np.testing.assert_allclose(found.corners, [[0, 0, 0.2, 0.2]], atol=1e-12)


ROWS = {
    "word": ("cat 0.5 0.5 1 1", "a.txt line 1: a row must hold numbers, but got cat"),
    "class": ("2 0.5 0.5 1 1", "a.txt line 1: a class must be a whole number from 0 to 1, but got 2"),
    "half a class": ("0.5 0.5 0.5 1 1", "a.txt line 1: a class must be a whole number"),
    "score": ("0 0.5 0.5 1 1 0.9", "a.txt line 1: a row must be a class with x, y, width, height or"),
    "pixels": ("0 20 10 8 8", "a.txt line 1: a box must lie in its image"),
}


@pytest.mark.parametrize("case", ROWS.values(), ids=ROWS)
def test_a_row_that_breaks_a_rule_is_named_with_its_line(
    tmp_path: Path, write_image: Any, checked: Any, case: tuple[str, str]
) -> None:
    write_image("images/a.png")
    write(tmp_path / "classes.txt", "cat\ndog\n")
    write(tmp_path / "labels/a.txt", case[0])
    errors = RowErrors()
    with pytest.raises(ValueError) as stopped:
        checked(read(tmp_path, errors), errors)
    assert case[1] in str(stopped.value)


def test_a_set_without_any_label_file_is_not_a_set_of_empty_images(tmp_path: Path, write_image: Any) -> None:
    write_image("images/a.png")
    write(tmp_path / "classes.txt", "cat\n")
    with pytest.raises(DataError, match=r"none of 1 has one; .*labels/a.txt is missing"):
        read(tmp_path)


POSES = {
    # The values after the box are even in number, and would make a polygon of four points.
    "even": ("[2, 2]", "0 0.5 0.5 0.2 0.4 0.9 0.9 0.8 0.8\n", (0.4, 0.3, 0.6, 0.7)),
    "with visibility": ("[2, 3]", "0 0.5 0.5 0.2 0.4 0.9 0.9 2 0 0 0\n", (0.4, 0.3, 0.6, 0.7)),
    "odd": ("[1, 3]", "0 0.5 0.5 0.2 0.4 0.9 0.9 2\n", (0.4, 0.3, 0.6, 0.7)),
    "a box only": ("[2, 2]", "0 0.5 0.5 0.2 0.4\n", (0.4, 0.3, 0.6, 0.7)),
}


@pytest.mark.parametrize("case", POSES.values(), ids=POSES)
def test_keypoints_follow_the_box_where_data_yaml_says_so(tmp_path: Path, write_image: Any, case: Any) -> None:
    shape, row, corners = case
    write_image("images/a.png")
    write(tmp_path / "data.yaml", f"train: images\nnames: [cat]\nkpt_shape: {shape}\n")
    write(tmp_path / "labels/a.txt", row)
    np.testing.assert_allclose([box[2] for box in read(tmp_path).boxes], [corners])


def test_a_row_that_holds_other_keypoints_than_said_is_named(tmp_path: Path, write_image: Any) -> None:
    write_image("images/a.png")
    write(tmp_path / "data.yaml", "train: images\nnames: [cat]\nkpt_shape: [2, 3]\n")
    write(tmp_path / "labels/a.txt", "0 0.5 0.5 0.2 0.4 0.9 0.9 0.8 0.8\n")
    errors = RowErrors()
    assert len(read(tmp_path, errors).boxes) == 0
    assert str(errors.found[0]) == (
        "a.txt line 1: a row must be a class with x, y, width, height and 6 values of keypoints, but got 9 fields"
    )
    write(tmp_path / "data.yaml", "train: images\nnames: [cat]\nkpt_shape: 17\n")
    with pytest.raises(ValueError, match=r"data.yaml: kpt_shape must be two whole numbers .*, but got '17'"):
        read(tmp_path)


LABELS = "0 0.5 0.5 0.2 0.4\n"


def test_what_is_left_out_is_counted_with_an_example(tmp_path: Path, write_image: Any, said: Any) -> None:
    for name in ("a.png", "b.tif", "c.TIFF", "._a.png"):
        write_image(f"images/train/{name.replace('._a.png', 'hidden.png')}")
    (tmp_path / "images/train/hidden.png").rename(tmp_path / "images/train/._a.png")
    for name in ("a", "b", "c", "alone", "._a"):
        write(tmp_path / f"labels/train/{name}.txt", LABELS)
    write(tmp_path / "labels/classes.txt", "cat\n")
    write(tmp_path / "labels/train/README.txt", "drawn by hand\n")
    write(tmp_path / "data.yaml", "train: images/train\nnames: [cat]\n")
    for place in (tmp_path / "data.yaml", tmp_path):
        found = read_yolo(ConvertConfig(), place, RowErrors(), classes=ClassNames())
        assert [image.name for image in found.images] == ["images/train/a.png"]
        images = tmp_path / "images/train"
        assert said() == [
            f"2 image files are left out, {images / 'b.tif'} for example: only .jpg, .jpeg, .png, .webp, .bmp are read",
            f"1 label files have no image file and are left out, {tmp_path / 'labels/train/alone.txt'} for example",
        ]


def test_images_beside_the_folders_of_splits_are_counted(tmp_path: Path, write_image: Any, said: Any) -> None:
    write_image("images/train/a.png"), write_image("images/b.png"), write_image("c.png")
    write(tmp_path / "labels/train/a.txt", LABELS), write(tmp_path / "labels/b.txt", LABELS)
    write(tmp_path / "classes.txt", "cat\n")
    assert len(read(tmp_path).images) == 1
    assert said() == [f"2 image files are in no split and are left out, {tmp_path / 'c.png'} for example"]


def test_images_that_no_list_names_are_counted_however_the_others_are_written(
    tmp_path: Path, write_image: Any, said: Any
) -> None:
    for name in "abc":
        write_image(f"images/{name}.png")
        write(tmp_path / f"labels/{name}.txt", LABELS)
    write(tmp_path / "train.txt", f"./images/a.png\n{tmp_path}/labels/../images/b.png\n")
    write(tmp_path / "data.yaml", "train: train.txt\nnames: [cat]\n")
    assert len(read(tmp_path).images) == 2
    assert said() == [f"1 image files are in no split and are left out, {tmp_path / 'images/c.png'} for example"]


def test_linked_folders_are_read_and_never_twice(tmp_path: Path, write_image: Any, said: Any) -> None:
    write_image("set/images/train/own/a.png"), write_image("store/b.png"), write_image("store/more/c.png")
    write_image("set/images/val/d.png")
    train = tmp_path / "set/images/train"
    # A link to the store, one that leads back up, and one to a folder beside it that sorts before it.
    (train / "linked").symlink_to(tmp_path / "store")
    (tmp_path / "store/loop").symlink_to(tmp_path / "set")
    (train / "again").symlink_to(train / "own")
    for name in ("own/a", "linked/b", "linked/more/c"):
        write(tmp_path / f"set/labels/train/{name}.txt", LABELS)
    write(tmp_path / "set/data.yaml", "train: images/train\nnames: [cat]\n")
    with pytest.raises(ValueError, match=rf"linked leads out of .*give linked_folders={tmp_path / 'store'}"):
        read(tmp_path / "set")
    found = read(tmp_path / "set", linked_folders=(tmp_path / "store",))
    assert [image.name.removeprefix("images/train/") for image in found.images] == [
        "linked/b.png", "linked/more/c.png", "own/a.png", "images/val/d.png",
    ]  # fmt: skip
    assert len(found.boxes) == 3
    assert said() == [
        "nothing names a validation split, so the 1 images in folders of that name are it",
        "1 images have no label file and count as images without objects, "
        f"{tmp_path / 'set/images/val/d.png'} for example",
    ]


def test_a_test_split_that_is_absent_is_said_and_others_stop(tmp_path: Path, write_image: Any, said: Any) -> None:
    write_image("train/images/a.png")
    write(tmp_path / "train/labels/a.txt", LABELS)
    write(tmp_path / "data.yaml", "train: ../train/images\ntest: ../test/images\nnames: [cat]\n")
    assert [image.split for image in read(tmp_path).images] == ["train"]
    assert said() == [f"data.yaml: test: ../test/images is no folder or file under {tmp_path}, and is left out"]
    write(tmp_path / "data.yaml", "train: ../train/images\nval: ../valid/images\nnames: [cat]\n")
    with pytest.raises(DataError, match=r"data.yaml: val: ../valid/images must be a folder or file under"):
        read(tmp_path)
    write(tmp_path / "data.yaml", "train:\ntest: ../test/images\nnames: [cat]\n")
    with pytest.raises(DataError, match=r"data.yaml: test: ../test/images must be a folder or file under"):
        read(tmp_path)


NAMES = {
    "data.yaml": (
        "train: images\nnames: [bank, bank, c]\n",
        r"data.yaml: a class must have .* 0 and 1 are both 'bank'",
    ),
    "classes.txt": (
        "c\nbank\nd\nbank \n",
        r"classes.txt: a class must have a name of its own, but 1 and 3 .*rename one",
    ),
}


@pytest.mark.parametrize("name", NAMES)
def test_two_classes_of_one_name_stop(tmp_path: Path, write_image: Any, name: str) -> None:
    write_image("images/a.png")
    write(tmp_path / "labels/a.txt", LABELS)
    write(tmp_path / name, NAMES[name][0])
    with pytest.raises(ValueError, match=NAMES[name][1]):
        read(tmp_path)


DOCUMENTS = {
    "no names": ("train: images\nnc: 3\n", "names must list the classes, but got None"),
    "gap": ("train: images\nnames: {0: a, x: b}\n", "names must be numbered 0, 1, 2, ..., but got"),
    "no mapping": ("- images\n", "the file must map names to values, but got"),
    "no YAML": ("train: [\n", "not a readable YAML file"),
}


@pytest.mark.parametrize("case", DOCUMENTS.values(), ids=DOCUMENTS)
def test_a_data_yaml_that_cannot_be_used_is_named(tmp_path: Path, case: tuple[str, str]) -> None:
    path = write(tmp_path / "mine.yaml", case[0])
    with pytest.raises(ValueError) as stopped:
        read_yolo(ConvertConfig(), path, RowErrors(), classes=ClassNames())
    assert str(stopped.value).startswith(str(path))
    assert case[1] in str(stopped.value)


def test_an_empty_line_among_the_class_names_stops_as_it_would_rename_the_rest(
    tmp_path: Path, write_image: Any
) -> None:
    write_image("images/a.png")
    write(tmp_path / "labels/a.txt", "1 0.5 0.5 1 1\n")
    write(tmp_path / "classes.txt", "cat\n\ndog\n")
    with pytest.raises(ValueError, match=r"classes.txt: line 2: a line must name a class, but is empty"):
        read(tmp_path)
    write(tmp_path / "classes.txt", "cat\ndog\n\n\n")
    assert read(tmp_path).boxes[0][1] == 1


def test_images_of_several_splits_are_counted(tmp_path: Path, write_image: Any, said: Any) -> None:
    write(tmp_path / "data.yaml", "train: images\nval: val.txt\nnames: [cat]\n")
    write_image("images/a.png"), write_image("images/b.png")
    write(tmp_path / "labels/a.txt", "0 0.5 0.5 1 1\n")
    write(tmp_path / "val.txt", "images/b.png\n")
    assert {image.split for image in read(tmp_path).images} == {"train"}
    assert [line for line in said() if "1 images are in more than one split" in line]


@pytest.mark.parametrize(("on_bad_row", "most"), [("stop", 5), ("drop", 20_000)])
def test_however_many_files_are_wrong_few_errors_are_kept(on_bad_row: Any, most: int) -> None:
    errors = RowErrors(on_bad_row)
    for number in range(21_000):
        note(errors, f"{number}.txt", "a row must hold numbers", "x", line=1)
    assert (len(errors.found), errors.count) == (most, 21_000)
    if on_bad_row == "stop":
        with pytest.raises(DataError, match=r"21,000 rows break a rule:\n  0.txt line 1: .*(?s:.*)and 20,995 more"):
            errors.settle()
    else:
        assert errors.frame()["rows"].sum() == 21_000
