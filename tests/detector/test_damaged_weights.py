"""Files of weights that are damaged, foreign or hold no numbers are named, and never leave a network half filled."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.models import resnet18

from retinaflow.detector.network import RetinaNet
from retinaflow.detector.weights import load_weights
from retinaflow.errors import DataError
from retinaflow.settings.training_settings import NetworkSettings

TINY = {"backbone": "resnet18", "fpn_channels": 64, "head_depth": 1}


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    """Of a classifier, as published."""
    values: dict[str, torch.Tensor] = resnet18(weights=None).state_dict()
    return values


def _flip_a_bit(path: Path, state: dict[str, Any]) -> None:
    torch.save(state, path)
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    data = bytearray(path.read_bytes())
    data[largest.header_offset + largest.file_size // 2] ^= 1
    path.write_bytes(bytes(data))


def _with(value: Any) -> Callable[[Path, dict[str, Any]], None]:
    return lambda path, state: torch.save({**state, "layer1.0.conv1.weight": value}, path)


def _compressed(path: Path, state: dict[str, Any]) -> None:
    torch.save(state, path.with_suffix(".plain"))
    with zipfile.ZipFile(path.with_suffix(".plain")) as plain, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for entry in plain.infolist():
            file.writestr(entry.filename, bytes(entry.file_size))


SHAPE = (64, 64, 3, 3)
DAMAGE: dict[str, tuple[Callable[[Path, dict[str, Any]], None], str]] = {
    "one bit": (_flip_a_bit, "is damaged"),
    "cut short": (lambda path, state: path.write_bytes(pickle.dumps(state)[:5000]), "must be a state dict that"),
    "a zip that expands": (_compressed, "its entries may have"),
    "another zip": (lambda path, state: zipfile.ZipFile(path, "w").close(), "must be a state dict that"),
    "random bytes": (lambda path, state: path.write_bytes(bytes(range(1, 256)) * 40), "must be a state dict that"),
    "a pickle of code": (lambda path, state: path.write_bytes(pickle.dumps(Path)), "must be a state dict that"),
    "not a number": (_with(torch.full(SHAPE, torch.nan)), "weights must be finite numbers, but those of .*conv1"),
    "whole numbers": (_with(torch.ones(SHAPE, dtype=torch.int8)), r"those of .*conv1.weight are not \(torch.int8\)"),
    "complex": (_with(torch.ones(SHAPE, dtype=torch.complex64)), "weights must be finite numbers"),
    "texts": (_with("x"), "must hold a state dict"),
    "a mapping of nothing": (lambda path, state: torch.save({}, path), "must hold a state dict"),
}


@pytest.mark.parametrize("fault", DAMAGE)
def test_weights_that_are_none_are_refused_by_name(fault: str, state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    damage, message = DAMAGE[fault]
    path = tmp_path / "bad.pth"
    damage(path, state)
    model = RetinaNet(NetworkSettings(**TINY), 2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(DataError, match=message) as caught:
        load_weights(model, str(path))
    assert "bad.pth" in str(caught.value)
    assert len(str(caught.value)) < 700
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_safetensors_that_are_damaged_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    pytest.importorskip("safetensors")
    for content in (b"", b"\xff" * 100, (1 << 40).to_bytes(8, "little") + b"{}"):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"bad\.safetensors must be a state dict"):
            load_weights(RetinaNet(NetworkSettings(**TINY), 2), str(path))


def test_a_checkpoint_of_this_program_gives_its_weights(tmp_path: Path) -> None:
    trained = RetinaNet(NetworkSettings(**TINY), 2, seed=1)
    torch.save({"format": 1, "state": trained.state_dict()}, tmp_path / "best.pt")
    model = RetinaNet(NetworkSettings(**TINY), 3, seed=2)
    report = load_weights(model, str(tmp_path / "best.pt"))
    assert len(report.replaced) == 2, "the class layer, of another number of classes"
    name = "backbone.body.layer1.0.conv1.weight"
    assert torch.equal(model.state_dict()[name], trained.state_dict()[name])
