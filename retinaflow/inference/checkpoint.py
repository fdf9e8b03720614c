"""Checkpoints: one file that holds a detector, its settings and, during a training, everything needed to resume it.

The file is written beside the old one, flushed to disk and renamed, so it is always whole, whatever ends the process
or fills the disk in between. Every entry of the file has a checksum (CRC-32), which is verified when it is read.
It is read with ``weights_only=True``: a checkpoint holds tensors and plain values and cannot run code.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retinaflow.data.batching import AspectBuckets
from retinaflow.data.frequency_bins import ClassBins
from retinaflow.detector.network import RetinaNet
from retinaflow.errors import DataError, first_line
from retinaflow.files import atomic_file, check_archive
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
    origin: str = field(default="", compare=False)
    """The file that it was read from, for messages."""

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
        """The detector on a device, ready for inference. Raises DataError for weights of another network."""
        model = RetinaNet(self.network, len(self.taxonomy), seed=0)
        try:
            model.load_state_dict(self.state)
        except RuntimeError as error:
            what, file = " ".join(str(error).split())[:_SHOWN], self.origin or "the checkpoint"
            raise DataError(f"{file}: the weights are those of another network: {what}") from None
        return on_device(model, device).eval()


def on_device(model: RetinaNet, device: torch.device) -> RetinaNet:
    """The model on a device in the channels-last memory order, the loader's own (``benchmarks/memory_format.py``)."""
    return model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def save_checkpoint(checkpoint: Checkpoint, path: Path) -> None:
    """Write a checkpoint atomically. Raises DataError when it cannot be written, which leaves the file as it was."""
    write_document(document_of(checkpoint), path)


def document_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """What :func:`checkpoint_of` reads: plain values and tensors."""
    return {
        "format": FORMAT,
        "network": _network_document(checkpoint),
        "state": checkpoint.state,
        "taxonomy": checkpoint.taxonomy.to_document(),
        "bins": checkpoint.bins.to_document(checkpoint.taxonomy.ids),
        "buckets": [list(shape) for shape in checkpoint.buckets.shapes],
        **{name: getattr(checkpoint, name) for name in _PLAIN},
    }


def write_document(document: Mapping[str, Any], path: Path) -> None:
    """Write plain values and tensors as a checkpoint file. Errors as of :func:`save_checkpoint`."""
    try:
        with atomic_file(path) as partial, partial.open("wb") as file:
            torch.save(dict(document), file)
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
    """Read a checkpoint to the CPU. Raises DataError for a file that does not exist, is not a whole checkpoint, is of
    another structure or a later version, or holds weights that are not finite."""
    return checkpoint_of(read_document(path), path)


