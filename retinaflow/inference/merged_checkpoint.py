"""A merged model in one file: the checkpoints of its members, their calibrators, and how their detections are joined.

The file is written and read as that of one network is, with the same checks (:mod:`retinaflow.inference.checkpoint`).
:func:`load_model` reads either kind. A merged model offers what commands read of a checkpoint: classes, bins, settings
and digest. It has no optimizer and is not trained; its members are no merged models.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retinaflow.data.frequency_bins import ClassBins
from retinaflow.inference.checkpoint import (
    FORMAT,
    MEMBERS,
    Checkpoint,
    check_classes,
    check_values,
    checked_format,
    checkpoint_of,
    document_of,
    is_merged,
    most_values,
    read_document,
    readable,
    require,
    write_document,
)
from retinaflow.settings.model_settings import JoinSettings, PostprocessSettings
from retinaflow.settings.resolve import current_names
from retinaflow.statistics.calibration import Calibrator
from retinaflow.taxonomy import Taxonomy

OF_DETECTIONS = (*PostprocessSettings.model_fields, "precision")
"""The settings of a training by which its model detects."""
MOST_MEMBERS = 100


@dataclass(frozen=True)
class MergedMember:
    """One model: its checkpoint without progress, whose settings are those that it detects by, a calibrator for each of
    its classes, and its ``run``, for messages."""

    checkpoint: Checkpoint
    calibrators: tuple[Calibrator, ...]
    run: str

    def identity(self) -> list[Any]:
        """What decides its detections, as JSON values."""
        settings = self.checkpoint.settings
        return [
            self.checkpoint.digest,
            {name: settings.get(name) for name in OF_DETECTIONS},
            [calibrator.to_document() for calibrator in self.calibrators],
        ]


@dataclass(frozen=True)
class MergedCheckpoint:
    """Several models as one, with the classes of all of them.

    ``settings``: those of the training of its first member, whose images are its own, with the classes, the limits of
    detections and the precision of the merge; ``data`` is None where no training has evaluated these images.
    """

    members: tuple[MergedMember, ...]
    join: JoinSettings
    taxonomy: Taxonomy
    bins: ClassBins
    settings: dict[str, Any]
    data_digest: str
    origin: str = field(default="", compare=False)
    """The file that it was read from, for messages."""

    @cached_property
    def classes(self) -> tuple[NDArray[np.int64], ...]:
        """Of each member, the class index here of each of its classes."""
        return tuple(
            np.array([self.taxonomy.index_of[mid] for mid in member.checkpoint.taxonomy.ids], dtype=np.int64)
            for member in self.members
        )

    @property
    def digest(self) -> str:
        """sha256 of what decides detections: members, calibrators, how they detect and how they are joined."""
        plain = [[one.identity() for one in self.members], self.taxonomy.to_document(), self.join.model_dump()]
        return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


Model = Checkpoint | MergedCheckpoint
"""What commands take as ``from_run``."""


def save_merged(merged: MergedCheckpoint, path: Path) -> None:
    """Write a merged model atomically. Errors as of :func:`retinaflow.inference.checkpoint.save_checkpoint`."""
    document = {
        "format": FORMAT,
        MEMBERS: [
            {
                "run": member.run,
                "checkpoint": document_of(member.checkpoint),
                "calibrators": [calibrator.to_document() for calibrator in member.calibrators],
            }
            for member in merged.members
        ],
        "join": merged.join.model_dump(),
        "taxonomy": merged.taxonomy.to_document(),
        "bins": merged.bins.to_document(merged.taxonomy.ids),
        "settings": merged.settings,
        "data_digest": merged.data_digest,
    }
    write_document(document, path)


def load_model(path: Path) -> Model:
    """Read a checkpoint of one network or a merged model to the CPU. Errors as of
    :func:`retinaflow.inference.checkpoint.load_checkpoint`."""
    document = read_document(path)
    return merged_of(document, path) if is_merged(document) else checkpoint_of(document, path)


def merged_of(document: object, path: Path) -> MergedCheckpoint:
    """The merged model of what :func:`save_merged` stored. Raises DataError, which names the file and what is missing
    or of another kind."""
    found = checked_format(document, path, part=MEMBERS)
    with readable(path):
        # All at once first: each of many members could have as many values as one may have.
        check_values(found, most=most_values(path), with_tensors=True)
        parts = found[MEMBERS]
        require(isinstance(parts, list) and 0 < len(parts) <= MOST_MEMBERS, f"1 to {MOST_MEMBERS} members are needed")
        stored = [(part["checkpoint"], part["run"], list(part["calibrators"])) for part in parts]
    checkpoints = [checkpoint_of(checkpoint, path) for checkpoint, _, _ in stored]
    with readable(path):
        check_values({name: value for name, value in found.items() if name != MEMBERS}, most=most_values(path))
        members = tuple(
            MergedMember(checkpoint, tuple(map(Calibrator.from_document, calibrators)), run)
            for checkpoint, (_, run, calibrators) in zip(checkpoints, stored, strict=True)
        )
        merged = MergedCheckpoint(
            members=members,
            join=JoinSettings.model_validate(found["join"]),
            taxonomy=Taxonomy.from_document(found["taxonomy"]),
            bins=ClassBins.from_document(found["bins"]),
            settings=current_names(found["settings"]),
            data_digest=found["data_digest"],
            origin=str(path),
        )
        check_classes(merged.taxonomy, merged.bins, merged.data_digest, *(member.run for member in members))
        has_model = np.zeros(len(merged.taxonomy), dtype=bool)
        for member, own in zip(members, merged.classes, strict=True):
            require(len(member.calibrators) == len(own), "a calibrator is needed for each class of a member")
            require(member.checkpoint.progress is None, "a member must hold weights only")
            has_model[own] = True
        require(bool(has_model.all()), "each class must be one of a member")
    return merged
