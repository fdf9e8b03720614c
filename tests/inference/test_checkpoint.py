"""Checkpoints: what is read is what was written, a file is whole or refused, and reading runs no code."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from retinaflow.detector.network import RetinaNet
from retinaflow.errors import DataError
from retinaflow.inference.checkpoint import Checkpoint, checkpoint_of, load_checkpoint, on_device, save_checkpoint


@pytest.fixture
def checkpoint(lab: Any) -> Checkpoint:
    model = lab.model(seed=3)
    return Checkpoint(
        network=lab.network,
        state=model.state_dict(),
        taxonomy=lab.index.taxonomy,
        bins=lab.bins,
        buckets=lab.buckets,
        parents="expand",
        settings={"lr": 0.001, "train_splits": ["train"], "eval_ids": None},
        data_digest="abc",
        epoch=4,
        progress={"optimizer": {"state": {0: torch.ones(2)}}, "best": 0.5},
    )


def test_what_is_read_is_what_was_written(checkpoint: Checkpoint, tmp_path: Path) -> None:
    save_checkpoint(checkpoint, tmp_path / "new folder" / "a.pt")
    read = load_checkpoint(tmp_path / "new folder" / "a.pt")
    for name in ("network", "taxonomy", "buckets", "parents", "settings", "data_digest", "epoch"):
        assert getattr(read, name) == getattr(checkpoint, name), name
    for name in ("images_per_class", "boxes_per_class", "edges", "bin_of_class"):
        assert np.array_equal(getattr(read.bins, name), getattr(checkpoint.bins, name)), name
    assert read.state.keys() == checkpoint.state.keys()
    assert all(torch.equal(read.state[name], checkpoint.state[name]) for name in read.state)
    assert read.progress is not None
    assert read.progress["best"] == 0.5
    assert torch.equal(read.progress["optimizer"]["state"][0], torch.ones(2))


def test_a_checkpoint_for_use_holds_no_progress(checkpoint: Checkpoint, tmp_path: Path) -> None:
    save_checkpoint(replace(checkpoint, progress=None), tmp_path / "a.pt")
    assert load_checkpoint(tmp_path / "a.pt").progress is None


def test_the_detector_built_from_a_checkpoint_is_the_one_that_was_saved(checkpoint: Checkpoint, tmp_path: Path) -> None:
    save_checkpoint(checkpoint, tmp_path / "a.pt")
    built = load_checkpoint(tmp_path / "a.pt").build(torch.device("cpu"))
    assert not built.training
    original = on_device(RetinaNet(checkpoint.network, len(checkpoint.taxonomy), seed=9), torch.device("cpu"))
    original.load_state_dict(checkpoint.state)
    images = torch.arange(3 * 32 * 64, dtype=torch.int64).reshape(1, 3, 32, 64).remainder(256).to(torch.uint8)
    with torch.inference_mode():
        ours, theirs = built(images), original.eval()(images)
    assert torch.equal(ours.class_logits, theirs.class_logits)
    assert torch.equal(ours.box_deltas, theirs.box_deltas)


def test_a_failure_while_writing_leaves_the_old_file_and_no_rubbish(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "checkpoints" / "last.pt"
    save_checkpoint(checkpoint, path)
    before = path.read_bytes()

    def full_disk(document: Any, file: Any) -> None:
        del document
        file.write(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(DataError, match="no space"):
        save_checkpoint(replace(checkpoint, epoch=5), path)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["last.pt"]


WRITER = """
import resource, signal, sys, torch
from pathlib import Path
from retinaflow.errors import DataError
from retinaflow.inference.checkpoint import load_checkpoint, save_checkpoint
path = Path(sys.argv[1])
checkpoint = load_checkpoint(path)
# The system refuses to write more than 1 MiB into a file, as a full disk would.
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    save_checkpoint(checkpoint, path)
except DataError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.slow
def test_a_disk_that_is_really_full_is_named_and_leaves_the_old_file(checkpoint: Checkpoint, tmp_path: Path) -> None:
    pytest.importorskip("resource")
    path = tmp_path / "checkpoints" / "last.pt"
    save_checkpoint(checkpoint, path)
    before = path.read_bytes()
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", WRITER, str(path)], env=environment, capture_output=True, text=True, check=True
    )
    assert "last.pt: the checkpoint cannot be written" in done.stdout
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["last.pt"]


