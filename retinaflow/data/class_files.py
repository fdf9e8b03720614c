"""The published class list and hierarchy -> :class:`~retinaflow.taxonomy.Taxonomy`.

The class list is a CSV of id and name (``/m/01g317,Person``), with or without a header line ``LabelName,DisplayName``;
the hierarchy is the nested JSON of Open Images. Errors are DataErrors that name file, line and rule.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path

from retinaflow.errors import DataError, shown
from retinaflow.files import read_json, read_text
from retinaflow.taxonomy import Hierarchy, Taxonomy


def read_taxonomy(classes: Path, hierarchy: Path | None) -> Taxonomy:
    """The classes in the order of their file, and the hierarchy between them (None: there is none)."""
    links = Hierarchy() if hierarchy is None else read_hierarchy(hierarchy)
    rows = _read_class_list(classes)
    try:
        return Taxonomy(tuple(mid for mid, _ in rows), tuple(name for _, name in rows), links)
    except DataError as error:
        raise DataError(f"{classes}: {error}") from None


def _read_class_list(path: Path) -> list[tuple[str, str]]:
    if not path.is_file():
        raise DataError(f"{path}: no such file; give the class list as classes=")
    try:
        reader = csv.reader(io.StringIO(read_text(path)))
        rows = [(reader.line_num, [field.strip() for field in row]) for row in reader if any(map(str.strip, row))]
    except csv.Error as error:
        raise DataError(f"{path}: the class list must be a CSV file: {error}") from None
    width = len(rows[0][1]) if rows else 0
    if rows and rows[0][1][0] == "LabelName":
        del rows[0]
    if not rows:
        raise DataError(f"{path}: the class list must name at least one class, but is empty")
    for line, fields in rows:
        if len(fields) < 2 or not fields[0] or not fields[1]:
            rule = "a class must have an id and a name (/m/01g317,Person)"
            raise DataError(f"{path.name} line {line}: {rule}, but got {shown(','.join(fields), quotes=False)}")
        if len(fields) != width:
            rule = f"a row must have {width} fields, a name with a comma in quotes"
            raise DataError(f"{path.name} line {line}: {rule}, but got {shown(','.join(fields), quotes=False)}")
    return [(fields[0], fields[1]) for _, fields in rows]


def read_hierarchy(path: Path) -> Hierarchy:
    """The links in the published nested JSON."""
    if not path.is_file():
        raise DataError(f"{path}: no such file; give the hierarchy as hierarchy=, or hierarchy=none")
    try:
        return Hierarchy.from_tree(read_json(path))
    except DataError as error:
        raise DataError(str(error) if str(error).startswith(str(path)) else f"{path}: {error}") from None
