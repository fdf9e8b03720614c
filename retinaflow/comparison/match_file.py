"""The matches of a evaluated run as one small file, so that runs can be compared later without their detectors or data.

:func:`save_matches` writes what average precision, bootstrap and the choice of sample images need: the entries with
their boxes, the ground truth counts, the classes with their training counts, digests of the ground truth, and the settings. Scores
are kept as float32 and boxes in steps of 1/65,535 of the image (for pictures, not for matching again); the order of
the entries, and with it every AP, is kept exactly. About 11 bytes per entry (``np.savez_compressed``, no pickle).

Two runs were evaluated on the same data when :class:`GroundTruthDigest` agrees: the images in their order, and for every class
that both evaluated its expanded ground truth boxes and the images on which it is verified. Digests are per class, so runs with
different class lists can be compared on the classes they share.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retinaflow.metric.ground_truth import Annotations, expand_boxes, verified_pairs
from retinaflow.metric.matches import Dropped, Kind, Matches

FILE_NAME = "matches.npz"
FORMAT = 1
STEPS = 65_535
DIGITS = 16


@dataclass(frozen=True)
class GroundTruthDigest:
    """What a run was evaluated on: ``images`` (ids in their order) and ``classes [K]``, 16 hex digits of sha256 each."""

    images: str
    classes: tuple[str, ...]

    @property
    def of_all(self) -> str:
        """One digest of the images and the ground truth of all classes."""
        return _hex("".join([self.images, *self.classes]).encode())


@dataclass(frozen=True)
class TrainingCounts:
    """``images [K]`` and ``boxes [K]`` of the training set, and ``bin_of_class [K]`` (0 the rarest, -1 none)."""

    images: NDArray[np.int64]
    boxes: NDArray[np.int64]
    bin_of_class: NDArray[np.int32]


@dataclass(frozen=True)
class StoredMatches:
    """What is kept of one evaluated run."""

    matches: Matches
    """``detection_row`` counts the rows of ``boxes``."""
    boxes: NDArray[np.float32]
    """``[E, 4]`` box of each entry, normalised xyxy in steps of 1/65,535, clipped to [0, 1]."""
    class_ids: tuple[str, ...]
    class_names: tuple[str, ...]
    training: TrainingCounts
    ground_truth: GroundTruthDigest
    settings: Mapping[str, Any]
    """How the detections were made: the settings of training and detection."""
    evaluated_from: Mapping[str, Any]
    """``command`` and ``settings`` that load the evaluated images again."""


def ground_truth_digest(ground_truth: Annotations) -> GroundTruthDigest:
    """Digests of the images and of each class's expanded ground truth; the order of an image's boxes plays no role."""
    num_classes = len(ground_truth.taxonomy)
    expanded = expand_boxes(ground_truth)
    image, class_index = np.divmod(expanded.pair, num_classes)
    order = np.lexsort((expanded.is_group_of, *expanded.boxes.T[::-1], image, class_index))
    box_start = np.searchsorted(class_index[order], np.arange(num_classes + 1))
    verified_image, verified_class = np.divmod(verified_pairs(ground_truth, expanded), num_classes)
    by_class = np.argsort(verified_class, kind="stable")
    verified_start = np.searchsorted(verified_class[by_class], np.arange(num_classes + 1))
    digests = []
    for k in range(num_classes):
        rows = order[box_start[k] : box_start[k + 1]]
        verified = verified_image[by_class[verified_start[k] : verified_start[k + 1]]]
        parts = (image[rows], expanded.boxes[rows], expanded.is_group_of[rows], verified)
        digests.append(_hex(b"".join(np.ascontiguousarray(part).tobytes() for part in parts)))
    return GroundTruthDigest(_hex("\n".join(map(str, ground_truth.image_ids)).encode()), tuple(digests))


def save_matches(kept: StoredMatches, path: Path) -> None:
    """Write the file."""
    matches = kept.matches
    header = {
        "format": FORMAT,
        "class_ids": kept.class_ids,
        "class_names": kept.class_names,
        "images_digest": kept.ground_truth.images,
        "class_digests": kept.ground_truth.classes,
        "settings": dict(kept.settings),
        "judged_from": dict(kept.evaluated_from),
        "dropped": vars(matches.dropped),
        **{stored: getattr(matches, name) for stored, name in _COUNTS.items()},
    }
    num_classes = len(matches.evaluated)
    np.savez_compressed(
        path,
        header=np.frombuffer(json.dumps(header, default=str).encode(), dtype=np.uint8),
        entry_start=np.searchsorted(matches.class_index, np.arange(num_classes + 1)),
        image_index=matches.image_index.astype(np.int32),
        score=matches.score.astype(np.float32),
        kind=matches.kind,
        boxes=np.rint(np.clip(kept.boxes, 0, 1) * STEPS).astype(np.uint16),
        truth_image=matches.gt_image.astype(np.int32),
        truth_class=matches.gt_class.astype(np.int32),
        truth_count=matches.gt_count,
        image_ids=matches.image_ids,
        judged=matches.evaluated,
        train_images=kept.training.images,
        train_boxes=kept.training.boxes,
        bin_of_class=kept.training.bin_of_class,
    )


def load_matches(path: Path) -> StoredMatches:
    """Read the file. Raises ValueError when it is damaged or of another format."""
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            columns = {name: file[name] for name in file.files}
        header = json.loads(columns.pop("header").tobytes())
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not a readable file of matches ({error}); evaluate the run again") from None
    if header.get("format") != FORMAT:
        raise ValueError(
            f"{path}: format {FORMAT} is needed, but the file has {header.get('format')}; evaluate it again"
        )
    return StoredMatches(
        matches=_matches(columns, header),
        boxes=(columns["boxes"] / np.float32(STEPS)).astype(np.float32),
        class_ids=tuple(header["class_ids"]),
        class_names=tuple(header["class_names"]),
        training=TrainingCounts(columns["train_images"], columns["train_boxes"], columns["bin_of_class"]),
        ground_truth=GroundTruthDigest(header["images_digest"], tuple(header["class_digests"])),
        settings=header["settings"],
        evaluated_from=header["judged_from"],
    )


_COUNTS = {
    "absorbed": "absorbed",
    "verified_labels": "verified_labels",
    "repeated_truths": "repeated_ground_truths",
    "iou_threshold": "iou_threshold",
    "group_of_weight": "group_of_weight",
}
"""Name in the file's header -> attribute of Matches. The file keeps its names, so that earlier files can be read."""

_RENAMED = {"class_not_judged": "class_not_evaluated"}
"""Name in files of version 0.1.0 -> name now."""


def _matches(columns: Mapping[str, NDArray[Any]], header: Mapping[str, Any]) -> Matches:
    kind = columns["kind"].astype(np.int8)
    return Matches(
        image_index=columns["image_index"].astype(np.int64),
        class_index=np.repeat(np.arange(len(columns["judged"])), np.diff(columns["entry_start"])),
        score=columns["score"].astype(np.float64),
        kind=kind,
        weight=np.where(kind == Kind.GROUP_OF, float(header["group_of_weight"]), 1.0),
        detection_row=np.arange(len(kind)),
        gt_image=columns["truth_image"].astype(np.int64),
        gt_class=columns["truth_class"].astype(np.int64),
        gt_count=columns["truth_count"],
        image_ids=columns["image_ids"],
        evaluated=columns["judged"],
        dropped=Dropped(**{_RENAMED.get(name, name): rows for name, rows in header["dropped"].items()}),
        **{name: header[stored] for stored, name in _COUNTS.items()},
    )


def _hex(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:DIGITS]
