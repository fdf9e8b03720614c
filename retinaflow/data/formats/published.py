"""The layout of Open Images, which ``train`` reads -> detection sets."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from retinaflow.data.formats import detection_set
from retinaflow.data.formats.detection_set import DetectionSet
from retinaflow.data.formats.orientation import orientations_of
from retinaflow.data.index import AnnotationIndex
from retinaflow.data.openimages import BOX_FILES, LABEL_FILES
from retinaflow.data.tables import RowError, RowErrors
from retinaflow.data.training_data import read_split
from retinaflow.errors import DataError
from retinaflow.progress import report
from retinaflow.settings.conversion_settings import ConvertConfig, Layout
from retinaflow.settings.data_settings import DataSettings
from retinaflow.settings.resolve import resolve


def splits_in(folder: Path) -> list[str]:
    """The splits of which a folder holds a published box file."""
    found = []
    for name in BOX_FILES:
        pattern = re.compile(re.escape(name).replace(re.escape("{split}"), r"(\w+)"))
        found += [hit[1] for path in sorted(folder.glob("*.csv")) if (hit := pattern.fullmatch(path.name))]
    order = {split: position for position, split in enumerate(detection_set.SPLITS)}
    return sorted(set(found), key=lambda split: (order.get(split, len(order)), split))


def _has_labels(folder: Path, split: str) -> bool:
    """Whether a folder holds a published file of image-level labels of a split."""
    return any((folder / name.format(split=split)).is_file() for name in LABEL_FILES)


def read_published(config: ConvertConfig, folder: Path, target: Layout, errors: RowErrors) -> DetectionSet:
    """All splits of a folder. EXIF orientations are read only for ``target="yolo"``, which depends on them.

    Raises DataError for a folder without annotations; rows that break a rule go to ``errors``.
    """
    given = {"images": config.images, "classes": config.classes}
    rules = {"data": str(folder), "on_bad_row": config.on_bad_row, "on_bad_image": config.on_bad_image}
    settings = resolve(DataSettings, rules | {name: value for name, value in given.items() if value})
    exhaustive = settings.exhaustive if config.exhaustive == "auto" else config.exhaustive
    splits = splits_in(folder)
    if not splits:
        raise DataError(f"data={folder}: the folder must hold a *-annotations-bbox.csv, but holds none")
    indexes, orientations = {}, {}
    for split in splits:
        has_labels = settings.label_files is not None and _has_labels(folder, split)
        own = {"exhaustive": exhaustive, "image_labels": () if has_labels else "none"}
        loaded = read_split(settings.model_copy(update=own), [split], fill_in=False)
        indexes[split] = loaded.index
        errors.add(RowError(*row) for row in loaded.dropped.itertuples(index=False))
        files = [loaded.index.file_of(image) for image in range(len(loaded.index))]
        orientations[split] = orientations_of(files) if target == "yolo" else [1] * len(files)
    return _from_indexes(indexes, orientations, exhaustive=exhaustive)


def _from_indexes(
    indexes: Mapping[str, AnnotationIndex], orientations: Mapping[str, Sequence[int]], *, exhaustive: bool
) -> DetectionSet:
    """The set of some splits. ``orientations``: the EXIF orientation of each image of a split."""
    images, boxes, labels, incomplete, first = [], [], [], [], 0
    for split, index in indexes.items():
        sizes = np.asarray(index.sizes)
        frame = pd.DataFrame({"image_id": np.asarray(index.image_ids).astype(object)})
        frame["split"] = split
        frame["file"] = np.array([index.file_of(image) for image in range(len(index))], dtype=object)
        frame["height"], frame["width"] = sizes[:, 0].astype(np.int64), sizes[:, 1].astype(np.int64)
        frame["orientation"] = list(orientations[split])
        images.append(frame)
        rows = pd.DataFrame({"image": index.box_image.astype(np.int64) + first, "class": np.asarray(index.labels)})
        rows[list(detection_set.CORNERS)] = np.asarray(index.boxes)
        for bit, name in enumerate(detection_set.FLAGS):
            rows[name] = (np.asarray(index.flags) >> bit & 1).astype(bool)
        boxes.append(rows)
        incomplete.append(rows.loc[index.is_not_exhaustive, ["image", "class"]].drop_duplicates())
        columns = {"image": index.label_image.astype(np.int64) + first, "class": np.asarray(index.verified_class)}
        labels.append(pd.DataFrame({**columns, "present": np.asarray(index.verified_present)}))
        first += len(index)
    taxonomy = next(iter(indexes.values())).taxonomy
    parts = (pd.concat(frames, ignore_index=True) for frames in (images, boxes, labels, incomplete))
    joined, boxed, labelled, pairs = parts
    return DetectionSet(taxonomy, joined, boxed, labelled, exhaustive, pairs)


def without_unknown_images(found: DetectionSet) -> DetectionSet:
    """The set without images that have no box and no label: the published layout lists an image by its rows only."""
    unknown = _unknown_images(found)
    if unknown.any():
        report(
            f"{int(unknown.sum()):,} images without any box or label are left out (with exhaustive=true they count as "
            "images without objects)"
        )
    return found.take(~unknown)


def _unknown_images(found: DetectionSet) -> np.ndarray:
    """``[I]`` images without a box and without a label, of a set that is not exhaustive: nothing is known of them."""
    known = np.zeros(len(found.images), dtype=bool)
    for frame in (found.boxes, found.labels):
        known[frame["image"].to_numpy(dtype=np.int64)] = True
    return ~known & (not found.exhaustive)
