"""YOLO: data.yaml in its many forms, rows, polygons, and images without labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retinaflow.data.formats.source import ClassNames, SourceSet
from retinaflow.data.formats.yolo import find_yolo, read_yolo
from retinaflow.data.tables import Faults


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def read(folder: Path, faults: Faults | None = None, **given: Any) -> SourceSet:
    place = find_yolo(folder)
    assert place is not None
    return read_yolo(place, faults or Faults(), classes=ClassNames(), **given)


SPLITS = {
    "folders": "train: images/train\nval: images/val\n",
    "path of another machine": "path: /no/such/folder\ntrain: images/train\nval: images/val\n",
    "Roboflow": "train: ../images/train\nval: ../images/val\n",
    "lists": "train: [images/train]\nval:\n - images/val\n",
    "text files": "train: train.txt\nval: val.txt\n",
}


@pytest.mark.parametrize("splits", SPLITS.values(), ids=SPLITS)
def test_images_of_the_splits_are_found_as_data_yaml_names_them(
    tmp_path: Path, picture: Any, checked: Any, splits: str
) -> None:
    root = tmp_path / "set"
    write(root / "data.yaml", splits + "names: {0: cat, 1: 'dog, big'}\n")
    write(root / "train.txt", "./images/train/a.png\nimages/train/0.png\n")
    write(root / "val.txt", "images/val/0.png\n")
    picture("set/images/train/a.png"), picture("set/images/train/0.png"), picture("set/images/val/0.png")
    write(root / "labels/train/a.txt", "1 0.5 0.5 0.5 0.2\n\n0 0.1 0.1 0.3 0.1 0.2 0.4\n")
    write(root / "labels/val/0.txt", "")
    found, _, _ = checked(read(root))
    assert dict(zip(found.images["image_id"], found.images["split"], strict=True)) == {
        "a": "train", "images__train__0": "train", "images__val__0": "validation",
    }  # fmt: skip
    assert found.taxonomy.names == ("cat", "dog, big")
    # The second row is a triangle (0.1, 0.1), (0.3, 0.1), (0.2, 0.4).
    np.testing.assert_allclose(found.corners, [[0.25, 0.4, 0.75, 0.6], [0.1, 0.1, 0.3, 0.4]])


def test_without_data_yaml_folders_and_classes_txt_will_do(tmp_path: Path, picture: Any) -> None:
    picture("images/train/a.png"), picture("images/val/b.png")
    write(tmp_path / "labels/train/a.txt", "0 0.5 0.5 1 1\n")
    with pytest.raises(FileNotFoundError, match=r"must hold data.yaml or classes.txt"):
        read(tmp_path)
    write(tmp_path / "classes.txt", "cat\n")
    assert [image.split for image in read(tmp_path).images] == ["train", "validation"]


def test_boxes_of_a_picture_turned_by_exif_are_turned_back(tmp_path: Path, picture: Any, checked: Any) -> None:
    picture("images/a.jpg", orientation=3)
    write(tmp_path / "labels/a.txt", "0 0.1 0.1 0.2 0.2\n")
    write(tmp_path / "classes.txt", "cat\n")
    found, _, said = checked(read(tmp_path))
    np.testing.assert_allclose(found.corners, [[0.8, 0.8, 1, 1]])
    assert said == ["1 images are turned by EXIF: their boxes were turned to the stored pixels"]
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
    tmp_path: Path, picture: Any, checked: Any, case: tuple[str, str]
) -> None:
    picture("images/a.png")
    write(tmp_path / "classes.txt", "cat\ndog\n")
    write(tmp_path / "labels/a.txt", case[0])
    faults = Faults()
    with pytest.raises(ValueError) as stopped:
        checked(read(tmp_path, faults), faults)
    assert case[1] in str(stopped.value)


def test_a_set_without_any_label_file_is_not_a_set_of_empty_images(tmp_path: Path, picture: Any) -> None:
    picture("images/a.png")
    write(tmp_path / "classes.txt", "cat\n")
    with pytest.raises(FileNotFoundError, match=r"none of 1 images has a label file; .*labels/a.txt is looked for"):
        read(tmp_path)
