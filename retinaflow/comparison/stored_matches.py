"""The matches of an evaluated run as one small file, ``matches.npz``, so that runs can be compared later without their
detectors or data.

:func:`store_matches` writes it when a run is evaluated, :func:`read_matches` reads it when runs are compared. It holds
what average precision, the bootstrap and the choice of sample images need: the entries with their boxes, the counts of
ground truth, the classes with their training counts, digests of the ground truth, and the settings. Scores are stored
as float32 and boxes in steps of 1/65,535 of the image (to look at, not to match again); the order of the entries, and
with it every AP, is exact. About 11 bytes per entry (``np.savez_compressed``, no pickle).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retinaflow.comparison.ground_truth_digest import GroundTruthDigest, ground_truth_digest
from retinaflow.data.frequency_bins import ClassBins
from retinaflow.data.index import AnnotationIndex
from retinaflow.detections import Detections
from retinaflow.errors import DataError, first_line
from retinaflow.files import check_archive
from retinaflow.metric.matches import Dropped, Kind, Matches
from retinaflow.metric.result import EvaluationResult
from retinaflow.runs import store
from retinaflow.runs.run import Run
from retinaflow.settings.commands import EvaluateConfig, TrainConfig
from retinaflow.settings.model_settings import EvaluationSettings
from retinaflow.settings.resolve import with_absolute_paths

FILE_NAME = "matches.npz"
FORMAT = 1
STEPS = 65_535
EXPANSION = 50
"""Bytes in memory for each of the file, beyond the first 64 MiB. Entries have 2."""


@dataclass(frozen=True)
class TrainingCounts:
    """``images [K]`` and ``boxes [K]`` of the training set, and ``bin_of_class [K]`` (0 the rarest, -1 none)."""

    images: NDArray[np.int64]
    boxes: NDArray[np.int64]
    bin_of_class: NDArray[np.int32]


@dataclass(frozen=True)
class StoredMatches:
    """The matches of one evaluated run, with all that a comparison needs."""

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

    def rows_of(self, class_ids: Sequence[str]) -> NDArray[np.int64]:
        """Class indices of some ids, all of which it has."""
        row_of = {mid: k for k, mid in enumerate(self.class_ids)}
        return np.array([row_of[mid] for mid in class_ids], dtype=np.int64)


def save_matches(stored: StoredMatches, path: Path) -> None:
    """Write the file."""
    matches = stored.matches
    header = {
        "format": FORMAT,
        "class_ids": stored.class_ids,
        "class_names": stored.class_names,
        "images_digest": stored.ground_truth.images,
        "class_digests": stored.ground_truth.classes,
        "settings": dict(stored.settings),
        "evaluated_from": dict(stored.evaluated_from),
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
        boxes=np.rint(np.clip(stored.boxes, 0, 1) * STEPS).astype(np.uint16),
        truth_image=matches.gt_image.astype(np.int32),
        truth_class=matches.gt_class.astype(np.int32),
        truth_count=matches.gt_count,
        image_ids=matches.image_ids,
        evaluated=matches.evaluated,
        train_images=stored.training.images,
        train_boxes=stored.training.boxes,
        bin_of_class=stored.training.bin_of_class,
    )


def load_matches(path: Path) -> StoredMatches:
    """Read the file. Raises DataError when it is damaged, of another structure or of another format."""
    try:
        # numpy reads a damaged array without an error; the archive has checksums.
        check_archive(path, most=(64 << 20) + EXPANSION * path.stat().st_size)
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            columns = {name: file[name] for name in file.files}
        header = json.loads(columns.pop("header").tobytes())
    # A damaged file makes the readers raise whatever their parsing meets.
    except Exception as error:
        what = first_line(error)[:200]
        raise DataError(f"{path}: not a readable file of matches ({what}); evaluate the run again") from None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        found = str(header.get("format"))[:20] if isinstance(header, dict) else "none"
        raise DataError(f"{path}: format {FORMAT} is needed, but the file has {found}; evaluate it again")
    try:
        _check_columns(columns, header)
        return _stored(columns, header)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        what = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise DataError(
            f"{path}: not a file of matches that this version can read: {what[:200]}; evaluate the run again"
        ) from None


def _stored(columns: Mapping[str, NDArray[Any]], header: Mapping[str, Any]) -> StoredMatches:
    return StoredMatches(
        matches=_matches(columns, header),
        boxes=(columns["boxes"] / np.float32(STEPS)).astype(np.float32),
        class_ids=tuple(header["class_ids"]),
        class_names=tuple(header["class_names"]),
        training=TrainingCounts(columns["train_images"], columns["train_boxes"], columns["bin_of_class"]),
        ground_truth=GroundTruthDigest(header["images_digest"], tuple(header["class_digests"])),
        settings=header["settings"],
        evaluated_from=header["evaluated_from"],
    )


_ROWS = {
    "entries": ("image_index", "score", "kind", "boxes"),
    "ground truth": ("truth_image", "truth_class", "truth_count"),
    "classes": ("evaluated", "train_images", "train_boxes", "bin_of_class"),
}
"""Columns of one length."""


def _check_columns(columns: Mapping[str, NDArray[Any]], header: Mapping[str, Any]) -> None:
    """Raise ValueError unless the columns are of one length where they belong together, and point to each other."""
    for what, names in _ROWS.items():
        if len({len(columns[name]) for name in names}) != 1:
            raise ValueError(f"the columns of {what} must be of one length")
    classes, images = len(columns["evaluated"]), len(columns["image_ids"])
    if any(len(header[name]) != classes for name in ("class_ids", "class_names", "class_digests")):
        raise ValueError("the names must be those of the classes")
    start = columns["entry_start"]
    if len(start) != classes + 1 or start[0] != 0 or start[-1] != len(columns["kind"]) or (np.diff(start) < 0).any():
        raise ValueError("the entries must be those of the classes")
    limits = (("image_index", images), ("truth_image", images), ("truth_class", classes))
    for name, limit in limits:
        if len(columns[name]) and not 0 <= columns[name].min() <= columns[name].max() < limit:
            raise ValueError(f"{name} must be in 0 to {limit - 1}")
    if columns["boxes"].shape[1:] != (4,) or columns["image_ids"].dtype.kind != "U":
        raise ValueError("a box must have four corners, and an image id must be a text")
    if not set(np.unique(columns["kind"]).tolist()) <= set(map(int, Kind)):
        raise ValueError("an entry must be of a known kind")
    if not isinstance(header["settings"], dict) or not isinstance(header["evaluated_from"], dict):
        raise ValueError("the settings must be names and values")


_COUNTS = {
    "absorbed": "absorbed",
    "verified_labels": "verified_labels",
    "repeated_truths": "repeated_ground_truths",
    "iou_threshold": "iou_threshold",
    "group_of_weight": "group_of_weight",
}
"""Name in the file's header -> attribute of Matches. The file keeps its names, so that earlier files can be read."""


