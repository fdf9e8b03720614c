"""Pascal VOC: pixels from 0 or 1, flags, splits, and files that are where tools leave them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retinaflow.data.formats.source import ClassNames, SourceSet
from retinaflow.data.formats.voc import read_voc
from retinaflow.data.tables import Faults

BOX = "<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox>"


def write(path: Path, objects: str = "", *, database: str = "mine", size: str = "40 20", filename: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    width, height = size.split()
    sides = f"<size><width>{width}</width><height>{height}</height></size>"
    source = f"<source><database>{database}</database></source><filename>{filename}</filename>"
    path.write_text(f"<annotation>{source}{sides}{objects}</annotation>", encoding="utf-8")
    return path


def thing(*corners: Any, name: str = "cat", more: str = "") -> str:
    return f"<object><name>{name}</name>{more}{BOX.format(*corners)}</object>"


def read(folder: Path, faults: Faults | None = None, **given: Any) -> SourceSet:
    return read_voc(folder, faults or Faults(), classes=ClassNames(), **given)


@pytest.mark.parametrize(
    ("database", "first_pixel", "left"),
    [("mine", "auto", 0.25), ("The VOC2007 Database", "auto", 0.225), ("mine", "1", 0.225), ("The VOC2007", "0", 0.25)],
)
def test_pixels_count_from_1_in_the_challenges_own_files_only(
    tmp_path: Path, picture: Any, checked: Any, database: str, first_pixel: Any, left: float
) -> None:
    picture("a.png")
    write(tmp_path / "a.xml", thing(10, 5, 30, 20), database=database)
    found, _, _ = checked(read(tmp_path, first_pixel=first_pixel))
    # From 1 the first column inside is 10, whose left edge is 9 / 40; the last one is 30, whose right edge is 30 / 40.
    np.testing.assert_allclose(found.corners[0, [0, 2]], [left, 0.75])


def test_flags_are_read_and_difficult_is_group_of_unless_kept(tmp_path: Path, picture: Any, checked: Any) -> None:
    picture("a.png")
    more = "<truncated>1</truncated><occluded>0</occluded><difficult>1</difficult>"
    write(
        tmp_path / "a.xml", thing(1, 1, 9, 9, more=more) + thing(2, 2, 9, 9, more="<truncated>Unspecified</truncated>")
    )
    columns = ["truncated", "occluded", "group_of"]
    found, _, _ = checked(read(tmp_path))
    assert found.boxes[columns].to_numpy().tolist() == [[True, False, True], [False, False, False]]
    found, _, _ = checked(read(tmp_path, difficult="keep"))
    assert not found.boxes["group_of"].any()


def test_splits_come_from_imagesets_and_parts_of_objects_are_no_objects(
    tmp_path: Path, picture: Any, checked: Any
) -> None:
    for name in "abc":
        picture(f"JPEGImages/{name}.jpg")
        part = f"<part><name>head</name>{BOX.format(1, 1, 3, 3)}</part>"
        write(tmp_path / f"Annotations/{name}.xml", thing(1, 1, 9, 9, more=part))
    lists = tmp_path / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("a\n\nb\n")
    (lists / "val.txt").write_text("c\n")
    (lists / "trainval.txt").write_text("a\nb\nc\n")
    (lists / "cat_train.txt").write_text("a 1\n")
    found, _, _ = checked(read(tmp_path))
    assert dict(zip(found.images["image_id"], found.images["split"], strict=True)) == {
        "a": "train", "b": "train", "c": "validation",
    }  # fmt: skip
    assert found.taxonomy.names == ("cat",)


def test_an_image_is_found_beside_its_file_by_stem_or_by_the_name_said(
    tmp_path: Path, picture: Any, checked: Any
) -> None:
    picture("train/a.JPG"), picture("train/b_jpg.rf.png"), picture("valid/c.png"), picture("valid/alone.png")
    write(tmp_path / "train/a.xml")
    write(tmp_path / "train/b.xml", filename="C:\\Users\\me\\b_jpg.rf.png", size="0 0")
    write(tmp_path / "valid/c.xml")
    said: list[str] = []
    found, _, _ = checked(read(tmp_path, say=said.append))
    assert found.images["split"].tolist() == ["train", "train", "validation"]
    assert found.images["width"].tolist() == [40, 40, 40]
    assert len(said) == 1
    assert "1 image files have no annotation file and are left out, alone.png" in said[0]


FAULTS = {
    "no name": (thing(1, 1, 2, 2, name=" "), "a.xml object 1: an object must have a name"),
    "no number": (thing("x", 1, 2, 2), "a.xml object 1: bndbox must hold four numbers, but got xmin=x"),
    "no area": (thing(5, 1, 5, 2), "a.xml object 1: a box must have a width and a height above 0"),
}


@pytest.mark.parametrize("case", FAULTS.values(), ids=FAULTS)
def test_an_object_that_breaks_a_rule_is_named(tmp_path: Path, picture: Any, checked: Any, case: Any) -> None:
    picture("a.png")
    write(tmp_path / "a.xml", case[0])
    faults = Faults()
    with pytest.raises(ValueError) as stopped:
        checked(read(tmp_path, faults), faults)
    assert case[1] in str(stopped.value)


def test_a_file_that_is_no_annotation_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.xml").write_text("<annotation><object>")
    with pytest.raises(ValueError, match=r"a.xml: not a readable XML file"):
        read(tmp_path)
    (tmp_path / "a.xml").write_text("<html/>")
    with pytest.raises(ValueError, match=r"a.xml: a VOC file must begin with <annotation>, but begins with <html>"):
        read(tmp_path)
