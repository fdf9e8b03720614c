"""Searches for image files: links to folders, and folders that cannot be used."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retinaflow.data.image_folders import images_under, locate_files
from retinaflow.errors import DataError


def write(path: Path) -> None:
    """A file, with its folder; its content is not read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")


def test_links_to_folders_are_followed_once_each_and_circles_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, disk = tmp_path / "images", tmp_path / "disk"
    for name in ("images/a.jpg", "images/own/b.jpg", "disk/one/c.jpg", "disk/two/deep/d.jpg"):
        write(tmp_path / name)
    for link, to in (
        ("part1", disk / "one"),
        ("part2", disk / "two"),
        ("again", disk / "one"),
        ("0own", images / "own"),
    ):
        (images / link).symlink_to(to)
    (disk / "two" / "back").symlink_to(images)
    (disk / "two" / "on").symlink_to(disk / "one")
    (images / "up").symlink_to(tmp_path)
    (images / "circle").symlink_to(images / "circle")
    there = ["a.jpg", "own/b.jpg", "again/c.jpg", "part2/deep/d.jpg"]
    assert [str(path.relative_to(images)) for path in images_under(images)] == there
    assert locate_files(np.array(list("abcd")), [images]).files.tolist() == there
    assert "left out" not in capsys.readouterr().out


@pytest.mark.parametrize("name", [b"camera \xe4/a.jpg", b"\xe4/b/a.jpg"])
def test_a_folder_whose_name_is_not_utf8_is_named(name: bytes, tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
    write(path)
    for search in (lambda: list(images_under(tmp_path)), lambda: locate_files(np.array(["a"]), [tmp_path])):
        with pytest.raises(DataError, match=r"xe4.*a file name must be UTF-8; rename the file or its folder"):
            search()


def test_a_folder_that_may_not_be_read_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "a.jpg")
    (tmp_path / "lost+found").mkdir()

    def refuse(path: Path, scandir: Callable[[Path], Any] = os.scandir) -> Any:
        if path.name == "lost+found":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    # Permissions do not hold for root.
    monkeypatch.setattr("os.scandir", refuse)
    assert [path.name for path in images_under(tmp_path)] == ["a.jpg"]
    assert "lost+found: the folder is left out, as it cannot be read: Permission denied" in capsys.readouterr().out
