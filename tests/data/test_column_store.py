"""Columns on disk: what damage is noticed, and what a process that was handed an index reads."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made_index import random_index

from retinaflow.data import cache
from retinaflow.data.cache import share_index
from retinaflow.data.column_store import open_columns, save_columns
from retinaflow.data.index import AnnotationIndex
from retinaflow.data.known_classes import with_absent_labels

LONG = np.random.default_rng(0).integers(0, 2**62, 40_000)
"""320 kB: five blocks of the checksum, the last one not full."""


def flip(path: Path, place: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


def test_columns_come_back_as_they_were(tmp_path: Path) -> None:
    columns = {"long": LONG, "empty": np.zeros((0, 4)), "words": np.array(["a", "ü"])}
    save_columns(tmp_path / "x", columns, {"note": "kept"})
    found, document = open_columns(tmp_path / "x")
    assert document["note"] == "kept"
    for name, column in columns.items():
        assert found[name].dtype == column.dtype
        np.testing.assert_array_equal(found[name], column)


def test_a_flipped_bit_anywhere_is_noticed(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    save_columns(folder, {"long": LONG, "short": np.arange(3)}, {"note": "kept"})
    rng = np.random.default_rng(1)
    for file in sorted(folder.iterdir()):
        for place in [0, file.stat().st_size - 1, *rng.integers(0, file.stat().st_size, 12).tolist()]:
            bit = int(rng.integers(0, 8))
            flip(file, place, bit)
            with pytest.raises(ValueError, match=r"damaged|not a saved index|index format"):
                open_columns(folder)
            flip(file, place, bit)
    open_columns(folder)


@pytest.mark.parametrize("damage", ["cut", "longer", "empty", "missing", "blocks exchanged", "a block of zeros"])
def test_other_damage_is_noticed(damage: str, tmp_path: Path) -> None:
    folder = tmp_path / "x"
    save_columns(folder, {"long": LONG}, {})
    file = folder / "long.npy"
    content = file.read_bytes()
    block = 1 << 16
    if damage == "missing":
        file.unlink()
    else:
        damaged = {
            "cut": content[:-8],
            # As if the last block, filled up with zeros, had been written in full.
            "longer": content + bytes(8),
            "empty": b"",
            "blocks exchanged": content[:block] + content[2 * block : 3 * block] + content[block : 2 * block]
            + content[3 * block :],
            "a block of zeros": content[:block] + bytes(block) + content[2 * block :],
        }[damage]  # fmt: skip
        file.write_bytes(damaged)
    with pytest.raises(ValueError, match="delete the folder"):
        open_columns(folder)


def test_an_opened_index_is_handed_on_as_its_path_and_not_checked_again(tmp_path: Path) -> None:
    index = random_index(3, images=500)
    index.save(tmp_path / "index")
    opened = AnnotationIndex.open(tmp_path / "index")
    given = pickle.dumps(opened)
    assert len(given) < 1000
    flip(tmp_path / "index" / "boxes.npy", 200, 0)
    assert pickle.loads(given).digest == index.digest
    with pytest.raises(ValueError, match="damaged"):
        AnnotationIndex.open(tmp_path / "index")


def test_the_digest_is_kept_with_an_index_and_made_anew_for_a_part_of_it(tmp_path: Path) -> None:
    index = random_index(4)
    index.save(tmp_path / "index")
    opened = AnnotationIndex.open(tmp_path / "index")
    assert opened.saved_digest == opened.digest == index.digest
    part, classes = np.arange(5), np.array([1, 3])
    assert opened.take(part).digest == index.take(part).digest != index.digest
    assert opened.with_classes(classes).digest == index.with_classes(classes).digest != index.digest
    assert with_absent_labels(opened).digest == with_absent_labels(index).digest != index.digest


def test_a_large_computed_index_is_shared_through_a_file_and_a_small_one_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RETINAFLOW_CACHE", str(tmp_path))
    index = random_index(5)
    assert share_index(index) is index
    monkeypatch.setattr(cache, "_SMALL", 1)
    # Of a process that was killed; no process has this number.
    left = tmp_path / "shared" / "999999999-x"
    left.mkdir(parents=True)
    shared = share_index(index)
    assert shared.path is not None
    assert shared.digest == index.digest
    assert len(pickle.dumps(shared)) < 1000
    assert share_index(shared) is shared
    assert not left.exists()
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    monkeypatch.setenv("RETINAFLOW_CACHE", str(tmp_path / "file"))
    assert share_index(index) is index, "no room for a file"


def test_an_opened_index_that_is_said_to_be_exhaustive_is_shared_from_its_own_file(tmp_path: Path) -> None:
    random_index(4).save(tmp_path / "index")
    opened = replace(AnnotationIndex.open(tmp_path / "index"), all_known=True)
    again = pickle.loads(pickle.dumps(opened))
    assert share_index(opened) is opened
    assert again.path == opened.path
    assert again.all_known
    assert again.digest == opened.digest != AnnotationIndex.open(tmp_path / "index").digest
