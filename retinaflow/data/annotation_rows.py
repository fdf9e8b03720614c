"""Rows of boxes, image-level labels and sizes in the published columns -> AnnotationIndex, every row verified.

Columns are read by header name, so the 13 columns of 2018 and the 7 of 2019 both work; flags that a file lacks are 0.
An image-level label has three states: ``Confidence`` 1 is verified present, 0 verified absent; a machine's label (a
Confidence between them, or Source ``machine``) is unverified and left out. Labels of classes that the class list lacks
are left out too, since the published file names some 20,000 classes. Both are counted in a line of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pa_compute
from numpy.typing import NDArray

from retinaflow.data.id_columns import as_text, with_class, with_plain_ids
from retinaflow.data.index import FLAGS, AnnotationIndex, row_starts
from retinaflow.data.table_reader import read_table
from retinaflow.data.tables import RowErrors, Source, Table, TextColumn, row_hashes
from retinaflow.errors import DataError
from retinaflow.taxonomy import Taxonomy

CORNERS = ("XMin", "YMin", "XMax", "YMax")
_MACHINE = "machine"


def build_annotations(
    taxonomy: Taxonomy,
    boxes: Sequence[Source],
    image_labels: Sequence[Source],
    errors: RowErrors,
    *,
    allow_repeats: bool = False,
    progress: Callable[[str], None] = lambda line: None,
) -> AnnotationIndex:
    """Read and verify every row of files or frames. Rows with errors stop the reading or are dropped, by the setting in
    ``errors``, which also gets a notice for what is left out without being an error.

    A repeated box is an error in training data; ``allow_repeats`` keeps both boxes, as the rules of the metric require.
    Raises DataError with file, line, rule and value. The result has no image files yet.
    """
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
        verified_present=_column(label_tables, "present", np.bool_)[label_order],
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
    return as_text(together.values.take(pa.array(order))), numbers


def _ascending(values: pa.StringArray) -> NDArray[np.int64]:
    """The order that sorts distinct texts; the published files are sorted already."""
    if len(values) < 2 or pa_compute.all(pa_compute.less(values[:-1], values[1:])).as_py():
        return np.arange(len(values))
    return np.asarray(pa_compute.sort_indices(values).to_numpy().astype(np.int64))


def _order(image: NDArray[np.int32]) -> NDArray[np.int64] | slice:
    """The order of the rows by image; a slice, which copies nothing, if they are sorted already."""
    is_sorted = bool((image[1:] >= image[:-1]).all())
    return slice(None) if is_sorted else np.argsort(image, kind="stable")


# Boxes


def _read_boxes(source: Source, taxonomy: Taxonomy, errors: RowErrors, *, allow_repeats: bool) -> Table:
    counts = _Counts()

    def check(table: Table) -> Table:
        counts.rows += len(table)
        table = with_class(with_plain_ids(table, errors), taxonomy, errors)
        for name in FLAGS:
            known = np.isin(table.columns[name], (-1, 0, 1))
            table = table.require(known, f"{name} must be 1 (yes), 0 (no) or -1 (unknown)", (name,), errors)
        inside = np.ones(len(table), dtype=bool)
        for name in CORNERS:
            inside &= (table.columns[name] >= 0) & (table.columns[name] <= 1)
        counts.outside += int(np.count_nonzero(~inside))
        table = table.require(inside, "coordinates must lie in [0, 1]", CORNERS, errors)
        before = len(table)
        for low, high in (("XMin", "XMax"), ("YMin", "YMax")):
            valid = table.columns[low] < table.columns[high]
            table = table.require(valid, f"{low} < {high} must hold", (low, high), errors)
        counts.without_area += before - len(table)
        return table

    table = read_table(
        source,
        text=("ImageID", "LabelName"),
        numbers=CORNERS,
        optional=dict.fromkeys(FLAGS, 0.0),
        errors=errors,
        check=check,
    )
    errors.hints += counts.hints(table.path.name)
    if allow_repeats:
        return table
    return table.require(~_repeats(table), "a box must be given once", ("ImageID", "LabelName", *CORNERS), errors)


@dataclass
class _Counts:
    """Rows of a file of boxes, and those that break a rule about their corners."""

    rows: int = 0
    outside: int = 0
    without_area: int = 0

    def hints(self, name: str) -> list[str]:
        """What the file seems to hold when the corners of many rows break a rule."""
        if 2 * self.outside > self.rows:
            return [
                f"Most rows of {name} reach out of the image: are they in pixels? XMin and XMax are fractions of its "
                "width, YMin and YMax of its height."
            ]
        if 10 * self.without_area > self.rows and self.without_area > 1:
            return [
                f"Many rows of {name} have no area: are XMax and YMax a width and a height, or columns exchanged? "
                "They are the right and the bottom edge."
            ]
        return []


def _repeats(table: Table) -> NDArray[np.bool_]:
    """``[R]`` rows with the image, class and corners of an earlier row; the second copy would count as a missed object.

    Rows are compared by a 64-bit hash first, since few are equal: one second for ten million rows.
    """
    columns = [table.texts["ImageID"].codes, table.columns["class"], *(table.columns[name] for name in CORNERS)]
    alike = pd.Series(row_hashes(columns)).duplicated(keep=False).to_numpy()
    repeats = np.zeros(len(table), dtype=bool)
    if alike.any():
        repeats[alike] = pd.DataFrame([column[alike] for column in columns]).T.duplicated().to_numpy()
    return repeats


# Image-level labels


def _read_labels(source: Source, taxonomy: Taxonomy, errors: RowErrors) -> Table:
    unlisted, unverified = _LeftOut("LabelName"), _LeftOut("Confidence")
    rows = 0

    def check(table: Table) -> Table:
        nonlocal rows
        rows += len(table)
        texts = table.texts["LabelName"]
        names = set(taxonomy.names) - set(taxonomy.ids)
        listed = [mid in taxonomy.index_of or mid in names or not mid for mid in texts.values.to_pylist()]
        table = unlisted.without(table, np.array(listed, dtype=bool)[texts.codes])
        table = with_class(with_plain_ids(table, errors), taxonomy, errors)
        confidence, sources = table.columns["Confidence"], table.texts["Source"]
        of_machine = np.array([text == _MACHINE for text in sources.values.to_pylist()], dtype=bool)[sources.codes]
        is_verified = ~(of_machine & (confidence >= 0) & (confidence <= 1)) & ~((confidence > 0) & (confidence < 1))
        table = unverified.without(table, is_verified)
        is_known = np.isin(table.columns["Confidence"], (0, 1))
        rule = "Confidence must be 1 (verified present) or 0 (verified absent)"
        table = table.require(is_known, rule, ("Confidence",), errors)
        # No more than the index needs: these columns have millions of rows.
        columns = {"class": table.columns["class"], "present": table.columns["Confidence"] == 1}
        return Table(table.path, columns, {"ImageID": table.texts["ImageID"]}, table.lines)

    table = read_table(
        source,
        text=("ImageID", "LabelName"),
        numbers=("Confidence",),
        optional={"Source": ""},
        errors=errors,
        check=check,
    )
    name = table.path.name
    errors.left_out += unlisted.rows + unverified.rows
    if unlisted.rows:
        whole = ", which are all rows: is it the file of this class list?" if unlisted.rows == rows else ""
        errors.notices.append(
            f"{name}: {unlisted.rows:,} labels of classes that the class list lacks are left out "
            f"({unlisted.example}){whole}"
        )
    if unverified.rows:
        errors.notices.append(
            f"{name}: {unverified.rows:,} labels of a machine (a Confidence between 0 and 1, or Source machine) are "
            f"unverified and left out ({unverified.example})"
        )
    return table


@dataclass
class _LeftOut:
    """Counts rows that are left out without being an error, with the first of them as an example."""

    column: str
    rows: int = 0
    example: str = ""

    def without(self, table: Table, wanted: NDArray[np.bool_]) -> Table:
        """The rows where ``wanted`` holds; the others are counted."""
        if wanted.all():
            return table
        other = np.flatnonzero(~wanted)
        if not self.rows:
            row = int(other[0])
            self.example = f"line {table.lines[row]}: {table.shown(row, (self.column,))}"
        self.rows += len(other)
        return table.take(wanted)


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
