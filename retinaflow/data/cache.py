"""The cache of built indexes, so that a second start reads no CSV file and no image header.

The key of a cached index is made of the inputs' paths, sizes and times of change, the reader's options and its version;
any change gives another key. An index is built anew also when a folder below those of the images, in which files were
looked for, has changed: a folder's time changes when a file is added, removed or moved. An image file that was
overwritten in place changes no folder: its new size is noticed when it is decoded. A damaged index is rebuilt, with a
message. ``RETINAFLOW_CACHE`` names the folder (default ``~/.cache/retinaflow``).

The cache is safe when several processes start at once (one builds, the others wait and open the result), when a process
is killed at any moment (the system releases its lock; its half-written folder is never opened, and the next builder
removes it), and when the disk is full or read-only (the index is built and used without the cache, with a message).
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil

from retinaflow.data.column_store import DOCUMENT, FORMAT
from retinaflow.data.id_columns import read_image_sizes
from retinaflow.data.image_folders import LocatedFiles, locate_files
from retinaflow.data.image_headers import depth_notice
from retinaflow.data.image_sizes import SizeTable
from retinaflow.data.images import attach_files
from retinaflow.data.index import AnnotationIndex
from retinaflow.data.openimages import SourceFiles, read_annotations
from retinaflow.data.tables import RowError, RowErrors, errors_frame
from retinaflow.errors import DataError
from retinaflow.files import lock
from retinaflow.settings.data_settings import OnBadImage, OnBadRow

_WAITING = "another process is building this index; waiting for it"
_READER = 4
"""Version of what is read from the files; an index that another version has read is not used."""
_SMALL = 1 << 26
"""Bytes of boxes and labels below which each worker gets a copy of a computed index."""


@dataclass(frozen=True)
class LoadedIndex:
    """An index and the rows and images left out of it (columns file, line, rule, value; empty when there are none)."""

    index: AnnotationIndex
    dropped: pd.DataFrame


def cache_folder() -> Path:
    """The folder of the cache."""
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
    """The index of some published files, from the cache if it holds a whole one, else built and cached.

    ``image_sizes``: a table of sizes to use instead of the headers of the image files. Raises DataError for a file that
    breaks a rule or changes while it is read.
    """
    inputs = [*files.all, *images, *([image_sizes] if image_sizes else [])]
    options = [on_bad_row, on_bad_image, len(files.boxes), len(files.image_labels), files.hierarchy is not None]
    options.append(allow_repeats)
    key = _key(inputs, [*options, image_sizes is not None])
    path = cache_folder() / "index" / key
    found = _open(path, report)
    if found is not None:
        return found
    with ExitStack() as stack:
        # Without a lock two processes build the same index, which costs only time.
        with suppress(OSError):
            stack.enter_context(lock(cache_folder() / "locks" / key, before_wait=lambda: report(_WAITING)))
        # Another process may have built it meanwhile.
        found = _open(path, lambda text: None)
        if found is not None:
            return found
        errors = RowErrors(on_bad_row)
        index = read_annotations(files, errors, allow_repeats=allow_repeats, progress=report)
        table = SizeTable(*read_image_sizes(image_sizes, errors)) if image_sizes else None
        found_files = locate_files(index.image_ids, images) if images else None
        if found_files is not None and files.list_other_images:
            index, found_files = _only_with_files(index, found_files, errors)
        if table is not None:
            index = replace(index, sizes=table.look_up(index.image_ids))
        if found_files is not None:
            journal = size_journal(images)
            index, bad = attach_files(index, found_files, on_bad_image=on_bad_image, given=table, journal=journal)
            if notice := depth_notice(index.files, Path(index.images_folder)):
                errors.notices.append(notice)
            rule = "an image must have a readable file"
            errors.add(RowError(image.image_id, 0, rule, image.reason) for image in bad)
        if _key(inputs, [*options, image_sizes is not None]) != key:
            raise DataError(
                f"{', '.join(path.name for path in files.all)}: the files must not change while they are read, but "
                "did; start the command again"
            )
        for notice in errors.notices:
            report(notice)
        return _save(index, errors, path, report, searched=found_files.searched if found_files else {})


def _only_with_files(
    index: AnnotationIndex, found: LocatedFiles, errors: RowErrors
) -> tuple[AnnotationIndex, LocatedFiles]:
    """The images that are there, of tables that name others too, and their files."""
    there = found.files != ""
    if there.all() or not there.any():
        return index, found
    errors.notices.append(
        f"{np.count_nonzero(~there):,} of {len(index):,} images in the tables have no file and are left out: an export "
        f"of some images keeps the rows of all ({index.image_ids[~there][0]} for example)"
    )
    return index.take(np.flatnonzero(there)), replace(found, files=found.files[there], reasons={})


def _open(path: Path, report: Callable[[str], None]) -> LoadedIndex | None:
    """The cached index; None if there is none, if a folder of its images has changed, or if it is damaged, which is
    reported."""
    if not (path / DOCUMENT).exists():
        return None
    try:
        index = AnnotationIndex.open(path)
        if any(_changed_ns(folder) != changed for folder, changed in index.notes["searched"].items()):
            return None
        dropped = errors_frame(RowError(*row) for row in index.notes["dropped"])
        for notice in index.notes["notices"]:
            report(notice)
        return LoadedIndex(index, dropped)
    except (DataError, KeyError) as error:
        report(f"the cached index is rebuilt: {error}")
        return None


def _changed_ns(folder: str) -> int | None:
    try:
        return Path(folder).stat().st_mtime_ns
    except OSError:
        return None


def _save(
    index: AnnotationIndex,
    errors: RowErrors,
    path: Path,
    report: Callable[[str], None],
    *,
    searched: Mapping[str, int],
) -> LoadedIndex:
    dropped = errors.frame()
    notes = {"dropped": dropped.to_numpy().tolist(), "notices": errors.notices, "searched": dict(searched)}
    try:
        index.save(path, notes=notes)
        return LoadedIndex(AnnotationIndex.open(path, verify=False), dropped)
    except (OSError, DataError) as error:
        report(f"the index is not cached: {error}; is the disk of {path.parent} full?")
        return LoadedIndex(index, dropped)


def share_index(index: AnnotationIndex) -> AnnotationIndex:
    """The same index, mapped from a file if it is large, so that loader workers share one copy of a computed index.

    The file is removed when this process ends. If no file can be written, the index is returned as it is.
    """
    if index.path is not None or index.boxes.nbytes + index.verified_class.nbytes < _SMALL:
        return index
    try:
        parent = cache_folder() / "shared"
        parent.mkdir(parents=True, exist_ok=True)
        _remove_left_behind(parent)
        folder = Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=parent))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        index.save(folder / "index", notes=index.notes)
        return AnnotationIndex.open(folder / "index", verify=False)
    except OSError:
        return index


def _remove_left_behind(parent: Path) -> None:
    """Remove the files of killed processes."""
    for folder in parent.iterdir():
        number = folder.name.partition("-")[0]
        if number.isdigit() and not psutil.pid_exists(int(number)):
            shutil.rmtree(folder, ignore_errors=True)


def size_journal(images: Sequence[Path]) -> Path:
    """The file that records the sizes of the images of these folders."""
    names = json.dumps([str(folder.resolve()) for folder in images])
    return cache_folder() / "sizes" / f"{hashlib.sha256(names.encode()).hexdigest()[:24]}.tsv"


def _key(inputs: Sequence[Path], options: Sequence[Any]) -> str:
    stamps: list[Any] = [FORMAT, _READER, *options]
    # The folders of images are among the inputs; the times of the folders below them are in the index.
    for path in inputs:
        if not path.exists():
            continue
        status = path.stat()
        stamps.append([str(path.resolve()), status.st_size, status.st_mtime_ns])
    return hashlib.sha256(json.dumps(stamps).encode()).hexdigest()[:24]
