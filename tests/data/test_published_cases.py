"""Data sets as people have them. Each case is read from the shared folder where it is there, and is made anew from code
where it is not; the others here are further members of its kind."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from made_index import SHARED, labels_of
from PIL import Image

from retinaflow.commands import evaluate
from retinaflow.data.training_data import TrainingData, load_training_data
from retinaflow.errors import DataError
from retinaflow.inference.image_selection import wanted_images
from retinaflow.settings.commands import EvaluateConfig, PredictConfig, TrainConfig
from retinaflow.settings.resolve import resolve
from retinaflow.taxonomy import Taxonomy

TAXONOMY = Taxonomy(("/m/01a", "/m/01b", "/m/01c"), ("Valve", "Pump", "Hose"))
CASES = SHARED.parent / "data_cases"
CLASSES = "/m/01a,Valve\n/m/01b,Pump\n/m/01c,Hose\n"
BOX = "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside"
LABEL = "ImageID,Source,LabelName,Confidence"


def boxes(ids: Sequence[str]) -> str:
    """A box for each image, of Valve and Pump in turn."""
    rows = (f"{i},xclick,/m/01{'ab'[n % 2]},1,0.2,0.6,0.2,0.7,0,0,0,0,0" for n, i in enumerate(ids))
    return "\n".join([BOX, *rows, ""])


def labels(ids: Sequence[str], *more: str) -> str:
    """The boxed class of each image is present; further rows."""
    rows = (f"{i},verification,/m/01{'ab'[n % 2]},1" for n, i in enumerate(ids))
    return "\n".join([LABEL, *rows, *more, ""])


def ids_from(first: int, count: int) -> list[str]:
    return [f"{number:04d}" for number in range(first, first + count)]


def put(folder: Path, files: dict[str, str], images: Sequence[str]) -> Path:
    """Write texts by path, and images of 80 x 60 pixels."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    for name in images:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((60, 80, 3), 90, np.uint8)).save(folder / name)
    return folder


TRAIN, VALIDATION = ids_from(0, 6), ids_from(6, 3)
IMAGES = [f"images/{image_id}.jpg" for image_id in TRAIN + VALIDATION]
PLAIN = {
    "class-descriptions.csv": CLASSES,
    "train-annotations-bbox.csv": boxes(TRAIN),
    "train-annotations-human-imagelabels.csv": labels(TRAIN),
    "validation-annotations-bbox.csv": boxes(VALIDATION),
    "validation-annotations-human-imagelabels.csv": labels(VALIDATION),
}
_LABELS = "train-annotations-human-imagelabels.csv"


def _unverified(folder: Path) -> Path:
    rows = [f"{i},machine,/m/01c,0.{n + 4}" for n, i in enumerate(TRAIN)]
    return put(folder, PLAIN | {_LABELS: labels(TRAIN, *rows)}, IMAGES)


def _unlisted(folder: Path) -> Path:
    rows = [f"{i},verification,/m/0q{n:05d},{n % 2}" for n, i in enumerate(TRAIN * 9)][:53]
    return put(folder, PLAIN | {_LABELS: labels(TRAIN, *rows)}, IMAGES)


def _names_of_v7(folder: Path) -> Path:
    absent = ([f"{i},verification,/m/01c,0" for i in ids] for ids in (TRAIN, VALIDATION))
    files = {
        "oidv7-class-descriptions-boxable.csv": f"LabelName,DisplayName\n{CLASSES}",
        "oidv6-train-annotations-bbox.csv": boxes(TRAIN),
        "oidv7-train-annotations-human-imagelabels.csv": labels(TRAIN, *next(absent)),
        "validation-annotations-bbox.csv": boxes(VALIDATION),
        "oidv7-val-annotations-human-imagelabels.csv": labels(VALIDATION, *next(absent)),
    }
    return put(
        folder, files, [f"{s}/{i}.jpg" for s, ids in (("train", TRAIN), ("validation", VALIDATION)) for i in ids]
    )


