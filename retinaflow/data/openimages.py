"""The published Open Images files -> AnnotationIndex. Only this file knows their names and columns.

A data folder looks like the published downloads: ``images/`` (or one folder per split),
``{split}-annotations-bbox.csv``, ``{split}-annotations-human-imagelabels.csv``, ``class-descriptions.csv`` and
optionally a hierarchy JSON. The names in the Challenges 2018 and 2019 and in Open Images V4 to V7 are recognised too.
Columns are read by header name, so the 13 columns of 2018 and the 7 of 2019 both work; flags that a file lacks are 0.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pa_compute
from numpy.typing import NDArray

from retinaflow.data.class_files import read_taxonomy
from retinaflow.data.index import FLAGS, AnnotationIndex, row_starts
from retinaflow.data.tables import RowErrors, Source, Table, TextColumn, read_table
from retinaflow.data.text_lines import read_lines
from retinaflow.errors import DataError, SettingError
from retinaflow.taxonomy import Taxonomy

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
CORNERS = ("XMin", "YMin", "XMax", "YMax")
_NOT_PLAIN = r"[/\\\x00:]|^[. ]*$"
_MOST_PIXELS = 1 << 16


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


def find_files(
    data: Path,
    splits: Sequence[str],
    *,
    boxes: Sequence[Path] = (),
    image_labels: Sequence[Path] | None = (),
    classes: Path | None = None,
    hierarchy: Path | None = None,
    use_hierarchy: bool = True,
) -> SourceFiles:
    """The published files of some splits under ``data``; a given path replaces the file that would be looked up.

    ``image_labels=None``: no image-level labels. Raises MissingAnnotationsError with the names looked for.
    """
    if classes is None:
        classes = _first(data, CLASS_FILES, "classes")
    if not boxes:
        boxes = [_first(data, [name.format(split=split) for name in BOX_FILES], "boxes") for split in splits]
    if image_labels is not None and not image_labels:
        looked_for = [[name.format(split=split) for name in LABEL_FILES] for split in splits]
        image_labels = [_first(data, names, "image_labels") for names in looked_for]
    if hierarchy is None and use_hierarchy:
        hierarchy = next((data / name for name in HIERARCHY_FILES if (data / name).is_file()), None)
    return SourceFiles(tuple(boxes), tuple(image_labels or ()), classes, hierarchy)


def _first(data: Path, names: Sequence[str], setting: str) -> Path:
    if not data.is_dir():
        raise MissingAnnotationsError(f"data={data}: no such folder")
    for name in names:
        if (data / name).is_file():
            return data / name
    hint = " or image_labels=none if there are none" if setting == "image_labels" else ""
    if setting == "boxes" and (there := sorted(path.name for path in data.glob("*-annotations-bbox.csv"))):
        hint += f"; there are {', '.join(there[:5])}: train_splits= and eval_split= name the splits to read"
    raise MissingAnnotationsError(
        f"{data} holds none of {', '.join(names)}; add the file, or give its path as {setting}={hint}"
    )


def read_annotations(
    files: SourceFiles, errors: RowErrors, *, allow_repeats: bool = False, progress: Callable[[str], None]
) -> AnnotationIndex:
    """Read and verify every row. Rows with errors stop the reading or are dropped, by the setting in ``errors``.

    A repeated box is an error in training data; ``allow_repeats`` keeps both boxes, as the rules of the metric require.
    Raises DataError with file, line, rule and value. The result has no image files yet.
    """
    taxonomy = read_taxonomy(files.classes, files.hierarchy)
    boxes, labels = files.boxes, files.image_labels
    return build_annotations(taxonomy, boxes, labels, errors, allow_repeats=allow_repeats, progress=progress)


def build_annotations(
    taxonomy: Taxonomy,
    boxes: Sequence[Source],
    image_labels: Sequence[Source],
    errors: RowErrors,
    *,
    allow_repeats: bool = False,
    progress: Callable[[str], None] = lambda line: None,
) -> AnnotationIndex:
    """As :func:`read_annotations`, from files or frames in the published columns."""
    box_tables = [_read_boxes(source, taxonomy, errors, allow_repeats=allow_repeats) for source in boxes]
    label_tables = [_read_labels(source, taxonomy, errors) for source in image_labels]
    for table in (*box_tables, *label_tables):
        progress(f"{table.path.name}: {len(table):,} rows")
    errors.settle()
    _refuse_shared_images(box_tables)
    return _assemble(taxonomy, box_tables, label_tables)


def _assemble(taxonomy: Taxonomy, box_tables: Sequence[Table], label_tables: Sequence[Table]) -> AnnotationIndex:
    """Sort the rows by image, keeping their order within each."""
    image_ids, images = _number_images([*box_tables, *label_tables])
    box_image = _joined(images[: len(box_tables)], np.int32)
    label_image = _joined(images[len(box_tables) :], np.int32)
    box_order, label_order = _order(box_image), _order(label_image)
    corners = np.stack([_column(box_tables, name, np.float64) for name in CORNERS], axis=1)
    flags = np.zeros(len(box_image), dtype=np.uint8)
    for bit, name in enumerate(FLAGS):
        flags |= (_column(box_tables, name, np.float64) == 1).astype(np.uint8) << bit
    count = len(image_ids)
    return AnnotationIndex(
        taxonomy=taxonomy,
        image_ids=image_ids,
        files=np.zeros(count, dtype="<U1"),
        sizes=np.zeros((count, 2), dtype=np.int32),
        box_start=row_starts(box_image, count),
        boxes=corners[box_order],
        labels=_column(box_tables, "class", np.int32)[box_order],
        flags=flags[box_order],
        label_start=row_starts(label_image, count),
        verified_class=_column(label_tables, "class", np.int32)[label_order],
        verified_present=(_column(label_tables, "Confidence", np.float64) == 1)[label_order],
    )


def _number_images(tables: Sequence[Table]) -> tuple[NDArray[np.str_], list[NDArray[np.int32]]]:
    """The ids in all tables, ascending, and for each table the index of each row's image among them."""
    together = TextColumn.encode(
        pa.chunked_array([table.texts["ImageID"].used() for table in tables], type=pa.string())
    )
    order = _ascending(together.values)
    rank = np.empty(len(order), dtype=np.int32)
    rank[order] = np.arange(len(order), dtype=np.int32)
    numbers, start = [], 0
    for texts in (table.texts["ImageID"] for table in tables):
        is_used = np.bincount(texts.codes, minlength=len(texts.values)) > 0
        of_value = np.zeros(len(texts.values), dtype=np.int32)
        count = int(is_used.sum())
        of_value[is_used] = rank[together.codes[start : start + count]]
        numbers.append(of_value[texts.codes])
        start += count
    ids = together.values.take(pa.array(order)).to_numpy(zero_copy_only=False)
    return (ids.astype(np.str_) if len(ids) else np.zeros(0, dtype="<U1")), numbers


