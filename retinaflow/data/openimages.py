"""The published Open Images files -> AnnotationIndex. Only this file knows their names.

A data folder looks like the published downloads: ``images/`` (or one folder per split),
``{split}-annotations-bbox.csv``, ``{split}-annotations-human-imagelabels.csv``, ``class-descriptions.csv`` and
optionally a hierarchy JSON. The names in the Challenges 2018 and 2019 and in Open Images V4 to V7 are recognised too,
and so is FiftyOne's export of Open Images, with a folder for each split (``train/labels/detections.csv``). What a row
must hold is in :mod:`retinaflow.data.annotation_rows`.
"""

from __future__ import annotations

import csv
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from retinaflow.data.annotation_rows import build_annotations
from retinaflow.data.class_files import read_taxonomy
from retinaflow.data.id_columns import LONGEST_ID, NOT_PLAIN, image_ids_of
from retinaflow.data.index import AnnotationIndex
from retinaflow.data.tables import RowErrors
from retinaflow.data.text_lines import read_lines
from retinaflow.errors import DataError, SettingError, shown

BOX_FILES = (
    "{split}-annotations-bbox.csv",
    "challenge-2018-{split}-annotations-bbox.csv",
    "challenge-2019-{split}-detection-bbox.csv",
    "oidv6-{split}-annotations-bbox.csv",
)
LABEL_FILES = (
    "{split}-annotations-human-imagelabels.csv",
    "{split}-annotations-human-imagelabels-boxable.csv",
    "challenge-2018-{split}-annotations-human-imagelabels.csv",
    "challenge-2019-{split}-detection-human-imagelabels.csv",
    "oidv7-{split}-annotations-human-imagelabels.csv",
)
CLASS_FILES = (
    "class-descriptions.csv",
    "class-descriptions-boxable.csv",
    "challenge-2018-class-descriptions-500.csv",
    "challenge-2019-classes-description-500.csv",
    "oidv7-class-descriptions-boxable.csv",
)
HIERARCHY_FILES = (
    "bbox_labels_hierarchy.json",
    "bbox_labels_500_hierarchy.json",
    "bbox_labels_600_hierarchy.json",
    "challenge-2019-label500-hierarchy.json",
)
_EXPORT_BOXES = "{split}/labels/detections.csv"
"""Files of FiftyOne's export. Its tables also have the rows of images that were not exported."""
_EXPORT_LABELS = "{split}/labels/classifications.csv"
_EXPORT_CLASSES = tuple(f"{split}/metadata/classes.csv" for split in ("train", "validation", "test"))
_EXPORT_HIERARCHY = tuple(f"{split}/metadata/hierarchy.json" for split in ("train", "validation", "test"))
_OTHER_NAMES = {"validation": ("val", "valid"), "val": ("validation",), "valid": ("validation",)}
"""Names of one split in published files: V7 has oidv7-val-annotations-human-imagelabels.csv."""
SPLIT_FOLDERS = ("train", "validation", "val", "valid", "test")
"""Names of folders that hold the images of one split."""


class MissingAnnotationsError(DataError):
    """A data folder that does not exist, or that lacks a file of annotations or classes."""


@dataclass(frozen=True)
class SourceFiles:
    """The files that one set of images is read from."""

    boxes: tuple[Path, ...]
    image_labels: tuple[Path, ...]
    classes: Path
    hierarchy: Path | None

    @property
    def all(self) -> tuple[Path, ...]:
        return (*self.boxes, *self.image_labels, self.classes, *([self.hierarchy] if self.hierarchy else []))

    @property
    def list_other_images(self) -> bool:
        """Whether the tables name images that the set does not hold, as those of FiftyOne's export do."""
        return any(map(_is_export, self.boxes))


def split_names(split: str) -> tuple[str, ...]:
    """The names that a split may have in files and folders, its own first."""
    return (split, *_OTHER_NAMES.get(split, ()))


def names_for(patterns: Sequence[str], split: str) -> list[str]:
    """The names that a file of a split may have."""
    return [name.format(split=word) for word in split_names(split) for name in patterns]


def lists_other_images(data: Path, split: str) -> bool:
    """Whether the boxes of a split are those of an export, which also names images that it does not hold."""
    found = next(
        (data / name for name in names_for((*BOX_FILES, _EXPORT_BOXES), split) if (data / name).is_file()), None
    )
    return found is not None and _is_export(found)


def _is_export(boxes: Path) -> bool:
    return boxes.parts[-2:] == Path(_EXPORT_BOXES).parts[-2:]


def has_boxes(data: Path) -> bool:
    """Whether a folder holds published boxes of any split."""
    return any(True for name in (*BOX_FILES, _EXPORT_BOXES) for _ in data.glob(name.format(split="*")))


