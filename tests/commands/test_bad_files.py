"""``evaluate`` from files with something wrong in them: an error with file and line, or a counted, listed row."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from retinaflow.cli import main
from retinaflow.metric.matches import Dropped

CORNERS = "XMin,XMax,YMin,YMax"
GOOD = {
    "classes.csv": "/m/0a,A\n/m/0b,B\n",
    "boxes.csv": f"ImageID,LabelName,{CORNERS}\nx,/m/0a,0.1,0.5,0.1,0.5\n",
    "labels.csv": "ImageID,LabelName,Confidence\nx,/m/0a,1\nx,/m/0b,0\n",
    "predictions.csv": f"ImageID,LabelName,Score,{CORNERS}\nx,/m/0a,0.9,0.1,0.5,0.1,0.5\n",
    "hierarchy.json": json.dumps({"LabelName": "/m/root", "Subcategory": [{"LabelName": "/m/0a"}]}),
}
CYCLE = {
    "LabelName": "/m/root",
    "Subcategory": [
        {"LabelName": "/m/0a", "Subcategory": [{"LabelName": "/m/0b", "Subcategory": [{"LabelName": "/m/0a"}]}]}
    ],
}


def evaluate(folder: Path, **more: str) -> int:
    """The exit code of the command on the five files of a folder."""
    given = {
        "predictions": folder / "predictions.csv",
        "boxes": folder / "boxes.csv",
        "image_labels": folder / "labels.csv",
        "classes": folder / "classes.csv",
        "hierarchy": folder / "hierarchy.json",
        "output": folder / "out",
        "track": "false",
        "bootstrap": "0",
        **more,
    }
    return main(["evaluate", *(word for name, value in given.items() for word in (f"--{name}", str(value)))])


def written(folder: Path, **changed: str) -> Path:
    """The good files, some replaced; ``boxes`` stands for ``boxes.csv``."""
    for name, text in {**GOOD, **{f"{name}.csv": text for name, text in changed.items()}}.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def more(name: str, row: str) -> str:
    """A good file with one more row, its third line."""
    return GOOD[f"{name}.csv"].rstrip("\n").split("\n")[0] + "\n" + GOOD[f"{name}.csv"].split("\n")[1] + f"\n{row}\n"


BAD_ROWS = {
    "class of a prediction": ("predictions", "x,/m/0z,0.5,0,1,0,1", "LabelName must be in the class list", "=/m/0z"),
    "class of a box": ("boxes", "x,/m/0z,0,1,0,1", "LabelName must be in the class list", "LabelName=/m/0z"),
    "class of a label": ("labels", "x,,1", "LabelName must be in the class list", "LabelName="),
    "state of a label": (
        "labels", "x,/m/0a,2", "Confidence must be 1 (verified present) or 0 (verified absent)", "Confidence=2.0"
    ),
    "text in a score": ("predictions", "x,/m/0a,high,0,1,0,1", "Score must be a number", "Score=high"),
    "text in a box": ("boxes", "x,/m/0a,0,wide,0,1", "XMax must be a number", "XMax=wide"),
    "NaN score": ("predictions", "x,/m/0a,nan,0,1,0,1", "Score must be a number", "Score=nan"),
    "no score": ("predictions", "x,/m/0a,,0,1,0,1", "Score must be a number", "Score="),
    "infinite corner": ("predictions", "x,/m/0a,0.5,0,inf,0,1", "XMax must be a number", "XMax=inf"),
    "row cut short": ("predictions", "x,/m/0a,0.5,0", "a row must have 7 fields", "fields=4"),
    "ground truth outside": ("boxes", "x,/m/0a,0.5,1.5,0,1", "coordinates must lie in [0, 1]", "XMax=1.5"),
    "ground truth without width": ("boxes", "x,/m/0a,0.5,0.5,0,1", "XMin < XMax must hold", "XMin=0.5, XMax=0.5"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD_ROWS)
def test_a_bad_row_stops_with_its_line_or_is_dropped_counted_and_listed(
    fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, row, rule, value = BAD_ROWS[fault]
    folder = written(tmp_path, **{name: more(name, row)})
    assert evaluate(folder) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: 1 row breaks a rule:\n")
    assert f"{name}.csv line 3: {rule}, but got " in shown
    assert value in shown
    assert "Traceback" not in shown
    assert evaluate(folder, on_bad_row="drop") == 0
    document = json.loads((folder / "out" / "metrics.json").read_text(encoding="utf-8"))
    assert document["mAP"] == 1.0
    assert document["dropped_rows"] == [{"file": f"{name}.csv", "rule": rule, "rows": 1}]
    listed = pd.read_csv(folder / "out" / "dropped.csv")
    assert listed[["file", "line"]].to_numpy().tolist() == [[f"{name}.csv", 3]]


KEPT = {
    # Predictions are used as given (METRIC rules 3 and 9).
    "outside the image": ("x,/m/0a,0.95,-0.5,1.5,0,1", {"invalid_box": 0}),
    "without width": ("x,/m/0a,0.95,0.5,0.5,0,1", {"invalid_box": 1}),
    "mirrored": ("x,/m/0a,0.95,0.5,0.1,0.1,0.5", {"invalid_box": 1}),
    "of an unknown image": ("nowhere,/m/0a,0.95,0,1,0,1", {"unknown_image": 1}),
    "of a class nobody verified": ("y,/m/0b,0.95,0,1,0,1", {"not_verified": 1}),
}


@pytest.mark.parametrize("kind", KEPT)
def test_a_prediction_that_is_not_evaluated_is_counted_with_its_reason(kind: str, tmp_path: Path) -> None:
    row, counts = KEPT[kind]
    folder = written(tmp_path, predictions=more("predictions", row), boxes=more("boxes", "y,/m/0a,0.1,0.5,0.1,0.5"))
    assert evaluate(folder) == 0
    document = json.loads((folder / "out" / "metrics.json").read_text(encoding="utf-8"))
    expected = dict.fromkeys(vars(Dropped()), 0)
    assert document["dropped_detections"] == {**expected, **counts, "total": sum(counts.values())}
    # Found 1 of 2; the detection outside the image is evaluated, is wrong and comes first.
    assert document["mAP"] == (0.25 if kind == "outside the image" else 0.5)


def _missing(name: str, column: str) -> str:
    return GOOD[f"{name}.csv"].replace(column, "Other", 1)


BAD_FILES: dict[str, tuple[dict[str, str], str]] = {
    "missing column": ({"predictions": _missing("predictions", "Score")}, "predictions.csv line 1: the header must"),
    "missing column of boxes": ({"boxes": _missing("boxes", "XMax")}, "but lacks XMax"),
    "missing column of labels": ({"labels": _missing("labels", "Confidence")}, "but lacks Confidence"),
    "duplicate header": (
        {"predictions": GOOD["predictions.csv"].replace("YMax", "XMin", 1).replace("YMin", "YMin,YMax", 1)},
        "predictions.csv line 1: a column must be named once, but XMin is named twice",
    ),
    "other line ends": ({"boxes": GOOD["boxes.csv"].replace("\n", "\u2028")}, "lines must end with LF or CR, but"),
    "line ends of a mainframe": ({"labels": GOOD["labels.csv"].replace("\n", "\x85")}, "line 1: lines must end with"),
    "empty predictions": ({"predictions": ""}, "predictions.csv: the file must begin with a header line, but is empty"),
    "empty boxes": ({"boxes": ""}, "boxes.csv: the file must begin with a header line, but is empty"),
    "empty class list": ({"classes": ""}, "classes.csv: the class list must name at least one class, but is empty"),
    "class twice": ({"classes": "/m/0a,A\n/m/0a,B\n"}, "class ids must be unique, but got twice: /m/0a"),
    "cycle": ({"hierarchy": json.dumps(CYCLE)}, "hierarchy.json: the class hierarchy must not contain a cycle"),
    "no JSON": ({"hierarchy": "{"}, "hierarchy.json line 1: not a readable JSON file"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD_FILES)
def test_a_bad_file_stops_with_its_name_and_rule(
    fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed, message = BAD_FILES[fault]
    written(tmp_path, **{name: text for name, text in changed.items() if name != "hierarchy"})
    if "hierarchy" in changed:
        (tmp_path / "hierarchy.json").write_text(changed["hierarchy"], encoding="utf-8")
    assert evaluate(tmp_path) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert message in shown


def _header(name: str) -> str:
    return GOOD[f"{name}.csv"].split("\n")[0] + "\n"


@pytest.mark.parametrize(
    ("empty", "mean"),
    [(("predictions",), 0.0), (("boxes",), None), (("labels",), 1.0), (("boxes", "labels", "predictions"), None)],
    ids=["predictions", "boxes", "labels", "all"],
)
def test_files_of_a_header_alone_are_evaluated_as_nothing(
    empty: tuple[str, ...], mean: float | None, tmp_path: Path
) -> None:
    folder = written(tmp_path, **{name: _header(name) for name in empty})
    assert evaluate(folder, iou_thresholds="coco", bootstrap="5") == 0
    document = json.loads((folder / "out" / "metrics.json").read_text(encoding="utf-8"))
    assert document["mAP"] == mean
    refused = any("no image-level labels" in reason for reason in document["not_a_challenge_score"])
    assert refused == ("labels" in empty)


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """A folder of good files."""
    return written(tmp_path)


def test_tables_and_document_say_what_was_asked_for(good: Path) -> None:
    assert evaluate(good, iou_thresholds="0.5,0.75", report_score="0.3", expand_predictions="true") == 0
    table = pd.read_csv(good / "out" / "per_class_ap.csv")
    assert list(table.columns[:3]) == ["class", "ap", "num_truths"]
    assert table.columns[-1] == "class_id"
    details = pd.read_csv(good / "out" / "per_class_details.csv").set_index("class")
    assert details.loc["A", ["ap_iou_50", "ap_iou_75", "ap_iou_mean", "precision_at_0.3"]].tolist() == [1, 1, 1, 1]
    assert pd.read_csv(good / "out" / "slices.csv")["slice"].tolist() == ["small", "medium", "large", "crowded"]
    document = json.loads((good / "out" / "metrics.json").read_text(encoding="utf-8"))
    assert document["expanded_predictions"] is True
    assert [document[name] for name in ("mAP_iou_50", "mAP_iou_75", "mAP_iou_mean")] == [1.0, 1.0, 1.0]
    assert document["num_verified_labels"] == 2
    assert document["not_a_challenge_score"] == []


def test_a_kaggle_submission_scores_as_the_published_columns(good: Path) -> None:
    submission = good / "submission.csv"
    submission.write_text("ImageId,PredictionString\nx,/m/0a 0.9 0.1 0.1 0.5 0.5\n", encoding="utf-8")
    tables: list[bytes] = []
    for predictions in (good / "predictions.csv", submission):
        assert evaluate(good, predictions=str(predictions)) == 0
        tables.append((good / "out" / "per_class_details.csv").read_bytes())
    assert tables[0] == tables[1]


@pytest.mark.slow
def test_judging_a_file_loads_no_torch(good: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from test_bad_files import evaluate; from pathlib import Path; "
        "assert evaluate(Path(sys.argv[2])) == 0; print('torch' in sys.modules)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parent), str(good)],
        capture_output=True, text=True, check=True, cwd=root,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "False"
