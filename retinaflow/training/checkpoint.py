"""Checkpoints: one file that holds a detector, what it was trained on and, while training, everything needed to go on.

Written to a temporary file, flushed to disk and renamed, so a file of that name is always whole. Read with
``weights_only=True``: a checkpoint holds tensors and plain values and cannot run code.
"""

from __future__ import annotations

import os
import pickle
import tempfile
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retinaflow.data.batching import AspectBuckets
from retinaflow.data.bins import ClassBins
from retinaflow.data.taxonomy import Taxonomy
from retinaflow.detector.network import NetworkConfig, RetinaNet

FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """A detector with its classes, bins and input shapes.

    ``settings``: the resolved configuration of the run. ``epoch``: epochs done. ``progress``: optimizer and best
    value, None in a checkpoint that is only for use.
    """

    network: NetworkConfig
    state: dict[str, Tensor]
    taxonomy: Taxonomy
    bins: ClassBins
    buckets: AspectBuckets
    parents: str
    settings: dict[str, Any]
    data_digest: str
    epoch: int
    progress: dict[str, Any] | None = None

    def build(self, device: torch.device) -> RetinaNet:
        """The detector on a device, ready for inference."""
        model = RetinaNet(self.network, seed=0)
        model.load_state_dict(self.state)
        return on_device(model, device).eval()


def on_device(model: RetinaNet, device: torch.device) -> RetinaNet:
    """The model on a device in the channels-last memory order, the loader's own (``benchmarks/memory_format.py``)."""
    return model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def save_checkpoint(checkpoint: Checkpoint, path: Path) -> None:
    """Write a checkpoint atomically."""
    document = {
        "format": FORMAT,
        "network": asdict(checkpoint.network),
        "state": checkpoint.state,
        "taxonomy": checkpoint.taxonomy.to_document(),
        "bins": checkpoint.bins.to_document(checkpoint.taxonomy.ids),
        "buckets": [list(shape) for shape in checkpoint.buckets.shapes],
        **{name: getattr(checkpoint, name) for name in _PLAIN},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(document, file)
            file.flush()
            os.fsync(file.fileno())
        Path(partial).replace(path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


_PLAIN = ("parents", "settings", "data_digest", "epoch", "progress")


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint to the CPU. Raises FileNotFoundError, or ValueError for a file that is not a whole
    checkpoint."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint file")
    try:
        # torch reads over a damaged tensor without a word; the archive knows better.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"{damaged} is damaged")
        document = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError, zipfile.BadZipFile, KeyError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: not a readable checkpoint: {first}") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT or "network" not in document:
        raise ValueError(f"{path}: not a retinaflow checkpoint of format {FORMAT}")
    return Checkpoint(
        network=NetworkConfig(**document["network"]),
        state=document["state"],
        taxonomy=Taxonomy.from_document(document["taxonomy"]),
        bins=ClassBins.from_document(document["bins"]),
        buckets=AspectBuckets(tuple((height, width) for height, width in document["buckets"])),
        **{name: document[name] for name in _PLAIN},
    )
