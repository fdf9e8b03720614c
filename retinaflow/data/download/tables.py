"""Published tables, filtered while they stream into a file: rows of some classes, or of some images.

The rows are split at commas: columns up to the one filtered by hold none. What is written has the published header and
rows as they came, so the largest table (training boxes, about 2.3 GB) needs no memory, and is read once: a finished
file stays until the download is complete.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

IMAGE, LABEL = "ImageID", "LabelName"


def filtered(lines: Iterable[bytes], wanted: Mapping[str, frozenset[str]], *, name: str) -> Iterator[bytes]:
    """The header and those rows whose named columns have one of the wanted values; without any, all rows.

    Raises ValueError for a table without those columns.
    """
    rows = iter(lines)
    header = next(rows, b"").removeprefix(b"\xef\xbb\xbf")
    names = [column.strip() for column in header.decode("utf-8", errors="replace").split(",")]
    missing = [column for column in (IMAGE, *wanted) if column not in names]
    if missing:
        raise ValueError(f"{name} line 1: the header must name {', '.join(missing)}, but got {names!r:.200}")
    tests = [(names.index(column), {value.encode() for value in values}) for column, values in wanted.items()]
    deepest = max((place for place, _ in tests), default=0) + 1
    yield header
    for row in rows:
        fields = row.split(b",", deepest)
        if len(fields) > deepest - 1 and all(fields[place] in values for place, values in tests):
            yield row


def keep(lines: Iterable[bytes], path: Path) -> None:
    """Write lines to a file, which is there whole or not at all."""
    part = path.with_name(f"{path.name}.part")
    with part.open("wb") as file:
        for line in lines:
            file.write(line + b"\n")
    part.replace(path)


def image_classes(path: Path, ids: tuple[str, ...]) -> tuple[NDArray[np.str_], NDArray[np.int64], NDArray[np.int64]]:
    """The distinct (image, class) pairs of a kept table: image ids ``[I]``, image ``[N]``, class (place in ``ids``)."""
    table = pd.read_csv(path, usecols=[IMAGE, LABEL], dtype=str, na_filter=False).drop_duplicates()
    table = table[table[LABEL].isin(ids)]
    image, names = pd.factorize(table[IMAGE], sort=True)
    classes = pd.Index(ids).get_indexer(pd.Index(table[LABEL]))
    return np.asarray(names, dtype=np.str_), image.astype(np.int64), classes.astype(np.int64)


def images_of(path: Path) -> list[str]:
    """The distinct image ids of a kept table, sorted."""
    return sorted(set(pd.read_csv(path, usecols=[IMAGE], dtype=str, na_filter=False)[IMAGE]))


def originals_of(path: Path) -> dict[str, tuple[str, int, str]]:
    """Image id -> (address, bytes, MD5 in base64) of its original, from a kept table of images."""
    with path.open(encoding="utf-8", newline="") as file:
        return {
            row[IMAGE]: (row["OriginalURL"], int(row["OriginalSize"] or 0), row.get("OriginalMD5") or "")
            for row in csv.DictReader(file)
        }


def class_rows(data: bytes, ids: Iterable[str]) -> str:
    """The rows of the published class list for some ids, in its order."""
    chosen = set(ids)
    rows = [row for row in csv.reader(io.StringIO(data.decode("utf-8-sig"))) if row and row[0] in chosen]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
