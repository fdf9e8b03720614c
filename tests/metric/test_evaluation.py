"""One call: files, frames, arrays or an index, the same scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from retinaflow.data.index import AnnotationIndex
from retinaflow.detections import Detections
from retinaflow.metric.challenge import COCO_THRESHOLDS
from retinaflow.metric.evaluation import evaluate_detections, read_detections, read_ground_truth

BOXES = pd.DataFrame(
    {
        "ImageID": ["x", "y", "y"],
        "LabelName": ["/m/0car", "/m/0car", "/m/0tree"],
        "XMin": [0.1, 0.2, 0.7],
        "XMax": [0.5, 0.6, 0.9],
        "YMin": [0.1, 0.2, 0.7],
        "YMax": [0.5, 0.6, 0.9],
    }
)
LABELS = pd.DataFrame({"ImageID": ["x", "y"], "LabelName": ["/m/0car", "/m/0tree"], "Confidence": [1, 1]})
FOUND = pd.DataFrame(
    {
        "ImageID": ["x", "y"],
        "LabelName": ["/m/0car", "/m/0car"],
        "Score": [0.9, 0.8],
        "XMin": [0.1, 0.7],
        "XMax": [0.5, 0.8],
        "YMin": [0.1, 0.1],
        "YMax": [0.5, 0.2],
    }
)
CLASSES = {"/m/0car": "Car", "/m/0vehicle": "Vehicle", "/m/0tree": "Tree"}
TREE = {
    "LabelName": "/m/0root",
    "Subcategory": [
        {"LabelName": "/m/0vehicle", "Subcategory": [{"LabelName": "/m/0car"}]},
        {"LabelName": "/m/0tree"},
    ],
}
# Car: found 1 of 2, precision 1 up to recall 1/2. Vehicle has the cars' boxes and no detection. Tree: nothing found.
EXPECTED = {"Car": 0.5, "Vehicle": 0.0, "Tree": 0.0}


def files(folder: Path) -> dict[str, Any]:
    """All of it as files."""
    for name, frame in (("boxes", BOXES), ("labels", LABELS), ("found", FOUND)):
        frame.to_csv(folder / f"{name}.csv", index=False)
    (folder / "classes.csv").write_text("".join(f"{mid},{name}\n" for mid, name in CLASSES.items()))
    (folder / "tree.json").write_text(json.dumps(TREE))
    return {
        "predictions": folder / "found.csv",
        "ground_truth": str(folder / "boxes.csv"),
        "image_labels": folder / "labels.csv",
        "classes": folder / "classes.csv",
        "hierarchy": folder / "tree.json",
    }


def arrays(frame: pd.DataFrame) -> dict[str, np.ndarray]:
    """Columns as numpy arrays."""
    return {str(name): column.to_numpy() for name, column in frame.items()}


def index() -> AnnotationIndex:
    """The ground truth as an index."""
    return read_ground_truth(BOXES, image_labels=LABELS, classes=CLASSES, hierarchy=TREE)


def given(form: str, folder: Path) -> dict[str, Any]:
    """The arguments of one form."""
    in_memory = {"image_labels": LABELS, "classes": CLASSES, "hierarchy": TREE}
    forms: dict[str, dict[str, Any]] = {
        "files": files(folder),
        "frames": {"predictions": FOUND, "ground_truth": BOXES, **in_memory},
        "arrays": {
            "predictions": arrays(FOUND), "ground_truth": arrays(BOXES), **in_memory, "image_labels": arrays(LABELS),
        },
        "mixed": {**files(folder), "predictions": FOUND, "classes": CLASSES},
        "index": {"predictions": FOUND, "ground_truth": index()},
        "index and detections": {"predictions": read_detections(FOUND, index()), "ground_truth": index()},
    }  # fmt: skip
    return forms[form]


@pytest.mark.parametrize("form", ["files", "frames", "arrays", "mixed", "index", "index and detections"])
def test_every_form_gives_the_same_scores(form: str, tmp_path: Path) -> None:
    found = evaluate_detections(**given(form, tmp_path))
    assert dict(zip(found.per_class["class"], found.per_class["ap"], strict=True)) == EXPECTED
    assert found.mean_ap == pytest.approx(0.5 / 3)
    assert found.not_a_challenge_score == ()
    assert found.scores.matches.verified_labels == 2


def test_without_image_labels_it_is_no_challenge_score() -> None:
    found = evaluate_detections(FOUND, BOXES, classes=CLASSES)
    assert "no image-level labels" in found.not_a_challenge_score[0]


def test_expanded_predictions_are_found_under_the_parent_too() -> None:
    found = evaluate_detections(FOUND, index(), expand_predictions=True)
    assert found.per_class["ap"].tolist() == [0.5, 0.5, 0.0]


def test_further_thresholds_are_columns() -> None:
    found = evaluate_detections(FOUND, index(), iou_thresholds=COCO_THRESHOLDS)
    assert list(found.per_class.columns[3:5]) == ["ap_iou_50", "ap_iou_55"]
    # The right box is exact: found at every threshold.
    assert found.ap_by_iou.mean(axis=0) == pytest.approx([0.5, 0, 0])
    per_class, slices = found.details(score_threshold=0.85)
    assert per_class["recall_at_0.85"].tolist() == [0.5, 0.0, 0.0]
    assert len(slices) == 4


def test_nothing_at_all_has_no_mean_and_no_error() -> None:
    found = evaluate_detections(FOUND[:0], BOXES[:0], image_labels=LABELS[:0], classes=CLASSES)
    assert np.isnan(found.mean_ap)
    only_truth = evaluate_detections(FOUND[:0], BOXES, image_labels=LABELS, classes=CLASSES)
    assert only_truth.mean_ap == 0.0
    no_truth = evaluate_detections(FOUND, BOXES[:0], image_labels=LABELS, classes=CLASSES)
    assert np.isnan(no_truth.mean_ap)
    assert len(evaluate_detections(Detections.empty(), index()).per_class) == 3


def test_what_is_missing_or_said_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="the class list must be given as classes="):
        evaluate_detections(FOUND, BOXES)
    with pytest.raises(ValueError, match="give none of them beside it"):
        evaluate_detections(FOUND, index(), classes=CLASSES)


@pytest.mark.parametrize(("weight", "car"), [(1.0, 1 / 3 + 1 / 3 * 1 / 2), (0.0, 1 / 2)])
def test_the_worked_example_of_the_document_gives_what_it_says(weight: float, car: float) -> None:
    a, b, g = (0.0, 0.0, 0.5, 0.5), (0.0, 0.0, 0.2, 0.2), (0.5, 0.5, 1.0, 1.0)
    boxes = _table([("x", "/m/car", a), ("y", "/m/car", b), ("y", "/m/car", g)]).assign(IsGroupOf=[0, 0, 1])
    labels = {"ImageID": ["z"], "LabelName": ["/m/vehicle"], "Confidence": [0]}
    found = _table(
        [
            ("x", "/m/car", (0.0, 0.0, 0.5, 0.4)),  # IoU 0.8
            ("z", "/m/car", a),
            ("x", "/m/car", (0.0, 0.0, 0.5, 0.3)),  # IoU 0.6
            ("y", "/m/car", (0.6, 0.6, 0.7, 0.7)),
            ("y", "/m/car", (0.8, 0.8, 0.9, 0.9)),
            ("x", "/m/dog", a),
        ]
    ).assign(Score=[0.9, 0.8, 0.7, 0.6, 0.5, 0.4])
    result = evaluate_detections(
        found,
        boxes,
        image_labels=labels,
        classes={"/m/car": "Car", "/m/vehicle": "Vehicle", "/m/dog": "Dog"},
        hierarchy={
            "LabelName": "/m/root",
            "Subcategory": [{"LabelName": "/m/vehicle", "Subcategory": [{"LabelName": "/m/car"}]}],
        },
        group_of_weight=weight,
    )
    np.testing.assert_allclose(result.per_class["ap"], [car, 0.0, np.nan])
    assert result.mean_ap == pytest.approx(car / 2)
    assert (result.scores.dropped.not_verified, result.scores.matches.absorbed) == (1, 2)


@pytest.mark.parametrize("form", ["csv", "parquet", "frame", "arrays"])
def test_classes_that_are_not_exhaustive_are_read_from_every_form_of_boxes(form: str, tmp_path: Path) -> None:
    # Image y has a car, and a detection of one elsewhere. A box of another image or class changes nothing there.
    flagged = {flags: BOXES.assign(IsNotExhaustive=flags) for flags in ((0, 0, 0), (1, 0, 1), (0, 1, 0))}
    found = {}
    for flags, frame in flagged.items():
        boxes: Any = frame
        if form in ("csv", "parquet"):
            boxes = tmp_path / f"boxes.{form}"
            frame.to_csv(boxes, index=False) if form == "csv" else frame.to_parquet(boxes)
        elif form == "arrays":
            boxes = {name: frame[name].to_numpy() for name in frame}
        scores = evaluate_detections(FOUND, boxes, image_labels=LABELS, classes=CLASSES, hierarchy=TREE).scores
        found[flags] = (scores.ap[0], len(scores.matches.score), scores.dropped.not_exhaustive)
    assert found == {(0, 0, 0): (0.5, 2, 0), (1, 0, 1): (0.5, 2, 0), (0, 1, 0): (0.5, 1, 1)}


def _table(rows: list[tuple[str, str, tuple[float, float, float, float]]]) -> pd.DataFrame:
    frame = pd.DataFrame([row[:2] for row in rows], columns=["ImageID", "LabelName"])
    frame[["XMin", "YMin", "XMax", "YMax"]] = [row[2] for row in rows]
    return frame