def _ascending(values: pa.StringArray) -> NDArray[np.int64]:
    """The order that sorts distinct texts; the published files are sorted already."""
    if len(values) < 2 or pa_compute.all(pa_compute.less(values[:-1], values[1:])).as_py():
        return np.arange(len(values))
    return np.asarray(pa_compute.sort_indices(values).to_numpy().astype(np.int64))


def _order(image: NDArray[np.int32]) -> NDArray[np.int64] | slice:
    """The order of the rows by image; a slice, which copies nothing, if they are sorted already."""
    is_sorted = bool((image[1:] >= image[:-1]).all())
    return slice(None) if is_sorted else np.argsort(image, kind="stable")


def _read_boxes(source: Source, taxonomy: Taxonomy, errors: RowErrors, *, allow_repeats: bool) -> Table:
    table = read_table(
        source, text=("ImageID", "LabelName"), numbers=CORNERS, optional=dict.fromkeys(FLAGS, 0.0), errors=errors
    )
    table = with_class(_with_plain_ids(table, errors), taxonomy, errors)
    inside = np.ones(len(table), dtype=bool)
    for name in CORNERS:
        inside &= (table.columns[name] >= 0) & (table.columns[name] <= 1)
    table = table.require(inside, "coordinates must lie in [0, 1]", CORNERS, errors)
    x_min, x_max = table.columns["XMin"], table.columns["XMax"]
    table = table.require(x_min < x_max, "XMin < XMax must hold", ("XMin", "XMax"), errors)
    y_min, y_max = table.columns["YMin"], table.columns["YMax"]
    table = table.require(y_min < y_max, "YMin < YMax must hold", ("YMin", "YMax"), errors)
    if allow_repeats:
        return table
    return table.require(~_repeats(table), "a box must be given once", ("ImageID", "LabelName", *CORNERS), errors)