def read_document(path: Path) -> object:
    """The content of a checkpoint file, on the CPU, not yet checked but for damage. Raises DataError."""
    if not path.is_file():
        raise DataError(f"{path}: no such checkpoint file")
    try:
        # torch reads a damaged tensor without an error; the archive has checksums.
        check_archive(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    # A damaged or foreign pickle makes torch raise whatever its parsing meets.
    except Exception as error:
        raise DataError(f"{path}: not a readable checkpoint: {first_line(error)[:_SHOWN]}") from None


def checkpoint_of(document: object, path: Path) -> Checkpoint:
    """The checkpoint of what :func:`document_of` gives. Raises DataError, which names the file and what is missing or
    of another kind."""
    if is_merged(document):
        raise DataError(
            f"{path}: one network is needed, but this is a merged model of several; give the checkpoint or the run of "
            "one of its members"
        )
    found = checked_format(document, path, part="network")
    with readable(path):
        most = most_values(path)
        check_values({name: found[name] for name in ("state", "progress")}, most=most, with_tensors=True)
        check_values({name: value for name, value in found.items() if name not in ("state", "progress")}, most=most)
        checkpoint = Checkpoint(
            network=_network_of(found["network"]),
            state=dict(found["state"]),
            taxonomy=Taxonomy.from_document(found["taxonomy"]),
            bins=ClassBins.from_document(found["bins"]),
            buckets=AspectBuckets(tuple((height, width) for height, width in found["buckets"])),
            **{name: found[name] for name in _PLAIN} | {"settings": current_names(found["settings"])},
            origin=str(path),
        )
        _check_parts(checkpoint)
    return checkpoint


MEMBERS = "members"
"""The part of the file that a merged model has, and one network lacks."""


def is_merged(document: object) -> bool:
    """Whether a file holds a merged model (:mod:`retinaflow.inference.merged_checkpoint`)."""
    return isinstance(document, dict) and MEMBERS in document


def checked_format(document: object, path: Path, *, part: str) -> dict[str, Any]:
    """The document, which has a ``part`` of that name. Raises DataError for another file or format."""
    version = document.get("format") if isinstance(document, dict) and part in document else None
    if not isinstance(version, int) or version not in range(1000):
        raise DataError(f"{path}: not a retinaflow checkpoint of format {FORMAT}")
    assert isinstance(document, dict)
    if version != FORMAT:
        raise DataError(
            f"{path}: a retinaflow checkpoint of format {FORMAT} is needed, but this one has format {version}; was it "
            "written by a later version?"
        )
    return document


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Inside the block what values of another structure raise becomes a DataError that names the file."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        what = f"it lacks {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise DataError(f"{path}: not a checkpoint that this version can read: {what[:_SHOWN]}") from None


_SHOWN = 200
"""Letters of a value from a file that a message shows."""
_MAX_VALUES, _MAX_DEPTH, _MAX_TEXT = 3_000_000, 50, 1 << 20
_MAX_SIDE, _MAX_BUCKETS = 16_384, 1000


def most_values(path: Path) -> int:
    """Values that a file may hold: one for each byte of the part without the tensors, as each has one at least. AP of
    thousands of classes in hundreds of evaluations is millions of values; calibrators in a merged model are as many."""
    if not zipfile.is_zipfile(path):
        return _MAX_VALUES
    with zipfile.ZipFile(path) as archive:
        sizes = [entry.file_size for entry in archive.infolist() if entry.filename.endswith("data.pkl")]
    return max(_MAX_VALUES, sum(sizes))


def check_values(document: object, *, most: int = _MAX_VALUES, with_tensors: bool = False) -> None:
    """Raise ValueError for values that no checkpoint has, or more than ``most``: a small file can name one list a
    million times, which becomes gigabytes when it is printed or copied."""
    waiting, seen = [(document, 0)], 0
    while waiting:
        value, depth = waiting.pop()
        seen += 1
        if seen > most or depth > _MAX_DEPTH:
            raise ValueError(f"it must have at most {most:,} values, {_MAX_DEPTH} deep, but has more")
        if isinstance(value, dict):
            waiting += [(item, depth + 1) for pair in value.items() for item in pair]
        elif isinstance(value, list | tuple):
            waiting += [(item, depth + 1) for item in value]
        elif isinstance(value, str):
            require(len(value) <= _MAX_TEXT, f"a text must have at most {_MAX_TEXT:,} letters")
        elif isinstance(value, int):
            require(abs(value) < 1 << 63, "a whole number must have 64 bits")
        elif isinstance(value, Tensor) and with_tensors:
            require(value.layout == torch.strided and value.device.type == "cpu", "a tensor must hold its values")
            own = value.untyped_storage().nbytes()
            require(value.numel() * value.element_size() <= own, "a tensor must hold each of its values")
        else:
            require(value is None or isinstance(value, float), f"a value must not be a {type(value).__name__}")


def check_classes(taxonomy: Taxonomy, bins: ClassBins, *texts: object) -> None:
    """Raise ValueError unless ids, names and further ``texts`` are texts, and the bins are those of the classes."""
    edges = (*taxonomy.hierarchy.subcategories, *taxonomy.hierarchy.parts)
    found = (*taxonomy.hierarchy.nodes, *(node for edge in edges for node in edge), *taxonomy.ids, *taxonomy.names)
    are_texts = all(isinstance(text, str) for text in (*found, *texts))
    require(len(taxonomy) > 0 and are_texts, "ids, names and digests must be texts")
    require(len(bins.bin_of_class) == len(taxonomy), "the bins must be of the classes")


def _check_parts(checkpoint: Checkpoint) -> None:
    """Raise ValueError unless the parts are of their kinds and fit each other."""
    check_classes(checkpoint.taxonomy, checkpoint.bins, checkpoint.parents, checkpoint.data_digest)
    shapes = checkpoint.buckets.shapes
    require(0 < len(shapes) <= _MAX_BUCKETS, f"there must be 1 to {_MAX_BUCKETS} input shapes")
    sides = [side for shape in shapes for side in shape]
    require(all(type(side) is int and 0 < side <= _MAX_SIDE for side in sides), "an input shape must be in pixels")
    require(isinstance(checkpoint.epoch, int) and checkpoint.epoch >= 0, "epoch must be a whole number")
    require(isinstance(checkpoint.progress, dict | None), "progress must be a mapping")
    for name, value in checkpoint.state.items():
        require(isinstance(name, str) and isinstance(value, Tensor), "the weights must be tensors by name")
        require(not value.is_complex(), "the weights must be real numbers")
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ValueError(f"{name[:_SHOWN]} has values that are not finite; did its training diverge?")


def require(condition: bool, rule: str) -> None:
    """Raise ValueError with the rule unless it holds."""
    if not condition:
        raise ValueError(rule)
