"""Data sets as people and their tools write them. Each case is read from the shared folder where it is there, and made
anew from code in any case; the tests beside it are further members of its kind."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from made_index import SHARED
from PIL import Image

from retinaflow.data.known_classes import known_classes
from retinaflow.data.training_data import read_split
from retinaflow.detections import Detections
from retinaflow.errors import DataError, SettingError
from retinaflow.metric.evaluation import evaluate_detections
from retinaflow.settings.data_settings import DataSettings
from retinaflow.settings.resolve import resolve

CASES = SHARED.parent / "data_cases"
ROW = "0 0.5 0.5 0.4 0.4\n"
Files = Mapping[str, str | bytes]


def put(folder: Path, files: Files, images: Sequence[str] = (), *, size: tuple[int, int] = (64, 48)) -> Path:
    """Write texts by path, and images of ``size`` (width, height)."""
    for name in images:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (90, 120, 90)).save(folder / name)
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def coco(boxes: Sequence[Sequence[float]], *, size: tuple[int, int] = (64, 48), **more: Any) -> str:
    """A COCO file with one image (``0.jpg``, ...) and box for each of ``boxes``; ``more``: keys of every annotation."""
    images = [{"id": n, "file_name": f"{n}.jpg", "width": size[0], "height": size[1]} for n in range(len(boxes))]
    annotations = [{"id": n, "image_id": n, "category_id": 1, "bbox": box, **more} for n, box in enumerate(boxes)]
    return json.dumps({"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "cup"}]})


def voc(filename: str, *, corners: Sequence[float] = (4, 4, 24, 24), name: str = "cup", more: str = "") -> str:
    sides = "".join(
        f"<{side}>{value}</{side}>" for side, value in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True)
    )
    thing = f"<object><name>{name}</name>{more}<bndbox>{sides}</bndbox></object>"
    size = "<size><width>64</width><height>48</height></size>"
    return f"<annotation><filename>{filename}</filename>{size}{thing}</annotation>"


def yolo(names: Sequence[str], labels: str = "labels", row: str = ROW) -> Files:
    return {f"{labels}/{name}.txt": row for name in names}


def jpgs(folder: str, names: Sequence[str]) -> list[str]:
    return [f"{folder}/{name}.jpg" for name in names]


Builder = Callable[[Path], Path]
BUILT: dict[str, Builder] = {
    "d02": lambda folder: put(
        folder,
        {
            "annotations/instances_train.json": json.dumps(
                {
                    "images": [
                        {"id": n, "file_name": f"{name}.jpg", "width": 64, "height": 48} for n, name in enumerate("ab")
                    ],
                    "annotations": [
                        {"id": 1, "image_id": 0, "category_id": 1, "bbox": [4, 4, 20, 20], "ignore": 0},
                        {"id": 2, "image_id": 0, "category_id": 1, "bbox": [30, 4, 30, 40], "ignore": 1},
                        {"id": 3, "image_id": 1, "category_id": 1, "bbox": [5, 5, 20, 20], "ignore": "0"},
                        {"id": 4, "image_id": 1, "category_id": 1, "bbox": [30, 5, 30, 30], "iscrowd": 1},
                    ],
                    "categories": [{"id": 1, "name": "walker"}],
                }
            )
        },
        jpgs("images", "ab"),
    ),
    "d03": lambda folder: put(folder, {"train.json": coco([[0.25, 0.25, 0.3, 0.4]] * 6)}, jpgs("images", "012345")),
    "d21": lambda folder: put(
        folder,
        {"train.json": coco([[300 + 10 * n, 200, 420 + 10 * n, 330] for n in range(6)], size=(640, 480), area=15600)},
        [f"{n}.jpg" for n in range(6)],
        size=(640, 480),
    ),
    "d04": lambda folder: put(
        folder,
        {
            "obj.data": "classes = 1\ntrain = data/train.txt\nvalid = data/valid.txt\nnames = data/obj.names\n",
            "obj.names": "valve\npump\n",
            "train.txt": "".join(f"data/obj_train_data/f{n}.png\n" for n in range(3, 10)),
            "valid.txt": "".join(f"data/obj_valid_data/f{n}.png\n" for n in range(3)),
            **yolo([f"f{n}" for n in range(3, 10)], "obj_train_data"),
            **yolo([f"f{n}" for n in range(3)], "obj_valid_data"),
        },
        [f"obj_{'valid' if n < 3 else 'train'}_data/f{n}.png" for n in range(10)],
    ),
    "d04b": lambda folder: put(
        folder,
        {
            "obj.data": "train = data/train.txt\nvalid = data/valid.txt\nnames = data/obj.names\n",
            "obj.names": "valve\npump\n",
            "train.txt": "".join(f"data/obj/f{n}.jpg\n" for n in range(3, 9)),
            "valid.txt": "".join(f"data/obj/f{n}.jpg\n" for n in range(3)),
            **yolo([f"f{n}" for n in range(10)], "obj"),
        },
        [f"obj/f{n}.jpg" for n in range(10)],
    ),
    "d05": lambda folder: put(
        folder,
        {"data.yaml": "nc: 2\nnames:\n- valve\n- pump\n", **yolo("0123", "train/labels"), **yolo("45", "valid/labels")},
        jpgs("train/images", "0123") + jpgs("valid/images", "45"),
    ),
    "d06": lambda folder: put(
        folder,
        {
            "dataset.yaml": "names: [valve, pump]\npath: c:\\Users\\me\\sets\\pumps\ntrain: .\\images\\train\\\n"
            "validation: .\\images\\validation\\\n",
            **yolo("0123", "labels/train"),
            **yolo("45", "labels/validation"),
        },
        jpgs("images/train", "0123") + jpgs("images/validation", "45"),
    ),
    "d06b": lambda folder: put(
        folder,
        {
            "dataset.yaml": "names:\n  0: valve\n  1: pump\npath: /Users/me/pumps\nval: ./images/val/\n",
            **yolo("012", "labels/val"),
        },
        jpgs("images/val", "012"),
    ),
    "d07": lambda folder: put(
        folder, {"export/classes.txt": "valve\n", **yolo("01234", "export/labels")}, jpgs("photos", "01234")
    ),
    "d31": lambda folder: put(
        folder,
        {"images/classes.txt": "valve\n", **yolo([f"IMG_{n}" for n in range(6)], "images")},
        [f"images/IMG_{n}.jpg" for n in range(6)],
    ),
    "o6": lambda folder: put(
        folder,
        {
            "classes.txt": "valve\n",
            **yolo(["IMG_0", "IMG_1", "IMG_2.JPG", "IMG_3.JPG", "img_4", "img_5"]),
        },
        [f"images/IMG_{n}.JPG" for n in range(6)],
    ),
    "d08": lambda folder: put(
        folder, {"dataset.json": coco([[4, 4, 20, 20]] * 3).replace('"category_id": 1', '"category_id": "1"')},
        [f"{n}.jpg" for n in range(3)],
    ),
    "d08b": lambda folder: put(
        folder, {"dataset.json": coco([[4, 4, 20, 20]] * 3).replace('"category_id": 1', '"category_id": 1.0')},
        [f"{n}.jpg" for n in range(3)],
    ),
    "d09": lambda folder: put(
        folder, {"train.json": coco([[100, 50, 200, 100], [412.5, 60, 5.7e-14, 40]], size=(640, 480))},
        ["0.jpg", "1.jpg"], size=(640, 480),
    ),
    "d13b": lambda folder: put(
        folder,
        {
            **{f"Annotations/s{n}.xml": voc(f"s{n}.jpg") for n in range(6)},
            "ImageSets/Main/train.txt": "s0.jpg\ns1.jpg\ns2.jpg\ns3.jpg\n",
            "ImageSets/Main/val.txt": "s4.jpg\ns5.jpg\n",
        },
        [f"JPEGImages/s{n}.jpg" for n in range(6)],
    ),
    "d14": lambda folder: put(
        folder,
        {f"{'train' if n < 4 else 'validation'}/annotations/s{n}.xml": voc(f"s{n}.jpg") for n in range(6)},
        [f"{'train' if n < 4 else 'validation'}/images/s{n}.jpg" for n in range(6)],
    ),
    "d14b": lambda folder: put(
        folder,
        {f"Annotations/{('north', 'south')[n % 2]}/s{n}.xml": voc(f"s{n}.jpg") for n in range(6)},
        [f"JPEGImages/{('north', 'south')[n % 2]}/s{n}.jpg" for n in range(6)],
    ),
    "d15_voc": lambda folder: put(
        folder,
        {"Annotations/fish.xml": voc("fish.png"), "Annotations/other.xml": voc("other.jpg")},
        ["images/fish.jpg", "images/fish.png", "images/other.jpg"],
    ),
    "d15_yolo": lambda folder: put(
        folder, {"classes.txt": "fish\n", **yolo(["fish", "other"])},
        ["images/fish.jpg", "images/fish.png", "images/other.jpg"],
    ),
    "d18": lambda folder: put(
        folder,
        {
            "data.yaml": "path: .\ntrain: images/train\nnames:\n  0: on\n  1: off\n  2: 010\n  3: 12:30\n",
            **{f"labels/train/{n}.txt": f"{n} 0.5 0.5 0.4 0.4\n" for n in range(4)},
        },
        jpgs("images/train", "0123"),
    ),
    "d29": lambda folder: put(
        folder,
        {
            "train.json": json.dumps(
                {
                    "images": [
                        {"id": n, "file_name": f"{'/'.join(LONG)}/tag{n}/0001.jpg", "width": 64, "height": 48}
                        for n in range(2)
                    ],
                    "annotations": [
                        {"id": n, "image_id": n, "category_id": 1, "bbox": [4, 4, 20, 20]} for n in range(2)
                    ],
                    "categories": [{"id": 1, "name": "cup"}],
                }
            )
        },
        [f"images/{'/'.join(LONG)}/tag{n}/0001.jpg" for n in range(2)],
    ),
    "d30": lambda folder: put(
        folder,
        {
            "result.json": json.dumps(
                {
                    "images": [
                        {"id": n, "file_name": name, "width": 64, "height": 48} for n, name in enumerate(OUTSIDE)
                    ],
                    "annotations": [
                        {"id": n, "image_id": n, "category_id": 1, "bbox": [5, 5, 20, 20]} for n in range(len(OUTSIDE))
                    ],
                    "categories": [{"id": 1, "name": "cup"}],
                }
            )
        },
        [f"photos/{n}.jpg" for n in range(5)],
    ),
    "d32_utf-16": lambda folder: put(
        folder, {**yolo("012"), "classes.txt": "Tür\n".encode("utf-16")}, jpgs("images", "012")
    ),
    "d32_cp1252": lambda folder: put(
        folder, {**yolo("012"), "classes.txt": "Tür\n".encode("cp1252")}, jpgs("images", "012")
    ),
    "d32_list": lambda folder: put(
        folder,
        {
            "data.yaml": "train: train.txt\nnames: [a]\n", "train.txt": "images/ü1.jpg\n".encode("cp1252"),
            **yolo(["ü1"]),
        },
        ["images/ü1.jpg"],
    ),
    "d32_coco": lambda folder: put(
        folder, {"train.json": coco([[4, 4, 20, 20]]).replace("cup", "Tür").encode("cp1252")}, ["0.jpg"]
    ),
}  # fmt: skip
LONG = [f"kamera-nordseite-lager-halle-{digit * 60}" for digit in "123"]
OUTSIDE = (
    "/Users/me/photos/0.jpg",
    "C:\\Users\\me\\photos\\1.jpg",
    "../photos/2.jpg",
    "file:///data/photos/3.jpg",
    "https://x.example/photos/4.jpg?size=1",
)


@pytest.fixture(params=["made", "shared"])
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], Path]:
    """``case("d02")``: the folder of a case, made from code or the shared one."""

    def folder(name: str) -> Path:
        if request.param == "made":
            return BUILT[name](tmp_path / name)
        if not (CASES / name).is_dir():
            pytest.skip(f"the shared case {name} is not here")
        return CASES / name

    return folder


# Splits that a source states


STATED = {
    "d04": {"train": 7, "validation": 3},
    "d04b": {"train": 6, "validation": 3},
    "d05": {"train": 4, "validation": 2},
    "d06": {"train": 4, "validation": 2},
    "d06b": {"validation": 3},
    "d13b": {"train": 4, "validation": 2},
    "d14": {"train": 4, "validation": 2},
    "d14b": {"train": 6},
}


@pytest.mark.parametrize("name", STATED)
def test_a_split_that_the_source_states_is_kept(case: Any, converted: Any, name: str) -> None:
    result = converted(case(name), validation_fraction=0.2 if "validation" in STATED[name] else 0)
    assert result.splits == STATED[name]
    assert len(result.found.boxes) == len(result.found.images)


def test_what_no_list_names_is_counted_and_not_trained_on(case: Any, converted: Any) -> None:
    result = converted(case("d04b"))
    assert not any("f9" in name for name in result.ids)
    assert result.said("1 image files are in no split and are left out")


OTHER_SPLITS: dict[str, tuple[Files, dict[str, str]]] = {
    "lists without data.yaml": (
        {"train.txt": "/Users/me/set/images/a.jpg\n", "val.txt": ".\\images\\b.jpg\n"},
        {"a": "train", "b": "validation"},
    ),
    "a list of names in quotes": (
        {"data.yaml": "names: [cup]\ntrain: lists/t.txt\nvalid: 'lists/v.txt'\n", "lists/t.txt": '"images/a.jpg"\n',
         "lists/v.txt": "../images/b.jpg\n"},
        {"a": "train", "b": "validation"},
    ),
    "a key in upper case": (
        {"data.yaml": "names: [cup]\nTrain: [images/a.txt]\nTEST: images/b.txt\n", "images/a.txt": "a.jpg\n",
         "images/b.txt": "b.jpg\n"},
        {"a": "train", "b": "test"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_SPLITS)
def test_lists_of_other_forms_are_splits_too(tmp_path: Path, converted: Any, name: str) -> None:
    files, expected = OTHER_SPLITS[name]
    put(tmp_path / "set", {"classes.txt": "cup\n", **yolo("ab"), **files}, jpgs("images", "ab"))
    assert converted(tmp_path / "set").ids == expected


def test_a_split_of_folders_is_found_at_any_depth(tmp_path: Path, converted: Any) -> None:
    # As Roboflow writes darknet's layout; the folder of a crash test is no split.
    for folder, name in (("cam/train", "a"), ("cam/crash_test/valid2024", "b")):
        put(tmp_path / "set", {f"{folder}/{name}.txt": ROW}, [f"{folder}/{name}.jpg"])
    put(tmp_path / "set", {"cam/train/_darknet.labels": "cup\n"})
    assert converted(tmp_path / "set").ids == {"a": "train", "b": "validation"}


def test_folders_of_one_coco_file_and_a_split_of_each_image_state_splits(tmp_path: Path, converted: Any) -> None:
    document = json.loads(coco([[4, 4, 20, 20]] * 2))
    for image, folder in zip(document["images"], ("train", "val"), strict=True):
        image["file_name"] = f"{folder}/{image['file_name']}"
    put(tmp_path / "one", {"result.json": json.dumps(document)}, ["train/0.jpg", "val/1.jpg"])
    assert set(converted(tmp_path / "one").ids.values()) == {"train", "validation"}
    document = json.loads(coco([[4, 4, 20, 20]] * 2))
    document["images"][1]["split"] = "Test"
    put(tmp_path / "two", {"result.json": json.dumps(document)}, ["0.jpg", "1.jpg"])
    assert converted(tmp_path / "two").ids == {"0": "train", "1": "test"}
    document["images"][1]["split"] = "fold 3"
    put(tmp_path / "two", {"result.json": json.dumps(document)})
    with pytest.raises(
        DataError, match=r"result.json image 2: split must be train, val or test, but got split='fold 3'"
    ):
        converted(tmp_path / "two")


METRICS: dict[str, Files] = {
    # Darknet's own coco.data has this line, also where a file of that name lies there.
    "*.data": {"coco.data": "classes= 1\ntrain = train.txt\nvalid = val.txt\nnames = c.names\nbackup = b/\neval=coco\n",
               "coco": "no list\n", "c.names": "cup\n", "train.txt": "images/a.jpg\n", "val.txt": "images/b.jpg\n"},
    "data.yaml": {"data.yaml": "names: [cup]\ntrain: train.txt\nval: val.txt\nEval: coco\n",
                  "train.txt": "images/a.jpg\n", "val.txt": "images/b.jpg\n"},
}  # fmt: skip


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_that_eval_names_is_no_split(tmp_path: Path, converted: Any, name: str) -> None:
    put(tmp_path, {**yolo("ab"), **METRICS[name]}, jpgs("images", "ab"))
    assert converted(tmp_path).ids == {"a": "train", "b": "validation"}


UNKNOWN: dict[str, tuple[Files, str]] = {
    "a key": ({"data.yaml": "names: [cup]\ntrain: images\nminival: images\n"}, r"minival: 'images' names files of an"),
    "a list": ({"classes.txt": "cup\n", "train.txt": "see the manual\n"}, r"train.txt: the list of a split must name"),
    "a list that is not there": (
        {"obj.data": "train = train.txt\nvalid = val.txt\nnames = c.names\n", "c.names": "cup\n",
         "train.txt": "images/a.jpg\n"},
        r"obj.data: valid = val.txt must be a list of images",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_split_that_is_not_understood_stops(tmp_path: Path, converted: Any, name: str) -> None:
    put(tmp_path, {**yolo("ab"), **UNKNOWN[name][0]}, jpgs("images", "ab"))
    with pytest.raises(DataError, match=UNKNOWN[name][1]):
        converted(tmp_path)


def test_lists_of_voc_with_unknown_names_stop_and_others_are_found(tmp_path: Path, converted: Any) -> None:
    xml = {f"Annotations/{n}.xml": voc(f"{n}.jpg") for n in "ab"}
    put(tmp_path, {**xml, "ImageSets/Main/fold1.txt": "a\n"}, jpgs("JPEGImages", "ab"))
    with pytest.raises(DataError, match=r"fold1.txt: the name of a list must be train, val, trainval or test"):
        converted(tmp_path)
    # CVAT's list of all images; lists of one class; then lists in the folder of the data, of pairs of files.
    put(tmp_path, {"ImageSets/Main/default.txt": "a\nb\n", "ImageSets/Main/fold1.txt": "a  1\nb -1\n"})
    assert converted(tmp_path).splits == {"train": 2}
    put(tmp_path, {"train.txt": "JPEGImages/a.jpg Annotations/a.xml\n", "val.txt": "JPEGImages/b.jpg\n"})
    assert converted(tmp_path).ids == {"a": "train", "b": "validation"}


# Units and flags


def test_ignored_objects_are_group_of_unless_kept(case: Any, converted: Any) -> None:
    folder = case("d02")
    assert converted(folder).found.boxes["group_of"].tolist() == [False, True, False, True]
    # What COCO calls a crowd stays one.
    assert converted(folder, difficult="keep").found.boxes["group_of"].tolist() == [False, False, False, True]


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"ignored": True}, True),
        ({"difficult": "1"}, True),
        ({"attributes": {"difficult": "true"}}, True),
        ({"ignore": 1.0}, True),
        ({"ignore": "no", "ignored": False, "difficult": None}, False),
    ],
)
def test_ignore_is_written_in_many_ways(tmp_path: Path, converted: Any, more: dict[str, Any], expected: bool) -> None:
    put(tmp_path, {"train.json": coco([[4, 4, 20, 20]], **more)}, ["0.jpg"])
    assert converted(tmp_path).found.boxes["group_of"].tolist() == [expected]


def test_a_flag_that_is_neither_yes_nor_no_is_counted(tmp_path: Path, converted: Any) -> None:
    put(tmp_path / "coco", {"train.json": coco([[4, 4, 20, 20]], attributes={"occluded": "partly"})}, ["0.jpg"])
    assert converted(tmp_path / "coco").said("1 flags are neither yes nor no (occluded='partly' for example)")
    put(tmp_path / "voc", {"a.xml": voc("a.jpg", more="<difficult>maybe</difficult>")}, ["a.jpg"])
    assert converted(tmp_path / "voc").said("1 flags are neither yes nor no (difficult='maybe' for example)")


def test_fractions_in_coco_stop_unless_the_unit_is_given(case: Any, converted: Any) -> None:
    folder = case("d03")
    with pytest.raises(DataError, match=r"train.json: boxes must be in pixels, .*box_unit=fraction if they are"):
        converted(folder)
    np.testing.assert_allclose(converted(folder, box_unit="fraction").found.corners, [[0.25, 0.25, 0.55, 0.65]] * 6)
    small = converted(folder, box_unit="pixel").found.corners
    np.testing.assert_allclose(small[0], [0.25 / 64, 0.25 / 48, 0.55 / 64, 0.65 / 48], atol=1e-9)


def test_fractions_in_voc_and_pixels_in_yolo_stop_unless_the_unit_is_given(tmp_path: Path, converted: Any) -> None:
    put(tmp_path / "voc", {"a.xml": voc("a.jpg", corners=(0.25, 0.25, 0.5, 1.02))}, ["a.jpg"])
    with pytest.raises(DataError, match=r"boxes must be in pixels, but all 1 look like fractions"):
        converted(tmp_path / "voc")
    np.testing.assert_allclose(converted(tmp_path / "voc", box_unit="fraction").found.corners, [[0.25, 0.25, 0.5, 1]])
    put(tmp_path / "yolo", {"classes.txt": "cup\n", **yolo("01234", row="0 32 24 16 12\n")}, jpgs("images", "01234"))
    with pytest.raises(DataError, match=r"most boxes leave their images \(5 of 5\).*0.txt line 1.*box_unit="):
        converted(tmp_path / "yolo")
    found = converted(tmp_path / "yolo", box_unit="pixel").found
    np.testing.assert_allclose(found.corners, [[0.375, 0.375, 0.625, 0.625]] * 5)


def test_corners_instead_of_sizes_stop_unless_they_are_asked_for(case: Any, converted: Any) -> None:
    folder = case("d21")
    with pytest.raises(DataError, match=r"train.json annotation 1: .*area contradicts it.*coco_bbox=corners"):
        converted(folder)
    found = converted(folder, coco_bbox="corners").found
    np.testing.assert_allclose(found.corners[0], [300 / 640, 200 / 480, 420 / 640, 330 / 480], atol=1e-9)


def test_corners_without_areas_stop_because_most_leave_the_image(tmp_path: Path, converted: Any) -> None:
    boxes = [[30 + n, 20, 45 + n, 40] for n in range(6)]
    put(tmp_path, {"train.json": coco(boxes)}, [f"{n}.jpg" for n in range(6)])
    with pytest.raises(DataError, match=r"most boxes leave their images \(6 of 6\).*coco_bbox="):
        converted(tmp_path)
    assert converted(tmp_path, on_bad_row="drop").said("6 boxes reached out of their image")
    # A mask is smaller than its box: that alone contradicts nothing.
    put(tmp_path, {"train.json": coco([[4, 4, 20, 20]] * 6, area=150)})
    assert len(converted(tmp_path).found.boxes) == 6


@pytest.mark.parametrize("layout", ["coco", "voc", "roLabelImg"])
def test_a_rotated_box_becomes_the_upright_box_around_it(tmp_path: Path, converted: Any, layout: str) -> None:
    # 20 x 10 around (32, 24), a quarter turned: 10 x 20.
    if layout == "coco":
        put(tmp_path, {"train.json": coco([[22, 19, 20, 10]], attributes={"rotation": 450.0})}, ["0.jpg"])
    else:
        turn = "<attributes><attribute><name>rotation</name><value>90.0</value></attribute></attributes>"
        text = voc("0.jpg", corners=(22, 19, 42, 29), more=turn)
        if layout == "roLabelImg":
            box = "<robndbox><cx>32</cx><cy>24</cy><w>20</w><h>10</h><angle>1.5707963267948966</angle></robndbox>"
            text = text.replace(turn, "").split("<bndbox>")[0] + box + "</object></annotation>"
        put(tmp_path, {"0.xml": text}, ["0.jpg"])
    result = converted(tmp_path)
    np.testing.assert_allclose(result.found.corners, [[27 / 64, 14 / 48, 37 / 64, 34 / 48]], atol=1e-9)
    assert result.said("are rotated: the upright boxes around them are read")


def test_what_is_not_read_of_an_annotation_is_counted(tmp_path: Path, converted: Any) -> None:
    polygon = [[4, 4, 24, 4, 24, 24]]
    put(tmp_path, {"train.json": coco([[4, 4, 20, 20], []], segmentation=polygon, score=0.9)}, ["0.jpg", "1.jpg"])
    result = converted(tmp_path)
    np.testing.assert_allclose(result.found.corners, [[4 / 64, 4 / 48, 24 / 64, 24 / 48]] * 2, atol=1e-9)
    assert result.said("2 annotations have a segmentation, which is not read")
    assert result.said("1 annotations have no bbox: those of their polygons are read")
    assert result.said("2 annotations have a score, which is not read")


# Ids and names


def test_ids_that_are_whole_numbers_are_equal_and_texts_are_named(case: Any, converted: Any) -> None:
    assert len(converted(case("d08b")).found.boxes) == 3
    with pytest.raises(
        DataError, match=r"category_id of the annotations must be .*it is a text \('\d'\) while .*numbers"
    ):
        converted(case("d08"))


def test_ids_of_images_as_texts_on_the_other_side_are_named_too(tmp_path: Path, converted: Any) -> None:
    document = json.loads(coco([[4, 4, 20, 20]]))
    document["images"][0]["id"] = "0"
    put(tmp_path, {"train.json": json.dumps(document)}, ["0.jpg"])
    with pytest.raises(DataError, match=r"image_id of the annotations must be .*a number \(0\) while .*texts \('0'\)"):
        converted(tmp_path)


def test_names_in_data_yaml_are_taken_as_they_are_written(case: Any, converted: Any) -> None:
    assert converted(case("d18")).found.taxonomy.names == ("on", "off", "010", "12:30")


@pytest.mark.parametrize("to", ["coco", "voc", "yolo", "openimages"])
def test_odd_class_names_come_back_from_every_layout(tmp_path: Path, converted: Any, to: Any) -> None:
    names = [
        "speed limit (30km/h)",
        "C++",
        "50% off",
        'naïve "q"',
        "NA",
        "null",
        "a/b",
        "a:b",
        "猫",
        "=1+1",
        "1_0",
        "<b>&",
    ]
    document = json.loads(coco([[4, 4, 20, 20]] * len(names)))
    document["categories"] = [{"id": n, "name": name} for n, name in enumerate(names)]
    for annotation in document["annotations"]:
        annotation["category_id"] = annotation["id"]
    put(tmp_path / "set", {"train.json": json.dumps(document)}, [f"{n}.jpg" for n in range(len(names))])
    there = converted(tmp_path / "set", to=to)
    back = converted(there.folder)
    assert list(back.found.taxonomy.names) == names
    for result in (there, back):
        named = zip(
            result.found.images["image_id"][result.found.boxes["image"]], result.found.boxes["class"], strict=True
        )
        assert {int(image_id): names[index] for image_id, index in named} == dict(enumerate(names))


def test_names_that_differ_in_case_or_form_are_reported_and_a_label_is_of_one_category(
    tmp_path: Path, converted: Any
) -> None:
    document = json.loads(coco([[4, 4, 20, 20]]))
    document["categories"] += [{"id": 2, "name": "Cup"}, {"id": 3, "name": "e\u0301t\u00e9"}]
    put(tmp_path, {"train.json": json.dumps(document)}, ["0.jpg"])
    result = converted(tmp_path)
    assert result.said("2 classes have the same name or differ only in upper and lower case ('cup', 'Cup')")
    assert result.found.taxonomy.names[2] == "\u00e9t\u00e9"
    document["categories"] = [{"id": n, "name": f"c{n}", "label_name": "/m/1"} for n in (1, 2)]
    put(tmp_path, {"train.json": json.dumps(document)})
    with pytest.raises(DataError, match=r"category 2: a category must have a label_name of its own"):
        converted(tmp_path)


def test_a_long_path_gets_a_short_id_and_its_origin_is_noted(case: Any, converted: Any) -> None:
    result = converted(case("d29"))
    assert len(result.ids) == 2
    assert max(len(name.encode()) for name in result.ids) <= 200
    assert (result.folder / "images.csv").read_text().count(LONG[0]) == 2


# Files


def test_labels_apart_from_the_images(case: Any, converted: Any) -> None:
    folder = case("d07")
    result = converted(folder / "export", images=str(folder / "photos"))
    assert (len(result.found.images), len(result.found.boxes)) == (5, 5)


@pytest.mark.parametrize("name", ["d31", "o6"])
def test_a_label_file_is_found_beside_its_image_and_by_a_name_of_other_form(
    case: Any, converted: Any, name: str
) -> None:
    result = converted(case(name))
    assert (len(result.found.images), len(result.found.boxes)) == (6, 6)
    assert not result.said("no label file")


def test_labels_of_composed_and_decomposed_names_are_found(tmp_path: Path, converted: Any) -> None:
    put(tmp_path / "set", {"classes.txt": "cup\n", **yolo(["e\u0301"])}, ["images/\u00e9.jpg"])
    assert converted(tmp_path / "set").found.boxes["class"].tolist() == [0]
    text = coco([[4, 4, 20, 20]]).replace("0.jpg", "\u00e9.JPG")
    put(tmp_path / "coco", {"train.json": text}, ["photos/e\u0301.jpg"])
    assert len(converted(tmp_path / "coco").found.boxes) == 1


def test_folders_above_the_data_are_never_exchanged(tmp_path: Path, converted: Any) -> None:
    data = put(tmp_path / "images" / "set", {"classes.txt": "cup\n", "a.txt": ROW}, ["a.jpg"])
    put(tmp_path / "labels" / "set", {"a.txt": ROW * 1 + "0 0.2 0.2 0.1 0.1\n"})
    assert len(converted(data).found.boxes) == 1


def test_images_without_a_label_file_are_counted(tmp_path: Path, converted: Any) -> None:
    put(tmp_path, {"classes.txt": "cup\n", **yolo("a")}, jpgs("images", "abc"))
    result = converted(tmp_path)
    assert result.said("2 images have no label file and count as images without objects")
    assert (len(result.found.images), len(result.found.boxes)) == (3, 1)


def test_the_file_that_an_annotation_names_is_read(case: Any, converted: Any) -> None:
    result = converted(case("d15_voc"))
    files = {file.name for file in result.found.files}
    assert files == {"fish.png", "other.jpg"}
    assert result.said("fish.jpg for example")


def test_a_label_file_of_two_images_stops(case: Any, converted: Any) -> None:
    with pytest.raises(DataError, match=r"fish.txt: a label file must be of one image, but .*fish.jpg and .*fish.png"):
        converted(case("d15_yolo"))


def test_two_annotation_files_of_one_image_and_one_of_two_images_are_errors(tmp_path: Path, converted: Any) -> None:
    put(tmp_path / "one", {"a.xml": voc("a.jpg"), "b.xml": voc("a.jpg")}, ["a.jpg"])
    with pytest.raises(DataError, match=r"b.xml: an image must have one annotation file"):
        converted(tmp_path / "one")
    put(tmp_path / "two", {"xml/a.xml": voc("")}, ["cam1/a.jpg", "cam2/a.jpg"])
    with pytest.raises(DataError, match=r"a.xml: filename must name the image where several have the name"):
        converted(tmp_path / "two")


def test_names_that_lead_out_are_found_in_a_folder_that_a_setting_names(case: Any, converted: Any) -> None:
    folder = case("d30")
    result = converted(folder, images=str(folder / "photos"))
    assert sorted(result.ids) == ["0", "1", "2", "3", "4"]
    assert {file.parent for file in result.found.files} == {folder / "photos"}


ENCODINGS = {
    "d32_cp1252": r"classes.txt line 1: the file must be text in UTF-8",
    "d32_list": r"train.txt line 1: the file must be text in UTF-8",
    "d32_coco": r"train.json line 1: the file must be text in UTF-8",
}


@pytest.mark.parametrize("name", ENCODINGS)
def test_a_file_that_is_not_utf_8_is_named(case: Any, converted: Any, name: str) -> None:
    with pytest.raises(DataError, match=ENCODINGS[name]):
        converted(case(name))


def test_utf_16_with_a_mark_is_read_in_every_kind_of_file(case: Any, converted: Any, tmp_path: Path) -> None:
    assert converted(case("d32_utf-16")).found.taxonomy.names[0].startswith("T")
    text = coco([[4, 4, 20, 20]]).replace("cup", "猫").encode("utf-16")
    put(tmp_path / "coco", {"train.json": text}, ["0.jpg"])
    assert converted(tmp_path / "coco").found.taxonomy.names == ("猫",)
    files = {"data.yaml": "names: [猫]\ntrain: t.txt\n".encode("utf-16"), "t.txt": "images/a.jpg\n".encode("utf-16")}
    put(tmp_path / "yolo", {**files, "labels/a.txt": ROW.encode("utf-16")}, ["images/a.jpg"])
    assert converted(tmp_path / "yolo").found.taxonomy.names == ("猫",)


# Results of this program and files outside


def test_results_inside_the_data_are_no_photographs(tmp_path: Path, converted: Any) -> None:
    put(tmp_path, {"classes.txt": "cup\n", **yolo("a")}, jpgs("images", "a"))
    earlier = put(tmp_path / "mine", {}, ["images/z.jpg"])
    (earlier / "images.csv").write_text("ImageID,Width,Height,Origin\n")
    for folder in ("outputs/train", "images/mlruns", "mlartifacts/1"):
        put(tmp_path / folder, {}, ["curve.png"])
    put(tmp_path / "page", {"explore.html": ""}, ["shown.jpg"])
    # A folder of results is read when it is the data itself.
    result = converted(tmp_path)
    assert list(result.ids) == ["a"]
    assert result.said("is left out: a folder of results")


LINKS: dict[str, Callable[[Path, Path], Files]] = {
    "a line of a list": lambda _, secret: {"train.txt": f"images/a.jpg\n{secret}/s.jpg\n"},
    "a line with dots": lambda *_: {"train.txt": "images/a.jpg\n../secret/s.jpg\n"},
    "a key of data.yaml": lambda *_: {"data.yaml": "names: [cup]\ntrain: ../secret\n"},
    "an absolute key": lambda _, secret: {"data.yaml": f"names: [cup]\ntrain: {secret}\n"},
    "a path in data.yaml": lambda *_: {"data.yaml": "names: [cup]\npath: ../secret\ntrain: .\n"},
    "a link to a folder": lambda data, secret: (data / "images" / "more").symlink_to(secret) or {},  # type: ignore[func-returns-value]
    "a link to a file": lambda data, secret: (data / "images" / "s.jpg").symlink_to(secret / "s.jpg") or {},  # type: ignore[func-returns-value]
    "a link of labels": lambda data, secret: (data / "labels" / "b.txt").symlink_to(secret / "s.txt") or {},  # type: ignore[func-returns-value]
}


@pytest.mark.parametrize("name", LINKS)
def test_paths_that_lead_out_of_the_data_are_refused_unless_a_setting_names_the_folder(
    tmp_path: Path, converted: Any, name: str
) -> None:
    secret = put(tmp_path / "secret", {"s.txt": ROW}, ["s.jpg"])
    data = put(tmp_path / "set", {"classes.txt": "cup\n", **yolo("a")}, jpgs("images", "a"))
    put(data, LINKS[name](data, secret))
    with pytest.raises(SettingError, match=rf"leads out of {data}, to {secret}.*give linked_folders={secret}$"):
        converted(data)
    assert len(converted(data, linked_folders=str(secret)).found.images) >= 1


def test_links_in_folders_of_coco_and_voc_are_refused_too(tmp_path: Path, converted: Any) -> None:
    put(tmp_path / "secret", {}, ["0.jpg"])
    for name, text in (("train.json", coco([[4, 4, 20, 20]])), ("0.xml", voc("0.jpg"))):
        data = put(tmp_path / name.replace(".", "_"), {name: text})
        (data / "0.jpg").symlink_to(tmp_path / "secret" / "0.jpg")
        with pytest.raises(SettingError, match=r"0.jpg leads out of"):
            converted(data)


def lvis(folder: Path) -> Path:
    """A cup on each of two images, where plates are absent; on 1.jpg not every cup has a box."""
    document = json.loads(coco([[4, 4, 20, 20]] * 2))
    document["categories"].append({"id": 2, "name": "plate"})
    for image in document["images"]:
        image |= {"neg_category_ids": [2], "not_exhaustive_category_ids": [1] if image["id"] else []}
    return put(folder, {"lvis_train.json": json.dumps(document)}, ["0.jpg", "1.jpg"])


def test_classes_that_are_not_exhaustive_come_back_from_every_layout_that_can_hold_them(
    tmp_path: Path, converted: Any
) -> None:
    direct, published = converted(lvis(tmp_path), to="coco"), converted(tmp_path)
    assert not published.said("cannot hold")
    for folder in (direct.folder, converted(published.folder, to="coco").folder):
        images = {image["file_name"]: image for image in json.loads(_instances(folder).read_text())["images"]}
        assert [images[name]["not_exhaustive_category_ids"] for name in ("0.jpg", "1.jpg")] == [[], [1]]
        assert [images[name]["neg_category_ids"] for name in ("0.jpg", "1.jpg")] == [[2], [2]]
    for layout in ("yolo", "voc"):
        for data in (tmp_path, published.folder):
            lost = "classes of which some objects have no box: 1 are lost"
            assert converted(data, to=layout).said(f"{layout} cannot hold {lost}")


def _instances(folder: Path) -> Path:
    return folder / "annotations" / "instances_train.json"


def test_the_column_of_classes_that_are_not_exhaustive_is_written_where_a_set_has_some(
    tmp_path: Path, converted: Any
) -> None:
    some = pd.read_csv(converted(lvis(tmp_path / "some")).folder / "train-annotations-bbox.csv")
    assert dict(zip(some["ImageID"].astype(str), some["IsNotExhaustive"], strict=True)) == {"0": 0, "1": 1}
    none = put(tmp_path / "none", {"train.json": coco([[4, 4, 20, 20]])}, ["0.jpg"])
    assert "IsNotExhaustive" not in pd.read_csv(converted(none).folder / "train-annotations-bbox.csv")
    overruled = converted(tmp_path / "some", exhaustive="true")
    assert overruled.said("exhaustive=true: 1 classes that are listed as not exhaustive are exhaustive")
    assert "IsNotExhaustive" not in pd.read_csv(overruled.folder / "train-annotations-bbox.csv")


def test_a_class_that_is_not_exhaustive_says_that_the_set_is_not(tmp_path: Path, converted: Any) -> None:
    document = json.loads(coco([[4, 4, 20, 20]] * 2))
    document["images"][1]["not_exhaustive_category_ids"] = [1]
    put(tmp_path, {"train.json": json.dumps(document)}, ["0.jpg", "1.jpg"])
    found = converted(tmp_path).found
    assert (found.exhaustive, found.incomplete["image"].tolist()) == (False, [1])


def test_a_class_that_is_not_exhaustive_and_has_no_box_is_counted_as_lost(tmp_path: Path, converted: Any) -> None:
    document = json.loads(coco([[4, 4, 20, 20]] * 2))
    document["categories"].append({"id": 2, "name": "plate"})
    for image in document["images"]:
        image |= {"neg_category_ids": [], "not_exhaustive_category_ids": [1, 2] if image["id"] else []}
    put(tmp_path, {"train.json": json.dumps(document)}, ["0.jpg", "1.jpg"])
    # Without a box or a label it is unknown on the image anyway.
    assert converted(tmp_path).said("openimages cannot hold classes of which some objects have no box: 1 are lost")


@pytest.mark.parametrize("shared", [True, False])
def test_a_class_that_is_not_exhaustive_gives_no_negatives_and_no_false_positives(
    shared: bool, tmp_path: Path, converted: Any
) -> None:
    if shared and not (CASES / "d26").is_dir():
        pytest.skip(f"no data cases at {CASES}")
    folder = converted(CASES / "d26" if shared else lvis(tmp_path)).folder
    settings = resolve(DataSettings, {"data": str(folder), "hierarchy": "none"})
    index = read_split(settings, ["train"]).index
    cup, open_images = index.labels[0], [image for image in range(len(index)) if index.is_not_exhaustive[image]]
    assert len(open_images) == (2 if shared else 1)
    for image in range(len(index)):
        assert known_classes(index, image)[cup] == (image not in open_images)
    # A cup beside the box: on an image where all cups are boxed it is false, on the others it may be a cup.
    image = np.arange(len(index), dtype=np.int32)
    beside = np.tile([0.8, 0.8, 0.95, 0.95], (len(index), 1))
    detections = Detections(image, np.full(len(index), cup, dtype=np.int32), np.full(len(index), 0.9), beside)
    scores = evaluate_detections(detections, index).scores
    assert scores.matches.image_index.tolist() == sorted(set(range(len(index))) - set(open_images))
    assert scores.dropped.not_exhaustive == len(open_images)
