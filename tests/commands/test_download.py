"""``download``: from a server to a folder that trains, in spite of errors, and on from where it was stopped."""

from __future__ import annotations

import base64
import csv
import errno
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bucket_server import Bucket, serving

from retinaflow.cli import main
from retinaflow.data.download import http, urls
from retinaflow.data.training_data import load_training_data
from retinaflow.settings.commands import BinningConfig
from retinaflow.settings.resolve import resolve


@pytest.fixture
def bucket(tiny_dataset: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """The tiny set as the buckets publish it: 12 training and 6 validation images."""
    monkeypatch.setattr(http, "FIRST_WAIT", 0.01)
    data = tiny_dataset()
    with serving() as bucket:
        bucket.files[urls.CLASSES] = (data / "class-descriptions.csv").read_bytes()
        bucket.files[urls.HIERARCHY] = (data / "bbox_labels_hierarchy.json").read_bytes()
        for split in ("train", "validation"):
            bucket.files[urls.BOXES[split]] = (data / f"{split}-annotations-bbox.csv").read_bytes()
            labels = (data / f"{split}-annotations-human-imagelabels.csv").read_bytes()
            bucket.files[urls.LABELS[split]] = labels
            for path in (data / "images").glob(f"{split}*.jpg"):
                bucket.files[f"{split}/{path.name}"] = path.read_bytes()
        yield bucket


def download(bucket: Bucket, output: Path, **given: Any) -> int:
    words = {"output": output, "track": "false", "tables_url": bucket.url, "images_url": bucket.url, "timeout": 0.5}
    words |= {"retries": 2, **given}
    return main(["download", *(word for name, value in words.items() for word in (f"--{name}", str(value)))])


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_classes_come_with_what_is_below_them_and_can_be_trained_on(
    bucket: Bucket, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert download(bucket, tmp_path / "oi", class_group="Vehicle", per_class=3) == 0
    out = capsys.readouterr().out
    assert "6 images to fetch (3 of train, 3 of validation), about 0.0 MiB by 6 of them, 8 at the same time" in out
    data = load_training_data(resolve(BinningConfig, {"data": str(tmp_path / "oi")}))
    assert data.train.taxonomy.names == ("Car", "Vehicle", "Bus")
    assert (len(data.train), len(data.evaluated)) == (3, 3)
    assert {row["LabelName"] for row in rows(tmp_path / "oi" / "train-annotations-bbox.csv")} <= {
        "/m/0car", "/m/0vehicle", "/m/0bus",
    }  # fmt: skip
    header = (tmp_path / "oi" / "train-annotations-bbox.csv").read_bytes().splitlines()[0]
    assert header == bucket.files[urls.BOXES["train"]].splitlines()[0]
    assert not (tmp_path / "oi" / ".download").exists()


def test_a_dry_run_says_how_much_and_fetches_no_image(
    bucket: Bucket, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert download(bucket, tmp_path / "oi", class_group="all", dry_run="true") == 0
    assert "images to fetch" in capsys.readouterr().out
    assert not any(path.endswith(".jpg") for path in bucket.asked)
    before = bucket.asked.copy()
    assert download(bucket, tmp_path / "oi", class_group="all") == 0
    # The tables of the dry run are not read again.
    assert bucket.asked[urls.BOXES["train"]] == before[urls.BOXES["train"]] == 1


def test_faults_are_waited_out_and_what_is_not_there_is_left_out_and_listed(
    bucket: Bucket, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bucket.errors = {
        "train/train001.jpg": ["truncate", 503],
        "train/train002.jpg": ["stall"],
        "train/train003.jpg": ["wrong md5", "reset"],
        urls.BOXES["train"]: ["truncate", "reset"],
    }
    del bucket.files["train/train005.jpg"]
    assert download(bucket, tmp_path / "oi", class_group="all", per_class=100, connections=3) == 0
    assert "1 images could not be fetched; missing.csv lists them" in capsys.readouterr().out
    assert [row["image_id"] for row in rows(tmp_path / "oi" / "missing.csv")] == ["train005"]
    assert "train005" not in {row["ImageID"] for row in rows(tmp_path / "oi" / "train-annotations-bbox.csv")}
    for path in (tmp_path / "oi" / "images").iterdir():
        assert path.read_bytes() == bucket.files[f"{path.stem.rstrip('0123456789')}/{path.name}"]
    assert bucket.most_at_once <= 3
    load_training_data(resolve(BinningConfig, {"data": str(tmp_path / "oi")}))


def test_the_same_command_goes_on_with_what_is_missing(
    bucket: Bucket, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = bucket.files["train/train001.jpg"]
    bucket.files["train/train001.jpg"] = whole[: len(whole) // 2]  # as long as it says, and no whole image
    assert download(bucket, tmp_path / "oi", class_group="Car,Tree") == 2
    error = capsys.readouterr().err
    assert "1 images could not be read whole, train001 for example" in error
    assert "the JPEG is cut short" in error
    assert not (tmp_path / "oi" / "train-annotations-bbox.csv").exists()
    bucket.files["train/train001.jpg"] = whole
    before = bucket.asked.copy()
    assert download(bucket, tmp_path / "oi", class_group="Car,Tree") == 0
    again = {path for path in bucket.asked if bucket.asked[path] > before[path]}
    assert again == {"train/train001.jpg", urls.LABELS["train"], urls.LABELS["validation"]}
    before = bucket.asked.copy()
    assert download(bucket, tmp_path / "oi", class_group="Car,Tree") == 0
    assert bucket.asked == before
    assert "is complete" in capsys.readouterr().out


@pytest.mark.parametrize("on_bad_image", ["stop", "skip"])
def test_an_attempt_that_misses_only_images_the_server_does_not_have_ends_well(
    bucket: Bucket, tmp_path: Path, on_bad_image: str
) -> None:
    for name in ("train001", "train005"):
        del bucket.files[f"train/{name}.jpg"]
    bucket.errors[urls.LABELS["validation"]] = [500] * 3
    given = {"class_group": "all", "on_bad_image": on_bad_image}
    assert download(bucket, tmp_path / "oi", **given) == 2
    assert download(bucket, tmp_path / "oi", **given) == 0
    assert {row["image_id"] for row in rows(tmp_path / "oi" / "missing.csv")} == {"train001", "train005"}
    assert len(list((tmp_path / "oi" / "images").iterdir())) == 13


def test_images_that_a_later_attempt_fetches_have_their_labels(bucket: Bucket, tmp_path: Path) -> None:
    given = {"class_group": "all", "on_bad_image": "skip"}
    bucket.errors = {f"train/{name}.jpg": [500] * 3 for name in ("train001", "train005")}
    bucket.errors[urls.LABELS["validation"]] = [500] * 3
    assert download(bucket, tmp_path / "oi", **given) == 2
    assert len(list((tmp_path / "oi" / "images").iterdir())) == 13
    assert download(bucket, tmp_path / "oi", **given) == 0
    assert not (tmp_path / "oi" / "missing.csv").exists()
    assert len(list((tmp_path / "oi" / "images").iterdir())) == 15
    for split in ("train", "validation"):
        labels = rows(tmp_path / "oi" / f"{split}-annotations-human-imagelabels.csv")
        there = {path.stem for path in (tmp_path / "oi" / "images").iterdir()}
        published = csv.DictReader(bucket.files[urls.LABELS[split]].decode().splitlines())
        assert labels == [row for row in published if row["ImageID"] in there]
    # What was read before is not read again.
    assert bucket.asked[urls.LABELS["train"]] == 1


def test_images_can_be_given_by_id(bucket: Bucket, tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_text("train/train001\ntrain002\nvalidation/validation000\nnowhere\n")
    assert download(bucket, tmp_path / "oi", image_ids=tmp_path / "ids.txt") == 0
    names = sorted(path.stem for path in (tmp_path / "oi" / "images").iterdir())
    assert names == ["train001", "train002", "validation000"]
    assert len(rows(tmp_path / "oi" / "class-descriptions.csv")) == 4
    assert rows(tmp_path / "oi" / "missing.csv") == [
        {"image_id": "nowhere", "reason": "in no box table of these splits"},
    ]


def test_originals_are_checked_by_the_size_and_md5_of_their_table(bucket: Bucket, tmp_path: Path) -> None:
    head = "ImageID,Subset,OriginalURL,Title,OriginalSize,OriginalMD5\n"
    for split in ("train", "validation"):
        text = head
        for path, data in bucket.files.items():
            if path.startswith(f"{split}/"):
                digest = base64.b64encode(hashlib.md5(data).digest()).decode()
                name = path.split("/")[1].removesuffix(".jpg")
                size = len(data) + (name == "train001")
                text += f'{name},{split},{bucket.url}/{path},"A title, with a comma",{size},{digest}\n'
        bucket.files[urls.ORIGINALS[split]] = text.encode()
    given = {"class_group": "Car,Tree", "originals": "true"}
    assert download(bucket, tmp_path / "oi", **given) == 2
    assert download(bucket, tmp_path / "oi", **given, on_bad_image="skip") == 0
    missing = rows(tmp_path / "oi" / "missing.csv")
    assert [row["image_id"] for row in missing] == ["train001"]
    assert "bytes, but" in missing[0]["reason"]


def test_an_image_that_the_table_of_originals_lacks_is_listed(
    bucket: Bucket, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "ImageID,Subset,OriginalURL,OriginalSize,OriginalMD5\n"
    for path in bucket.files:
        if path.startswith("train/") and path != "train/train001.jpg":
            text += f"{path[6:-4]},train,{bucket.url}/{path},,\n"
    bucket.files[urls.ORIGINALS["train"]] = text.encode()
    (tmp_path / "ids.txt").write_text("train001\ntrain002\nnowhere\n")
    assert download(bucket, tmp_path / "oi", image_ids=tmp_path / "ids.txt", splits="train", originals="true") == 0
    out = capsys.readouterr().out
    assert f"1 images are not in {urls.ORIGINALS['train']}, train001 for example" in out
    assert "1 images are in no box table of these splits, nowhere for example" in out
    assert "1 images to fetch (1 of train)" in out
    assert rows(tmp_path / "oi" / "missing.csv") == [
        {"image_id": "nowhere", "reason": "in no box table of these splits"},
        {"image_id": "train001", "reason": f"not in {urls.ORIGINALS['train']}"},
    ]


REFUSED = {
    "nothing asked": ({}, "class_group or image_ids must be given"),
    "unknown class": ({"class_group": "Carr"}, "no class has the id or name 'Carr'; did you mean Car"),
    "no such list": ({"image_ids": "no.txt"}, "image_ids=no.txt: no such file"),
    "too many connections": ({"class_group": "Car", "connections": 99}, "connections <= 32 must hold"),
    "no such split": ({"class_group": "Car", "splits": "val"}, "splits"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_refused(
    bucket: Bucket, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: tuple[dict[str, Any], str]
) -> None:
    assert download(bucket, tmp_path / "oi", **case[0]) == 2
    assert case[1] in capsys.readouterr().err


def test_a_folder_of_something_else_is_refused(
    bucket: Bucket, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("")
    assert download(bucket, tmp_path / "mine", class_group="Car") == 2
    assert "the folder must be new, empty, or begun by download" in capsys.readouterr().err
    assert download(bucket, tmp_path / "oi", class_group="Car", dry_run="true") == 0
    assert download(bucket, tmp_path / "oi", class_group="Tree") == 2
    assert "was begun with other settings (class_group)" in capsys.readouterr().err
    assert json.loads((tmp_path / "oi" / "download.json").read_text())["complete"] is False


def test_of_a_file_of_classes_the_content_counts(
    bucket: Bucket, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "classes.txt").write_text("Car\nTree\n")
    assert download(bucket, tmp_path / "oi", class_group=tmp_path / "classes.txt") == 0
    (tmp_path / "other.txt").write_text("Tree\n\n Car\n")
    assert download(bucket, tmp_path / "oi", class_group=tmp_path / "other.txt") == 0
    assert "is complete" in capsys.readouterr().out
    (tmp_path / "classes.txt").write_text("Car\nTree\nVehicle\n")
    assert download(bucket, tmp_path / "oi", class_group=tmp_path / "classes.txt") == 2
    assert "was begun with other settings (class_group)" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", '{"asked": {', "[]", '{"asked": null, "complete": false}'])
def test_a_damaged_note_of_what_was_asked_for_is_named(
    bucket: Bucket, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    (tmp_path / "oi").mkdir()
    (tmp_path / "oi" / "download.json").write_text(text)
    assert download(bucket, tmp_path / "oi", class_group="Car") == 2
    error = capsys.readouterr().err
    assert "download.json: the file must hold the request of the download, but is damaged" in error
    assert "give another output, or remove the folder and start again" in error


def test_the_note_of_what_was_asked_for_is_there_whole_or_not_at_all(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "oi").mkdir()
    (tmp_path / "oi" / ".download.json.partial").write_text("what a killed process left")
    assert download(bucket, tmp_path / "oi", class_group="Car", dry_run="true") == 0

    def full_disk(*_: Any, **__: Any) -> int:
        raise OSError(errno.ENOSPC, "no space left")

    note = (tmp_path / "oi" / "download.json").read_text()
    with monkeypatch.context() as patch:
        patch.setattr("retinaflow.files.os.fsync", full_disk)
        assert download(bucket, tmp_path / "oi", class_group="Car") == 2
    assert (tmp_path / "oi" / "download.json").read_text() == note
    assert download(bucket, tmp_path / "oi", class_group="Car") == 0


@pytest.mark.parametrize("on_bad_image", ["stop", "skip"])
def test_a_folder_without_any_image_is_no_success(
    bucket: Bucket, tmp_path: Path, capsys: pytest.CaptureFixture[str], on_bad_image: str
) -> None:
    given = {"class_group": "all", "on_bad_image": on_bad_image}
    assert download(bucket, tmp_path / "oi", **given, images_url=f"{bucket.url}/wrong") == 2
    error = capsys.readouterr().err
    assert "the 15 images all failed; check images_url. missing.csv has the reasons, for example: http" in error
    assert "the server has no such file (status 404)" in error
    assert len(rows(tmp_path / "oi" / "missing.csv")) == 15
