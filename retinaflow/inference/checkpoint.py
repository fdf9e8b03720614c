"""Checkpoints: one file that holds a detector, its settings and, during a training, everything needed to resume it.

The file is written beside the old one, flushed to disk and renamed, so it is always whole, whatever ends the process
or fills the disk in between. Every entry of the file has a checksum (CRC-32), which is verified when it is read.
It is read with ``weights_only=True``: a checkpoint holds tensors and plain values and cannot run code.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retinaflow.data.batching import AspectBuckets
from retinaflow.data.frequency_bins import ClassBins
from retinaflow.detector.network import RetinaNet
from retinaflow.errors import DataError, first_line
from retinaflow.files import atomic_file
from retinaflow.settings.resolve import current_names, resolve
from retinaflow.settings.training_settings import NetworkSettings
from retinaflow.taxonomy import Taxonomy

FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """A detector with its classes, bins and input shapes.

    ``settings``: the resolved configuration of the run. ``epoch``: epochs done. ``progress``: optimizer and best
    value, None in a checkpoint that is only for use.
    """

    network: NetworkSettings
    state: dict[str, Tensor]
    taxonomy: Taxonomy
    bins: ClassBins
    buckets: AspectBuckets
    parents: str
    settings: dict[str, Any]
    data_digest: str
    epoch: int
    progress: dict[str, Any] | None = None

    @property
    def digest(self) -> str:
        """sha256 of what decides detections: network, weights, classes and input shapes. Equal means equal models."""
        plain = [_network_document(self), self.taxonomy.to_document(), self.buckets.shapes, self.parents]
        hasher = hashlib.sha256(json.dumps(plain, sort_keys=True).encode())
        for name, value in sorted(self.state.items()):
            hasher.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            hasher.update(value.contiguous().numpy().tobytes())
        return hasher.hexdigest()

    def build(self, device: torch.device) -> RetinaNet:
        """The detector on a device, ready for inference."""
        model = RetinaNet(self.network, len(self.taxonomy), seed=0)
        model.load_state_dict(self.state)
        return on_device(model, device).eval()


def on_device(model: RetinaNet, device: torch.device) -> RetinaNet:
    """The model on a device in the channels-last memory order, the loader's own (``benchmarks/memory_format.py``)."""
    return model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def save_checkpoint(checkpoint: Checkpoint, path: Path) -> None:
    """Write a checkpoint atomically. Raises DataError when it cannot be written, which leaves the file as it was."""
    document = {
        "format": FORMAT,
        "network": _network_document(checkpoint),
        "state": checkpoint.state,
        "taxonomy": checkpoint.taxonomy.to_document(),
        "bins": checkpoint.bins.to_document(checkpoint.taxonomy.ids),
        "buckets": [list(shape) for shape in checkpoint.buckets.shapes],
        **{name: getattr(checkpoint, name) for name in _PLAIN},
    }
    try:
        with atomic_file(path) as partial, partial.open("wb") as file:
            torch.save(document, file)
    except (RuntimeError, OSError) as error:
        # The RuntimeError that torch makes of a failed write names neither the file nor the reason.
        raise DataError(f"{path}: the checkpoint cannot be written ({first_line(error)}); is the disk full?") from None


_PLAIN = ("parents", "settings", "data_digest", "epoch", "progress")


def _network_document(checkpoint: Checkpoint) -> dict[str, Any]:
    """The network as it stands in the file, and in the digest: by names that do not change with those of settings."""
    network = checkpoint.network
    return {
        "backbone": network.backbone,
        "num_classes": len(checkpoint.taxonomy),
        "anchor_scale": network.anchor_scale,
        "trainable_layers": network.trainable_layers,
        "norm": "frozen" if network.batch_norm == "frozen" else "batch",
        "head_norm": network.head_norm,
        "head_depth": network.head_depth,
        "fpn_channels": network.fpn_channels,
        "p6_from": network.p6_from,
    }


def _network_of(document: dict[str, Any]) -> NetworkSettings:
    own = {name: value for name, value in document.items() if name not in ("num_classes", "norm")}
    return resolve(NetworkSettings, {**own, "batch_norm": "frozen" if document["norm"] == "frozen" else "train"})


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint to the CPU. Raises DataError for a file that does not exist or is not a whole checkpoint."""
    if not path.is_file():
        raise DataError(f"{path}: no such checkpoint file")
    try:
        # torch reads a damaged tensor without an error; the archive has checksums.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"{damaged} is damaged")
        document = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError, zipfile.BadZipFile, KeyError) as error:
        raise DataError(f"{path}: not a readable checkpoint: {first_line(error)}") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT or "network" not in document:
        raise DataError(f"{path}: not a retinaflow checkpoint of format {FORMAT}")
    return Checkpoint(
        network=_network_of(document["network"]),
        state=document["state"],
        taxonomy=Taxonomy.from_document(document["taxonomy"]),
        bins=ClassBins.from_document(document["bins"]),
        buckets=AspectBuckets(tuple((height, width) for height, width in document["buckets"])),
        **{name: document[name] for name in _PLAIN} | {"settings": current_names(document["settings"])},
    )
