"""YOLO folders in the layout of Ultralytics <-> detection sets: a text file of labels for each image.

``data.yaml`` names the classes and the images of each split; without one, ``images/{split}`` and ``labels/{split}``
with ``classes.txt`` are read (:mod:`~retinaflow.data.formats.yolo_files`). A row is ``class x y width height``, centre
and size as fractions of the image, or a class and a polygon, of which the bounding box is taken. With ``kpt_shape: [k,
d]`` in ``data.yaml`` k x d values of keypoints follow the box, and are not read. An image without label file, or with
an empty one, has no objects. Fractions refer to the image as EXIF rotates it, as Ultralytics reads it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from retinaflow.data.formats.detection_set import FLAGS, DetectionSet
from retinaflow.data.formats.orientation import to_rotated
from retinaflow.data.formats.source import ClassNames, SourceImage, SourceSet, note
from retinaflow.data.formats.yolo_files import (
    NAME_FILES,
    SplitFiles,
    by_document,
    by_folder,
    in_folders,
    label_file,
    report_left_out,
)
from retinaflow.data.tables import RowErrors
from retinaflow.data.text_lines import read_lines
from retinaflow.errors import DataError, shown

SHORT = {"validation": "val"}
"""Names of splits in YOLO."""
_NO_FLAGS = (False,) * len(FLAGS)


def find_yolo(folder: Path) -> Path | None:
    """The ``data.yaml`` of a folder, the folder itself where it has images and labels, or None."""
    documents = [path for path in sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")]) if _is_yolo(path)]
    if len(documents) > 1:
        raise DataError(
            f"{folder}: a folder must hold one data.yaml, but {documents[0].name} and {documents[1].name} both look "
            "like one; give the file as data="
        )
    if documents:
        return documents[0]
    has_labels = any((folder / part).is_dir() for part in ("labels", "train/labels"))
    return folder if has_labels or any((folder / name).is_file() for name in NAME_FILES) else None


def _is_yolo(path: Path) -> bool:
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError):
        return False
    return isinstance(document, dict) and "names" in document and "train" in document


def read_yolo(
    data: Path,
    errors: RowErrors,
    *,
    classes: ClassNames,
    images: Sequence[Path] = (),
    report: Callable[[str], None] = lambda line: None,
) -> SourceSet:
    """A ``data.yaml`` or a folder without one; ``images``: folders of images instead of those it names (all train).

    Raises DataError for files that cannot be read; rows that break a rule go to ``errors``. ``report`` gets a line
    about what is left out.
    """
    root = data.parent if data.is_file() else data
    document = _document(data) if data.is_file() else {}
    names = _names(document.get("names"), data) if document else _names_in_text(root)
    if images:
        files = in_folders(images)
    elif document:
        files = by_document(document, data, report)
    else:
        files = by_folder(root)
    of_class = [classes.find(name) for name in names]
    keypoints = _keypoint_values(document.get("kpt_shape"), data)
    source = SourceSet("fraction", classes)
    labelled = 0
    seen: set[Path] = set()
    _report_repeated(files, report)
    for split, paths in files.images.items():
        for path in (path for path in paths if path not in seen):
            seen.add(path)
            name = path.relative_to(root).as_posix() if path.is_relative_to(root) else f"{split}/{path.name}"
            source.images.append(SourceImage(split, name, path if path.is_file() else None))
            rows = _Rows(label_file(path), len(source.images) - 1, names, of_class, keypoints)
            labelled += rows.read(source, errors)
    report_left_out(files, seen, report)
    if source.images and not labelled:
        first = next(iter(seen))
        raise DataError(
            f"{data}: at least one image must have a label file, but none of {len(seen):,} has one; "
            f"{label_file(first)} is missing, for example"
        )
    return source


def _report_repeated(files: SplitFiles, report: Callable[[str], None]) -> None:
    """Report images in several splits: evaluating on training images would give too good results."""
    first: dict[Path, str] = {}
    repeated = [
        path for split, paths in files.images.items() for path in paths if first.setdefault(path, split) != split
    ]
    if repeated:
        report(
            f"{len(repeated):,} images are in more than one split and count for the first, {repeated[0]} for example"
        )


def _document(path: Path) -> dict[str, Any]:
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a readable YAML file: {error}") from None
    if not isinstance(document, dict):
        raise DataError(f"{path}: the file must map names to values, but got {shown(document)}")
    return document


def _names(names: Any, path: Path) -> list[str]:
    """Class names of data.yaml in the order of their numbers."""
    if isinstance(names, dict):
        if set(names) != set(range(len(names))):
            raise DataError(f"{path}: names must be numbered 0, 1, 2, ..., but got {shown(list(names))}")
        names = [names[number] for number in range(len(names))]
    if not isinstance(names, list) or not names:
        raise DataError(f"{path}: names must list the classes, but got {shown(names)}")
    return _each_once([str(name).strip() for name in names], path)


def _names_in_text(root: Path) -> list[str]:
    """Class names of a folder without data.yaml, one per line."""
    for name in NAME_FILES:
        if (root / name).is_file():
            lines = read_lines(root / name)
            while lines and not lines[-1].strip():
                del lines[-1]
            if blank := [number for number, line in enumerate(lines, 1) if not line.strip()]:
                # Skipping the line would shift the names of all classes after it.
                raise DataError(f"{root / name}: line {blank[0]}: a line must name a class, but is empty; delete it")
            return _each_once([line.strip() for line in lines], root / name)
    raise DataError(f"{root}: the folder must hold the class names in data.yaml or {' or '.join(NAME_FILES)}")


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
    if not isinstance(shape, list) or len(shape) != 2 or not all(isinstance(side, int) and side > 0 for side in shape):
        raise DataError(f"{path}: kpt_shape must be two whole numbers [points, values of each], but got {shown(shape)}")
    return int(shape[0] * shape[1])


@dataclass(frozen=True)
class _Rows:
    """The label file of an image, with what is needed to read its rows."""

    path: Path
    image: int
    names: Sequence[str]
    of_class: Sequence[int | None]
    keypoints: int
    """Keypoint values after the box; 0: a row is a box or a polygon."""

    def read(self, source: SourceSet, errors: RowErrors) -> bool:
        """Add the rows of the label file to the source; False if there is no such file."""
        if not self.path.is_file():
            return False
        text = self.path.read_bytes().decode("utf-8-sig", errors="replace")
        for line, row in enumerate(text.splitlines(), 1):
            words = row.split()
            if not words:
                continue
            try:
                number, values = float(words[0]), [float(word) for word in words[1:]]
            except ValueError:
                note(errors, self.path.name, "a row must hold numbers", row[:60], line=line)
                continue
            self._enter(source, number, values, line, errors)
        return True

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
            source.boxes.append((self.image, index, corners, _NO_FLAGS, self.path.name, line))


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


def write_yolo(found: DetectionSet, folder: Path) -> None:
    """``labels/{split}/{image_id}.txt`` and ``data.yaml``; the images belong in ``images/{split}``."""
    image = found.boxes["image"].to_numpy(dtype=np.int64)
    start = np.searchsorted(image, np.arange(len(found.images) + 1))
    corners = found.corners
    orientation = found.images["orientation"].to_numpy(dtype=np.int64)
    for kind in np.unique(orientation[orientation > 1]):
        rows = orientation[image] == kind
        corners[rows] = to_rotated(corners[rows], int(kind))
    centre, size = (corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]
    values = np.concatenate([centre, size], axis=1)
    classes = found.boxes["class"].to_numpy(dtype=np.int64)
    for split in found.splits:
        (folder / "labels" / SHORT.get(split, split)).mkdir(parents=True)
    for row, (image_id, split) in enumerate(zip(found.images["image_id"], found.images["split"], strict=True)):
        lines = [
            f"{classes[box]} {' '.join(f'{value:.8f}' for value in values[box])}\n"
            for box in range(int(start[row]), int(start[row + 1]))
        ]
        path = folder / "labels" / SHORT.get(split, split) / f"{image_id}.txt"
        path.write_text("".join(lines), encoding="utf-8")
    document = {SHORT.get(split, split): f"images/{SHORT.get(split, split)}" for split in found.splits}
    names = dict(enumerate(found.taxonomy.labels))
    text = yaml.safe_dump({**document, "names": names}, allow_unicode=True, sort_keys=False)
    (folder / "data.yaml").write_text(text, encoding="utf-8")
