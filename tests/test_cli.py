"""The command line: what a user can cause ends in a message and exit code 2, never in a traceback."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import pytest
from made_index import TinyDataset

from retinaflow.cli import main
from retinaflow.errors import DataError
from retinaflow.settings.commands import COMMANDS

BOXES, LABELS = "train-annotations-bbox.csv", "train-annotations-human-imagelabels.csv"


def _binning(data: Path, *more: str) -> int:
    return main(["binning", "--data", str(data), "--track", "false", "--output", str(data.parent / "out"), *more])


def _replace(folder: Path, name: str, old: str, new: str) -> None:
    """The first match of a pattern in a file."""
    path = folder / name
    text, count = re.subn(old, new, path.read_text(encoding="utf-8"), count=1, flags=re.MULTILINE)
    assert count == 1
    path.write_text(text, encoding="utf-8")


def _cut_image(folder: Path) -> None:
    path = folder / "images" / "train000.jpg"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _swap_sides(folder: Path) -> None:
    path = folder / BOXES
    lines = path.read_text(encoding="utf-8").splitlines()
    fields = lines[2].split(",")
    fields[4], fields[5] = "0.75", "0.25"
    path.write_text("\n".join([*lines[:2], ",".join(fields), *lines[3:]]) + "\n", encoding="utf-8")


FAULTS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "missing boxes": (lambda d: (d / BOXES).unlink(), ["holds none of train-annotations-bbox.csv", "boxes="]),
    "missing labels": (lambda d: (d / LABELS).unlink(), ["train-annotations-human-imagelabels.csv", "image_labels="]),
    "missing class list": (lambda d: (d / "class-descriptions.csv").unlink(), ["class-descriptions.csv", "classes="]),
    "empty class list": (
        lambda d: (d / "class-descriptions.csv").write_text(""),
        ["class-descriptions.csv: the class list must name at least one class"],
    ),
    "unknown class id": (
        lambda d: _replace(d, BOXES, "/m/0car", "/m/0boat"),
        [f"{BOXES} line 2: LabelName must be in the class list, but got LabelName=/m/0boat", "on_bad_row=drop"],
    ),
    "XMax < XMin": (_swap_sides, [f"{BOXES} line 3: XMin < XMax must hold, but got XMin=0.75, XMax=0.25"]),
    "text for a number": (
        lambda d: _replace(d, BOXES, r"(,/m/0car,1),[0-9.]+", r"\1,left"),
        [f"{BOXES} line 2: XMin must be a number, but got", "left"],
    ),
    "missing column": (lambda d: _replace(d, BOXES, "XMax", "Right"), [BOXES, "lacks XMax"]),
    "empty table": (lambda d: (d / BOXES).write_text(""), [BOXES, "is empty"]),
    "missing image": (
        lambda d: (d / "images" / "train003.jpg").unlink(),
        ["11 of 12 images have a file", "train003 has none", "on_bad_image=skip"],
    ),
    "truncated JPEG": (_cut_image, ["train000.jpg: the JPEG is cut short", "on_bad_image=skip"]),
    "no picture at all": (
        lambda d: (d / "images" / "train000.jpg").write_text("hello"),
        ["train000.jpg: not an image file"],
    ),
    "broken hierarchy": (
        lambda d: (d / "bbox_labels_hierarchy.json").write_text("{"),
        ["bbox_labels_hierarchy.json"],
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_data_ends_with_a_message_that_names_it(
    fault: str, tiny_dataset: TinyDataset, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tiny_dataset()
    spoil, words = FAULTS[fault]
    spoil(data)
    assert _binning(data) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert "Traceback" not in shown
    for word in words:
        assert word in shown


SETTINGS: dict[str, tuple[list[str], list[str]]] = {
    "missing data folder": (["--data", "nowhere"], ["data=nowhere: no such folder"]),
    "bad value": (["--num_bins", "0"], ["num_bins >= 1 must hold, but got num_bins=0"]),
    "missing YAML": (["--config", "nowhere.yaml"], ["config=nowhere.yaml: no such file"]),
    "unknown class": (["--class_group", "Boat"], ["class_group=Boat", "'Boat'"]),
    "unknown bin": (["--class_group", "bin:9"], ["class_group=bin:9"]),
    "missing id list": (["--eval_ids", "nowhere.txt"], ["eval_ids=nowhere.txt: no such file"]),
    "unknown split": (["--eval_split", "test"], ["holds none of test-annotations-bbox.csv"]),
    "training images evaluated": (
        ["--eval_split", "train"],
        ["12 are in both train and train", "train000 for example"],
    ),
    "missing image folder": (["--images", "nowhere"], ["images=nowhere: no such folder"]),
    "bad edges": (["--bin_edges", "10,5"], ["bin edges must ascend, but got 10.0, 5.0"]),
    "too long an epoch": (["--epoch_length", "100", "--max_repeats", "2"], ["epoch_length <= max_repeats x images"]),
}


@pytest.mark.parametrize("fault", SETTINGS)
def test_settings_that_do_not_fit_the_data_end_with_a_message(
    fault: str, tiny_dataset: TinyDataset, capsys: pytest.CaptureFixture[str]
) -> None:
    flags, words = SETTINGS[fault]
    assert _binning(tiny_dataset(), *flags) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert "Traceback" not in shown
    for word in words:
        assert word in shown


def test_eval_ids_must_leave_something_to_train_on(
    tiny_dataset: TinyDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ids.txt").write_text("\n".join(f"train{n:03d}" for n in range(12)))
    assert _binning(tiny_dataset(), "--eval_ids", str(tmp_path / "ids.txt")) == 2
    assert "but names 12 of 12" in capsys.readouterr().err


def test_eval_ids_of_no_training_image_are_counted_with_an_example(
    tiny_dataset: TinyDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "ids.txt"
    path.write_text("train000\nTrain001\nvalidation000\n")
    assert _binning(tiny_dataset(), "--eval_ids", str(path), "--output", str(tmp_path / "out")) == 0
    said = f"eval_ids={path}: 2 of 3 ids are of no training image and are left out, Train001 for example"
    assert said in capsys.readouterr().out


def test_an_unknown_flag_or_command_ends_with_usage_and_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        (["train", "--focal_gama", "2"], "there is no --focal_gama; did you mean --focal_gamma?"),
        (["train", "--focal_gama=2"], "did you mean --focal_gamma?"),
        (["trian"], "there is no command trian; did you mean train?"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 2
        assert message in capsys.readouterr().err


def test_flags_are_not_guessed_from_their_beginning() -> None:
    with pytest.raises(SystemExit):
        main(["train", "--num", "3"])


def test_a_traceback_is_shown_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETINAFLOW_TRACEBACK", "1")
    with pytest.raises(DataError, match="data=nowhere"):
        _binning(Path("nowhere"))


def test_a_run_without_faults_ends_with_code_0_and_nothing_on_stderr(
    tiny_dataset: TinyDataset, capfd: pytest.CaptureFixture[str]
) -> None:
    assert _binning(tiny_dataset()) == 0
    shown = capfd.readouterr()
    assert shown.err == ""
    assert "12 training images" in shown.out


def test_bad_rows_and_images_are_dropped_on_request_and_listed(tiny_dataset: TinyDataset) -> None:
    data = tiny_dataset()
    _replace(data, BOXES, "/m/0car", "/m/0boat")
    _cut_image(data)
    assert _binning(data, "--on_bad_row", "drop", "--on_bad_image", "skip") == 0
    listed = (data.parent / "out" / "dropped.csv").read_text(encoding="utf-8").splitlines()
    assert listed[0] == "file,line,rule,value,rows"
    assert [line.split(",")[:2] for line in listed[1:]] == [[BOXES, "2"], ["train000", "0"]]


@pytest.mark.trains
def test_an_image_that_is_replaced_by_rubbish_after_caching_is_named_when_it_is_read(
    tiny_dataset: TinyDataset, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tiny_dataset()
    assert _binning(data) == 0
    image = data / "images" / "train001.jpg"
    assert cv2.imread(str(image)) is not None
    image.write_bytes(b"no longer a picture")
    small = {"image_size": 64, "num_buckets": 1, "batch_size": 4, "fpn_channels": 64, "head_depth": 1, "epochs": 1}
    given = {"data": data, "sampling": "uniform", **small, "track": "false", "output": data.parent / "out"}
    assert main(["train", *(word for name, value in given.items() for word in (f"--{name}", str(value)))]) == 2
    assert "train001.jpg: not a readable image" in capsys.readouterr().err


@pytest.mark.parametrize("command", sorted(set(COMMANDS) - {"train"}))
def test_only_train_is_run_by_several_processes(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([command]) == 2
    assert f"start {command} without torchrun" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["export", "--output"], ["predict", "--submission"]], ids=["export", "predict"])
def test_a_folder_where_a_file_is_to_be_written_is_refused_before_the_work(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, str(tmp_path), "--track", "false"]) == 2
    assert f"{tmp_path}: must be a file to write, but is a folder" in capsys.readouterr().err
    (tmp_path / "file").touch()
    given = [*words, str(tmp_path / "file" / "found.csv"), "--track", "false"]
    assert main([*given, *(["--output", str(tmp_path / "out")] if "predict" in words else [])]) == 2
    setting = words[1].removeprefix("--")
    assert f"{setting}={tmp_path / 'file'}: must be a folder, but it is a file" in capsys.readouterr().err


def test_a_working_folder_that_was_removed_is_a_message(
    tiny_dataset: TinyDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    removed = tmp_path / "removed"
    removed.mkdir()
    monkeypatch.chdir(removed)
    removed.rmdir()
    assert _binning(tiny_dataset(), "--output", "out") == 2
    assert "the working folder cannot be read (No such file or directory)" in capsys.readouterr().err


@pytest.mark.slow
def test_a_store_without_room_is_a_message(tiny_dataset: TinyDataset, tmp_path: Path) -> None:
    def limit() -> None:
        # What a full disk does to SQLite, without filling one.
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = subprocess.run(
        [sys.executable, "-m", "retinaflow", "binning", "--data", str(tiny_dataset())],
        cwd=tmp_path,
        env={**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path / 'mlflow.db'}"},
        preexec_fn=limit,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "error: the MLflow store sqlite:" in done.stderr
    assert "room on its disk" in done.stderr
    assert "Traceback" not in done.stderr
