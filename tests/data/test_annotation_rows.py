"""What a row means: labels of three states, flags, units; what is left out without being an error, and is counted."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from made_index import boxes_of, labels_of

from retinaflow.data.annotation_rows import build_annotations
from retinaflow.data.index import AnnotationIndex
from retinaflow.data.tables import LISTED, Frame, RowErrors, Source
from retinaflow.errors import DataError
from retinaflow.taxonomy import Taxonomy

TAXONOMY = Taxonomy(("/m/car", "/m/bus"), ("Car", "Bus"))
BOX = "ImageID,LabelName,XMin,XMax,YMin,YMax,IsGroupOf"
LABEL = "ImageID,Source,LabelName,Confidence"


def as_source(kind: str, text: str, folder: Path, name: str) -> Source:
    """A CSV text as a file or frame."""
    path = folder / f"{name}.csv"
    path.write_text(text, encoding="utf-8")
    frame = pd.read_csv(path, keep_default_na=False)
    if kind == "frame":
        return Frame(name, frame)
    if kind == "parquet":
        frame.to_parquet(path.with_suffix(".parquet"))
        return path.with_suffix(".parquet")
    if kind in ("utf-16", "CR"):
        path.write_bytes(text.encode("utf-16") if kind == "utf-16" else text.replace("\n", "\r").encode())
    return path


def read(
    folder: Path,
    *,
    boxes: str = f"{BOX}\na,/m/car,0,0.5,0,0.5,0\n",
    labels: str = LABEL,
    kind: str = "csv",
    drop: bool = False,
) -> tuple[AnnotationIndex, RowErrors]:
    errors = RowErrors("drop" if drop else "stop")
    sources = [as_source(kind, text, folder, name) for name, text in (("boxes", boxes), ("labels", labels))]
    return build_annotations(TAXONOMY, sources[:1], sources[1:], errors), errors


@pytest.mark.parametrize("kind", ["csv", "parquet", "frame", "utf-16", "CR"])
def test_a_label_is_present_absent_or_unverified(kind: str, tmp_path: Path) -> None:
    labels = (
        f"{LABEL}\na,verification,/m/car,1\na,verification,/m/bus,0\n"
        "b,verification,/m/car,0.0\nb,machine,/m/bus,0.9\nc,machine,/m/bus,1.0\nc,verification,/m/car,0.5\n"
    )
    index, errors = read(tmp_path, labels=labels, kind=kind)
    assert labels_of(index) == {"a": [("/m/car", True), ("/m/bus", False)], "b": [("/m/car", False)]}
    first = {"csv": 5, "utf-16": 5, "CR": 5}.get(kind, 4)
    suffix = "" if kind == "frame" else ".parquet" if kind == "parquet" else ".csv"
    assert errors.notices == [
        f"labels{suffix}: 3 labels of a machine (a Confidence between 0 and 1, or Source machine) are unverified and "
        f"left out (line {first}: Confidence=0.9)"
    ]


@pytest.mark.parametrize("value", ["-1", "2", "10", "90", "1.5", "-0.5"])
@pytest.mark.parametrize("kind", ["csv", "parquet", "frame"])
def test_a_confidence_of_another_scale_is_an_error(value: str, kind: str, tmp_path: Path) -> None:
    labels = f"{LABEL}\na,v,/m/car,1\na,v,/m/bus,{value}\n"
    line = 3 if kind == "csv" else 2
    rule = rf"labels\S* line {line}: Confidence must be 1 \(verified present\) or 0 \(verified absent\), but got"
    with pytest.raises(DataError, match=rule):
        read(tmp_path, labels=labels, kind=kind)
    index, errors = read(tmp_path, labels=labels, kind=kind, drop=True)
    assert labels_of(index) == {"a": [("/m/car", True)]}
    assert errors.count == 1


def test_labels_of_classes_that_the_list_lacks_are_counted_in_one_line(tmp_path: Path) -> None:
    labels = f"{LABEL}\na,v,/m/car,1\n" + "".join(f"z{row},v,/m/0q{row},{row % 2}\n" for row in range(1000))
    index, errors = read(tmp_path, labels=labels)
    assert (index.image_ids.tolist(), errors.count) == (["a"], 0)
    assert errors.notices == [
        "labels.csv: 1,000 labels of classes that the class list lacks are left out (line 3: LabelName=/m/0q0)"
    ]
    _, errors = read(tmp_path, labels=f"{LABEL}\na,v,/m/other,1\n")
    assert errors.notices[0].endswith("which are all rows: is it the file of this class list?")


@pytest.mark.parametrize(
    "text", ["a,/m/car,0.1,0.5,0,0.5,2", "a,/m/car,0.1,0.5,0,0.5,-2", "a,/m/car,0.1,0.5,0,0.5,0.5"]
)
@pytest.mark.parametrize("kind", ["csv", "parquet", "frame"])
def test_a_flag_is_yes_no_or_unknown(text: str, kind: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"IsGroupOf must be 1 \(yes\), 0 \(no\) or -1 \(unknown\), but got"):
        read(tmp_path, boxes=f"{BOX}\n{text}\n", kind=kind)
    index, errors = read(tmp_path, boxes=f"{BOX}\nb,/m/car,0.25,0.5,0,0.5,-1\n{text}\n", kind=kind, drop=True)
    assert boxes_of(index) == {"b": [("/m/car", 0.25, 0, 0.5, 0.5, 0)]}
    assert errors.count == 1


UNITS = {
    "pixels": ("a,/m/car,10,60,20,80,0\nb,/m/car,5,9,5,9,0\nc,/m/car,0,1,0,1,0\n", "are they in pixels?"),
    "width and height": (
        "a,/m/car,0.6,0.2,0.1,0.2,0\nb,/m/car,0.1,0.2,0.1,0.2,0\nc,/m/car,0.7,0.2,0.1,0.3,0\n",
        "are XMax and YMax a width and a height, or columns exchanged?",
    ),
    "columns exchanged": (
        "a,/m/car,0.6,0.2,0.8,0.4,0\nb,/m/car,0.5,0.1,0.6,0.2,0\n",
        "are XMax and YMax a width and a height, or columns",
    ),
    "names": ("a,Car,0.1,0.2,0.1,0.2,0\n", "LabelName is the id of a class: Car is the name of /m/car"),
}


@pytest.mark.parametrize("case", UNITS.values(), ids=UNITS)
def test_errors_of_many_rows_name_their_likely_cause(case: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=re.escape(case[1])):
        read(tmp_path, boxes=f"{BOX}\n{case[0]}")


def test_an_id_in_two_unicode_forms_is_one_image(tmp_path: Path) -> None:
    boxes = f"{BOX}\ne\u0301,/m/car,0.1,0.5,0,0.5,0\n\u00e9,/m/bus,0.1,0.5,0,0.5,0\n"
    index, _ = read(tmp_path, boxes=boxes, labels=f"{LABEL}\ne\u0301,v,/m/car,1\n")
    assert index.image_ids.tolist() == ["\u00e9"]
    assert (len(index.boxes), len(index.verified_class)) == (2, 1)
    with pytest.raises(DataError, match="a box must be given once"):
        read(tmp_path, boxes=f"{BOX}\ne\u0301,/m/car,0.1,0.5,0,0.5,0\n\u00e9,/m/car,0.1,0.5,0,0.5,0\n")


def test_errors_are_listed_up_to_a_bound_and_all_are_counted() -> None:
    rows = LISTED + 1234
    frame = pd.DataFrame({name: np.full(rows, 0.5) for name in ("XMin", "XMax", "YMin", "YMax")})
    frame["ImageID"], frame["LabelName"] = "a", "/m/car"
    errors = RowErrors("drop")
    index = build_annotations(TAXONOMY, [Frame("boxes", frame), Frame("more", frame[:10])], [], errors)
    assert (len(index), errors.count, len(errors.found)) == (0, rows + 10, LISTED)
    listed = errors.frame()
    assert listed["rows"].sum() == rows + 10
    assert listed.iloc[-1].to_dict() == {
        "file": "several files", "line": 0, "rule": "XMin < XMax must hold", "value": "1,244 more", "rows": 1244
    }  # fmt: skip
