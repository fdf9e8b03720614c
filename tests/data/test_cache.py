"""The cache of built indexes: when it is used, when it is not, and that damage is noticed and said."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from made_index import TinyDataset, boxes_of, labels_of
from PIL import Image

from retinaflow.data.cache import LoadedIndex, cache_folder, load_index
from retinaflow.data.images import UnreadableImageError, decode_sized
from retinaflow.data.openimages import find_files
from retinaflow.errors import DataError
from retinaflow.settings.data_settings import OnBadImage, OnBadRow


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RETINAFLOW_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def load(
    folder: Path, *, on_bad_row: OnBadRow = "stop", on_bad_image: OnBadImage = "stop", with_images: bool = True
) -> tuple[LoadedIndex, list[str]]:
    said: list[str] = []
    loaded = load_index(
        find_files(folder, ["train"]),
        [folder / "images"] if with_images else [],
        on_bad_row=on_bad_row,
        on_bad_image=on_bad_image,
        report=said.append,
    )
    return loaded, said


def was_built(said: list[str]) -> bool:
    return any(line.startswith("train-annotations-bbox.csv: ") for line in said)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def test_a_second_start_reads_neither_rows_nor_image_headers(
    tiny_dataset: TinyDataset, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_dataset()
    first, said = load(folder)
    assert was_built(said)
    monkeypatch.setattr("retinaflow.data.cache.read_annotations", None)
    monkeypatch.setattr("retinaflow.data.cache.attach_files", None)
    second, said = load(folder)
    assert said == []
    assert second.index.digest == first.index.digest
    assert second.index.file_of(0) == folder / "images" / "train000.jpg"
    assert second.index.sizes[:4].tolist() == [[64, 96], [96, 64], [80, 80], [48, 128]]
    assert second.dropped.equals(first.dropped)
    assert list(second.dropped.columns) == ["file", "line", "rule", "value", "rows"]
    assert cache.is_dir()


@pytest.mark.parametrize(
    "change", ["boxes", "labels", "classes", "hierarchy", "an image more", "rows dropped", "no images"]
)
def test_any_change_of_the_inputs_builds_the_index_anew(change: str, tiny_dataset: TinyDataset, cache: Path) -> None:
    folder = tiny_dataset()
    load(folder)
    if change == "boxes":
        edit(folder / "train-annotations-bbox.csv", ",xclick,", ",drawn,")
    elif change == "labels":
        edit(folder / "train-annotations-human-imagelabels.csv", ",verification,", ",crowdsource,")
    elif change == "classes":
        edit(folder / "class-descriptions.csv", "Bus", "Van")
    elif change == "hierarchy":
        (folder / "bbox_labels_hierarchy.json").unlink()
    elif change == "an image more":
        (folder / "images" / "more.jpg").write_bytes(b"")
    _, said = load(folder, on_bad_row="drop" if change == "rows dropped" else "stop", with_images=change != "no images")
    assert was_built(said)
    assert len(list((cache / "index").iterdir())) == 2


def test_a_file_of_the_same_size_written_later_is_read_anew(tiny_dataset: TinyDataset, cache: Path) -> None:
    folder = tiny_dataset()
    load(folder)
    path = folder / "train-annotations-bbox.csv"
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000))
    assert was_built(load(folder)[1])
    assert cache.is_dir()


@pytest.mark.parametrize("name", ["boxes.npy", "image_ids.npy", "index.json"])
def test_a_flipped_bit_in_the_cache_is_said_and_the_index_rebuilt(
    name: str, tiny_dataset: TinyDataset, cache: Path
) -> None:
    folder = tiny_dataset()
    first, _ = load(folder)
    before = boxes_of(first.index), labels_of(first.index)
    (place,) = (cache / "index").iterdir()
    content = bytearray((place / name).read_bytes())
    content[len(content) // 2] ^= 4
    (place / name).write_bytes(content)
    second, said = load(folder)
    assert said[0].startswith("the cached index is rebuilt: ")
    assert was_built(said)
    assert (boxes_of(second.index), labels_of(second.index)) == before
    assert load(folder)[1] == [], "the rebuilt index is whole"


def test_what_was_left_out_is_remembered_with_the_index(tiny_dataset: TinyDataset, cache: Path) -> None:
    folder = tiny_dataset()
    edit(folder / "train-annotations-bbox.csv", "/m/0bus", "/m/0tram")
    (folder / "images" / "train003.jpg").unlink()
    (folder / "images" / "train001.jpg").write_bytes(b"no image")
    for expected_to_build in (True, False):
        loaded, said = load(folder, on_bad_row="drop", on_bad_image="skip")
        assert was_built(said) == expected_to_build
        records = loaded.dropped.to_dict("records")
        assert [(row["file"], row["value"]) for row in records] == [
            ("train-annotations-bbox.csv", "LabelName=/m/0tram"),
            ("train003", "no file"),
            ("train001", "not an image file"),
        ]
        assert not np.isin(["train001", "train003"], loaded.index.image_ids).any()
    assert cache.is_dir()


@pytest.mark.usefixtures("cache")
def test_an_image_that_is_added_below_the_folder_of_images_is_found_at_the_next_start(
    tiny_dataset: TinyDataset,
) -> None:
    folder = tiny_dataset()
    part, away = folder / "images" / "part" / "deeper", folder / "train003.jpg"
    part.mkdir(parents=True)
    (folder / "images" / "train003.jpg").rename(away)
    assert "train003" not in load(folder, on_bad_image="skip")[0].index.image_ids
    assert not was_built(load(folder, on_bad_image="skip")[1])
    away.rename(part / "train003.jpg")
    assert "train003" in load(folder, on_bad_image="skip")[0].index.image_ids
    assert not was_built(load(folder, on_bad_image="skip")[1])


@pytest.mark.usefixtures("cache")
def test_an_image_that_is_moved_below_the_folder_of_images_is_found_where_it_is(tiny_dataset: TinyDataset) -> None:
    folder = tiny_dataset()
    # The second part is elsewhere, behind a link.
    first, second, linked = folder / "images" / "p1", folder / "elsewhere", folder / "images" / "p2"
    first.mkdir()
    second.mkdir()
    linked.symlink_to(second)
    (folder / "images" / "train000.jpg").rename(first / "train000.jpg")
    assert load(folder)[0].index.file_of(0) == first / "train000.jpg"
    (first / "train000.jpg").rename(second / "train000.jpg")
    assert load(folder)[0].index.file_of(0) == linked / "train000.jpg"
    second.rename(folder / "third")
    with pytest.raises(DataError, match="train000 has none"):
        load(folder)


@pytest.mark.usefixtures("cache")
def test_images_of_an_export_that_are_added_later_join_the_index(tiny_dataset: TinyDataset) -> None:
    # FiftyOne's tables name all images of the split, of which some are in train/data.
    folder = tiny_dataset()
    (folder / "train" / "labels").mkdir(parents=True)
    (folder / "train-annotations-bbox.csv").rename(folder / "train" / "labels" / "detections.csv")
    (folder / "images").rename(folder / "train" / "data")
    (folder / "train" / "data" / "train003.jpg").rename(folder / "train003.jpg")

    def count() -> int:
        files = find_files(folder, ["train"])
        return len(load_index(files, [folder / "train"], report=lambda text: None).index)

    assert count() == 11
    (folder / "train003.jpg").rename(folder / "train" / "data" / "train003.jpg")
    assert count() == 12


@pytest.mark.usefixtures("cache")
def test_an_image_overwritten_in_place_is_noticed_when_it_is_decoded_and_read_anew_after_a_touch(
    tiny_dataset: TinyDataset,
) -> None:
    folder = tiny_dataset()
    index = load(folder)[0].index
    path = index.file_of(0)
    Image.new("RGB", (200, 50)).save(path)
    with pytest.raises(
        UnreadableImageError, match=r"train000\.jpg: the image is 200 x 50 pixels, but 96 x 64 is its size"
    ):
        decode_sized(load(folder)[0].index, 0, longest=96)
    status = path.parent.stat()
    os.utime(path.parent, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000))
    index = load(folder)[0].index
    assert index.sizes[0].tolist() == [50, 200]
    assert decode_sized(index, 0, longest=100).shape == (25, 100, 3)


def test_an_index_that_cannot_be_cached_is_still_loaded_and_that_is_said(
    tiny_dataset: TinyDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    monkeypatch.setenv("RETINAFLOW_CACHE", str(tmp_path / "file"))
    loaded, said = load(tiny_dataset())
    assert len(loaded.index) == 12
    assert said[-1].startswith("the index is not cached: ")


def test_the_cache_folder_is_named_by_the_environment_or_lies_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETINAFLOW_CACHE", "/x/y")
    assert cache_folder() == Path("/x/y")
    monkeypatch.delenv("RETINAFLOW_CACHE")
    monkeypatch.setenv("HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/.cache/retinaflow")
