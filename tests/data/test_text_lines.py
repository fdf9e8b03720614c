"""Lists of names in text files: a file that is not UTF-8 is an error of the user that names the file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from retinaflow.data.class_groups import keys_of_file
from retinaflow.data.formats.folders import ReadableFolders
from retinaflow.data.formats.yolo_files import SplitFiles
from retinaflow.data.openimages import read_image_ids
from retinaflow.data.text_lines import read_lines
from retinaflow.errors import DataError


def yolo_files(folder: Path) -> SplitFiles:
    return SplitFiles(folder, ReadableFolders(folder))


READERS: dict[str, Callable[[Path], object]] = {
    "lines": read_lines,
    "class group": lambda path: keys_of_file(str(path)),
    "image ids": read_image_ids,
    "list of YOLO images": lambda path: yolo_files(path.parent).add_list("train", path, path.parent),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_a_list_that_is_not_utf_8_is_refused_with_its_path(read: Callable[[Path], object], tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes("Stra\xdfe\n".encode("latin-1"))
    with pytest.raises(
        DataError,
        match=r"list\.txt line 1: .* but the byte 0xdf is not; save it as UTF-8",
    ):
        read(path)


def test_lines_come_without_their_ends_and_without_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbfcat\r\n\ndog")
    assert read_lines(tmp_path / "list.txt") == ["cat", "", "dog"]
