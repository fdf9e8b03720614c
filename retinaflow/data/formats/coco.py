"""COCO JSON (cocodataset.org/#format-data) and LVIS JSON -> source sets.

Boxes are ``[x, y, width, height]`` in pixels, from 0 (or as ``box_unit`` and ``coco_bbox`` state); what is read of an
annotation, :mod:`~retinaflow.data.formats.coco_annotations` describes. Category ids need not be consecutive; classes
keep the order of the list of categories, and the ids in ``label_name`` where categories have them. An LVIS file (images
with ``neg_category_ids``) lists the classes that are annotated on each image; the others are unknown there, and of
those in ``not_exhaustive_category_ids`` some objects have no box.

A file is read element by element (:mod:`~retinaflow.data.formats.json_lists`), so it may be much larger than the
memory that its annotations take as columns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retinaflow.data.formats.box_values import refuse_fractions
from retinaflow.data.formats.coco_annotations import Annotations, Columns, Numbers, corners_of, key_of
from retinaflow.data.formats.coco_files import LISTS, OWN_INFO, image_folders, stated_split
from retinaflow.data.formats.folders import (
    SPLIT_NAMES,
    FileFinder,
    ReadableFolders,
    bare_name,
    existing,
    safe_name,
    short_name,
    split_of_folders,
)
from retinaflow.data.formats.json_lists import elements
from retinaflow.data.formats.source import ClassNames, SourceImage, SourceSet, note
from retinaflow.data.image_folders import SUFFIXES
from retinaflow.data.tables import SHOWN, RowErrors
from retinaflow.errors import DataError, shown
from retinaflow.progress import report
from retinaflow.settings.conversion_settings import ConvertConfig

_MOST_PIXELS = 1 << 24


def read_coco(
    config: ConvertConfig, files: dict[str, Path], errors: RowErrors, *, folder: Path, classes: ClassNames
) -> SourceSet:
    """The annotation files of each split, in ``folder``.

    Raises DataError for a file that is no COCO JSON, SettingError for an image that leads out of ``folder`` and those
    of the settings; annotations that break a rule go to ``errors``.
    """
    images, bbox = config.images, config.coco_bbox
    source = SourceSet("fraction" if config.box_unit == "fraction" else "pixel", classes)
    readable = ReadableFolders(folder, [*images, *config.linked_folders])
    finder = FileFinder([*images, folder], readable, SUFFIXES)
    outside: list[str] = []
    for split, path in files.items():
        own = existing([*images, *image_folders(path, split, folder)])
        reader = _File(source, path, split, stated_split(path, folder) is not None, finder, own, errors)
        annotations = Annotations(path.name, bbox, config.difficult, errors)
        is_own = _read_file(path, reader, annotations)
        reader.settle_splits()
        columns = annotations.columns()
        corners = corners_of(columns, bbox, name=path.name)
        if config.box_unit == "auto" and not is_own:
            refuse_fractions(columns.given, path.name)
        reader.enter(annotations, columns, corners)
        annotations.report()
        outside += reader.outside
    _find_by_bare_names(source, finder)
    if outside:
        report(
            f"{len(outside):,} file names lead out of the image folder, {outside[0]} for example: files of their last "
            "part are looked for in images= and in the data folder"
        )
    if classes.given is None:
        _settle_equal_names(source)
    return source


def _read_file(path: Path, reader: _File, annotations: Annotations) -> bool:
    """Enter all elements; whether the file is one that ``convert`` wrote, whose boxes are pixels however small."""
    seen, is_own = set(), False
    for name, number, element in elements(path, LISTS):
        if number == 0:
            seen.add(name)
            is_own = is_own or (name == "info" and element == OWN_INFO)
        elif name == "annotations":
            annotations.add(number, element)
        elif name == "images":
            reader.add_image(number, element)
        else:
            reader.add_category(number, element)
    for name in LISTS:
        if name not in seen:
            raise DataError(f"{path}: a COCO file must hold a list of {name}, but holds none")
    return is_own


class _File:
    """One annotation file: its images, which are added to the source, and its categories."""

    def __init__(
        self,
        source: SourceSet,
        path: Path,
        split: str,
        split_is_stated: bool,
        finder: FileFinder,
        folders: Sequence[Path],
        errors: RowErrors,
    ) -> None:
        self.source, self.name, self.split, self.errors = source, path.name, split, errors
        self.outside: list[str] = []
        """Names that lead out of the folder of images, as they are shown."""
        self._split_is_stated, self._finder, self._folders = split_is_stated, finder, list(folders)
        self._first = len(source.images)
        self._positions: dict[int | str, int] = {}
        self._names: set[str] = set()
        self._categories: dict[int | str, tuple[int, str, str | None]] = {}
        self._absent: list[tuple[int, int | str]] = []
        self._incomplete: list[tuple[int, int | str]] = []

    def add_category(self, number: int, category: Any) -> None:
        """Add one element of the list of categories."""
        where = f"{self.name} category {number}"
        name = category.get("name") if isinstance(category, dict) else None
        if not isinstance(category, dict) or not isinstance(name, str) or not name.strip():
            raise DataError(f"{where}: a category must have an id and a name, but got {shown(category)}")
        key, label = key_of(category.get("id")), category.get("label_name")
        label = label.strip() if isinstance(label, str) and label.strip() and label.isprintable() else None
        if key is None or key in self._categories:
            raise DataError(f"{where}: a category must have an id of its own, but got id={shown(category.get('id'))}")
        if label is not None and label in (given for _, _, given in self._categories.values()):
            raise DataError(f"{where}: a category must have a label_name of its own, but got {shown(label)} again")
        self._categories[key] = (number, name, label)

    def add_image(self, number: int, image: Any) -> None:
        """Add one element of the list of images."""
        where = f"{self.name} image {number}"
        key = key_of(image.get("id")) if isinstance(image, dict) else None
        if not isinstance(image, dict) or key is None:
            raise DataError(f"{where}: an image must have an id, but got {shown(image)}")
        # LVIS has no file names: the URL ends with train2017/000000391895.jpg.
        given = image.get("file_name") or "/".join(str(image.get("coco_url", "")).split("/")[-2:])
        leads_out = False
        try:
            name = safe_name(given, where)
        except DataError:
            leads_out, name = True, bare_name(given) or ""
        if not name:
            note(self.errors, where, "file_name must stay inside the image folder", f"file_name={shown(given)}")
            return
        if key in self._positions or (name in self._names and not leads_out):
            note(self.errors, where, "an image must be listed once", f"id={shown(key)}, file_name={shown(name)}")
            return
        position = len(self.source.images)
        if leads_out:
            self.outside.append(shown(given))
        self._names.add(name)
        self._positions[key] = position
        file = None if leads_out else self._finder.at(name, self._folders)
        # One folder for each split distinguishes files of the same name.
        folder = "" if "/" in name else f"{short_name(self.split)}/"
        split = self._split(image, where)
        self.source.images.append(SourceImage(split, f"{folder}{name}", file, _size(image)))
        if "neg_category_ids" in image or image.get("not_exhaustive_category_ids"):
            self.source.federated = True
        for field, found in (
            ("neg_category_ids", self._absent),
            ("not_exhaustive_category_ids", self._incomplete),
        ):
            listed = image.get(field) or []
            if not isinstance(listed, list):
                raise DataError(f"{where}: {field} must be a list of category ids, but got {shown(listed, limit=80)}")
            found += [(position, own) for other in listed if (own := key_of(other)) is not None]

    def _split(self, image: dict[str, Any], where: str) -> str:
        given = image.get("split")
        if not isinstance(given, str) or not given.strip():
            return self.split
        if given.strip().lower() not in SPLIT_NAMES:
            raise DataError(f"{where}: split must be train, val or test, but got split={shown(given)}")
        return SPLIT_NAMES[given.strip().lower()]

    def settle_splits(self) -> None:
        """Take the splits that the folders in file_name state, for a file that states none by its own name."""
        own = self.source.images[self._first :]
        if self._split_is_stated or {image.split for image in own} != {self.split}:
            return
        stated = [split_of_folders(PurePosixPath(image.name).parts[:-1]) for image in own]
        stated = [split if "/" in image.name else None for split, image in zip(stated, own, strict=True)]
        if {split for split in stated if split} - {self.split}:
            report(f"{self.name}: the folders in file_name state the splits of the images")
            self.source.images[self._first :] = [
                replace(image, split=split or self.split) for image, split in zip(own, stated, strict=True)
            ]

    def enter(self, annotations: Annotations, columns: Columns, corners: NDArray[np.float64]) -> None:
        """Enter the boxes and image-level labels of the file in the source."""
        class_of = self._classes(np.bincount(columns.category, minlength=len(annotations.categories.of)), annotations)
        _same_kind(annotations.images, self._positions, "image_id", "images", self.name)
        _same_kind(annotations.categories, class_of, "category_id", "categories", self.name)
        image = annotations.images.table(self._positions, -1)[columns.image]
        category = annotations.categories.table(class_of, -2)[columns.category]
        keys = {
            name: list(numbers.of)
            for name, numbers in (("image", annotations.images), ("category", annotations.categories))
        }
        for name, wrong, ids in (
            ("image", image < 0, columns.image),
            ("category", (image >= 0) & (category == -2), columns.category),
        ):
            rows = np.flatnonzero(wrong)
            listed = rows[:SHOWN] if self.errors.on_bad_row == "stop" else rows
            self.errors.count += len(rows) - len(listed)
            for row in listed.tolist():
                where = f"{self.name} annotation {columns.numbers[row]}"
                value = f"{name}_id={shown(keys[name][int(ids[row])])}"
                note(self.errors, where, f"{name}_id must be that of a listed {name}", value)
        good = (image >= 0) & (category >= 0)
        self.source.boxes.extend(
            image[good], category[good], corners[good], columns.flags[good], file=self.name,
            numbers=columns.numbers[good], what="annotation",
        )  # fmt: skip
        for found, pairs in ((self.source.absent, self._absent), (self.source.incomplete, self._incomplete)):
            found += [(position, index) for position, key in pairs if (index := class_of.get(key, -1)) >= 0]

    def _classes(self, boxes: np.ndarray, annotations: Annotations) -> dict[int | str, int]:
        """Category id -> class index; -1 for a category that is not in the class list."""
        found: dict[int | str, int] = {}
        names: Counter[str] = Counter()
        for key, (number, name, label) in self._categories.items():
            index = self.source.classes.find(name, class_id=label, number=names[name])
            names[name] += 1
            found[key] = -1 if index is None else index
            if index is None:
                count = int(boxes[annotations.categories.of[key]]) if key in annotations.categories.of else 0
                value = f"name={shown(name)}, with {count:,} annotations"
                note(self.errors, f"{self.name} category {number}", "a category must be in the class list", value)
        return found


def _size(image: dict[str, Any]) -> tuple[int, int] | None:
    """The declared (height, width); None if it is missing, or no size at all."""
    sides = [image.get("height"), image.get("width")]
    if not all(isinstance(side, int | float) and 1 <= side <= _MOST_PIXELS for side in sides):
        return None
    height, width = (int(side) for side in sides if side is not None)
    return height, width


def _same_kind(numbers: Numbers, listed: dict[int | str, int], field: str, what: str, name: str) -> None:
    """Raise DataError where ids are texts on one side and numbers on the other: no row would be found."""
    for key in (key for key in numbers.of if key not in listed):
        other = str(key) if isinstance(key, int) else int(key) if key.isdecimal() and len(key) < 20 else None
        if other in listed:
            kinds = ("a text", "numbers") if isinstance(key, str) else ("a number", "texts")
            raise DataError(
                f"{name}: {field} of the annotations must be an id of the {what}, but it is {kinds[0]} ({shown(key)}) "
                f"while the ids of the {what} are {kinds[1]} ({shown(other)}); write both as numbers"
            )


def _find_by_bare_names(source: SourceSet, finder: FileFinder) -> None:
    """Find the files of images that are not at their paths: by the name without folders, where it is unambiguous."""
    missing = [position for position, image in enumerate(source.images) if image.file is None]
    if not missing:
        return
    bare = Counter(PurePosixPath(image.name).name for image in source.images)
    taken = {image.file for image in source.images}
    found = 0
    for position in missing:
        image = source.images[position]
        name = PurePosixPath(image.name).name
        if bare[name] == 1:
            root = finder.readable.data
            files = [path for path in finder.named(name) if path not in taken and _may_be(path, root, image.split)]
            if len(files) == 1:
                source.images[position] = replace(image, file=files[0])
                found += 1
    if found:
        report(f"{found:,} images were found by their names alone, not in the folders that file_name names")


def _may_be(path: Path, root: Path, split: str) -> bool:
    """Whether a file does not lie in a folder of another split."""
    parts = path.relative_to(root).parts[:-1] if path.is_relative_to(root) else ()
    return split_of_folders(parts) in (None, split)


def _settle_equal_names(source: SourceSet) -> None:
    """Remove repeated classes without a box (exports put the name of a group before its classes); others stay."""
    boxed = set(np.unique(source.boxes.class_index).tolist())
    unwanted: set[int] = set()
    for name, count in Counter(source.classes.names).items():
        if count > 1:
            own = [index for index, other in enumerate(source.classes.names) if other == name]
            used = [index for index in own if index in boxed] or own[:1]
            unwanted |= set(own) - set(used)
    if unwanted:
        wanted = [index for index in range(len(source.classes.names)) if index not in unwanted]
        now = {before: after for after, before in enumerate(wanted)}
        source.renumber_classes([now.get(index, -1) for index in range(len(source.classes.names))])
