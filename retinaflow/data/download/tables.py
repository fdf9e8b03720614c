"""Published tables, filtered while they are read: the rows of some classes, or of some images.

Rows are split at commas, since the columns up to the filtered ones hold no quotes. The written tables have the
published header and unchanged rows. So the largest table (training boxes, about 2.3 GB) needs no memory and is read
once: a finished file stays until the download is complete.
"""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from tqdm import tqdm

from retinaflow.data.class_files import read_taxonomy
from retinaflow.data.class_groups import select_classes
from retinaflow.data.download import urls
from retinaflow.data.download.request import Request
from retinaflow.errors import DataError, shown
from retinaflow.files import atomic_file
from retinaflow.progress import report
from retinaflow.taxonomy import Taxonomy

IMAGE, LABEL = "ImageID", "LabelName"


def fetch_classes(request: Request) -> tuple[Taxonomy, tuple[str, ...]]:
    """All boxable classes, and the ids of those to fetch with their descendants; () with given image ids: all."""
    paths = []
    for name in (urls.CLASSES, urls.HIERARCHY):
        path = request.work / Path(name).name
        if not path.is_file():
            with atomic_file(path) as partial:
                partial.write_bytes(request.fetcher.read(request.table_url(name)))
        paths.append(path)
    taxonomy = read_taxonomy(*paths)
    if request.config.class_group is None:
        return taxonomy, ()
    chosen = select_classes(request.config.class_group, taxonomy)
    below = np.flatnonzero(taxonomy.is_ancestor[:, chosen].sum(axis=1))
    return taxonomy, tuple(taxonomy.ids[index] for index in np.union1d(chosen, below).tolist())


def fetch_boxes(request: Request, split: str, classes: Sequence[str]) -> Path:
    """The filtered box table of a split, from an earlier attempt if there is one."""
    return _fetch(request, urls.BOXES[split], f"{split}-boxes.csv", classes, request.ids)


def fetch_originals(request: Request, split: str, images: Iterable[str]) -> dict[str, tuple[str, int, str]]:
    """Image id -> (URL, bytes, MD5 in base64) of the original of each image; 0 and empty where they are unknown."""
    path = _fetch(request, urls.ORIGINALS[split], f"{split}-originals.csv", (), frozenset(images))
    with path.open(encoding="utf-8", newline="") as file:
        return {
            row[IMAGE]: (
                row["OriginalURL"],
                int(row["OriginalSize"]) if row["OriginalSize"].isdecimal() else 0,
                row.get("OriginalMD5") or "",
            )
            for row in csv.DictReader(file)
        }


def _fetch(request: Request, published: str, name: str, classes: Sequence[str], images: frozenset[str] | None) -> Path:
    """A table with the rows of some classes (() for all) and images (None for all), read unless it is there."""
    path = request.work / name
    if path.is_file():
        return path
    wanted = {LABEL: frozenset(classes)} if classes else {}
    wanted |= {} if images is None else {IMAGE: images}
    url = request.table_url(published)
    size = request.fetcher.size(url)
    report(f"reading {url}{f' ({size / 2**20:,.0f} MiB)' if size else ''}")
    with tqdm(total=size, unit="B", unit_scale=True, disable=None, leave=False) as bar:

        def seen(count: int) -> None:
            bar.update(count)
            request.check()

        write_lines(filtered(request.fetcher.lines(url, seen=seen), wanted, name=url), path)
    return path


def write_annotations(
    request: Request, split: str, classes: Sequence[str], chosen: frozenset[str], fetched: frozenset[str]
) -> None:
    """Write the published tables of a split with the rows of the fetched images."""
    boxes = request.work / f"{split}-boxes.csv"
    # Labels of all chosen images: a later attempt may fetch more of them.
    labels = _fetch(request, urls.LABELS[split], f"{split}-labels.csv", classes, chosen)
    for path, name in ((boxes, "bbox"), (labels, "human-imagelabels")):
        with path.open("rb") as file:
            lines = (line.rstrip(b"\n") for line in file)
            rows = filtered(lines, {IMAGE: fetched}, name=path.name)
            write_lines(rows, request.folder / f"{split}-annotations-{name}.csv")


def write_classes(request: Request, ids: Iterable[str]) -> None:
    """Write the rows of the class list for some ids, in its order, and the hierarchy."""
    chosen = set(ids)
    data = (request.work / Path(urls.CLASSES).name).read_bytes()
    rows = [row for row in csv.reader(io.StringIO(data.decode("utf-8-sig"))) if row and row[0] in chosen]
    with (request.folder / "class-descriptions.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
    hierarchy = Path(urls.HIERARCHY).name
    shutil.copyfile(request.work / hierarchy, request.folder / hierarchy)


def filtered(lines: Iterable[bytes], wanted: Mapping[str, frozenset[str]], *, name: str) -> Iterator[bytes]:
    """The header, and the rows whose named columns hold one of the wanted values; all rows if no column is named.

    Raises DataError for a table without those columns.
    """
    rows = iter(lines)
    header = next(rows, b"").removeprefix(b"\xef\xbb\xbf")
    names = [column.strip() for column in header.decode("utf-8", errors="replace").split(",")]
    missing = [column for column in (IMAGE, *wanted) if column not in names]
    if missing:
        raise DataError(f"{name} line 1: the header must name {', '.join(missing)}, but got {shown(names)}")
    tests = [(names.index(column), {value.encode() for value in values}) for column, values in wanted.items()]
    columns = max((column for column, _ in tests), default=0) + 1
    yield header
    for row in rows:
        fields = row.split(b",", columns)
        if len(fields) >= columns and all(fields[column] in values for column, values in tests):
            yield row


def write_lines(lines: Iterable[bytes], path: Path) -> None:
    """Write lines to a file, atomically."""
    with atomic_file(path) as partial, partial.open("wb") as file:
        for line in lines:
            file.write(line + b"\n")


def image_classes(path: Path, ids: tuple[str, ...]) -> tuple[NDArray[np.str_], NDArray[np.int64], NDArray[np.int64]]:
    """The distinct (image, class) pairs of a table: image ids ``[I]``, image ``[N]``, class ``[N]`` (index in
    ``ids``)."""
    table = pd.read_csv(path, usecols=[IMAGE, LABEL], dtype=str, na_filter=False).drop_duplicates()
    table = table[table[LABEL].isin(ids)]
    image, names = pd.factorize(table[IMAGE], sort=True)
    classes = pd.Index(ids).get_indexer(pd.Index(table[LABEL]))
    return np.asarray(names, dtype=np.str_), image.astype(np.int64), classes.astype(np.int64)


def images_of(path: Path) -> list[str]:
    """The distinct image ids of a table, sorted."""
    return sorted(set(pd.read_csv(path, usecols=[IMAGE], dtype=str, na_filter=False)[IMAGE]))