def test_what_a_killed_process_left_behind_is_overwritten(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / ".last.pt.partial").write_bytes(b"half of it")
    save_checkpoint(checkpoint, folder / "last.pt")
    assert [file.name for file in folder.iterdir()] == ["last.pt"]


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip_a_bit_of_a_weight(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda item: item.file_size)
    data = bytearray(path.read_bytes())
    data[largest.header_offset + largest.file_size // 2] ^= 1
    path.write_bytes(bytes(data))


DAMAGE = {
    "cut short": _cut,
    "one bit of a weight": _flip_a_bit_of_a_weight,
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("hello"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_refused_by_name(checkpoint: Checkpoint, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(checkpoint, path)
    DAMAGE[damage](path)
    with pytest.raises(ValueError, match=r"last\.pt: not a readable checkpoint: ."):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "document",
    [
        pytest.param({"weight": torch.ones(1)}, id="weights alone"),
        pytest.param([1, 2], id="a list"),
        pytest.param({"format": 1}, id="somebody else's format 1"),
    ],
)
def test_a_file_of_another_kind_is_refused(document: Any, tmp_path: Path) -> None:
    torch.save(document, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt: not a retinaflow checkpoint of format 1"):
        load_checkpoint(tmp_path / "other.pt")


def test_a_later_format_is_named_with_the_one_that_is_needed(tmp_path: Path) -> None:
    torch.save({"format": 99, "network": {}}, tmp_path / "later.pt")
    with pytest.raises(DataError, match=r"later\.pt: .* format 1 is needed, but this one has format 99; was it"):
        load_checkpoint(tmp_path / "later.pt")


def _document(checkpoint: Checkpoint, folder: Path) -> dict[str, Any]:
    """What a file of the checkpoint holds, with one tensor alone."""
    small = replace(checkpoint, state={"head.weight": torch.ones(3)}, progress={"open": {}, "run_id": "a"})
    save_checkpoint(small, folder / "small.pt")
    document: dict[str, Any] = torch.load(folder / "small.pt", weights_only=True)
    assert checkpoint_of(document, folder / "small.pt").digest == small.digest
    return document


_OTHERS = {
    "nothing": None,
    "a list": [1],
    "a text": "x",
    "a number": -1,
    "a mapping": {"x": 1},
    "a tensor": torch.ones(2),
}


def _changed(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The document with each entry, and each entry one level below, removed or of another kind."""
    for path in [(name,) for name in document] + [(name, below) for name in _NESTED for below in document[name]]:
        for what, value in {"missing": None, **_OTHERS}.items():
            changed = copy.deepcopy(document)
            *above, last = path
            inside = changed[above[0]] if above else changed
            if what == "missing":
                del inside[last]
            else:
                inside[last] = value
            yield f"{'.'.join(path)} {what}", changed


_NESTED = ("network", "taxonomy", "bins")


def test_another_structure_is_refused_with_the_name_of_the_file_and_never_a_bug(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    path, refused, read = tmp_path / "other.pt", [], []
    for name, document in _changed(_document(checkpoint, tmp_path)):
        try:
            # What is read is used: nothing is of a kind that fails later.
            assert len(checkpoint_of(document, path).digest) == 64
            read.append(name)
        except DataError as error:
            refused.append(str(error))
    assert len(refused) > 150
    assert all("other.pt: " in message and len(message) < 400 for message in refused)
    # What every version may have, or does not look at.
    free = ("settings a mapping", "settings.", "progress", "parents a text", "data_digest a text", "network.", "bins.")
    free += ("taxonomy.nodes a text", "taxonomy.nodes a mapping")
    assert [name for name in read if not name.startswith(free)] == []


BAD_WEIGHTS = {
    "not a number": (torch.tensor([1.0, float("nan")]), "head.weight has values that are not finite; did its training"),
    "infinity": (torch.tensor([float("inf")], dtype=torch.float16), "head.weight has values that are not finite"),
    "more values than the file has": (torch.ones(1).expand(1_000_000), "a tensor must hold each of its values"),
    "sparse": (torch.ones(3).to_sparse(), "a tensor must hold its values"),
    "no tensor": ([1.0], "the weights must be tensors by name"),
}


@pytest.mark.parametrize("fault", BAD_WEIGHTS)
def test_weights_that_detect_nothing_are_refused_when_they_are_read(
    checkpoint: Checkpoint, tmp_path: Path, fault: str
) -> None:
    value, message = BAD_WEIGHTS[fault]
    document = _document(checkpoint, tmp_path)
    document["state"]["head.weight"] = value
    with pytest.raises(DataError, match=message):
        checkpoint_of(document, tmp_path / "a.pt")


def test_weights_of_complex_numbers_are_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    document = _document(checkpoint, tmp_path)
    name = next(iter(document["state"]))
    document["state"][name] = document["state"][name].to(torch.complex64)
    with pytest.raises(DataError, match="the weights must be real numbers"):
        checkpoint_of(document, tmp_path / "a.pt")


def test_weights_of_another_network_are_refused_by_name(checkpoint: Checkpoint, tmp_path: Path) -> None:
    wider = replace(checkpoint, network=checkpoint.network.model_copy(update={"fpn_channels": 128}))
    save_checkpoint(replace(wider, progress=None), tmp_path / "a.pt")
    with pytest.raises(DataError, match=r"a\.pt: the weights are those of another network: .*size mismatch"):
        load_checkpoint(tmp_path / "a.pt").build(torch.device("cpu"))


def test_a_file_that_expands_is_refused_before_it_does(checkpoint: Checkpoint, tmp_path: Path) -> None:
    document = _document(checkpoint, tmp_path)
    many: list[Any] = ["x"]
    for _ in range(30):
        many = [many, many]
    document["settings"]["data"] = many
    with pytest.raises(DataError, match="must have at most 3,000,000 values") as caught:
        checkpoint_of(document, tmp_path / "a.pt")
    assert len(str(caught.value)) < 300
    document["settings"]["data"] = "x" * 2_000_000
    with pytest.raises(DataError, match="a text must have at most"):
        checkpoint_of(document, tmp_path / "a.pt")
    torch.save({"format": 1, "network": {}, "state": {"a": torch.zeros(1_000_000)}}, tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as plain,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for entry in plain.infolist():
            bomb.writestr(entry.filename, plain.read(entry))
    with pytest.raises(DataError, match=r"its entries may have [0-9,]+ bytes in all, but have 4,"):
        load_checkpoint(tmp_path / "bomb.pt")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.pt: no such checkpoint file"):
        load_checkpoint(tmp_path / "none.pt")


class _Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


def test_reading_a_checkpoint_runs_no_code_from_it(tmp_path: Path) -> None:
    torch.save({"format": 1, "settings": _Malicious(tmp_path / "was here")}, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match=r"bad\.pt: not a readable checkpoint"):
        load_checkpoint(tmp_path / "bad.pt")
    assert not (tmp_path / "was here").exists()
