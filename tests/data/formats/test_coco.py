"""COCO and LVIS JSON: boxes, flags, ids, files, and what breaks a rule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retinaflow.data.formats.coco import read_coco
from retinaflow.data.formats.coco_files import find_coco
from retinaflow.data.formats.source import ClassNames, SourceSet
from retinaflow.data.tables import RowErrors
from retinaflow.settings.conversion_settings import ConvertConfig


def annotation(box: Any, *, image: Any = 7, category: Any = 90, **more: Any) -> dict[str, Any]:
    return {"id": 1, "image_id": image, "category_id": category, "bbox": box, **more}


def write(folder: Path, annotations: list[Any], *, name: str = "train.json", **more: Any) -> Path:
    document = {
        "images": [{"id": 7, "file_name": "a.png", "width": 40, "height": 20}],
        "categories": [{"id": 90, "name": 'Traffic "light", röd'}, {"id": 3, "name": "Cat"}],
        "annotations": annotations,
        **more,
    }
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(document), encoding="utf-8")
    return folder / name


def read(path: Path, errors: RowErrors | None = None, **given: Any) -> SourceSet:
    config = ConvertConfig(**given)
    return read_coco(config, {"train": path}, errors or RowErrors(), folder=path.parent, classes=ClassNames())


def test_a_box_is_x_y_width_height_and_a_crowd_is_a_group(tmp_path: Path, write_image: Any, checked: Any) -> None:
    write_image("a.png")
    attributes = {"occluded": True, "truncated": False}
    path = write(tmp_path, [annotation([10, 5, 20, 10], iscrowd=1, attributes=attributes)])
    found, _, _ = checked(read(path))
    # x 10 / 40 to 30 / 40, y 5 / 20 to 15 / 20
    np.testing.assert_allclose(found.corners, [[0.25, 0.25, 0.75, 0.75]])
    assert found.boxes[["group_of", "occluded", "truncated"]].to_numpy().tolist() == [[True, True, False]]


def test_category_ids_need_not_follow_each_other_and_names_may_hold_anything(tmp_path: Path, write_image: Any) -> None:
    write_image("a.png")
    source = read(write(tmp_path, [annotation([0, 0, 5, 5], category=3)]))
    assert source.boxes[0][1] == 1
    assert source.classes.taxonomy().ids == ("/c/traffic_light_röd", "/c/cat")
    assert source.classes.taxonomy().names == ('Traffic "light", röd', "Cat")


def test_images_without_boxes_are_kept_and_a_box_over_the_edge_is_clipped_and_told(
    tmp_path: Path, write_image: Any, checked: Any
) -> None:
    write_image("a.png"), write_image("b.png")
    images = [{"id": n, "file_name": f"{n}.png", "width": 40, "height": 20} for n in "ab"]
    path = write(tmp_path, [annotation([-4, 0, 12, 20], image="a")], images=images)
    found, _, said = checked(read(path))
    assert found.images["image_id"].tolist() == ["a", "b"]
    np.testing.assert_allclose(found.corners, [[0, 0, 0.2, 1]])
    assert said == [
        "1 boxes reached out of their image, by 10.00% of it at most, and were clipped, train.json annotation 1 for "
        "example"
    ]


BROKEN: dict[str, tuple[Any, str]] = {
    "no width": (annotation([3, 3, 0, 5]), "train.json annotation 2: a box must have a width and a height above 0"),
    "outside": (annotation([50, 3, 5, 5]), "train.json annotation 2: a box must lie in its image"),
    "NaN": (annotation([float("nan"), 3, 5, 5]), "train.json annotation 2: a coordinate must be a finite number"),
    "twice": (annotation([1, 1, 5, 5]), "train.json annotation 2: a box must be given once"),
    "no box": (annotation([]), "train.json annotation 2: bbox must be four numbers"),
    "text": (annotation([1, 2, "3", 4]), "train.json annotation 2: bbox must be four numbers"),
    "image": (
        annotation([1, 2, 3, 4], image=8),
        "annotation 2: image_id must be that of a listed image, but got image_id=8",
    ),
    "category": (annotation([1, 2, 3, 4], category=1), "annotation 2: category_id must be that of a listed category"),
    "no object": ([], "train.json annotation 2: an annotation must be an object"),
}


@pytest.mark.parametrize("case", BROKEN.values(), ids=BROKEN)
def test_an_annotation_that_breaks_a_rule_stops_or_is_dropped_and_listed(
    tmp_path: Path, write_image: Any, checked: Any, case: tuple[Any, str]
) -> None:
    write_image("a.png")
    path = write(tmp_path, [annotation([1, 1, 5, 5]), case[0]])
    errors = RowErrors()
    with pytest.raises(ValueError) as stopped:
        checked(read(path, errors), errors)
    assert case[1] in str(stopped.value)
    errors = RowErrors("drop")
    found, _, _ = checked(read(path, errors), errors)
    assert len(found.boxes) == errors.count == 1


@pytest.mark.parametrize("name", ["/etc/passwd", "../a.png", "x/../../a.png", "C:\\a.png", "..\\a.png"])
def test_a_file_name_that_leads_out_of_the_folder_is_never_followed(
    tmp_path: Path, write_image: Any, name: str, said: Any
) -> None:
    write_image("a.png"), write_image("set/other.png"), write_image("photos/a.png")
    path = write(tmp_path / "set", [], images=[{"id": 1, "file_name": name, "width": 4, "height": 4}])
    assert [image.file for image in read(path).images] == [None]
    assert "1 file names lead out of the image folder" in said()[0]
    # Its last part is the name of a file in a folder that a setting names.
    found = read(path, images=(tmp_path / "photos",)).images[0].file
    assert found == (None if name == "/etc/passwd" else tmp_path / "photos" / "a.png")


@pytest.mark.parametrize("name", ["..", ".", 3, None, "x" * 256, "\ud800.png", "a\0.png"])
def test_a_file_name_that_no_file_can_have_is_refused_and_shown_in_short(tmp_path: Path, name: Any) -> None:
    path = write(tmp_path, [], images=[{"id": 1, "file_name": name, "width": 4, "height": 4}])
    errors = RowErrors()
    assert not read(path, errors).images
    with pytest.raises(ValueError, match=r"image 1: file_name must stay inside the image folder, but got") as refused:
        errors.settle()
    assert len(str(refused.value)) < 400


def test_files_of_one_name_in_several_folders_get_ids_of_their_own(
    tmp_path: Path, write_image: Any, checked: Any
) -> None:
    names = ["cam1/0.png", "cam2/0.png", "cam2/9.png", "cam1\\8.png"]
    for name in names:
        write_image(name.replace("\\", "/"))
    images = [{"id": n, "file_name": name, "width": 40, "height": 20} for n, name in enumerate(names)]
    found, _, _ = checked(read(write(tmp_path, [], images=images)))
    assert found.images["image_id"].tolist() == ["cam1__0", "cam2__0", "9", "8"]


def of_names(*names: str) -> list[dict[str, Any]]:
    return [{"id": n, "file_name": name, "width": 40, "height": 20} for n, name in enumerate(names)]


def test_a_file_elsewhere_is_taken_only_where_its_bare_name_can_mean_but_one(
    tmp_path: Path, write_image: Any, said: Any
) -> None:
    folder = tmp_path / "set"
    for name in ("7.png", "set/1.png", "set/images/2.png", "set/valid/3.png"):
        write_image(name)
    # 1.png is listed itself, and 3.png lies in the folder of another split; 7.png lies outside of the set.
    images = of_names("b/1.png", "1.png", "cam/2.png", "3.png", "7.png")
    source = read(write(folder, [], images=images))
    files = [image.file and image.file.relative_to(folder).as_posix() for image in source.images]
    assert files == [None, "1.png", "images/2.png", None, None]
    assert said() == ["1 images were found by their names alone, not in the folders that file_name names"]

    source = read(write(folder, [], images=of_names("cam1/2.png", "cam2/2.png")))
    assert [image.file for image in source.images] == [None, None]


def test_categories_of_one_name_stay_apart_and_one_without_a_box_goes(
    tmp_path: Path, write_image: Any, checked: Any
) -> None:
    write_image("a.png")
    categories = [{"id": n, "name": name} for n, name in enumerate(("mouse", "cells", "mouse", "cells"))]
    boxes = [annotation([n, n, 5, 5], category=n) for n in (0, 2, 3)]
    source = read(write(tmp_path, boxes, categories=categories))
    assert source.classes.taxonomy().names == ("mouse", "mouse", "cells")
    assert source.classes.taxonomy().ids == ("/c/mouse", "/c/mouse_2", "/c/cells")
    assert [box[1] for box in source.boxes] == [0, 1, 2]
    _, _, said = checked(source)
    assert "2 classes have the same name or differ only in upper and lower case ('mouse', 'mouse')" in said[0]


@pytest.mark.parametrize("negatives", [None, [], [3, [3], 99]])
def test_odd_negatives_of_lvis_are_no_traceback(tmp_path: Path, negatives: Any) -> None:
    images = [{**of_names("a.png")[0], "id": 7, "neg_category_ids": negatives}]
    source = read(write(tmp_path, [], images=images))
    assert source.absent == ([(0, 1)] if negatives else [])
    images[0]["neg_category_ids"] = 3
    with pytest.raises(ValueError, match=r"image 1: neg_category_ids must be a list of category ids, but got 3"):
        read(write(tmp_path, [], images=images))


def test_a_size_that_is_not_the_files_is_scaled_turned_or_refused(
    tmp_path: Path, write_image: Any, checked: Any
) -> None:
    write_image("scaled.png", width=80, height=40)
    write_image("turned.jpg", width=20, height=40, orientation=6)
    names = ("scaled.png", "turned.jpg")
    images = [{"id": n, "file_name": name, "width": 40, "height": 20} for n, name in enumerate(names)]
    boxes = [annotation([0, 0, 10, 5], image=n) for n in (0, 1)]
    found, _, said = checked(read(write(tmp_path, boxes, images=images)))
    # Orientation 6 is shown turned clockwise: the upper left of what is shown is the lower left of what is stored.
    np.testing.assert_allclose(found.corners, [[0, 0, 0.25, 0.25], [0, 0.75, 0.25, 1]])
    assert len(said) == 2
    write_image("scaled.png", width=40, height=40)
    with pytest.raises(
        ValueError, match=r"declared size must be that of the file, .* but got 40 x 20 for a file of 40 x 40"
    ):
        checked(read(tmp_path / "train.json"))


def test_an_image_without_a_readable_file_stops_or_is_skipped_with_its_boxes(
    tmp_path: Path, write_image: Any, checked: Any
) -> None:
    write_image("a.png")
    (tmp_path / "cut.png").write_bytes(b"no image")
    names = ("cut.png", "gone.png", "a.png", "text.gif")
    (tmp_path / "text.gif").write_text("")
    images = [{"id": n, "file_name": name, "width": 40, "height": 20} for n, name in enumerate(names)]
    path = write(tmp_path, [annotation([1, 1, 5, 5], image=n) for n in (0, 1, 2)], images=images)
    with pytest.raises(ValueError, match=r"3 of 4 images have no readable file; .*cut.png: not an image file"):
        checked(read(path))
    found, errors, _ = checked(read(path), on_bad_image="skip")
    assert found.images["image_id"].tolist() == ["a"]
    assert found.boxes["image"].tolist() == [0]
    reasons = ["no file, with 1 boxes", "the file must be one of .jpg, .jpeg, .png, .webp, .bmp"]
    assert [fault.value for fault in errors.found[1:]] == reasons


def test_lvis_says_which_classes_were_looked_for(tmp_path: Path, write_image: Any, checked: Any) -> None:
    write_image("train2017/5.png")
    images = [{"id": 7, "coco_url": "http://x/train2017/5.png", "width": 40, "height": 20, "neg_category_ids": [3]}]
    source = read(write(tmp_path, [annotation([1, 1, 5, 5])], images=images))
    assert source.federated
    found, _, _ = checked(source, exhaustive=False)
    assert found.labels.to_numpy().tolist() == [[0, 0, True], [0, 1, False]]


def test_files_are_told_apart_by_split_and_captions_are_passed_over(tmp_path: Path) -> None:
    for name in ("instances_train2017.json", "instances_val2017.json", "person_keypoints_val2017.json"):
        write(tmp_path, [], name=name)
    (tmp_path / "captions_val2017.json").write_text('{"images": [], "annotations": []}')
    found = find_coco(tmp_path)
    assert {split: path.name for split, path in found.items()} == {
        "train": "instances_train2017.json",
        "validation": "instances_val2017.json",
    }


def test_two_files_of_one_split_are_refused(tmp_path: Path) -> None:
    write(tmp_path, [], name="a.json"), write(tmp_path, [], name="b.json")
    with pytest.raises(
        ValueError, match=r"a split must have one annotation file, but a.json and b.json are both train"
    ):
        find_coco(tmp_path)


@pytest.mark.parametrize("text", ["", "[1]", '{"images": []}', '{"images": {}, "annotations": [], "categories": []}'])
def test_a_file_that_is_no_coco_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(
        ValueError,
        match=r"x.json: (not a readable JSON file|a COCO file must hold a list|images must be given once, as a list)",
    ):
        read(tmp_path / "x.json")
