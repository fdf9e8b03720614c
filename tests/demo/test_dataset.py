"""The laws of the generated demo set."""

from __future__ import annotations

import csv
import re
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any, TypedDict

import cv2
import numpy as np
import pytest

from retinaflow.demo import dataset as demo
from retinaflow.demo.dataset import CLASSES, TRAIN_IMAGES, VALIDATION_IMAGES, demo_is_current, plan_split, write_demo
from retinaflow.demo.plan import ScenePlan, Thing, ancestors
from retinaflow.demo.scene import SUPERSAMPLING, draw_once, draw_scene
from retinaflow.errors import DataError

SPLITS = {"train": TRAIN_IMAGES, "validation": VALIDATION_IMAGES}


class Sizes(TypedDict):
    train_images: int
    validation_images: int


SMALL: Sizes = {"train_images": 90, "validation_images": 30}
TINY: Sizes = {"train_images": 6, "validation_images": 4}
NAMES = {spec.mid: spec.name for spec in CLASSES}
DRAWN = [spec.name for spec in CLASSES if spec.train]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "small"
    write_demo(folder, **SMALL)
    return folder


def rows(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def boxes(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for split in SPLITS:
        for row in rows(folder, f"{split}-annotations-bbox.csv"):
            sides = [float(row[side]) for side in ("XMin", "YMin", "XMax", "YMax")]
            found.append({**row, "name": NAMES[row["LabelName"]], "box": np.array(sides), "split": split})
    return found


def shape_of(file: Path) -> tuple[int, int]:
    pixels = cv2.imread(str(file))
    assert pixels is not None, file
    return pixels.shape[0], pixels.shape[1]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def box_counts(split: str, seed: int) -> tuple[Counter[str], Counter[str]]:
    """Boxes and images per class by the plan."""
    plans = plan_split(split, images=SPLITS[split], seed=seed)
    shown = [[n for thing in plan.things for n in thing.classes if n not in plan.hidden] for plan in plans]
    return Counter(n for names in shown for n in names), Counter(n for names in shown for n in set(names))


def test_the_same_seed_writes_the_same_bytes_whatever_the_global_random_state(tmp_path: Path) -> None:
    write_demo(tmp_path / "a", seed=3, **TINY)
    np.random.seed(99)  # noqa: NPY002  (the point of the test)
    state = str(np.random.get_state())  # noqa: NPY002
    write_demo(tmp_path / "b", seed=3, **TINY)
    assert str(np.random.get_state()) == state  # noqa: NPY002
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_another_seed_writes_other_images_and_other_ids(tmp_path: Path) -> None:
    write_demo(tmp_path / "a", seed=0, **TINY)
    write_demo(tmp_path / "b", seed=1, **TINY)
    first, second = contents(tmp_path / "a"), contents(tmp_path / "b")
    shared = {"class-descriptions.csv", "bbox_labels_hierarchy.json"}
    assert {name for name in first if first[name] == second.get(name)} == shared


@pytest.mark.parametrize("seed", [0, 1, 17])
def test_training_has_a_long_tail_by_the_plan(seed: int) -> None:
    per_class, images = box_counts("train", seed)
    assert set(per_class) == set(DRAWN)
    assert max(per_class.values()) > 500
    assert min(per_class.values()) == per_class["Ambulance"] == 6
    assert per_class["Fedora"] < 10
    assert 4 <= images["Ambulance"] <= 8
    ordered = sorted(per_class.values())
    assert max(b / a for a, b in pairwise(ordered)) < 3, "no gap in the tail"


@pytest.mark.parametrize("seed", [0, 1, 17])
def test_validation_is_flat_enough_to_measure_every_drawn_class(seed: int) -> None:
    per_class, _ = box_counts("validation", seed)
    assert set(per_class) == set(DRAWN)
    assert min(per_class.values()) >= 30
    assert max(per_class.values()) < 7 * min(per_class.values())


@pytest.mark.parametrize("seed", [0, 1, 17])
def test_rare_classes_are_seen_both_beside_frequent_ones_and_alone(seed: int) -> None:
    plans = plan_split("train", images=TRAIN_IMAGES, seed=seed)
    rare = {"Ambulance", "Rose", "Palm tree", "Taxi"}
    found = [plan for plan in plans if any(thing.kind in rare for thing in plan.things)]
    alone = sum(len(plan.things) == 1 for plan in found)
    assert 0 < alone < len(found) / 2


def test_everything_planned_is_drawn_and_boxed(small: Path) -> None:
    for split, images in (("train", 90), ("validation", 30)):
        plans = plan_split(split, images=images, seed=0)
        wanted = Counter((p.image_id, n) for p in plans for t in p.things for n in t.classes if n not in p.hidden)
        assert Counter((b["ImageID"], b["name"]) for b in boxes(small) if b["split"] == split) == wanted


def test_every_box_is_valid_and_has_the_published_columns(small: Path) -> None:
    for box in boxes(small):
        x1, y1, x2, y2 = box["box"]
        assert 0 <= x1 < x2 <= 1
        assert 0 <= y1 < y2 <= 1
        assert box["LabelName"] in NAMES
    header = (small / "train-annotations-bbox.csv").read_text(encoding="utf-8").splitlines()[0]
    assert header == (
        "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside"
    )


@pytest.mark.parametrize("kind", ["Car", "Tree", "Woman"])
def test_a_box_is_where_the_image_differs_from_the_same_image_without_the_object(kind: str) -> None:
    """Height 100, width 200: the same generator draws the same background, so the difference is the object alone."""
    thing = Thing(kind, "Coat" if kind == "Woman" else "")
    with_it, without_it = (
        draw_once(ScenePlan("0", things, frozenset(), ()), np.random.default_rng(8), size=(100, 200), shrink=1.0)
        for things in ((thing,), ())
    )
    changed = (with_it[1] != without_it[1]).any(axis=2)
    height, width = changed.shape
    assert (height, width) == (100 * SUPERSAMPLING, 200 * SUPERSAMPLING)
    rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
    wanted = [columns[0] / width, rows[0] / height, (columns[-1] + 1) / width, (rows[-1] + 1) / height]
    box = with_it[2][0]
    assert box.name == kind
    assert [box.x1, box.y1, box.x2, box.y2] == pytest.approx(wanted, abs=0.015), "outlines are half outside the box"


def test_every_boxed_class_is_verified_present_and_no_class_is_both(small: Path) -> None:
    for split in SPLITS:
        labels = rows(small, f"{split}-annotations-human-imagelabels.csv")
        assert list(labels[0]) == ["ImageID", "Source", "LabelName", "Confidence"]
        pairs = [(row["ImageID"], row["LabelName"]) for row in labels]
        assert len(set(pairs)) == len(pairs)
        present = {(row["ImageID"], row["LabelName"]) for row in labels if row["Confidence"] == "1"}
        boxed = {(b["ImageID"], b["LabelName"]) for b in boxes(small) if b["split"] == split}
        assert boxed == present
        assert {row["Confidence"] for row in labels} == {"0", "1"}


@pytest.mark.parametrize("split", SPLITS)
def test_nothing_shown_is_called_absent_nor_is_any_ancestor_of_it(split: str) -> None:
    for plan in plan_split(split, images=SPLITS[split], seed=0):
        shown = {name for thing in plan.things for name in thing.classes}
        assert not {up for name in shown for up in (name, *ancestors(name))} & set(plan.absent)


def test_about_15_percent_of_hideable_classes_are_left_unannotated_in_training_and_none_in_validation() -> None:
    plans = plan_split("train", images=TRAIN_IMAGES, seed=0)
    for spec in CLASSES:
        shown = [plan for plan in plans if any(spec.name in thing.classes for thing in plan.things)]
        hidden = sum(spec.name in plan.hidden for plan in shown)
        assert hidden == (round(0.15 * len(shown)) if spec.hideable else 0)
    assert not any(plan.hidden for plan in plan_split("validation", images=VALIDATION_IMAGES, seed=0))


def test_hidden_classes_have_neither_box_nor_label_on_disk(small: Path) -> None:
    hidden = {(p.image_id, name) for p in plan_split("train", images=90, seed=0) for name in p.hidden}
    assert hidden
    assert not hidden & {(b["ImageID"], b["name"]) for b in boxes(small)}
    labels = rows(small, "train-annotations-human-imagelabels.csv")
    assert not hidden & {(row["ImageID"], NAMES[row["LabelName"]]) for row in labels}


def test_group_of_occluded_and_truncated_boxes_exist_but_are_the_exception(small: Path) -> None:
    found = boxes(small)
    for flag, most in (("IsGroupOf", 0.12), ("IsTruncated", 0.2), ("IsOccluded", 0.35)):
        assert 0 < sum(box[flag] == "1" for box in found) < most * len(found), flag
    groups = [
        thing for plan in plan_split("train", images=TRAIN_IMAGES, seed=0) for thing in plan.things if thing.group
    ]
    assert min(thing.group for thing in groups) > 5


def test_clothing_lies_within_the_people_who_wear_it(small: Path) -> None:
    people = defaultdict(list)
    for box in boxes(small):
        if box["name"] in ("Man", "Woman"):
            people[box["ImageID"]].append(box["box"])
    garments = [box for box in boxes(small) if box["name"] in ("Shirt", "Coat", "Sun hat", "Fedora")]
    assert len(garments) > 50
    for garment in garments:
        inner = garment["box"]
        low = np.maximum(inner[:2], np.array(people[garment["ImageID"]])[:, :2])
        high = np.minimum(inner[2:], np.array(people[garment["ImageID"]])[:, 2:])
        shared = np.prod(np.maximum(high - low, 0), axis=1).max()
        assert shared / np.prod(inner[2:] - inner[:2]) >= 0.8


def test_most_objects_are_at_least_24_pixels_when_the_image_is_160(small: Path) -> None:
    sides = []
    for box in boxes(small):
        height, width = shape_of(small / "images" / f"{box['ImageID']}.jpg")
        spans = (box["box"][2:] - box["box"][:2]) * np.array([width, height])
        sides.append(float(spans.min()) * 160 / float(np.sqrt(height * width)))
    assert np.mean(np.array(sides) >= 24) > 0.8
    assert min(sides) > 5


def test_the_hierarchy_has_three_levels_and_names_every_class_once() -> None:
    def depths(node: dict[str, Any], depth: int) -> list[tuple[str, int]]:
        below = [pair for child in node.get("Subcategory", []) for pair in depths(child, depth + 1)]
        return [(node["LabelName"], depth), *below]

    (root, _), *found = depths(demo.hierarchy(), 0)
    assert root == "/m/0bl9f"
    assert Counter(mid for mid, _ in found) == Counter(NAMES.keys())
    assert max(depth for _, depth in found) == 3
    assert dict(found)["/m/0pg52"] == 3, "Vehicle > Land vehicle > Taxi"


def test_class_descriptions_have_no_header_and_the_order_of_the_classes(small: Path) -> None:
    lines = (small / "class-descriptions.csv").read_text(encoding="utf-8").splitlines()
    assert lines == [f"{spec.mid},{spec.name}" for spec in CLASSES]


def test_images_have_many_shapes_and_splits_share_none(small: Path) -> None:
    ids = {split: {plan.image_id for plan in plan_split(split, images=n, seed=0)} for split, n in SPLITS.items()}
    assert not ids["train"] & ids["validation"]
    assert {split: len(found) for split, found in ids.items()} == SPLITS
    files = sorted((small / "images").iterdir())
    assert len(files) == 120
    assert all(re.fullmatch(r"[0-9a-f]{16}\.jpg", file.name) for file in files)
    shapes = [shape_of(file) for file in files]
    assert {max(shape) for shape in shapes} == {256}
    aspects = [width / height for height, width in shapes]
    assert min(aspects) >= 0.5
    assert max(aspects) <= 2
    assert min(aspects) < 0.7
    assert max(aspects) > 1.7
    assert len({round(aspect, 2) for aspect in aspects}) >= 6


def test_the_stamp_tells_whether_the_set_is_the_one_asked_for(small: Path, tmp_path: Path) -> None:
    assert demo_is_current(small, **SMALL)
    assert not demo_is_current(small, seed=1, **SMALL)
    assert not demo_is_current(small)
    assert not demo_is_current(tmp_path / "nowhere")
    (tmp_path / "demo.json").write_text("{", encoding="utf-8")
    assert not demo_is_current(tmp_path)


@pytest.mark.parametrize("fault", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_write_leaves_nothing_behind(
    fault: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter(range(3))

    def stumble(*args: Any) -> Any:
        if next(calls, None) is None:
            raise fault
        return draw_scene(*args)

    monkeypatch.setattr(demo, "draw_scene", stumble)
    with pytest.raises(fault):
        write_demo(tmp_path / "set", **TINY)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_rewrite_keeps_the_old_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_demo(tmp_path / "set", **TINY)
    before = contents(tmp_path / "set")

    def fail(*_: Any) -> Any:
        raise RuntimeError

    monkeypatch.setattr(demo, "draw_scene", fail)
    with pytest.raises(RuntimeError):
        write_demo(tmp_path / "set", seed=5, **TINY)
    assert contents(tmp_path / "set") == before
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_a_set_of_other_sizes_replaces_the_old_one_completely(tmp_path: Path) -> None:
    write_demo(tmp_path / "set", **TINY)
    write_demo(tmp_path / "set", train_images=2, validation_images=1)
    assert len(list((tmp_path / "set" / "images").iterdir())) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_a_folder_that_holds_something_else_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious", encoding="utf-8")
    with pytest.raises(DataError, match="hold a demo set, but holds something else"):
        write_demo(tmp_path, **TINY)
    assert (tmp_path / "thesis.txt").read_text(encoding="utf-8") == "precious"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train_images": 0}, r"`train_images >= 1` must hold, but got train_images=0"),
        ({"validation_images": -3}, r"`validation_images >= 1` must hold, but got validation_images=-3"),
        ({"seed": -1}, r"`seed >= 0` must hold, but got seed=-1"),
    ],
    ids=["no training images", "negative validation images", "negative seed"],
)
def test_impossible_arguments_are_refused_by_name(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(message).replace(r"\`", "`")):
        write_demo(tmp_path / "set", **arguments)


def test_progress_is_not_written_where_no_terminal_is(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_demo(tmp_path / "quiet", train_images=1, validation_images=1)
    assert capfd.readouterr() == ("", "")
