"""What a folder holds instead of published annotations, and the command that converts it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from retinaflow.data.formats.recognition import conversion_hint

FOLDERS = {
    "COCO JSON": {"annotations/instances_train.json": json.dumps({"images": [], "annotations": [], "categories": []})},
    "Pascal VOC XML": {"Annotations/a.xml": "<annotation/>"},
    "YOLO labels": {"data.yaml": "train: images\nnames: [cat]\n"},
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_of_another_layout_is_named_with_the_command_that_converts_it(tmp_path: Path, name: str) -> None:
    for path, text in FOLDERS[name].items():
        (tmp_path / "set" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / path).write_text(text)
    hint = conversion_hint(tmp_path / "set")
    assert hint is not None
    assert hint.startswith(f"found {name} in ")
    assert f"retinaflow convert --data {tmp_path / 'set'} --output {tmp_path / 'set-converted'}" in hint


def test_a_folder_of_nothing_known_or_of_two_that_contradict_has_no_hint(tmp_path: Path) -> None:
    assert conversion_hint(tmp_path) is None
    assert conversion_hint(tmp_path / "missing") is None
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text('{"images": [], "annotations": [], "categories": []}')
    assert conversion_hint(tmp_path) is None
