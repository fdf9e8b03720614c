"""COCO results as they are written: what is read back is what was written, and pycocotools reads the same."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from made_index import make_index

from retinaflow.data.coco_results import CocoResults
from retinaflow.data.index import AnnotationIndex
from retinaflow.data.predictions import SCHEMA, predictions_frame, read_predictions
from retinaflow.data.tables import RowErrors
from retinaflow.detections import Detections
from retinaflow.errors import DataError, SettingError
from retinaflow.taxonomy import Taxonomy

SIZES = [(480, 640), (333, 517), (1000, 7), (61, 4096)]


def index_of(image_ids: list[str], class_ids: list[str]) -> AnnotationIndex:
    index = make_index([[0]] * len(image_ids), classes=len(class_ids), sizes=SIZES[: len(image_ids)])
    taxonomy = Taxonomy(tuple(class_ids), tuple(f"name of {mid}" for mid in class_ids))
    return replace(index, image_ids=np.array(image_ids, dtype=np.str_), taxonomy=taxonomy)


def detections_on(index: AnnotationIndex, count: int = 2000) -> Detections:
    rng = np.random.default_rng(0)
    corners = np.sort(rng.random((count, 2, 2)), axis=1).reshape(count, 4).astype(np.float32)
    corners[:3] = [[0, 0, 1, 1], [1e-7, 0.5, 2e-7, 0.5000001], [-0.01, 0, 1.01, 1]]
    return Detections(
        np.sort(rng.integers(len(index), size=count)).astype(np.int32),
        rng.integers(len(index.taxonomy), size=count).astype(np.int32),
        rng.random(count).astype(np.float32),
        corners,
    )


def written(detections: Detections, index: AnnotationIndex, path: Path, file: Path | None = None) -> list[Any]:
    """In two tables, as the shards of ``predict`` are."""
    half = len(detections) // 2
    rows = np.arange(len(detections))
    tables = [
        pa.Table.from_pandas(predictions_frame(detections.take(part), index), schema=SCHEMA, preserve_index=False)
        for part in (rows[:half], rows[half:])
    ]
    CocoResults(index, file).write(tables, path)
    return list(json.loads(path.read_text(encoding="utf-8")))


IDS = {
    "numbers": (["000000000009", "000000391895", "7"], ["/m/0a", "/m/0b"], [9, 391895, 7], {1, 2}),
    "texts": (["a", 'quote"d', "ünï/x"], ["/m/0a", "/m/0b"], ["a", 'quote"d', "ünï/x"], {1, 2}),
    "one number twice": (["07", "7", "8"], ["/m/0a", "/m/0b"], ["07", "7", 8], {1, 2}),
    "class ids that are numbers": (["a", "b", "c"], ["90", "18", "other"], ["a", "b", "c"], {90, 18, "other"}),
}


@pytest.mark.parametrize("case", IDS.values(), ids=IDS)
def test_what_is_read_back_is_what_was_written(
    case: tuple[list[str], list[str], list[Any], set[Any]], tmp_path: Path
) -> None:
    image_ids, class_ids, numbers, categories = case
    index = index_of(image_ids, class_ids)
    detections = detections_on(index)
    entries = written(detections, index, tmp_path / "results.json")
    assert list(dict.fromkeys(entry["image_id"] for entry in entries)) == numbers
    assert {entry["category_id"] for entry in entries} == categories
    again = read_predictions(tmp_path / "results.json", index, RowErrors("stop"))
    np.testing.assert_array_equal(again.image_index, detections.image_index)
    np.testing.assert_array_equal(again.class_index, detections.class_index)
    np.testing.assert_array_equal(again.score.astype(np.float32), detections.score)
    np.testing.assert_array_equal(again.boxes.astype(np.float32), detections.boxes)
    # The numbers of the CSV file of the same detections, but for the last digit of a division.
    predictions_frame(detections, index).to_csv(tmp_path / "results.csv", index=False)
    table = read_predictions(tmp_path / "results.csv", index, RowErrors("stop"))
    np.testing.assert_array_equal(again.score, table.score)
    np.testing.assert_allclose(again.boxes, table.boxes, rtol=0, atol=1e-15)


def annotation_file(path: Path) -> Path:
    """Images 11 and 12 with sizes of their own, and two categories of which one is known by its name."""
    path.write_text(
        json.dumps(
            {
                "images": [
                    {"id": 11, "file_name": "val/a.jpg", "width": 1000, "height": 500},
                    {"id": 12, "file_name": "b.png", "width": 30, "height": 40},
                ],
                "categories": [{"id": 90, "name": "Name of /m/0b"}, {"id": 3, "name": "x", "label_name": "/m/0a"}],
                "annotations": [],
            }
        ),
        encoding="utf-8",
    )
    return path


def test_ids_and_sizes_are_those_of_the_annotation_file(tmp_path: Path) -> None:
    file, index = annotation_file(tmp_path / "instances.json"), index_of(["a", "b"], ["/m/0a", "/m/0b"])
    detections = Detections(
        np.array([0, 1], dtype=np.int32),
        np.array([0, 1], dtype=np.int32),
        np.array([0.5, 0.25]),
        np.array([[0.125, 0.25, 0.5, 0.75], [0.0, 0.0, 0.5, 0.25]]),
    )
    entries = written(detections, index, tmp_path / "results.json", file)
    assert entries == [
        {"image_id": 11, "category_id": 3, "bbox": [125.0, 125.0, 375.0, 250.0], "score": 0.5},
        {"image_id": 12, "category_id": 90, "bbox": [0.0, 0.0, 15.0, 10.0], "score": 0.25},
    ]
    again = read_predictions(tmp_path / "results.json", index, RowErrors("stop"), ids=file)
    np.testing.assert_array_equal(again.boxes, detections.boxes)


def test_what_the_annotation_file_lacks_is_printed_and_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = annotation_file(tmp_path / "instances.json")
    index = index_of(["a", "b", "c"], ["/m/0a", "/m/0b", "/m/0z"])
    detections = detections_on(index)
    entries = written(detections, index, tmp_path / "results.json", file)
    assert len(entries) == np.count_nonzero((detections.image_index < 2) & (detections.class_index < 2))
    printed = capsys.readouterr().out
    assert f"{file} lacks 1 of 3 images (c): their detections are left out" in printed
    assert f"{file} lacks 1 of 3 classes (name of /m/0z): their detections are left out" in printed


@pytest.mark.parametrize(("images", "classes"), [(["x"], ["/m/0a"]), (["a"], ["/m/0z"])], ids=["images", "classes"])
def test_an_annotation_file_of_other_images_or_classes_is_refused(
    images: list[str], classes: list[str], tmp_path: Path
) -> None:
    what = "images" if images == ["x"] else "classes"
    with pytest.raises(DataError, match=rf"instances\.json: it must list the {what} of the predictions"):
        CocoResults(index_of(images, classes), annotation_file(tmp_path / "instances.json"))


@pytest.mark.parametrize("given", [{"image_id": True}, {"category_id": False}, {"image_id": "\ud800"}])
def test_true_false_and_half_of_a_character_are_no_ids(given: dict[str, Any], tmp_path: Path) -> None:
    entry = {"image_id": 1, "category_id": 1, "bbox": [0, 0, 1, 1], "score": 0.5, **given}
    (tmp_path / "results.json").write_text(json.dumps([entry]))
    with pytest.raises(DataError, match="image_id and category_id must be numbers or texts"):
        read_predictions(tmp_path / "results.json", index_of(["1"], ["1"]), RowErrors("stop"))


def test_no_detection_is_an_empty_list(tmp_path: Path) -> None:
    assert written(Detections.empty(), index_of(["a"], ["/m/0a"]), tmp_path / "results.json") == []


RESULT = {"category_id": 1, "bbox": [1, 1, 10, 10], "score": 0.5}


@pytest.mark.parametrize("columns", [False, True])
def test_boxes_of_images_that_are_not_evaluated_are_not_measured(
    columns: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = index_of(["a"], ["/m/0a"])
    if columns:
        path = tmp_path / "found.csv"
        # The other image is in pixels, and without any area.
        path.write_text(
            "ImageID,LabelName,Score,XMin,XMax,YMin,YMax\na,/m/0a,0.5,0.1,0.2,0.1,0.2\n"
            + "b,/m/0a,0.5,30,20,30,20\n" * 2
        )
    else:
        path = tmp_path / "found.json"
        path.write_text(json.dumps([{**RESULT, "image_id": name} for name in "abb"]))
    read_predictions(path, index, RowErrors("stop"), explain=True)
    out = capsys.readouterr().out
    assert "2 of 3 detections are of images that are not evaluated and do not count, b (line " in out
    assert "no width or height" not in out
    assert "reach far out" not in out


@pytest.mark.parametrize("name", ["missing.json", "folder", "found.json/below.json"])
def test_a_missing_file_of_ids_is_named_when_results_are_read_and_written(name: str, tmp_path: Path) -> None:
    index = index_of(["a"], ["/m/0a"])
    (tmp_path / "folder").mkdir()
    (tmp_path / "found.json").write_text(json.dumps([{**RESULT, "image_id": "a"}]))
    with pytest.raises(SettingError, match=rf"prediction_ids=.*{name}: no such file"):
        read_predictions(tmp_path / "found.json", index, RowErrors("stop"), ids=tmp_path / name)
    with pytest.raises(SettingError, match=rf"prediction_ids=.*{name}: no such file"):
        CocoResults(index, tmp_path / name)


def test_a_category_whose_name_several_classes_have_is_refused_unless_it_names_the_id(tmp_path: Path) -> None:
    index = index_of(["a"], ["/m/0a", "/m/0b"])
    index = replace(index, taxonomy=Taxonomy(index.taxonomy.ids, ("Bench", "bench")))
    file, path = tmp_path / "instances.json", tmp_path / "found.json"
    path.write_text(json.dumps([{**RESULT, "image_id": 7}]))
    document: dict[str, Any] = {
        "images": [{"id": 7, "file_name": "a.jpg"}],
        "categories": [{"id": 1, "name": "Bench"}],
    }
    file.write_text(json.dumps(document))
    with pytest.raises(
        DataError, match=r"instances.json: category 1: 'Bench' is the name of .*label_name \(/m/0a, /m/0b"
    ):
        read_predictions(path, index, RowErrors("stop"), ids=file)
    document["categories"][0]["label_name"] = "/m/0b"
    file.write_text(json.dumps(document))
    assert read_predictions(path, index, RowErrors("stop"), ids=file).class_index.tolist() == [1]