def _export(folder: Path) -> Path:
    """FiftyOne's export of Open Images: the tables have rows of ten images that were not exported."""
    files, images = {}, []
    for split, own, other in (("train", TRAIN, 100), ("validation", ids_from(20, 3), 200)):
        ids = own + [f"{number:04x}" for number in range(other, other + 10)]
        files[f"{split}/labels/detections.csv"] = boxes(ids)
        files[f"{split}/labels/classifications.csv"] = labels(ids, *(f"{i},verification,/m/0zzz,1" for i in ids))
        files[f"{split}/metadata/classes.csv"] = CLASSES
        tree = {"LabelName": "/m/0root", "Subcategory": [{"LabelName": "/m/01a"}, {"LabelName": "/m/01b"}]}
        files[f"{split}/metadata/hierarchy.json"] = json.dumps(tree)
        images += [f"{split}/data/{i}.jpg" for i in own]
    return put(folder, files, images)


MADE: dict[str, Callable[[Path], Path]] = {
    "d01": _unverified, "d23": _unlisted, "d24": _names_of_v7, "d16": _export,
}  # fmt: skip
LINES = {
    "d01": "6 labels of a machine",
    "d23": "53 labels of classes that the class list lacks are left out",
    "d24": "oidv7-val-annotations-human-imagelabels.csv: 6 rows",
    "d16": "10 of 16 images in the tables have no file and are left out",
}


def load(folder: Path, **given: object) -> TrainingData:
    return load_training_data(resolve(TrainConfig, {"data": str(folder), **given}))