def _repeats(table: Table) -> NDArray[np.bool_]:
    """``[R]`` rows with the image, class and corners of an earlier row; the second copy would count as a missed object.

    Rows are compared by a 64-bit hash first, since few are equal: one second for ten million rows.
    """
    columns = [table.texts["ImageID"].codes, table.columns["class"], *(table.columns[name] for name in CORNERS)]
    hashed = np.zeros(len(table), dtype=np.uint64)
    for column in columns:
        # Adding 0 turns -0 into 0, which is equal but has other bits.
        hashed = (hashed ^ (column + 0.0).view(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        hashed ^= hashed >> np.uint64(29)
    alike = pd.Series(hashed).duplicated(keep=False).to_numpy()
    repeats = np.zeros(len(table), dtype=bool)
    if alike.any():
        repeats[alike] = pd.DataFrame([column[alike] for column in columns]).T.duplicated().to_numpy()
    return repeats


def _read_labels(source: Source, taxonomy: Taxonomy, errors: RowErrors) -> Table:
    table = read_table(source, text=("ImageID", "LabelName"), numbers=("Confidence",), optional={}, errors=errors)
    return with_class(_with_plain_ids(table, errors), taxonomy, errors)


def with_class(table: Table, taxonomy: Taxonomy, errors: RowErrors) -> Table:
    """The table with a column ``class``: the index of the class that a row names."""
    texts = table.texts["LabelName"]
    known = np.array([taxonomy.index_of.get(mid, -1) for mid in texts.values.to_pylist()], dtype=np.int32)
    table = table.with_columns({"class": known[texts.codes]})
    return table.require(table.columns["class"] >= 0, "LabelName must be in the class list", ("LabelName",), errors)


def _with_plain_ids(table: Table, errors: RowErrors) -> Table:
    texts = table.texts["ImageID"]
    plain = ~pa_compute.match_substring_regex(texts.values, _NOT_PLAIN).to_numpy(zero_copy_only=False).astype(bool)
    return table.require(plain[texts.codes], "ImageID must be a plain file name", ("ImageID",), errors)


def is_plain_id(image_id: str) -> bool:
    """Whether an id can only name a file inside a folder: ids are never trusted as paths."""
    return re.search(_NOT_PLAIN, image_id) is None


def read_image_sizes(path: Path, errors: RowErrors) -> tuple[NDArray[np.str_], NDArray[np.int32]]:
    """A table of image sizes (ImageID, Width, Height, in pixels): ids ``[S]`` and (height, width) ``[S, 2]``."""
    table = read_table(path, text=("ImageID",), numbers=("Width", "Height"), optional={}, errors=errors)
    table = _with_plain_ids(table, errors)
    sides = np.stack([table.columns["Height"], table.columns["Width"]], axis=1)
    whole = np.asarray(((sides >= 1) & (sides < _MOST_PIXELS) & (sides == np.floor(sides))).all(axis=1))
    table = table.require(
        whole, f"sizes must be whole numbers from 1 to {_MOST_PIXELS - 1}", ("Width", "Height"), errors
    )
    texts = table.texts["ImageID"]
    repeated = np.ones(len(table), dtype=bool)
    repeated[np.unique(texts.codes, return_index=True)[1]] = False
    table = table.require(~repeated, "an image must have one size", ("ImageID",), errors)
    errors.settle()
    ids = texts.values.take(pa.array(table.texts["ImageID"].codes)).to_numpy(zero_copy_only=False)
    sides = np.stack([table.columns["Height"], table.columns["Width"]], axis=1)
    return ids.astype(np.str_) if len(ids) else np.zeros(0, dtype="<U1"), sides.astype(np.int32)


def split_image_ids(
    data: Path, splits: Sequence[str], *, boxes: Sequence[Path] = (), image_labels: Sequence[Path] | None = ()
) -> NDArray[np.str_]:
    """The images in the annotation files of some splits, ascending; none if there is no such file.

    As in :func:`find_files` a given path replaces the files that would be looked up. Only ids are read.
    """

    def looked_up(names: Sequence[str]) -> list[Path]:
        paths = [[data / name.format(split=split) for name in names] for split in splits]
        return [found for found in (next(filter(Path.is_file, options), None) for options in paths) if found]

    labels = () if image_labels is None else image_labels or looked_up(LABEL_FILES)
    errors = RowErrors("stop")
    tables = [
        _with_plain_ids(read_table(path, text=("ImageID",), numbers=(), optional={}, errors=errors), errors)
        for path in (*(boxes or looked_up(BOX_FILES)), *labels)
    ]
    errors.settle()
    ids = {image_id for table in tables for image_id in table.texts["ImageID"].used().to_pylist()}
    return np.array(sorted(ids), dtype=np.str_)


def read_image_ids(path: Path, *, setting: str = "eval_ids") -> NDArray[np.str_]:
    """A list of image ids: the Challenge's ``ImageID`` column, or one plain id per line. Errors name ``setting``."""
    if not path.is_file():
        raise SettingError(f"{setting}={path}: no such file")
    lines = [line.split(",")[0].strip().strip('"') for line in read_lines(path)]
    ids = [line for line in lines if line and line != "ImageID"]
    if not ids:
        raise SettingError(f"{setting}={path}: the list must hold at least one image id, but is empty")
    return np.array(sorted(set(ids)), dtype=np.str_)


def _refuse_shared_images(tables: Sequence[Table]) -> None:
    for table, earlier in combinations(reversed(tables), 2):
        own = table.texts["ImageID"].used()
        shared = own.filter(pa_compute.is_in(own, value_set=earlier.texts["ImageID"].used()))
        if len(shared):
            raise DataError(
                f"{table.path.name}: an image must be in one split, but {shared[0]} is in {earlier.path.name} too"
            )


def _column(tables: Sequence[Table], name: str, dtype: type) -> NDArray[Any]:
    return _joined([table.columns[name] for table in tables], dtype)


def _joined(parts: Sequence[NDArray[Any]], dtype: type) -> NDArray[Any]:
    """One column of those of several tables, without a copy when there is one table."""
    return parts[0] if len(parts) == 1 else np.concatenate([np.zeros(0, dtype=dtype), *parts])