def find_files(
    data: Path,
    splits: Sequence[str],
    *,
    boxes: Sequence[Path] = (),
    image_labels: Sequence[Path] | None = (),
    classes: Path | None = None,
    hierarchy: Path | None = None,
    use_hierarchy: bool = True,
    prefix: str = "",
) -> SourceFiles:
    """The published files of some splits under ``data``; a given path replaces the file that would be looked up.

    ``image_labels=None``: no image-level labels. ``prefix``: of the names of the settings for boxes and labels, in
    errors. Raises MissingAnnotationsError with the names looked for.
    """
    if classes is None:
        classes = _first(data, (*CLASS_FILES, *_EXPORT_CLASSES), "classes")
    if not boxes:
        options = [names_for((*BOX_FILES, _EXPORT_BOXES), split) for split in splits]
        boxes = [_first(data, names, f"{prefix}boxes") for names in options]
    if image_labels is not None and not image_labels:
        options = [names_for((*LABEL_FILES, _EXPORT_LABELS), split) for split in splits]
        image_labels = [_first(data, names, f"{prefix}image_labels") for names in options]
    if hierarchy is None and use_hierarchy:
        names = (*HIERARCHY_FILES, *_EXPORT_HIERARCHY)
        hierarchy = next((data / name for name in names if (data / name).is_file()), None)
    return SourceFiles(tuple(boxes), tuple(image_labels or ()), classes, hierarchy)


def _first(data: Path, names: Sequence[str], setting: str) -> Path:
    if not data.is_dir():
        raise MissingAnnotationsError(f"data={data}: no such folder")
    for name in names:
        if (data / name).is_file():
            return data / name
    hint = ""
    if setting == "image_labels":
        hint = ", or image_labels=none if there are none"
    elif setting.endswith("image_labels"):
        # image_labels=none would take those of the training away.
        hint = " (if there are none: a file of the header ImageID,LabelName,Confidence alone)"
    if setting.endswith("boxes") and (there := sorted(path.name for path in data.glob("*-annotations-bbox.csv"))):
        hint = f"; there are {', '.join(there[:5])}: train_splits= and eval_split= name the splits to read"
    raise MissingAnnotationsError(
        f"{data} holds none of {', '.join(names)}; add the file, or give its path as {setting}={hint}"
    )


def read_annotations(
    files: SourceFiles, errors: RowErrors, *, allow_repeats: bool = False, progress: Callable[[str], None]
) -> AnnotationIndex:
    """:func:`~retinaflow.data.annotation_rows.build_annotations` of the files."""
    taxonomy = read_taxonomy(files.classes, files.hierarchy)
    boxes, labels = files.boxes, files.image_labels
    return build_annotations(taxonomy, boxes, labels, errors, allow_repeats=allow_repeats, progress=progress)


def is_plain_id(image_id: str) -> bool:
    """Whether an id can only name a file inside a folder: ids are never trusted as paths."""
    return re.search(NOT_PLAIN, image_id) is None and len(image_id.encode(errors="replace")) <= LONGEST_ID


def normal_id(text: str) -> str:
    """An image id in the Unicode form in which ids are compared (NFC)."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def split_image_ids(
    data: Path, splits: Sequence[str], *, boxes: Sequence[Path] = (), image_labels: Sequence[Path] | None = ()
) -> NDArray[np.str_]:
    """The images in the annotation files of some splits, ascending; none if there is no such file.

    As in :func:`find_files` a given path replaces the files that would be looked up. Only ids are read.
    """

    def looked_up(patterns: Sequence[str]) -> Iterator[Path]:
        for split in splits:
            paths = [data / name for name in names_for(patterns, split)]
            yield from [path for path in paths if path.is_file()][:1]

    labels = () if image_labels is None else image_labels or looked_up((*LABEL_FILES, _EXPORT_LABELS))
    return image_ids_of([*(boxes or looked_up((*BOX_FILES, _EXPORT_BOXES))), *labels])


def _first_cell(line: str) -> str:
    if '"' not in line:
        return line.split(",")[0]
    try:
        # Line by line, so that a quote that is not closed spoils one id only.
        return next(csv.reader([line], skipinitialspace=True))[0]
    except csv.Error:
        return line


def read_image_ids(path: Path, *, setting: str = "eval_ids") -> NDArray[np.str_]:
    """A list of image ids: the Challenge's ``ImageID`` column, or one plain id per line; one that holds a comma is in
    quotes. Errors name ``setting``."""
    if not path.is_file():
        raise SettingError(f"{setting}={path}: no such file")
    lines = [normal_id(_first_cell(line).strip()) for line in read_lines(path)]
    ids = [line for line in lines if line and line != "ImageID"]
    if not ids:
        raise SettingError(f"{setting}={path}: the list must hold at least one image id, but is empty")
    wrong = next((image_id for image_id in ids if len(image_id.encode()) > LONGEST_ID), None)
    if wrong is not None:
        got = shown(wrong, quotes=False)
        raise DataError(f"{setting}={path}: an image id must have at most {LONGEST_ID} bytes, but got {got}")
    return np.array(sorted(set(ids)), dtype=np.str_)
