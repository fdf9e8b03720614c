"""Built indexes kept on disk, so that a second start reads no CSV and no image header.

A cached index lies under a key made of the inputs' paths, sizes and times of change, the reader's options and its
version; any change gives another key. A damaged one is rebuilt, and that is said. ``RETINAFLOW_CACHE`` names the folder
(default ``~/.cache/retinaflow``).

Safe when several processes start at once (one builds, the others wait for it and open what it built), when one is
killed at any moment (the system takes its lock away; what it left half written is never opened, and removed by the next
builder), and when the disk is full or may not be written (the index is built and used all the same, and that is said).
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import psutil

from retinaflow.data.column_store import DOCUMENT, FORMAT, remove_partial
from retinaflow.data.image_sizes import SizeTable
from retinaflow.data.images import attach_files
from retinaflow.data.index import AnnotationIndex
from retinaflow.data.openimages import SourceFiles, read_annotations, read_image_sizes
from retinaflow.data.tables import RowError, RowErrors
from retinaflow.settings.groups import OnBadImage, OnBadRow

try:
    import fcntl
except ImportError:  # Windows: without locks two processes build twice, which costs time and nothing else.
    fcntl = None  # type: ignore[assignment]

_SMALL = 1 << 26
"""Bytes of boxes and labels below which a computed index is handed to workers as a copy."""


@dataclass(frozen=True)
class LoadedIndex:
    """An index and what was left out on the way to it (columns file, line, rule, value; empty when nothing was)."""

    index: AnnotationIndex
    dropped: pd.DataFrame


def cache_folder() -> Path:
    """Where built indexes are kept."""
    given = os.environ.get("RETINAFLOW_CACHE")
    return Path(given) if given else Path.home() / ".cache" / "retinaflow"


def load_index(
    files: SourceFiles,
    images: Sequence[Path],
    *,
    image_sizes: Path | None = None,
    on_bad_row: OnBadRow = "stop",
    on_bad_image: OnBadImage = "stop",
    allow_repeats: bool = False,
    report: Callable[[str], None],
) -> LoadedIndex:
    """The index of some published files, from the cache where it is there and whole, else built and cached.

    ``image_sizes`` is a table of sizes to believe instead of the headers of the files. Raises ValueError when a file is
    changed while it is read.
    """
    inputs = [*files.all, *images, *([image_sizes] if image_sizes else [])]
    options = [on_bad_row, on_bad_image, len(files.boxes), len(files.image_labels), files.hierarchy is not None]
    options.append(allow_repeats)
    key = _key(inputs, [*options, image_sizes is not None])
    place = cache_folder() / "index" / key
    found = _open(place, report)
    if found is not None:
        return found
    with _one_at_a_time(key, report) as is_alone:
        # Another process may have built it meanwhile.
        found = _open(place, lambda text: None)
        if found is not None:
            return found
        if is_alone:
            remove_partial(place)
        errors = RowErrors(on_bad_row)
        index = read_annotations(files, errors, allow_repeats=allow_repeats, progress=report)
        if images:
            table = SizeTable(*read_image_sizes(image_sizes, errors)) if image_sizes else None
            journal = size_journal(images)
            index, bad = attach_files(index, images, on_bad_image=on_bad_image, given=table, journal=journal)
            rule = "an image must have a readable file"
            errors.found += [RowError(image.image_id, 0, rule, image.reason) for image in bad]
        if _key(inputs, [*options, image_sizes is not None]) != key:
            raise ValueError(f"{place.name}: the files must not change while they are read, but did; start again")
        return _save(index, errors.frame(), place, report)


def _open(place: Path, report: Callable[[str], None]) -> LoadedIndex | None:
    """What is cached there, or None when nothing is, or nothing whole, which is said."""
    if not (place / DOCUMENT).exists():
        return None
    try:
        index = AnnotationIndex.open(place)
        return LoadedIndex(index, pd.DataFrame(index.notes["dropped"], columns=list(RowError._fields)))
    except (ValueError, KeyError) as error:
        report(f"the cached index is rebuilt: {error}")
        return None


def _save(index: AnnotationIndex, dropped: pd.DataFrame, place: Path, report: Callable[[str], None]) -> LoadedIndex:
    try:
        index.save(place, notes={"dropped": dropped.to_numpy().tolist()})
        return LoadedIndex(AnnotationIndex.open(place, verify=False), dropped)
    except (OSError, ValueError) as error:
        report(f"the index is not cached: {error}; is there room on the disk of {place.parent}?")
        return LoadedIndex(index, dropped)


def share_index(index: AnnotationIndex) -> AnnotationIndex:
    """The same index, mapped from a file if it is large, so that loader workers share one copy of a computed index.

    The file is removed when this process ends. Where none can be written, the index is handed on as it is.
    """
    if index.path is not None or index.boxes.nbytes + index.verified_class.nbytes < _SMALL:
        return index
    try:
        parent = cache_folder() / "shared"
        parent.mkdir(parents=True, exist_ok=True)
        _remove_left_behind(parent)
        folder = Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=parent))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        return index.mapped(folder / "index")
    except OSError:
        return index


def _remove_left_behind(parent: Path) -> None:
    """Remove what processes that were killed have shared."""
    for folder in parent.iterdir():
        number = folder.name.partition("-")[0]
        if number.isdigit() and not psutil.pid_exists(int(number)):
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _one_at_a_time(key: str, report: Callable[[str], None]) -> Iterator[bool]:
    """Wait until no other process builds this index; False where that cannot be known (no locks, no place for one)."""
    if fcntl is None:
        yield False
        return
    path = cache_folder() / "locks" / key
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError:
        yield False
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("another process is building this index; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            yield False
            return
        yield True


def size_journal(images: Sequence[Path]) -> Path:
    """Where sizes of the images of these folders are kept while and after they are read."""
    names = json.dumps([str(folder.resolve()) for folder in images])
    return cache_folder() / "sizes" / f"{hashlib.sha256(names.encode()).hexdigest()[:24]}.tsv"


def _key(inputs: Sequence[Path], options: Sequence[Any]) -> str:
    stamps: list[Any] = [FORMAT, *options]
    # A folder's time changes when a file is added or removed; a file replaced in place is caught when it is decoded.
    for path in inputs:
        if not path.exists():
            continue
        status = path.stat()
        stamps.append([str(path.resolve()), status.st_size, status.st_mtime_ns])
    return hashlib.sha256(json.dumps(stamps).encode()).hexdigest()[:24]
