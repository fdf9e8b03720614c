"""Pascal VOC: pixels from 0 or 1, flags, splits, and files that are where tools leave them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retinaflow.data.formats.source import ClassNames, SourceSet
from retinaflow.data.formats.voc import read_voc
from retinaflow.data.tables import RowErrors
from retinaflow.settings.conversion_settings import ConvertConfig

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


def read(folder: Path, errors: RowErrors | None = None, **given: Any) -> SourceSet:
    return read_voc(ConvertConfig(**given), folder, errors or RowErrors(), classes=ClassNames())


@pytest.mark.parametrize(
    ("database", "first_pixel", "left"),
    [("mine", "auto", 0.25), ("The VOC2007 Database", "auto", 0.225), ("mine", "1", 0.225), ("The VOC2007", "0", 0.25)],
)
def test_pixels_count_from_1_in_the_challenges_own_files_only(
    tmp_path: Path, write_image: Any, checked: Any, database: str, first_pixel: Any, left: float
) -> None:
    write_image("a.png")
    write(tmp_path / "a.xml", thing(10, 5, 30, 20), database=database)
    found, _, _ = checked(read(tmp_path, voc_first_pixel=first_pixel))
    # From 1 the first column inside is 10, whose left edge is 9 / 40; the last one is 30, whose right edge is 30 / 40.
    np.testing.assert_allclose(found.corners[0, [0, 2]], [left, 0.75])


def test_flags_are_read_and_difficult_is_group_of_unless_kept(tmp_path: Path, write_image: Any, checked: Any) -> None:
    write_image("a.png")
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
    tmp_path: Path, write_image: Any, checked: Any
) -> None:
    for name in "abc":
        write_image(f"JPEGImages/{name}.jpg")
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
    tmp_path: Path, write_image: Any, checked: Any
) -> None:
    (
        write_image("train/a.JPG"),
        write_image("train/b_jpg.rf.png"),
        write_image("valid/c.png"),
        write_image("valid/alone.png"),
    )
    write(tmp_path / "train/a.xml")
    write(tmp_path / "train/b.xml", filename="C:\\Users\\me\\b_jpg.rf.png", size="0 0")
    write(tmp_path / "valid/c.xml")
    found, _, said = checked(read(tmp_path))
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
def test_an_object_that_breaks_a_rule_is_named(tmp_path: Path, write_image: Any, checked: Any, case: Any) -> None:
    write_image("a.png")
    write(tmp_path / "a.xml", case[0])
    errors = RowErrors()
    with pytest.raises(ValueError) as stopped:
        checked(read(tmp_path, errors), errors)
    assert case[1] in str(stopped.value)


def lists(root: Path, **names: str) -> None:
    folder = root / "ImageSets" / "Main"
    folder.mkdir(parents=True, exist_ok=True)
    for split, ids in names.items():
        (folder / f"{split}.txt").write_text("".join(f"{name}\n" for name in ids.split(",")), encoding="utf-8")


def splits(source: SourceSet) -> dict[str, str]:
    return {image.name.split("/")[-1]: image.split for image in source.images}


def test_each_year_of_a_devkit_has_lists_of_its_own(tmp_path: Path, write_image: Any, said: Any) -> None:
    for year in ("2007", "2012"):
        for name in "abcd":
            write_image(f"VOC{year}/JPEGImages/{name}{year}.jpg")
            write(tmp_path / f"VOC{year}/Annotations/{name}{year}.xml", thing(1, 1, 9, 9))
    # Of 2007 d is in no list; 2012 has trainval besides val and test, and val must win.
    lists(tmp_path / "VOC2007", trainval="a2007,b2007", test="c2007")
    lists(tmp_path / "VOC2012", trainval="a2012,b2012,c2012", val="b2012", test="d2012")
    assert splits(read(tmp_path)) == {
        "a2007.jpg": "train", "b2007.jpg": "train", "c2007.jpg": "test",
        "a2012.jpg": "train", "b2012.jpg": "validation", "c2012.jpg": "train", "d2012.jpg": "test",
    }  # fmt: skip
    assert said() == ["1 annotation files are in none of the lists and are left out, d2007.xml for example"]


def test_ids_may_have_spaces_and_end_in_a_number(tmp_path: Path, write_image: Any) -> None:
    for name in ("my photo 0", "my photo 1", "b"):
        write_image(f"JPEGImages/{name}.png")
        write(tmp_path / f"Annotations/{name}.xml")
    lists(tmp_path, train="my photo 0,b -1", val=" my photo 1 \r")
    assert splits(read(tmp_path)) == {"my photo 0.png": "train", "b.png": "train", "my photo 1.png": "validation"}
    (tmp_path / "ImageSets/Main/val.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"val.txt line 1: the file must be text in UTF-8"):
        read(tmp_path)


def test_what_macos_hides_beside_files_is_ignored(tmp_path: Path, write_image: Any, said: Any) -> None:
    write_image("a.png")
    write(tmp_path / "a.xml")
    for name in ("._a.xml", "._a.png", "x/._b.xml"):
        (tmp_path / "x").mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"\0\5\x16\7\0\2")
    assert splits(read(tmp_path)) == {"a.png": "train"}
    assert said() == []


@pytest.mark.parametrize("encoding", ["gb2312", "shift_jis", "iso-8859-1", "utf-16"])
def test_a_file_may_declare_its_encoding(tmp_path: Path, encoding: str) -> None:
    name = "é" if encoding == "iso-8859-1" else "猫"
    text = f"<?xml version='1.0' encoding='{encoding}'?><annotation>{thing(1, 1, 9, 9, name=name)}</annotation>"
    (tmp_path / "a.xml").write_bytes(text.encode(encoding))
    assert read(tmp_path).classes.names == [name]


BROKEN = {
    "cut short": (
        b"<annotation><object>",
        "a.xml: an annotation file must be readable XML, but got the parser error no elem",
    ),
    "another kind": (b"<html/>", "a.xml: a VOC file must begin with <annotation>, but got <html>"),
    "another encoding": (b"<?xml version='1.0' encoding='gb2312'?><annotation>\xff", "a.xml: an annotation file must"),
    "no encoding": (b"<?xml version='1.0' encoding='mine'?><annotation/>", "a.xml: an annotation file must"),
    "no bytes": (b"", "a.xml: an annotation file must"),
}


@pytest.mark.parametrize("case", BROKEN.values(), ids=BROKEN)
def test_a_file_that_is_no_annotation_is_named_or_left_out(
    tmp_path: Path, write_image: Any, checked: Any, case: tuple[bytes, str]
) -> None:
    write_image("a.png"), write_image("b.png")
    (tmp_path / "a.xml").write_bytes(case[0])
    write(tmp_path / "b.xml", thing(1, 1, 9, 9))
    errors = RowErrors()
    with pytest.raises(ValueError) as stopped:
        checked(read(tmp_path, errors), errors)
    assert case[1] in str(stopped.value)
    errors = RowErrors("drop")
    found, _, said = checked(read(tmp_path, errors), errors)
    assert found.images["image_id"].tolist() == ["b"]
    assert [fault.file for fault in errors.found] == ["a.xml"]
    assert said == []
