"""``convert``: there and back again, what ``train`` makes of it, and a folder that appears whole or not at all."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retinaflow.cli import main
from retinaflow.data.index import FLAGS, AnnotationIndex
from retinaflow.data.known_classes import known_classes
from retinaflow.data.training_data import load_training_data
from retinaflow.errors import DataError
from retinaflow.settings.commands import BinningConfig
from retinaflow.settings.resolve import resolve


def convert(data: Path, output: Path, **given: Any) -> int:
    words = {"data": data, "output": output, "track": "false", **given}
    return main(["convert", *(word for name, value in words.items() for word in (f"--{name}", str(value)))])


def indexes(folder: Path, **given: Any) -> list[AnnotationIndex]:
    data = load_training_data(resolve(BinningConfig, {"data": str(folder), "hierarchy": "none", **given}))
    return [data.train, data.evaluated]


def by_image(index: AnnotationIndex) -> dict[str, Any]:
    """Rows (class, corners, flags) of each image, sorted."""
    rows = np.column_stack([index.labels, index.boxes, index.flags])
    ids = np.asarray(index.image_ids)[index.box_image]
    return {name: sorted(rows[ids == name].tolist()) for name in index.image_ids.tolist()}


LOST = {"coco": (), "voc": ("IsDepiction", "IsInside"), "yolo": FLAGS}
"""Flags that a layout cannot hold."""


@pytest.mark.parametrize("layout", LOST)
@pytest.mark.parametrize("exhaustive", ["true", "false"])
def test_a_set_comes_back_as_it_was(tiny_dataset: Any, tmp_path: Path, layout: str, exhaustive: str) -> None:
    data = tiny_dataset()
    assert convert(data, tmp_path / "there", to=layout, exhaustive=exhaustive) == 0
    assert convert(tmp_path / "there", tmp_path / "back", exhaustive=exhaustive) == 0
    lost = sum(1 << FLAGS.index(name) for name in LOST[layout])
    for before, after in zip(indexes(data), indexes(tmp_path / "back", exhaustive="false"), strict=True):
        assert before.taxonomy.ids == after.taxonomy.ids
        assert before.taxonomy.names == after.taxonomy.names
        expected, found = by_image(before), by_image(after)
        # Images without boxes: of a set that is not exhaustive only COCO keeps what is known of them.
        if exhaustive == "true" or layout == "coco":
            assert list(expected) == list(found)
        pixels = 0.51 / 48 if layout == "voc" else 1e-7
        for name in found:
            rows, own = np.array(expected[name]).reshape(-1, 6), np.array(found[name]).reshape(-1, 6)
            np.testing.assert_allclose(own[:, 1:5], rows[:, 1:5], atol=pixels)
            assert (own[:, 0] == rows[:, 0]).all()
            assert (own[:, 5] == (rows[:, 5].astype(int) & ~lost)).all()
        if exhaustive == "false" and layout == "coco":
            assert np.array_equal(before.verified_class, after.verified_class)
            assert np.array_equal(before.verified_present, after.verified_present)


def test_a_converted_set_knows_that_it_is_exhaustive(
    tiny_dataset: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(tiny_dataset(), tmp_path / "coco", to="coco", exhaustive="true")
    convert(tmp_path / "coco", tmp_path / "mine")
    train, evaluated = indexes(tmp_path / "mine")
    assert all(known_classes(train, image).all() for image in range(len(train)))
    assert len(evaluated.verified_class) == len(evaluated) * evaluated.num_classes
    partly, evaluated = indexes(tmp_path / "mine", exhaustive="false")
    assert not all(known_classes(partly, image).all() for image in range(len(partly)))
    assert len(evaluated.verified_class) < len(evaluated) * evaluated.num_classes
    capsys.readouterr()
    assert main(["binning", "--data", str(tmp_path / "mine"), "--track", "false", "--output", str(tmp_path / "o")]) == 0
    assert "retinaflow.yaml of the data folder: exhaustive=true" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["classes: ../../x.csv", "image_labels: /x.csv", "lr: 1", "- 1", "a: [", "data: x"])
def test_a_data_folder_may_give_settings_of_data_and_no_paths(tiny_dataset: Any, text: str) -> None:
    data = tiny_dataset()
    (data / "retinaflow.yaml").write_text(text)
    with pytest.raises(
        ValueError, match=r"retinaflow.yaml[^:]*: (a data folder may give|the file must|not a readable)"
    ):
        resolve(BinningConfig, {"data": str(data)})


def test_flags_and_files_win_over_the_data_folder(tiny_dataset: Any, tmp_path: Path) -> None:
    data = tiny_dataset()
    (data / "retinaflow.yaml").write_text("eval_split: test\ntrain_splits: [train, extra]\nexhaustive: true\n")
    (tmp_path / "own.yaml").write_text("eval_split: validation\n")
    found = resolve(BinningConfig, {"data": str(data), "config": str(tmp_path / "own.yaml"), "exhaustive": "false"})
    assert (found.train_splits, found.eval_split, found.exhaustive) == (("train", "extra"), "validation", False)
    assert "train_splits" not in found.model_fields_set


def test_one_split_becomes_two(tiny_dataset: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert(tiny_dataset(validation=1), tmp_path / "coco", to="coco", exhaustive="true")
    (tmp_path / "coco" / "annotations" / "instances_val.json").unlink()
    assert convert(tmp_path / "coco", tmp_path / "mine", validation_fraction=0.25) == 0
    told = re.search(r"(\d+) of 12 images became the validation split", capsys.readouterr().out)
    assert told
    train, evaluated = indexes(tmp_path / "mine")
    assert (len(train), len(evaluated)) == (12 - int(told[1]), int(told[1]))
    # Car, Tree and Bus are on two images and more, Vehicle is on one.
    assert [set(index.labels.tolist()) for index in (train, evaluated)] == [{0, 1, 2, 4}, {0, 2, 4}]
    assert convert(tmp_path / "coco", tmp_path / "whole", validation_fraction=0) == 0
    assert not (tmp_path / "whole" / "validation-annotations-bbox.csv").exists()


def test_a_test_split_stays_where_a_validation_split_is_made(tiny_dataset: Any, tmp_path: Path) -> None:
    convert(tiny_dataset(validation=2), tmp_path / "coco", to="coco", exhaustive="true")
    folder = tmp_path / "coco" / "annotations"
    (folder / "instances_val.json").rename(folder / "instances_test.json")
    (tmp_path / "coco" / "val").rename(tmp_path / "coco" / "test")
    assert convert(tmp_path / "coco", tmp_path / "mine", validation_fraction=0.25) == 0
    train, evaluated = indexes(tmp_path / "mine")
    assert len(train) + len(evaluated) == 12
    assert len(evaluated) > 0
    (test,) = indexes(tmp_path / "mine", eval_split="test")[1:]
    assert test.image_ids.tolist() == ["validation000", "validation001"]


def test_a_split_that_is_not_there_is_named_with_those_that_are(tiny_dataset: Any, tmp_path: Path) -> None:
    convert(tiny_dataset(), tmp_path / "coco", to="coco", exhaustive="true")
    (tmp_path / "coco" / "annotations" / "instances_train.json").unlink()
    assert convert(tmp_path / "coco", tmp_path / "mine") == 0
    with pytest.raises(
        DataError, match=r"validation-annotations-bbox\.csv: train_splits= and eval_split= name the splits"
    ):
        indexes(tmp_path / "mine")


@pytest.mark.parametrize("layout", ["coco", "voc", "yolo"])
def test_the_hierarchy_goes_along(
    tiny_dataset: Any, tmp_path: Path, layout: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tiny_dataset()
    with (data / "train-annotations-human-imagelabels.csv").open("a", encoding="utf-8") as file:
        file.write("train000,verification,/m/0plant,1\n")
    convert(data, tmp_path / "there", to=layout)
    said = capsys.readouterr().out
    assert f"{layout} cannot hold classes verified present without a box: 1 are lost" in said
    convert(tmp_path / "there", tmp_path / "back")
    name = "bbox_labels_hierarchy.json"
    assert (tmp_path / "back" / name).read_text() == (data / name).read_text()
    before, after = (load_training_data(resolve(BinningConfig, {"data": str(d)})) for d in (data, tmp_path / "back"))
    assert np.array_equal(before.train.taxonomy.is_ancestor, after.train.taxonomy.is_ancestor)


STOPPED = """
import os, signal, sys
from retinaflow.cli import main
from retinaflow.data.formats import conversion
copy = conversion.shutil.copyfile