@pytest.mark.parametrize("where", ["shared", "made"])
@pytest.mark.parametrize("name", MADE)
def test_a_case_is_read_and_what_is_left_out_has_a_line(
    name: str, where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if where == "shared" and not (CASES / name).is_dir():
        pytest.skip("the shared cases are not here")
    data = load(CASES / name if where == "shared" else MADE[name](tmp_path / name))
    assert LINES[name] in capsys.readouterr().out
    assert (len(data.train), len(data.evaluated), len(data.train.boxes), len(data.dropped)) == (6, 3, 6, 0)
    absent = [row for rows in labels_of(data.train).values() for row in rows if not row[1]]
    assert absent == ([("/m/01c", False)] * 6 if name == "d24" else [])
    assert data.train.sizes.all()


@pytest.mark.skipif(not (CASES / "d23real").is_dir(), reason="the shared cases are not here")
def test_real_rows_of_v7_are_read_with_the_list_of_boxable_classes(capsys: pytest.CaptureFixture[str]) -> None:
    data = load_training_data(resolve(TrainConfig, {"data": str(CASES / "d23real")}), need_images=False)
    assert "15 labels of classes that the class list lacks are left out" in capsys.readouterr().out
    assert (len(data.train.boxes), len(data.train.verified_class), data.train.num_classes) == (87, 4, 601)


def test_a_hint_about_the_evaluation_split_names_its_settings(tmp_path: Path) -> None:
    folder = _names_of_v7(tmp_path / "d24")
    (folder / "oidv7-val-annotations-human-imagelabels.csv").unlink()
    with pytest.raises(
        DataError, match=r"holds none of validation-.*oidv7-val-.*its path as eval_image_labels="
    ) as caught:
        load(folder)
    assert "image_labels=none" not in str(caught.value)
    (folder / "validation-annotations-bbox.csv").unlink()
    with pytest.raises(DataError, match=r"holds none of validation-annotations-bbox\.csv.* its path as eval_boxes=;"):
        load(folder)


def test_a_folder_of_another_layout_is_recognised_with_the_command_that_converts_it(tmp_path: Path) -> None:
    document = {
        "images": [{"id": 1, "file_name": "a.jpg", "width": 80, "height": 60}],
        "annotations": [],
        "categories": [],
    }
    folder = put(tmp_path / "coco", {"annotations/instances_train.json": json.dumps(document)}, ["train/a.jpg"])
    with pytest.raises(
        DataError, match=r"^found COCO JSON in .*coco: convert it first: .*convert --data .*coco --output"
    ):
        load(folder)
    # Boxes of another split are published boxes.
    put(folder, {"class-descriptions.csv": CLASSES, "test-annotations-bbox.csv": boxes(TRAIN)}, [])
    with pytest.raises(DataError, match=r"there are test-annotations-bbox\.csv: train_splits="):
        load(folder)


# Evaluation of predictions

_E4 = "ImageID,LabelName,Score,XMin,YMin,XMax,YMax\n"


def score(folder: Path, predictions: str, name: str = "found.csv", **given: object) -> float:
    """The mean AP of a file of predictions on the validation images of a folder."""
    (folder / name).write_text(predictions, encoding="utf-8")
    settings = {"data": str(folder), "predictions": str(folder / name), "output": str(folder / "out"), **given}
    config = resolve(EvaluateConfig, {"track": False, "bootstrap": 0, "error_analysis": False, **settings})
    return evaluate.run(config).scores.mean_ap


def test_an_unverified_label_changes_no_score(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = f"{_E4}0007,/m/01a,0.9,0.2,0.2,0.6,0.6\n0006,/m/01a,0.8,0.2,0.2,0.6,0.7\n0008,/m/01a,0.7,0.2,0.2,0.6,0.7\n"
    folder = put(tmp_path / "plain", PLAIN, [])
    before = score(folder, rows)
    put(folder, {"validation-annotations-human-imagelabels.csv": labels(VALIDATION, "0007,machine,/m/01a,0.9")}, [])
    # Valve: both boxes found; Pump: none.
    assert score(folder, rows) == before == 0.5
    assert "1 labels of a machine" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["results", "dataset", "ids given"])
def test_coco_results_are_evaluated(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = put(tmp_path / "plain", PLAIN, IMAGES if kind == "results" else [])
    # Boxes of 0.2 to 0.6 and 0.2 to 0.7 of 80 x 60 pixels. Category 1 is the first class where no file says otherwise.
    valve, pump = {"results": (1, 2), "dataset": (7, 3), "ids given": (7, 3)}[kind]
    image = {"results": [6, 7, 8], "dataset": [11, 12, 13], "ids given": [11, 12, 13]}[kind]
    box = {"bbox": [16, 12, 32, 30], "score": 0.9}
    found = [{"image_id": number, "category_id": (valve, pump)[n % 2], **box} for n, number in enumerate(image)]
    document = {
        "images": [
            {"id": n, "file_name": f"val/{i}.jpg", "width": 80, "height": 60}
            for n, i in zip(image, VALIDATION, strict=True)
        ],
        "categories": [{"id": pump, "name": "pump"}, {"id": valve, "name": "Valve"}],
        "annotations": found,
    }
    given = {}
    if kind == "ids given":
        (folder / "instances_val.json").write_text(json.dumps(document), encoding="utf-8")
        given["prediction_ids"] = str(folder / "instances_val.json")
    text = json.dumps(document if kind == "dataset" else found)
    assert score(folder, text, "results.json", **given) == 1.0
    assert ("1 is Valve, and so on" in capsys.readouterr().out) == (kind == "results")


BAD_RESULTS = {
    "no list": ('"a"', "COCO results must be a list of detections"),
    "cut": ('[{"image_id": 6', r"results\.json: not a readable JSON file in the list, element 1"),
    "three sides": (
        '[{"image_id": 6, "category_id": 1, "bbox": [1, 2, 3], "score": 1}]',
        "line 1: bbox must be four numbers",
    ),
    "no score": (
        '[{"image_id": 6, "category_id": 1, "bbox": [1, 2, 3, 4]}]',
        "must have image_id, category_id, bbox and",
    ),
    "huge": (f'[{{"image_id": 6, "category_id": 1, "bbox": [1, 2, 3, {10**400}], "score": 1}}]', "bbox must be four"),
    "class": ('[{"image_id": 6, "category_id": 90, "bbox": [1, 2, 3, 4], "score": 1}]', "LabelName=90"),
    "image": (
        '[{"image_id": 600, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 1}]',
        "no detection is of an evaluated",
    ),
}


@pytest.mark.parametrize("case", BAD_RESULTS.values(), ids=BAD_RESULTS)
def test_a_bad_file_of_coco_results_is_named(case: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=case[1]):
        score(put(tmp_path / "plain", PLAIN, IMAGES), case[0], "results.json")


def test_boxes_in_pixels_need_sizes(tmp_path: Path) -> None:
    text = '[{"image_id": 6, "category_id": 1, "bbox": [16, 12, 32, 30], "score": 1}]'
    folder = put(tmp_path / "plain", PLAIN, [])
    with pytest.raises(
        DataError, match=r"the sizes of 1 images are not known; give .*images=.*size_table=.*prediction_ids="
    ):
        score(folder, text, "results.json")
    put(folder, {"sizes.csv": "ImageID,Width,Height\n0006,80,60\n"}, [])
    # Found at rank 1 of 2 Valves: AP 0.5; Pump 0.
    assert score(folder, text, "results.json", size_table=str(folder / "sizes.csv")) == 0.25


ZERO = {
    "pixels": (
        "0006,/m/01a,0.9,16,12,48,42\n",
        r"most coordinates lie outside of \[0, 1\], 16, 12, 48, 42 for example \(line 2",
    ),
    "pixels from 0": ("0006,/m/01a,0.9,0,0,48,42\n", "are they in pixels"),
    "per cent": ("0006,/m/01a,0.9,20,20,60,70\n", "most coordinates lie outside"),
    "suffix": (
        "0006.jpg,/m/01a,0.9,0.2,0.2,0.6,0.7\n",
        r"first is of 0006\.jpg \(line 2\).*without folder and suffix \(0006\)",
    ),
    "folder": ("val/0006.PNG,/m/01a,0.9,0.2,0.2,0.6,0.7\n", r"without folder and suffix \(0006\)"),
    "other images": ("zzz,/m/01a,0.9,0.2,0.2,0.6,0.7\n", "no detection is of an evaluated image: the first is of zzz"),
    "name": ("0006,Valve,0.9,0.2,0.2,0.6,0.7\n", "Valve is the name of /m/01a"),
}


@pytest.mark.parametrize("case", ZERO.values(), ids=ZERO)
def test_predictions_that_cannot_count_are_refused(case: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"(?s)found.csv.*{case[1]}"):
        score(put(tmp_path / "plain", PLAIN, []), _E4 + case[0])


PARTLY = {
    "other images": ("zzz,/m/01a,0.9,0.2,0.2,0.6,0.7\n", "1 of 2 detections are of images that are not evaluated"),
    "suffix": ("0008.jpg,/m/01a,0.9,0.2,0.2,0.6,0.7\n", "an id is the file name without folder and suffix (0008)"),
    "pixels": ("0008,/m/01a,0.9,16,12,48,42\n", "reach far out of their image and cannot match (XMin=16,"),
    "width": (
        "0008,/m/01a,0.9,0.6,0.2,0.2,0.7\n",
        "have no width or height and do not count: are XMax and YMax a width",
    ),
    "score": ("0008,/m/01a,90,0.2,0.2,0.6,0.7\n", "have a score outside of [0, 1] (90)"),
}


@pytest.mark.parametrize("case", PARTLY.values(), ids=PARTLY)
def test_a_part_that_cannot_count_has_a_line_with_an_example(
    case: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    score(put(tmp_path / "plain", PLAIN, []), f"{_E4}0006,/m/01a,0.9,0.2,0.2,0.6,0.7\n{case[0]}")
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if line.startswith("found.csv: "))
    assert case[1] in line
    assert "line 3" in line


def test_a_zero_is_explained_by_what_was_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert score(put(tmp_path / "plain", PLAIN, []), f"{_E4}0006,/m/01c,0.9,0.2,0.2,0.6,0.7\n") == 0
    assert "no detection matches a ground-truth box; detections left out: 1 of classes that are not verified on" in (
        capsys.readouterr().out
    )


def test_an_export_is_evaluated_and_predicted_on_the_images_that_it_holds(tmp_path: Path) -> None:
    folder = _export(tmp_path / "d16")
    rows = "".join(f"{i},/m/01{'ab'[n % 2]},0.9,0.2,0.2,0.6,0.7\n" for n, i in enumerate(ids_from(20, 3)))
    assert score(folder, _E4 + rows) == 1.0
    wanted = wanted_images(resolve(PredictConfig, {"data": str(folder), "split": "validation"}), TAXONOMY, {})
    assert (wanted.index.image_ids.tolist(), wanted.unreadable) == (ids_from(20, 3), [])


def test_a_file_of_which_no_row_is_left_says_why(tmp_path: Path) -> None:
    text = PLAIN["train-annotations-bbox.csv"].replace("0.2,0.6,0.2,0.7", "20,60,20,70")
    empty = {"train-annotations-human-imagelabels.csv": LABEL, "train-annotations-bbox.csv": text}
    folder = put(tmp_path / "pixels", PLAIN | empty, IMAGES)
    with pytest.raises(
        DataError, match=r"none of 6 rows keeps the rules \(train-annotations-bbox\.csv line 2: coordinates"
    ):
        load(folder, on_bad_row="drop")
    with pytest.raises(DataError, match="are they in pixels"):
        load(folder)