def _matches(columns: Mapping[str, NDArray[Any]], header: Mapping[str, Any]) -> Matches:
    kind = columns["kind"].astype(np.int8)
    return Matches(
        image_index=columns["image_index"].astype(np.int64),
        class_index=np.repeat(np.arange(len(columns["evaluated"])), np.diff(columns["entry_start"])),
        score=columns["score"].astype(np.float64),
        kind=kind,
        weight=np.where(kind == Kind.GROUP_OF, float(header["group_of_weight"]), 1.0),
        detection_row=np.arange(len(kind)),
        gt_image=columns["truth_image"].astype(np.int64),
        gt_class=columns["truth_class"].astype(np.int64),
        gt_count=columns["truth_count"],
        image_ids=columns["image_ids"],
        evaluated=columns["evaluated"],
        dropped=Dropped(**header["dropped"]),
        **{name: header[stored] for stored, name in _COUNTS.items()},
    )


def store_matches(
    targets: Sequence[Run],
    evaluation: EvaluationResult,
    detections: Detections,
    index: AnnotationIndex,
    bins: ClassBins,
    config: TrainConfig | EvaluateConfig,
    *,
    trained: Mapping[str, Any] | None = None,
) -> StoredMatches:
    """Write ``matches.npz`` with every target, and return what it holds. ``trained``: settings that the evaluated model
    was trained with, with absolute paths as those that are stored."""
    own = with_absolute_paths(config)
    on_trained_data = own["data"] == "trained" and trained is not None
    return write_matches(
        targets,
        evaluation,
        detections,
        index,
        bins,
        settings=own if isinstance(config, TrainConfig) else _settings(config, own, trained),
        evaluated_from={
            "command": "train" if isinstance(config, TrainConfig) or on_trained_data else "evaluate",
            "settings": trained if on_trained_data else own,
        },
    )


def write_matches(
    targets: Sequence[Run],
    evaluation: EvaluationResult,
    detections: Detections,
    index: AnnotationIndex,
    bins: ClassBins,
    *,
    settings: Mapping[str, Any],
    evaluated_from: Mapping[str, Any],
) -> StoredMatches:
    """As :func:`store_matches`, with ``settings`` and ``evaluated_from`` as in :class:`StoredMatches`."""
    matches = evaluation.scores.matches
    stored = StoredMatches(
        matches=matches,
        boxes=detections.boxes[matches.detection_row].astype(np.float32),
        class_ids=index.taxonomy.ids,
        class_names=index.taxonomy.labels,
        training=TrainingCounts(
            bins.images_per_class.astype(np.int64), bins.boxes_per_class.astype(np.int64), bins.bin_of_class
        ),
        ground_truth=ground_truth_digest(index),
        settings=settings,
        evaluated_from=evaluated_from,
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / FILE_NAME
        save_matches(stored, path)
        for target in targets:
            target.log_file(path)
    return stored


def _settings(config: EvaluateConfig, own: Mapping[str, Any], trained: Mapping[str, Any] | None) -> dict[str, Any]:
    """How detections were made: the settings of the training, with those that ``evaluate`` changed."""
    names = [*EvaluationSettings.model_fields, *(["expand_predictions"] if config.expand_predictions else [])]
    names += [] if config.image_size == "trained" else ["image_size"]
    names += [] if config.predictions is None else ["predictions"]
    return {**(trained or {}), **{name: own[name] for name in names}}


def read_matches(run_id: str) -> StoredMatches:
    """The matches of a run in the store, or of a folder written with track=false.

    Raises DataError, with the next step, when it has none.
    """
    if (Path(run_id) / FILE_NAME).is_file():
        return load_matches(Path(run_id) / FILE_NAME)
    try:
        path = store.fetch(run_id, FILE_NAME)
    except DataError as error:
        next_step = f"evaluate the model again with evaluate from_run={run_id}"
        raise DataError(f"{error}; train and evaluate write it: {next_step}") from None
    return load_matches(path)