def copy_and_signal(source, target):
    copy(source, target)
    if target.name == "train000.jpg":
        os.kill(os.getpid(), getattr(signal, sys.argv[1]))

conversion.shutil.copyfile = copy_and_signal
sys.exit(main(["convert", *sys.argv[2:]]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGKILL"])
def test_a_conversion_that_is_stopped_or_killed_leaves_nothing_that_stays(
    tiny_dataset: Any, tmp_path: Path, name: str
) -> None:
    words = ["--data", str(tiny_dataset()), "--to", "coco", "--output", str(tmp_path / "coco"), "--track", "false"]
    ended = subprocess.run([sys.executable, "-c", STOPPED, name, *words], capture_output=True, check=False, text=True)
    left = [path.name for path in tmp_path.iterdir() if path.name.startswith(".coco.partial-")]
    if name == "SIGTERM":
        assert (ended.returncode, left) == (130, [])
        assert "stopped: signal SIGTERM" in ended.stderr
    else:
        assert ended.returncode == -9
        assert len(left) == 1
    assert main(["convert", *words]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["coco", "tiny"]


@pytest.mark.parametrize("how", ["copy", "hardlink", "symlink"])
def test_images_are_never_encoded_again(tiny_dataset: Any, tmp_path: Path, how: str) -> None:
    data = tiny_dataset()
    convert(data, tmp_path / "yolo", to="yolo", exhaustive="true", image_files=how)
    before, after = data / "images" / "train000.jpg", tmp_path / "yolo" / "images" / "train" / "train000.jpg"
    assert before.read_bytes() == after.read_bytes()
    assert after.is_symlink() == (how == "symlink")
    assert (before.stat().st_ino == after.stat().st_ino) == (how != "copy")


def test_nothing_is_overwritten_and_a_failure_leaves_nothing_behind(
    tiny_dataset: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tiny_dataset()
    assert convert(data, data, to="coco") == 2
    assert "the folder must be new or empty, but holds " in capsys.readouterr().err
    convert(data, tmp_path / "coco", to="coco", exhaustive="true")
    path = tmp_path / "coco" / "annotations" / "instances_train.json"
    document = json.loads(path.read_text())
    document["annotations"][3]["bbox"][2] = 0
    path.write_text(json.dumps(document))
    assert convert(tmp_path / "coco", tmp_path / "mine") == 2
    assert "instances_train.json annotation 4: a box must have a width and a height above 0" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["coco", "tiny"]
    assert convert(tmp_path / "coco", tmp_path / "mine", on_bad_row="drop") == 0
    assert (tmp_path / "mine" / "dropped.csv").read_text().count("\n") == 2


def test_label_files_without_an_image_are_told(
    tiny_dataset: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(tiny_dataset(), tmp_path / "yolo", to="yolo", exhaustive="true")
    (tmp_path / "yolo" / "images" / "train" / "train000.jpg").unlink()
    assert convert(tmp_path / "yolo", tmp_path / "mine") == 0
    assert re.search(r"1 label files have no image file .*train000.txt for example", capsys.readouterr().out)


def test_a_folder_of_nothing_known_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert convert(tmp_path / "empty", tmp_path / "out") == 2
    assert "found neither COCO JSON files, nor VOC XML files, nor YOLO" in capsys.readouterr().err
    assert convert(tmp_path / "nothing", tmp_path / "out") == 2
    assert "no such file or folder" in capsys.readouterr().err
