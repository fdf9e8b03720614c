"""The sets of images that a run has as inputs, as MLflow's column Dataset shows them: name, digest, source, counts.

A name is ``FOLDER/SPLIT``, whatever path the folder has on a machine, or ``FOLDER/FILE`` for files that were given
instead. The digest is that of the annotations, the same as in the tag ``retinaflow.data_digest``; so runs of the same
data are found by ``search_runs("datasets.name = 'mydata/validation'")``, and an evaluation on the validation images of
a training has the dataset of the training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from retinaflow.data.index import AnnotationIndex
from retinaflow.data.training_data import TrainingData, demo_folder
from retinaflow.inference.image_selection import is_evaluated
from retinaflow.settings.model_settings import ImagesSettings

DIGEST_LETTERS = 16
"""Hex digits of a digest; MLflow takes at most 36."""
TRAINING_DIGEST = "retinaflow.training_digest"
"""Tag of an evaluation with the digest of what its model was trained on."""


@dataclass(frozen=True)
class DatasetInput:
    """One set of images. ``source``: the folder it lies in, absolute. ``profile``: plain values. ``context``: what the
    run uses it for: training, validation, evaluation, prediction or exploration."""

    name: str
    digest: str
    source: str
    profile: Mapping[str, Any]
    context: str

    @staticmethod
    def of(index: AnnotationIndex, name: str, source: str, context: str) -> DatasetInput:
        """The input of an index of images."""
        return DatasetInput(name, index.digest[:DIGEST_LETTERS], source, profile_of(index), context)

    def document(self) -> dict[str, Any]:
        """As plain values."""
        return {**vars(self), "profile": dict(self.profile)}


def profile_of(index: AnnotationIndex) -> dict[str, Any]:
    """Counts of images, boxes and classes, and the classes of the fewest and of the most boxes with these."""
    counts = np.bincount(np.asarray(index.labels), minlength=index.num_classes)
    with_boxes = np.flatnonzero(counts)
    profile = {
        "images": len(index),
        "boxes": len(index.labels),
        "classes": index.num_classes,
        "classes_with_boxes": len(with_boxes),
    }
    if len(with_boxes) == 0:
        return profile
    ends = {"rarest_class": counts[with_boxes].argmin(), "most_frequent_class": counts[with_boxes].argmax()}
    return profile | {
        name: {"name": index.taxonomy.labels[with_boxes[at]], "boxes": int(counts[with_boxes[at]])}
        for name, at in ends.items()
    }


def training_datasets(settings: Mapping[str, Any], data: TrainingData) -> list[DatasetInput]:
    """The images that a training is trained on and those that it is evaluated on. ``settings``: of a training."""
    name, source = _named(settings, settings["train_splits"], settings["boxes"])
    return [
        DatasetInput.of(data.train, name, source, "training"),
        evaluated_dataset(settings, data.evaluated, context="validation"),
    ]


def evaluated_dataset(
    settings: Mapping[str, Any], index: AnnotationIndex, *, context: str = "evaluation"
) -> DatasetInput:
    """The images that are evaluated. ``settings``: of the ``evaluate`` or the training that has read them."""
    files, splits = settings.get("eval_boxes", settings["boxes"]), [settings["eval_split"]]
    if settings.get("eval_ids") is not None:
        splits = [Path(settings["eval_ids"]).stem]
    return DatasetInput.of(index, *_named(settings, splits, files), context)


def training_digest(tags: Mapping[str, str]) -> str | None:
    """The digest of what the model of a run was trained on, from the tags of a training (``TRAIN-EVALUATED``) or of an
    evaluation; None where it is not known."""
    both = tags.get("retinaflow.data_digest", "")
    return tags.get(TRAINING_DIGEST) or (both.split("-")[0] if "-" in both else None)


def explored_dataset(settings: Mapping[str, Any], index: AnnotationIndex) -> DatasetInput:
    """The images that ``explore`` looks at."""
    return DatasetInput.of(index, *_named(settings, settings["train_splits"], settings["boxes"]), "exploration")


def predicted_dataset(config: ImagesSettings, index: AnnotationIndex, trained: Mapping[str, Any]) -> DatasetInput:
    """The images that a model detects on. ``trained``: settings of its training, for ``data=trained``."""
    if config.image_list is not None:
        name, source = _named({}, (), [config.image_list])
    elif config.images:
        folders = [path.resolve() for path in config.images]
        source = str(folders[0])
        name = f"{folders[0].parent.name}/{'+'.join(folder.name for folder in folders)}"
    else:
        data = trained.get("data", "demo") if config.data == "trained" else config.data
        split = trained.get("eval_split", config.split) if is_evaluated(config, trained) else config.split
        name, source = _named({"data": data}, [split], ())
    return DatasetInput.of(index, name, source, "prediction")


def _named(settings: Mapping[str, Any], splits: Sequence[str], files: Sequence[str | Path]) -> tuple[str, str]:
    """Name and source of some splits of the data folder, or of files of boxes."""
    if files:
        folder = Path(files[0]).resolve().parent
        return f"{folder.name}/{'+'.join(Path(file).stem for file in files)}", str(folder)
    is_demo = str(settings["data"]) == "demo"
    folder = (demo_folder() if is_demo else Path(settings["data"])).resolve()
    return f"{'demo' if is_demo else folder.name}/{'+'.join(splits)}", str(folder)
