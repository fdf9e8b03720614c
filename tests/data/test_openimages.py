"""Published files -> index: what is found, what is read, and how every faulty row is named."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from made_index import SHARED, boxes_of, labels_of

from retinaflow.data.index import AnnotationIndex
from retinaflow.data.openimages import (
    find_files,
    is_plain_id,
    read_annotations,
    read_image_ids,
)
from retinaflow.data.predictions import predictions_frame, read_predictions
from retinaflow.data.tables import SHOWN, RowErrors
from retinaflow.detections import Detections
from retinaflow.errors import DataError, SettingError
from retinaflow.settings.data_settings import OnBadRow

HEADER_2018 = (
    "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside"
)
HEADER_2019 = "ImageID,LabelName,XMin,XMax,YMin,YMax,IsGroupOf"
GOOD = "a,xclick,/m/car,1,0.1,0.3,0.2,0.4,0,0,0,0,0"
LABEL_HEADER = "ImageID,Source,LabelName,Confidence"
CLASSES = "/m/car,Car\n/m/bus,Bus\n"


def write(
    folder: Path,
    *rows: str,
    header: str = HEADER_2018,
    labels: Sequence[str] = (),
    name: str = "train-annotations-bbox.csv",
    classes: str = CLASSES,
) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "class-descriptions.csv").write_text(classes, encoding="utf-8")
    (folder / name).write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    label_rows = "\n".join([LABEL_HEADER, *labels]) + "\n"
    (folder / "train-annotations-human-imagelabels.csv").write_text(label_rows, encoding="utf-8")
    return folder


def read(
    folder: Path, splits: Sequence[str] = ("train",), on_bad_row: OnBadRow = "stop"
) -> tuple[AnnotationIndex, RowErrors]:
    errors = RowErrors(on_bad_row)
    index = read_annotations(find_files(folder, splits), errors, progress=lambda text: None)
    return index, errors


def test_files_without_rows_make_an_empty_index(tmp_path: Path) -> None:
    index, errors = read(write(tmp_path))
    assert len(index) == len(index.boxes) == len(index.verified_class) == 0
    assert index.num_classes == 2
    assert len(errors.frame()) == 0


def test_the_13_columns_of_2018_are_read_by_hand(tmp_path: Path) -> None:
    write(
        tmp_path,
        "b,xclick,/m/bus,1,0.5,0.75,0,1,1,0,1,0,1",
        GOOD,
        "b,activemil,/m/car,1,0.25,0.5,0.125,0.25,0,-1,0,1,0",
        labels=["c,verification,/m/bus,0", "a,verification,/m/car,1", "b,crowdsource,/m/bus,1"],
    )
    index, _ = read(tmp_path)
    assert index.image_ids.tolist() == ["a", "b", "c"]
    assert index.box_start.tolist() == [0, 1, 3, 3]
    # The file gives XMin, XMax, YMin, YMax; the index holds xyxy. Flags by bit: 0 occluded, 2 group-of, 3 depiction.
    assert index.boxes.tolist() == [[0.1, 0.2, 0.3, 0.4], [0.5, 0.0, 0.75, 1.0], [0.25, 0.125, 0.5, 0.25]]
    assert index.labels.tolist() == [0, 1, 0]
    assert index.flags.tolist() == [0, 1 + 4 + 16, 8], "a flag of -1 (unknown) is not set"
    assert index.is_group_of.tolist() == [False, True, False]
    assert labels_of(index) == {"a": [("/m/car", True)], "b": [("/m/bus", True)], "c": [("/m/bus", False)]}


def test_the_7_columns_of_2019_give_the_same_boxes_with_all_other_flags_off(tmp_path: Path) -> None:
    index, _ = read(write(tmp_path, "a,/m/car,0.1,0.3,0.2,0.4,1", header=HEADER_2019))
    assert boxes_of(index) == {"a": [("/m/car", 0.1, 0.2, 0.3, 0.4, 4)]}


COLUMNS_MIXED = "Extra,YMax,YMin,XMax,XMin,LabelName,IsGroupOf,ImageID"
WRITINGS = {
    "plain": f"{HEADER_2018}\n{GOOD}\nb,x,/m/bus,1,0.5,0.75,0,1,0,0,1,0,0\n",
    "byte order mark": f"\ufeff{HEADER_2018}\n{GOOD}\nb,x,/m/bus,1,0.5,0.75,0,1,0,0,1,0,0\n",
    "CRLF": f"{HEADER_2018}\r\n{GOOD}\r\nb,x,/m/bus,1,0.5,0.75,0,1,0,0,1,0,0\r\n",
    "no last newline": f"{HEADER_2018}\n{GOOD}\nb,x,/m/bus,1,0.5,0.75,0,1,0,0,1,0,0",
    "blank lines": f"{HEADER_2018}\n\n{GOOD}\n\n\nb,x,/m/bus,1,0.5,0.75,0,1,0,0,1,0,0\n\n",
    "images in another order": f"{HEADER_2018}\nb,x,/m/bus,1,0.5,0.75,0,1,0,0,1,0,0\n{GOOD}\n",
    "quoted": f'{HEADER_2018}\n"a","x","/m/car",1,"0.1",0.3,0.2,0.4,0,0,0,0,0\nb,x,/m/bus,1,0.5,0.75,0,1,0,0,1,0,0\n',
    "spaces in the header": f"{HEADER_2018.replace(',', ', ')}\n{GOOD}\nb,x,/m/bus,1,0.5,0.75,0,1,0,0,1,0,0\n",
    "numbers written otherwise": f"{HEADER_2018}\na,x,/m/car,1,1e-1,0.300,.2,0.4,0,0,0.0,0,0\n"
    "b,x,/m/bus,1,0.50,0.75,0.0,1.000000,0,0,1.0,0,0\n",
    "columns in another order": f"{COLUMNS_MIXED}\nq,0.4,0.2,0.3,0.1,/m/car,0,a\n,1,0,0.75,0.5,/m/bus,1,b\n",
}


@pytest.mark.parametrize("name", WRITINGS)
def test_the_digest_depends_on_the_data_and_not_on_how_the_file_is_written(name: str, tmp_path: Path) -> None:
    digests = []
    for writing in ("plain", name):
        write(tmp_path)
        (tmp_path / "train-annotations-bbox.csv").write_bytes(WRITINGS[writing].encode())
        index, _ = read(tmp_path)
        assert boxes_of(index) == {"a": [("/m/car", 0.1, 0.2, 0.3, 0.4, 0)], "b": [("/m/bus", 0.5, 0.0, 0.75, 1.0, 4)]}
        digests.append(index.digest)
    assert digests[0] == digests[1]


def test_a_quoted_class_name_with_a_comma_and_a_quoted_id_are_read(tmp_path: Path) -> None:
    row = '"a,1",x,/m/car,1,0.1,0.3,0.2,0.4,0,0,0,0,0'
    index, _ = read(write(tmp_path, row, classes='/m/car,"Car, small"\n/m/bus,Bus\n'))
    assert index.taxonomy.names == ("Car, small", "Bus")
    assert index.image_ids.tolist() == ["a,1"]


def test_boxes_in_parquet_are_read_like_csv(tmp_path: Path) -> None:
    write(tmp_path, GOOD)
    frame = pd.read_csv(tmp_path / "train-annotations-bbox.csv")
    frame["LabelName"] = frame["LabelName"].astype("category")
    frame.to_parquet(tmp_path / "boxes.parquet")
    files = find_files(tmp_path, ["train"], boxes=[tmp_path / "boxes.parquet"])
    index = read_annotations(files, RowErrors(), progress=lambda text: None)
    assert boxes_of(index) == {"a": [("/m/car", 0.1, 0.2, 0.3, 0.4, 0)]}


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ("ImageID", "boxes.parquet line 2: ImageID must be a plain file name, but got ImageID="),
        ("LabelName", "boxes.parquet line 2: LabelName must be in the class list, but got LabelName="),
        ("XMin", "boxes.parquet line 2: XMin must be a number, but got XMin=nan"),
    ],
)
def test_a_null_in_parquet_is_a_fault_like_any_other(column: str, message: str, tmp_path: Path) -> None:
    write(tmp_path, GOOD, GOOD)
    frame = pd.read_csv(tmp_path / "train-annotations-bbox.csv")
    frame.loc[1, column] = None
    frame.to_parquet(tmp_path / "boxes.parquet")
    files = find_files(tmp_path, ["train"], boxes=[tmp_path / "boxes.parquet"])
    with pytest.raises(ValueError, match=re.escape(message)):
        read_annotations(files, RowErrors(), progress=lambda text: None)


def row(**changes: str) -> str:
    fields = dict(zip(HEADER_2018.split(","), GOOD.split(","), strict=True)) | changes
    return ",".join(fields.values())


BAD_ROWS = {
    "text in a number": (row(XMin="left"), "XMin must be a number, but got XMin=left"),
    "comma for a point": (row(XMin='"0,1"'), "XMin must be a number, but got XMin=0,1"),
    "NaN": (row(YMax="NaN"), "YMax must be a number, but got YMax=nan"),
    "infinite": (row(XMax="inf"), "XMax must be a number, but got XMax=inf"),
    "empty number": (row(XMax=""), "XMax must be a number, but got XMax=nan"),
    "empty flag": (row(IsGroupOf=""), "IsGroupOf must be a number, but got IsGroupOf=nan"),
    "cut row": ("a,xclick,/m/car,1,0.1", "a row must have 13 fields, but got fields=5"),
    "long row": (GOOD + ",0", "a row must have 13 fields, but got fields=14"),
    "no width": (row(XMin="0.3"), "XMin < XMax must hold, but got XMin=0.3, XMax=0.3"),
    "XMin beyond XMax": (row(XMin="0.5"), "XMin < XMax must hold, but got XMin=0.5, XMax=0.3"),
    "no height": (row(YMin="0.4"), "YMin < YMax must hold, but got YMin=0.4, YMax=0.4"),
    "below 0": (
        row(XMin="-0.1"),
        "coordinates must lie in [0, 1], but got XMin=-0.1, YMin=0.2, XMax=0.3, YMax=0.4",
    ),
    "pixels": (row(XMax="96"), "coordinates must lie in [0, 1], but got XMin=0.1, YMin=0.2, XMax=96.0, YMax=0.4"),
    "unknown class": (row(LabelName="/m/cat"), "LabelName must be in the class list, but got LabelName=/m/cat"),
    "no class": (row(LabelName=""), "LabelName must be in the class list, but got LabelName="),
    "parent folder": (row(ImageID="../x"), "ImageID must be a plain file name, but got ImageID=../x"),
    "absolute": (row(ImageID="/etc/passwd"), "ImageID must be a plain file name, but got ImageID=/etc/passwd"),
    "empty id": (row(ImageID=""), "ImageID must be a plain file name, but got ImageID="),
    "folder": (row(ImageID="a/b"), "ImageID must be a plain file name, but got ImageID=a/b"),
    "windows folder": (row(ImageID="a\\b"), "ImageID must be a plain file name, but got ImageID=a\\b"),
    "dots": (row(ImageID=".."), "ImageID must be a plain file name, but got ImageID=.."),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_stops_the_reading_with_file_line_rule_and_value(name: str, tmp_path: Path) -> None:
    bad, rule = BAD_ROWS[name]
    # The blank line counts: line 1 header, 2 good, 3 blank, 4 bad.
    write(tmp_path, GOOD, "", bad, GOOD.replace("a,", "b,", 1))
    with pytest.raises(ValueError) as caught:
        read(tmp_path)
    assert str(caught.value) == (
        f"1 row breaks a rule:\n  train-annotations-bbox.csv line 4: {rule}\n"
        "Fix the file, or give on_bad_row=drop to leave it out."
    )


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_dropped_is_listed_and_the_good_rows_stay(name: str, tmp_path: Path) -> None:
    bad, rule = BAD_ROWS[name]
    write(tmp_path, GOOD, "", bad, GOOD.replace("a,", "b,", 1))
    index, errors = read(tmp_path, on_bad_row="drop")
    assert boxes_of(index) == {image: [("/m/car", 0.1, 0.2, 0.3, 0.4, 0)] for image in ("a", "b")}
    text, _, value = rule.rpartition(", but got ")
    expected = {"file": "train-annotations-bbox.csv", "line": 4, "rule": text, "value": value, "rows": 1}
    assert errors.frame().to_dict("records") == [expected]


def test_many_bad_rows_are_counted_once_each_and_the_first_are_shown(tmp_path: Path) -> None:
    bad = [bad for bad, _ in BAD_ROWS.values()]
    write(tmp_path, *bad, GOOD)
    index, errors = read(tmp_path, on_bad_row="drop")
    assert len(index.boxes) == 1
    assert sorted(errors.frame()["line"]) == list(range(2, len(bad) + 2))
    with pytest.raises(ValueError) as caught:
        read(tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{len(bad)} rows break a rule:\n")
    assert message.count(" line ") == SHOWN
    assert f"and {len(bad) - SHOWN} more" in message


@pytest.mark.parametrize(
    ("label", "rule"),
    [
        ("a,v,,1", "LabelName must be in the class list, but got LabelName="),
        ("../x,v,/m/car,1", "ImageID must be a plain file name, but got ImageID=../x"),
        ("a,v,/m/car,yes", "Confidence must be a number, but got Confidence=yes"),
        ("a,v,/m/car,", "Confidence must be a number, but got Confidence=nan"),
        ("a,v,/m/car", "a row must have 4 fields, but got fields=3"),
    ],
    ids=["no class", "parent folder", "text in a number", "empty number", "cut row"],
)
def test_a_bad_image_level_label_is_named_too(label: str, rule: str, tmp_path: Path) -> None:
    write(tmp_path, GOOD, labels=["a,v,/m/car,1", label])
    with pytest.raises(ValueError, match=re.escape(f"train-annotations-human-imagelabels.csv line 3: {rule}\n")):
        read(tmp_path)
    index, errors = read(tmp_path, on_bad_row="drop")
    assert labels_of(index) == {"a": [("/m/car", True)]}
    assert len(errors.found) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"", "the file must begin with a header line, but is empty", id="empty"),
        pytest.param(b"\n" + HEADER_2018.encode(), "the file must begin with a header line", id="blank first line"),
        pytest.param(
            HEADER_2018.replace("XMax", "XMaximum").encode(),
            "line 1: the header must name ImageID, LabelName, XMin, YMin, XMax, YMax, but lacks XMax",
            id="missing column",
        ),
        pytest.param(GOOD.encode(), "line 1: the header must name", id="no header"),
        pytest.param(
            (HEADER_2018 + ",XMin").encode(), "line 1: a column must be named once, but XMin is named twice", id="twice"
        ),
    ],
)
def test_a_file_that_is_no_such_table_is_refused_with_its_path(content: bytes, message: str, tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "train-annotations-bbox.csv"
    path.write_bytes(content)
    for on_bad_row in ("stop", "drop"):
        with pytest.raises(ValueError, match=re.escape(message)) as caught:
            read(tmp_path, on_bad_row=on_bad_row)  # type: ignore[arg-type]
        assert str(path) in str(caught.value)


def test_a_parquet_file_that_is_none_or_of_other_types_is_refused_with_its_path(tmp_path: Path) -> None:
    write(tmp_path, GOOD)
    path = tmp_path / "boxes.parquet"
    path.write_bytes(b"no parquet at all")
    files = find_files(tmp_path, ["train"], boxes=[path])
    with pytest.raises(ValueError, match=r"boxes\.parquet: not a readable Parquet file"):
        read_annotations(files, RowErrors(), progress=lambda text: None)
    frame = pd.read_csv(tmp_path / "train-annotations-bbox.csv")
    frame["XMin"] = "left"
    frame.to_parquet(path)
    with pytest.raises(ValueError, match=r"boxes\.parquet: a column must hold the type that its name requires.*left"):
        read_annotations(files, RowErrors(), progress=lambda text: None)


def test_an_image_in_two_splits_is_refused_with_both_files(tmp_path: Path) -> None:
    write(tmp_path, GOOD)
    write(tmp_path, GOOD, name="validation-annotations-bbox.csv")
    (tmp_path / "validation-annotations-human-imagelabels.csv").write_text(LABEL_HEADER, encoding="utf-8")
    with pytest.raises(ValueError) as caught:
        read(tmp_path, ["train", "validation"])
    assert str(caught.value) == (
        "validation-annotations-bbox.csv: an image must be in one split, but a is in train-annotations-bbox.csv too"
    )


def test_two_splits_are_read_as_one_set_of_images(tmp_path: Path) -> None:
    write(tmp_path, GOOD.replace("a,", "z,", 1))
    write(tmp_path, GOOD, name="validation-annotations-bbox.csv")
    (tmp_path / "validation-annotations-human-imagelabels.csv").write_text(
        f"{LABEL_HEADER}\na,v,/m/bus,0\n", encoding="utf-8"
    )
    index, _ = read(tmp_path, ["train", "validation"])
    assert index.image_ids.tolist() == ["a", "z"]
    assert labels_of(index) == {"a": [("/m/bus", False)], "z": []}


PUBLISHED_NAMES = {
    "plain": ("train-annotations-bbox.csv", "train-annotations-human-imagelabels.csv", "class-descriptions.csv"),
    "V5": (
        "train-annotations-bbox.csv",
        "train-annotations-human-imagelabels-boxable.csv",
        "class-descriptions-boxable.csv",
    ),
    "Challenge 2018": (
        "challenge-2018-train-annotations-bbox.csv",
        "challenge-2018-train-annotations-human-imagelabels.csv",
        "challenge-2018-class-descriptions-500.csv",
    ),
    "Challenge 2019": (
        "challenge-2019-train-detection-bbox.csv",
        "challenge-2019-train-detection-human-imagelabels.csv",
        "challenge-2019-classes-description-500.csv",
    ),
    "V7": (
        "oidv6-train-annotations-bbox.csv",
        "oidv7-train-annotations-human-imagelabels.csv",
        "oidv7-class-descriptions-boxable.csv",
    ),
}


@pytest.mark.parametrize("release", PUBLISHED_NAMES)
@pytest.mark.parametrize(
    "hierarchy",
    [None, "bbox_labels_500_hierarchy.json", "bbox_labels_600_hierarchy.json", "bbox_labels_hierarchy.json"],
)
def test_the_names_of_every_release_are_found(release: str, hierarchy: str | None, tmp_path: Path) -> None:
    boxes, labels, classes = (tmp_path / name for name in PUBLISHED_NAMES[release])
    for path in (boxes, labels, classes, *([tmp_path / hierarchy] if hierarchy else [])):
        path.touch()
    files = find_files(tmp_path, ["train"])
    assert (files.boxes, files.image_labels, files.classes) == ((boxes,), (labels,), classes)
    assert files.hierarchy == (tmp_path / hierarchy if hierarchy else None)
    assert find_files(tmp_path, ["train"], use_hierarchy=False).hierarchy is None


def test_explicit_paths_stand_for_the_files_looked_up(tmp_path: Path) -> None:
    given = [tmp_path / name for name in ("b.csv", "l.csv", "c.csv", "h.json")]
    files = find_files(
        tmp_path / "nowhere", ["train"], boxes=[given[0]], image_labels=[given[1]], classes=given[2], hierarchy=given[3]
    )
    assert files.all == tuple(given)
    assert find_files(write(tmp_path), ["train"], image_labels=None).image_labels == ()


def test_a_file_that_is_not_found_names_the_names_looked_for_and_the_setting(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data=.*nowhere: no such folder"):
        find_files(tmp_path / "nowhere", ["train"])
    with pytest.raises(DataError, match=r"holds none of class-descriptions\.csv.* as classes="):
        find_files(tmp_path, ["train"])
    write(tmp_path)
    with pytest.raises(DataError, match=r"holds none of test-annotations-bbox\.csv.* as boxes="):
        find_files(tmp_path, ["test"])
    (tmp_path / "train-annotations-human-imagelabels.csv").unlink()
    with pytest.raises(DataError, match="as image_labels=, or image_labels=none if there are none"):
        find_files(tmp_path, ["train"])


@pytest.mark.parametrize("image_id", ["0a1b", "IMG_1 (2)", "a.b", "größe", "-", "..a"])
def test_ordinary_ids_are_plain(image_id: str) -> None:
    assert is_plain_id(image_id)


@pytest.mark.parametrize("image_id", ["", " ", ".", "..", "...", "a/b", "../x", "/x", "a\\b", "C:x", "a\0b"])
def test_ids_that_could_name_another_folder_are_not_plain(image_id: str) -> None:
    assert not is_plain_id(image_id)


@pytest.mark.parametrize(
    "content",
    ["b\na\nb\n", "\ufeffImageID\nb\na\n", "ImageID,Split\r\nb,x\r\na,y\r\n", '"b"\n\n"a"', "a,1\nb"],
    ids=repr,
)
def test_a_list_of_image_ids_may_have_a_header_and_repeats(content: str, tmp_path: Path) -> None:
    path = tmp_path / "ids.csv"
    path.write_bytes(content.encode())
    assert read_image_ids(path).tolist() == ["a", "b"]


def test_an_image_id_in_quotes_may_hold_commas_and_quotes(tmp_path: Path) -> None:
    path = tmp_path / "ids.csv"
    path.write_text('ImageID,Split\n"a, 1",x\n "b ""2""" ,y\nc"3,z\n"d,4\n' + '"' + "e" * 100 + '",z\n')
    assert read_image_ids(path).tolist() == ["a, 1", 'b "2"', 'c"3', "d,4", "e" * 100]
    path.write_text('"' + "e" * 200_000)
    with pytest.raises(DataError, match="an image id must have at most 255 bytes"):
        read_image_ids(path)


