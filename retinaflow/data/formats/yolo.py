"""YOLO data sets in the layouts of Ultralytics and darknet -> source sets: a text file of labels for each image.

``data.yaml``, darknet's ``*.data`` or folders give the images of each split
(:mod:`~retinaflow.data.formats.yolo_files`) and the class names, as they are written;
:mod:`~retinaflow.data.formats.yolo_labels` finds the label file of an image. A row is ``class x y width height``,
centre and size as fractions of the image, or a class and a polygon, of which the bounding box is taken. With
``kpt_shape: [k, d]`` in ``data.yaml`` k x d values of keypoints follow the box, and are not read. An image without
label file, or with an empty one, has no objects; the former are counted. Fractions refer to the image as EXIF rotates
it, as Ultralytics reads it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retinaflow.data.formats.folders import ReadableFolders, files_under
from retinaflow.data.formats.source import ClassNames, SourceImage, SourceSet, note
from retinaflow.data.formats.yolo_files import (
    SplitFiles,
    by_data_file,
    by_document,
    by_folders,
    by_lists,
    data_file,
    holds_labels,
    name_file,
    report_left_out,
)
from retinaflow.data.formats.yolo_labels import expected_label, label_files
from retinaflow.data.tables import RowErrors
from retinaflow.data.text_lines import lines_of_text, read_lines
from retinaflow.errors import DataError, shown
from retinaflow.files import read_text, read_yaml
from retinaflow.progress import report
from retinaflow.settings.conversion_settings import ConvertConfig


def find_yolo(folder: Path) -> Path | None:
    """The ``data.yaml`` or ``*.data`` of a folder, the folder itself where it has label files, or None."""
    documents = [path for path in sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")]) if _is_yolo(path)]
    if len(documents) > 1:
        raise DataError(
            f"{folder}: a folder must hold one data.yaml, but {documents[0].name} and {documents[1].name} both look "
            "like one; give the file as data="
        )
    documents += [path for path in sorted(folder.glob("*.data")) if path.is_file() and "names" in data_file(path)]
    if documents:
        return documents[0]
    has_names = any((folder / name).is_file() for name in ("classes.txt", "labels/classes.txt", "obj.names"))
    return folder if has_names or has_labels(folder) else None


def has_labels(folder: Path) -> bool:
    """Whether a folder holds a file of labels, at any depth."""
    return any(holds_labels(path) for path in files_under(folder) if path.suffix.lower() == ".txt")


def _is_yolo(path: Path) -> bool:
    try:
        document = read_yaml(path, as_written=True)
    except DataError:
        if path.stem in ("data", "dataset"):
            raise
        return False
    return isinstance(document, dict) and "names" in document


def read_yolo(config: ConvertConfig, data: Path, errors: RowErrors, *, classes: ClassNames) -> SourceSet:
    """A ``data.yaml``, a ``*.data`` or a folder without one.

    Raises DataError for files that cannot be read, SettingError for a path that leads out of the data set and the
    folders of the settings; rows that break a rule go to ``errors``.
    """
    root = data.parent if data.is_file() else data
    files = SplitFiles(root, ReadableFolders(root, [*config.images, *config.linked_folders]), config.images)
    is_darknet = data.suffix.lower() == ".data"
    document = _document(data) if data.is_file() and not is_darknet else {}
    source_names = document.get("names", None) if document else None
    names_path = None if document and not isinstance(source_names, str) else _names_path(files, data, source_names)
    names = _names_in_text(names_path) if names_path else _names(source_names, data)
    by_document(files, document, data)
    if is_darknet:
        by_data_file(files, data)
    if not files.images:
        by_lists(files)
    by_folders(files)
    source = SourceSet("pixel" if config.box_unit == "pixel" else "fraction", classes)
    of_class = [classes.find(name) for name in names]
    keypoints = _keypoint_values(document.get("kpt_shape"), data)
    split_of_image = _splits(files)
    present = [path for path in split_of_image if path.is_file()]
    not_labels = [*files.lists, *([names_path] if names_path else [])]
    labels = label_files(present, root, files.readable, not_labels=not_labels)
    for path, split in split_of_image.items():
        source.images.append(
            SourceImage(split, _name(path, split, files), path if path in labels or path.is_file() else None)
        )
        if path in labels:
            _Rows(labels[path], len(source.images) - 1, names, of_class, keypoints).read(source, errors)
    report_left_out(files, split_of_image, [*labels.values(), *not_labels])
    _report_unlabelled(present, labels, data, root)
    return source


def _name(path: Path, split: str, files: SplitFiles) -> str:
    top = next((top for top in (files.root, *files.images_folders) if path.is_relative_to(top)), None)
    return path.relative_to(top).as_posix() if top else f"{split}/{path.name}"


def _splits(files: SplitFiles) -> dict[Path, str]:
    """Image -> split. Images in several splits are reported: evaluating on training images gives too good results."""
    first: dict[Path, str] = {}
    repeated = [
        path for split, paths in files.images.items() for path in paths if first.setdefault(path, split) != split
    ]
    if repeated:
        report(
            f"{len(repeated):,} images are in more than one split and count for the first, {repeated[0]} for example"
        )
    return first


def _report_unlabelled(images: Sequence[Path], labels: dict[Path, Path], data: Path, root: Path) -> None:
    without = [path for path in images if path not in labels]
    if without and not labels:
        raise DataError(
            f"{data}: at least one image must have a label file, but none of {len(without):,} has one; "
            f"{expected_label(without[0], root)} is missing, for example"
        )
    if without:
        report(
            f"{len(without):,} images have no label file and count as images without objects, {without[0]} for example"
        )


def _document(path: Path) -> dict[str, Any]:
    document = read_yaml(path, as_written=True)
    if not isinstance(document, dict):
        raise DataError(f"{path}: the file must map names to values, but got {shown(document)}")
    return document


def _names(names: Any, path: Path) -> list[str]:
    """Class names of data.yaml in the order of their numbers."""
    if isinstance(names, dict):
        numbers = [str(number) for number in range(len(names))]
        if set(names) != set(numbers):
            raise DataError(f"{path}: names must be numbered 0, 1, 2, ..., but got {shown(list(names))}")
        names = [names[number] for number in numbers]
    if not isinstance(names, list) or not names:
        raise DataError(f"{path}: names must list the classes, but got {shown(names)}")
    for name in names:
        if not isinstance(name, str) or not name.strip():
            raise DataError(f"{path}: a class must have a name, but got {shown(name)}")
    return _each_once([name.strip() for name in names], path)


def _names_path(files: SplitFiles, data: Path, given: str | None) -> Path:
    """The file of class names: the one that data.yaml or ``*.data`` names, or one of the usual names."""
    if data.suffix.lower() == ".data":
        given = data_file(data).get("names")
    path = files.find(given, [files.root], f"{data.name}: names: {given}") if given else name_file(files)
    if path is None or not path.is_file():
        where = f" (it names {shown(given)})" if given else ""
        raise DataError(f"{data}: the folder must hold the class names in data.yaml or classes.txt or obj.names{where}")
    return path


def _names_in_text(path: Path) -> list[str]:
    """Class names of a text file, one per line."""
    lines = read_lines(path)
    while lines and not lines[-1].strip():
        del lines[-1]
    if blank := [number for number, line in enumerate(lines, 1) if not line.strip()]:
        # Skipping the line would shift the names of all classes after it.
        raise DataError(f"{path}: line {blank[0]}: a line must name a class, but is empty; delete it")
    if not lines:
        raise DataError(f"{path}: the file must name the classes, but is empty")
    return _each_once([line.strip() for line in lines], path)


def _each_once(names: list[str], path: Path) -> list[str]:
    """The names. Raises DataError for a repeated one: only the user knows whether both mean the same class."""
    for number, name in enumerate(names):
        first = names.index(name)
        if first < number:
            raise DataError(
                f"{path}: a class must have a name of its own, but {first} and {number} are both {name!r}; rename one "
                f"of them there, for example to '{name} 2'"
            )
    return names


def _keypoint_values(shape: Any, path: Path) -> int:
    """Number of keypoint values that follow the box in a row."""
    if shape is None:
        return 0
    sides = [int(side) for side in shape if str(side).isdecimal() and len(side) < 5] if isinstance(shape, list) else []
    if len(sides) != 2 or len(shape) != 2 or min(sides) == 0:
        raise DataError(f"{path}: kpt_shape must be two whole numbers [points, values of each], but got {shown(shape)}")
    return sides[0] * sides[1]


@dataclass(frozen=True)
class _Rows:
    """The label file of an image, with what is needed to read its rows."""

    path: Path
    image: int
    names: Sequence[str]
    of_class: Sequence[int | None]
    keypoints: int
    """Keypoint values after the box; 0: a row is a box or a polygon."""

    def read(self, source: SourceSet, errors: RowErrors) -> None:
        """Add the rows of the label file to the source."""
        try:
            lines = lines_of_text(read_text(self.path))
        except DataError as error:
            note(errors, self.path.name, "a label file must be text", str(error))
            return
        for line, row in enumerate(lines, 1):
            words = row.split()
            if not words:
                continue
            try:
                number, values = float(words[0]), [float(word) for word in words[1:]]
            except ValueError:
                note(errors, self.path.name, "a row must hold numbers", row[:60], line=line)
                continue
            self._enter(source, number, values, line, errors)

    def _enter(self, source: SourceSet, number: float, values: list[float], line: int, errors: RowErrors) -> None:
        corners = _corners(values, self.keypoints)
        if not 0 <= number < len(self.names) or number != int(number):
            rule = f"a class must be a whole number from 0 to {len(self.names) - 1}"
            note(errors, self.path.name, rule, f"{number:g}", line=line)
        elif (index := self.of_class[int(number)]) is None:
            note(errors, self.path.name, "the class must be in the class list", self.names[int(number)], line=line)
        elif corners is None:
            more = (
                f"{self.keypoints} values of keypoints" if self.keypoints else "with a polygon of three points or more"
            )
            rule = f"a row must be a class with x, y, width, height {'and' if self.keypoints else 'or'} {more}"
            note(errors, self.path.name, rule, f"{len(values) + 1} fields", line=line)
        else:
            source.boxes.add(self.image, index, corners, file=self.path.name, number=line)


def _corners(values: Sequence[float], keypoints: int) -> tuple[float, float, float, float] | None:
    """Corners of a box (with keypoints or without) or, without keypoints, of a polygon; None for anything else."""
    if len(values) in (4, 4 + keypoints):
        x, y, width, height = values[:4]
        return x - width / 2, y - height / 2, x + width / 2, y + height / 2
    if keypoints or len(values) < 6 or len(values) % 2:
        return None
    across, down = values[0::2], values[1::2]
    if not all(map(math.isfinite, values)):
        return math.nan, math.nan, math.nan, math.nan
    return min(across), min(down), max(across), max(down)
