"""The columns that name images and classes: ids in one form, classes as their index, tables of sizes, lists of ids."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pa_compute
from numpy.typing import NDArray

from retinaflow.data.table_reader import read_table
from retinaflow.data.tables import RowErrors, Table
from retinaflow.taxonomy import Taxonomy

NOT_PLAIN = r"[/\\\x00:]|^[. ]*$"
"""What an image id must not be: ids are never trusted as paths."""
LONGEST_ID = 255
"""Bytes of a file name that file systems take."""
_MOST_PIXELS = 1 << 16
_UNKNOWN_CLASS = "LabelName must be in the class list"
_AT_ONCE = 1 << 17


def with_class(table: Table, taxonomy: Taxonomy, errors: RowErrors) -> Table:
    """The table with a column ``class``: the index of the class that a row names."""
    texts = table.texts["LabelName"]
    given = texts.values.to_pylist()
    known = np.array([taxonomy.index_of.get(mid, -1) for mid in given], dtype=np.int32)
    unknown = [given[value] for value in np.unique(texts.codes[known[texts.codes] < 0]).tolist()]
    named = next((name for name in unknown if taxonomy.named(name)), None)
    if named is not None:
        ids = " and ".join(taxonomy.ids[index] for index in taxonomy.named(named))
        hint = f"LabelName is the id of a class: {named} is the name of {ids}."
        errors.hints += [hint] if hint not in errors.hints else []
    table = table.with_columns({"class": known[texts.codes]})
    return table.require(table.columns["class"] >= 0, _UNKNOWN_CLASS, ("LabelName",), errors)


def with_normal_ids(table: Table) -> Table:
    """The table with image ids in one Unicode form (NFC), so that ``é`` in one or two characters is one id."""
    texts = table.texts["ImageID"]
    if pa_compute.all(pa_compute.string_is_ascii(texts.values)).as_py():
        return table
    # Not by Arrow, whose utf8_normalize takes the forms apart.
    normal = [unicodedata.normalize("NFC", text) for text in texts.values.to_pylist()]
    texts = texts.mapped(pa.array(normal, pa.string()))
    return Table(table.path, table.columns, {**table.texts, "ImageID": texts}, table.lines)


def with_plain_ids(table: Table, errors: RowErrors) -> Table:
    """The rows whose image id is a plain file name, ids in one Unicode form."""
    table = with_normal_ids(table)
    texts = table.texts["ImageID"]
    plain = ~pa_compute.match_substring_regex(texts.values, NOT_PLAIN).to_numpy(zero_copy_only=False).astype(bool)
    table = table.require(plain[texts.codes], "ImageID must be a plain file name", ("ImageID",), errors)
    texts = table.texts["ImageID"]
    short = pa_compute.binary_length(texts.values).to_numpy(zero_copy_only=False) <= LONGEST_ID
    return table.require(short[texts.codes], f"ImageID must have at most {LONGEST_ID} bytes", ("ImageID",), errors)


def read_image_sizes(path: Path, errors: RowErrors) -> tuple[NDArray[np.str_], NDArray[np.int32]]:
    """A table of image sizes (ImageID, Width, Height, in pixels): ids ``[S]`` and (height, width) ``[S, 2]``."""
    table = read_table(path, text=("ImageID",), numbers=("Width", "Height"), optional={}, errors=errors)
    table = with_plain_ids(table, errors)
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
    sides = np.stack([table.columns["Height"], table.columns["Width"]], axis=1)
    return as_text(texts.values.take(pa.array(table.texts["ImageID"].codes))), sides.astype(np.int32)


def image_ids_of(paths: Sequence[Path]) -> NDArray[np.str_]:
    """The ids in the ``ImageID`` columns of some files, ascending. Only ids are read."""
    errors = RowErrors("stop")

    def check(table: Table) -> Table:
        return with_plain_ids(table, errors)

    tables = [
        read_table(path, text=("ImageID",), numbers=(), optional={}, errors=errors, check=check) for path in paths
    ]
    errors.settle()
    ids = {image_id for table in tables for image_id in table.texts["ImageID"].used().to_pylist()}
    return np.array(sorted(ids), dtype=np.str_)


def as_text(values: pa.StringArray) -> NDArray[np.str_]:
    """Texts as a numpy column, a part at a time: all at once would be as many Python objects."""
    longest = pa_compute.max(pa_compute.utf8_length(values)).as_py() or 1
    result = np.zeros(len(values), dtype=f"<U{longest}")
    for start in range(0, len(values), _AT_ONCE):
        result[start : start + _AT_ONCE] = values[start : start + _AT_ONCE].to_numpy(zero_copy_only=False)
    return result