def test_an_empty_or_missing_list_of_image_ids_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ids.csv").write_text("ImageID\n", encoding="utf-8")
    with pytest.raises(ValueError, match="the list must hold at least one image id, but is empty"):
        read_image_ids(tmp_path / "ids.csv")
    with pytest.raises(SettingError, match=r"eval_ids=.*none\.csv: no such file"):
        read_image_ids(tmp_path / "none.csv")


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_predictions_written_and_read_again_are_the_same_rows_in_the_same_order(suffix: str, tmp_path: Path) -> None:
    index, _ = read(write(tmp_path / "data", GOOD, GOOD.replace("a,", "b,", 1)))
    rng = np.random.default_rng(0)
    made = Detections(np.array([1, 0, 1], np.int32), np.array([0, 1, 1], np.int32), rng.random(3), rng.random((3, 4)))
    frame = predictions_frame(made, index)
    path = tmp_path / f"predictions{suffix}"
    frame.to_csv(path, index=False) if suffix == ".csv" else frame.to_parquet(path)
    again = read_predictions(path, index, RowErrors())
    for name in ("image_index", "class_index", "score", "boxes"):
        np.testing.assert_array_equal(getattr(again, name), getattr(made, name))


def test_predictions_of_an_unknown_image_are_marked_and_invalid_boxes_kept(tmp_path: Path) -> None:
    index, _ = read(write(tmp_path, GOOD))
    path = tmp_path / "p.csv"
    path.write_text(
        "ImageID,LabelName,Score,XMin,XMax,YMin,YMax\nzzz,/m/car,0.5,0.9,0.1,0,2\na,/m/bus,-1,0,1,0,1\n",
        encoding="utf-8",
    )
    found = read_predictions(path, index, RowErrors())
    assert found.image_index.tolist() == [-1, 0]
    assert found.boxes.tolist() == [[0.9, 0.0, 0.1, 2.0], [0.0, 0.0, 1.0, 1.0]]
    path.write_text("ImageID,LabelName,Score,XMin,XMax,YMin,YMax\na,/m/cat,0.5,0,1,0,1\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"p\.csv line 2: LabelName must be in the class list"):
        read_predictions(path, index, RowErrors())


@pytest.mark.skipif(not (SHARED / "bccd").is_dir(), reason="the blood cell data is not here")
def test_the_blood_cell_files_agree_with_pandas() -> None:
    folder = SHARED / "bccd"
    index, _ = read(folder, ["train", "validation"])
    frame = pd.concat([pd.read_csv(folder / f"{split}-annotations-bbox.csv") for split in ("train", "validation")])
    assert index.taxonomy.names == ("RBC", "WBC", "Platelets")
    assert len(index.boxes) == len(frame)
    by_class = frame["LabelName"].value_counts()
    assert {index.taxonomy.ids[k]: n for k, n in enumerate(np.bincount(index.labels).tolist())} == by_class.to_dict()
    one = frame[frame["ImageID"] == index.image_ids[3]]
    rows = slice(index.box_start[3], index.box_start[4])
    np.testing.assert_array_equal(index.boxes[rows], one[["XMin", "YMin", "XMax", "YMax"]])


@pytest.mark.skipif(not (SHARED / "bccd").is_dir(), reason="the blood cell data is not here")
def test_the_broken_blood_cell_rows_are_refused() -> None:
    folder = SHARED / "bccd"
    files = find_files(folder, ["train"], boxes=[folder / "broken_rows.csv"])
    rule = "2 rows break a rule:\n  broken_rows.csv line 2: XMin < XMax must hold, but got XMin=0.282813, XMax=0.282813"
    with pytest.raises(ValueError, match=re.escape(rule)):
        read_annotations(files, RowErrors(), progress=lambda text: None)


@pytest.mark.skipif(not (SHARED / "oid_real27").is_dir(), reason="the sample of Open Images is not here")
@pytest.mark.parametrize("split", ["train", "validation"])
def test_the_group_of_flags_of_the_open_images_sample_agree_with_pandas(split: str) -> None:
    folder = SHARED / "oid_real27"
    index, _ = read(folder, [split])
    frame = pd.read_csv(folder / f"{split}-annotations-bbox.csv").sort_values("ImageID", kind="stable")
    assert index.is_group_of.any()
    assert index.is_group_of.tolist() == (frame["IsGroupOf"] == 1).tolist()


def test_classes_keep_the_order_of_their_file_and_take_the_hierarchy_beside_it(tmp_path: Path) -> None:
    folder = write(tmp_path, GOOD, classes="/m/bus,Bus\n/m/car,Car\n/m/v,Vehicle\n")
    tree = {"LabelName": "root", "Subcategory": [{"LabelName": "/m/v", "Subcategory": [{"LabelName": "/m/car"}]}]}
    (folder / "bbox_labels_500_hierarchy.json").write_text(json.dumps(tree), encoding="utf-8")
    index, _ = read(folder)
    assert index.labels.tolist() == [1]
    assert index.taxonomy.ancestors(1).tolist() == [2]
