"""Sizes of image files: read once, kept as they are found, or believed from a table."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from made_index import TinyDataset, make_index
from PIL import Image

from retinaflow.data.cache import load_index
from retinaflow.data.id_columns import read_image_sizes
from retinaflow.data.image_sizes import SizeTable, read_sizes
from retinaflow.data.images import attach_files
from retinaflow.data.openimages import find_files
from retinaflow.data.tables import RowErrors


class Reader:
    """Pretends to read headers, and remembers of which files; a file's text is its size."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, path: Path) -> tuple[int, int] | str:
        self.asked.append(path.name)
        text = path.read_text(encoding="utf-8")
        height, _, width = text.partition("x")
        return (int(height), int(width)) if width else f"bad: {text}"


def files_in(folder: Path, *texts: str) -> list[str]:
    folder.mkdir(exist_ok=True)
    for number, text in enumerate(texts):
        (folder / f"{number}.jpg").write_text(text, encoding="utf-8")
    return [f"{number}.jpg" for number in range(len(texts))]


def read(folder: Path, names: Sequence[str], journal: Path | None) -> tuple[list[tuple[int, int] | str], list[str]]:
    reader = Reader()
    found = list(read_sizes(folder, names, reader, journal=journal))
    return found, sorted(reader.asked)


def test_sizes_come_in_the_order_of_the_files_with_and_without_a_journal(tmp_path: Path) -> None:
    texts = [f"{number + 1}x7" for number in range(600)]
    names = files_in(tmp_path / "images", *texts)
    for journal in (None, tmp_path / "deep" / "sizes.tsv"):
        found, asked = read(tmp_path / "images", names, journal)
        assert found == [(number + 1, 7) for number in range(600)]
        assert len(asked) == 600


def test_a_second_reading_asks_only_for_new_changed_and_faulty_files(tmp_path: Path) -> None:
    folder, journal = tmp_path / "images", tmp_path / "sizes.tsv"
    names = files_in(folder, "1x2", "3x4", "broken", "5x6")
    assert read(folder, names, journal)[0] == [(1, 2), (3, 4), "bad: broken", (5, 6)]
    (folder / "1.jpg").write_text("30x40", encoding="utf-8")
    (folder / "4.jpg").write_text("7x8", encoding="utf-8")
    found, asked = read(folder, [*names, "4.jpg"], journal)
    assert found == [(1, 2), (30, 40), "bad: broken", (5, 6), (7, 8)]
    assert asked == ["1.jpg", "2.jpg", "4.jpg"]
    assert read(folder, ["1.jpg"], journal) == ([(30, 40)], []), "the later line counts"


def test_a_reading_that_was_stopped_goes_on_where_it_was(tmp_path: Path) -> None:
    folder, journal = tmp_path / "images", tmp_path / "sizes.tsv"
    names = files_in(folder, *["1x2"] * 20)
    list(read_sizes(folder, names[:12], Reader(), journal=journal))
    # As a kill in the middle of a write leaves it.
    journal.write_bytes(journal.read_bytes()[:-5])
    assert read(folder, names, journal)[1] == sorted(names[11:])


@pytest.mark.parametrize("place", [0, 3, 8, -4])
def test_a_damaged_line_counts_for_nothing(place: int, tmp_path: Path) -> None:
    folder, journal = tmp_path / "images", tmp_path / "sizes.tsv"
    names = files_in(folder, "1x2")
    read(folder, names, journal)
    content = bytearray(journal.read_bytes())
    content[place] ^= 1
    journal.write_bytes(content)
    assert read(folder, names, journal) == ([(1, 2)], ["0.jpg"])


def test_a_journal_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    names = files_in(folder, "1x2")
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    assert read(folder, names, tmp_path / "file" / "sizes.tsv")[0] == [(1, 2)]


def test_given_sizes_are_found_by_id_and_0_where_there_is_none() -> None:
    table = SizeTable(np.array(["c", "a"]), np.array([[3, 4], [1, 2]], dtype=np.int32))
    assert table.look_up(np.array(["a", "b", "c", "d"])).tolist() == [[1, 2], [0, 0], [3, 4], [0, 0]]
    none = SizeTable(np.zeros(0, dtype="<U1"), np.zeros((0, 2), dtype=np.int32))
    assert none.look_up(np.array(["a"])).tolist() == [[0, 0]]


def test_files_in_the_table_are_not_opened_and_the_others_are(tmp_path: Path) -> None:
    for name in ("i0001", "i0002"):
        Image.new("RGB", (5, 9)).save(tmp_path / f"{name}.png")
    (tmp_path / "i0000.png").write_bytes(b"never opened")
    index = make_index([[0]] * 4, classes=1)
    table = SizeTable(np.array(["i0000", "i0002", "i0003"]), np.array([[1, 2], [3, 4], [5, 6]], dtype=np.int32))
    complete, bad = attach_files(index, [tmp_path], given=table, on_bad_image="skip")
    assert complete.sizes.tolist() == [[1, 2], [9, 5], [3, 4]]
    assert [(image.image_id, image.reason) for image in bad] == [("i0003", "no file")]


def test_the_table_gives_width_before_height_and_the_index_height_before_width(
    tiny_dataset: TinyDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RETINAFLOW_CACHE", str(tmp_path / "cache"))
    folder = tiny_dataset()
    table = tmp_path / "sizes.csv"
    table.write_text("ImageID,Width,Height\ntrain001,640,480\n", encoding="utf-8")
    files = find_files(folder, ["train"])
    given = load_index(files, [folder / "images"], image_sizes=table, report=lambda text: None).index
    assert given.sizes[:3].tolist() == [[64, 96], [480, 640], [80, 80]]
    read_ones = load_index(files, [folder / "images"], report=lambda text: None).index
    assert read_ones.sizes[:3].tolist() == [[64, 96], [96, 64], [80, 80]], "another index than the one with the table"


BAD_SIZES = {
    "0": ("a,0,5", "sizes.csv line 3: sizes must be whole numbers from 1 to 65535, but got Width=0.0, Height=5.0"),
    "half": ("a,5,2.5", "sizes.csv line 3: sizes must be whole numbers from 1 to 65535, but got Width=5.0, Height=2.5"),
    "text": ("a,5,tall", "sizes.csv line 3: Height must be a number, but got Height=tall"),
    "twice": ("b,5,5", "sizes.csv line 3: an image must have one size, but got ImageID=b"),
    "path": ("a/b,5,5", "sizes.csv line 3: ImageID must be a plain file name, but got ImageID=a/b"),
}


@pytest.mark.parametrize("name", BAD_SIZES)
def test_a_faulty_row_of_the_table_is_named(name: str, tmp_path: Path) -> None:
    row, message = BAD_SIZES[name]
    path = tmp_path / "sizes.csv"
    path.write_text(f"ImageID,Width,Height\nb,1,2\n{row}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(message)):
        read_image_sizes(path, RowErrors())
    ids, sizes = read_image_sizes(path, RowErrors("drop"))
    assert (ids.tolist(), sizes.tolist()) == (["b"], [[2, 1]])
