"""Predictions from published columns, Kaggle submissions, frames and dicts; and what is wrong with them, by line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from retinaflow.data.id_columns import read_image_sizes
from retinaflow.data.index import AnnotationIndex
from retinaflow.data.openimages import read_image_ids
from retinaflow.data.predictions import read_predictions, source_of
from retinaflow.data.tables import RowErrors
from retinaflow.errors import DataError
from retinaflow.metric.evaluation import read_ground_truth

CORNERS = "XMin,XMax,YMin,YMax"
KAGGLE = "ImageId,PredictionString\n"


@pytest.fixture
def index() -> AnnotationIndex:
    """Images x and y, classes /m/0a and /m/0b."""
    boxes = {"ImageID": ["y", "x"], "LabelName": ["/m/0a", "/m/0b"], "XMin": [0.1, 0.1], "YMin": [0.1, 0.1]}
    boxes |= {"XMax": [0.5, 0.5], "YMax": [0.5, 0.5]}
    return read_ground_truth(boxes, classes={"/m/0a": "A", "/m/0b": "B"})


Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """``write(text, name)`` makes a file of that content."""

    def write(text: str, name: str = "predictions.csv") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_a_kaggle_submission_reads_as_the_same_rows_in_published_columns(index: AnnotationIndex, write: Write) -> None:
    kaggle = write(
        KAGGLE
        + "y,/m/0a 0.9 0.1 0.2 0.3 0.4 /m/0b 0.5 0 0 1 1\n"
        + "elsewhere,/m/0a 1e-3 0.1 0.2 0.3 0.4\nempty,\nx, /m/0b 0.25 0.5 0.5 0.75 0.75 \n"
    )
    published = write(
        f"ImageID,LabelName,Score,{CORNERS}\ny,/m/0a,0.9,0.1,0.3,0.2,0.4\ny,/m/0b,0.5,0,1,0,1\n"
        "elsewhere,/m/0a,0.001,0.1,0.3,0.2,0.4\nx,/m/0b,0.25,0.5,0.75,0.5,0.75\n",
        "published.csv",
    )
    found, wanted = (read_predictions(path, index, RowErrors()) for path in (kaggle, published))
    # Images are in order of their ids: x 0, y 1; the third is none of them.
    assert found.image_index.tolist() == [1, 1, -1, 0]
    for name in ("image_index", "class_index", "score", "boxes"):
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name))
    assert found.boxes[0].tolist() == [0.1, 0.2, 0.3, 0.4]


def test_a_submission_may_be_parquet_or_a_frame(index: AnnotationIndex, tmp_path: Path) -> None:
    frame = pd.DataFrame({"ImageId": ["x"], "PredictionString": ["/m/0a 0.5 0 0 1 1"]})
    frame.to_parquet(tmp_path / "s.parquet")
    for source in (tmp_path / "s.parquet", frame):
        found = read_predictions(source_of(source, "predictions"), index, RowErrors())
        assert (found.score.tolist(), found.class_index.tolist()) == ([0.5], [0])


def test_a_submission_without_any_detection_is_empty(index: AnnotationIndex, write: Write) -> None:
    for text in (KAGGLE, KAGGLE + "x,\ny,\n"):
        assert len(read_predictions(write(text), index, RowErrors())) == 0


BAD_STRINGS = {
    "five words": ("/m/0a 0.9 0.1 0.2 0.3", "must hold six words per detection", "words=5"),
    "text in a number": ("/m/0a high 0.1 0.2 0.3 0.4", "Score must be a number", "Score=high"),
    "NaN score": ("/m/0a nan 0.1 0.2 0.3 0.4", "Score must be a number", "Score=nan"),
    "infinite corner": ("/m/0a 0.5 0.1 0.2 inf 0.4", "XMax must be a number", "XMax=inf"),
    "unknown class": ("/m/0z 0.9 0.1 0.2 0.3 0.4", "LabelName must be in the class list", "LabelName=/m/0z"),
}


@pytest.mark.parametrize("fault", BAD_STRINGS)
def test_a_bad_prediction_string_is_named_by_line_and_can_be_dropped(
    fault: str, index: AnnotationIndex, write: Write
) -> None:
    bad, rule, value = BAD_STRINGS[fault]
    path = write(KAGGLE + f"x,/m/0a 0.5 0 0 1 1\ny,{bad}\n")
    with pytest.raises(ValueError, match="1 row breaks a rule") as caught:
        read_predictions(path, index, RowErrors())
    message = str(caught.value)
    assert "predictions.csv line 3: " in message
    assert rule in message
    assert value in message
    errors = RowErrors("drop")
    assert read_predictions(path, index, errors).score.tolist() == [0.5]
    assert len(errors.frame()) == 1


def test_frames_and_dicts_are_checked_like_files_and_counted_from_one(index: AnnotationIndex) -> None:
    columns = {"ImageID": ["x", "y"], "LabelName": ["/m/0a", "/m/0b"], "Score": [0.5, np.nan]}
    columns |= {name: np.array([0.25, 0.5]) for name in CORNERS.split(",")}
    for given in (columns, pd.DataFrame(columns)):
        with pytest.raises(ValueError, match="predictions line 2: Score must be a number, but got Score=nan"):
            read_predictions(source_of(given, "predictions"), index, RowErrors())
    with pytest.raises(ValueError, match=r"the header must name .* but lacks Score"):
        read_predictions(source_of({"ImageID": [], "LabelName": []}, "predictions"), index, RowErrors())
    with pytest.raises(ValueError, match="predictions: columns must be arrays of one length"):
        source_of({**columns, "Score": [0.5]}, "predictions")
    with pytest.raises(ValueError, match="predictions must be a path, a pandas frame or a dict"):
        source_of([], "predictions")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["LF", "CR LF", "CR"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_predictions_sizes_and_lists_are_read_with_any_line_ends_and_encoding(
    end: str, encoding: str, index: AnnotationIndex, tmp_path: Path
) -> None:
    texts = {
        "found.csv": f"ImageID,LabelName,Score,{CORNERS}\ny,/m/0a,0.9,0.1,0.3,0.2,0.4\nx,/m/0b,0.5,0,1,0,1\n",
        "submission.csv": f"{KAGGLE}y,/m/0a 0.9 0.1 0.2 0.3 0.4\nx,/m/0b 0.5 0 0 1 1",
        "sizes.csv": "ImageID,Width,Height\nx,80,60\n\ny,30,40\n",
        "ids.txt": "x\ny\n",
    }
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text.replace("\n", end).encode(encoding))
    for name in ("found.csv", "submission.csv"):
        assert read_predictions(tmp_path / name, index, RowErrors()).image_index.tolist() == [1, 0]
    ids, sizes = read_image_sizes(tmp_path / "sizes.csv", RowErrors())
    assert (ids.tolist(), sizes.tolist()) == (["x", "y"], [[60, 80], [40, 30]])
    assert read_image_ids(tmp_path / "ids.txt").tolist() == ["x", "y"]


def test_an_id_of_a_million_letters_is_cut_in_messages_and_refused_in_lists(
    index: AnnotationIndex, write: Write
) -> None:
    long = "x" * 10**6
    path = write(f"ImageID,LabelName,Score,{CORNERS}\n{long},/m/0a,0.9,0.1,0.3,0.2,0.4\n")
    with pytest.raises(DataError, match=r"no detection is of an evaluated image") as caught:
        read_predictions(path, index, RowErrors(), explain=True)
    assert len(str(caught.value)) < 1000
    with pytest.raises(DataError, match="an image id must have at most 255 bytes, but got xxx") as caught:
        read_image_ids(write(long, "ids.txt"))
    assert len(str(caught.value)) < 1000


def test_cp1252_is_an_error_of_the_row(index: AnnotationIndex, tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_bytes(f"ImageID,LabelName,Score,{CORNERS}\nStraße,/m/0a,1,0,1,0,1\n".encode("cp1252"))
    with pytest.raises(DataError, match=r"p\.csv line 2: a row must be text in UTF-8, but got Stra.e,/m/0a"):
        read_predictions(tmp_path / "p.csv", index, RowErrors())
    (tmp_path / "p.csv").write_bytes("ImageID\n".encode("utf-16-le"))
    with pytest.raises(DataError, match=r"p\.csv line 1: the file must be text in UTF-8, but holds zero bytes"):
        read_predictions(tmp_path / "p.csv", index, RowErrors())


def test_a_class_name_in_place_of_the_id_is_said_in_any_case_with_all_its_ids(write: Write) -> None:
    boxes = {"ImageID": ["x"], "LabelName": ["/m/0a"], "XMin": [0.1], "YMin": [0.1], "XMax": [0.5], "YMax": [0.5]}
    index = read_ground_truth(boxes, classes={"/m/0a": "Bench", "/m/0b": "Bench"})
    path = write(f"ImageID,LabelName,Score,{CORNERS}\nx,bench,0.5,0.1,0.2,0.1,0.2\n")
    with pytest.raises(DataError, match="LabelName is the id of a class: bench is the name of /m/0a and /m/0b"):
        read_predictions(path, index, RowErrors("stop"))
