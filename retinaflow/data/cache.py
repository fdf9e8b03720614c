"""Built indexes kept on disk, so that a second start reads no CSV and no image header.

A cached index lies under a key made of the inputs' paths, sizes and times of change, the reader's options and its
version; any change gives another key. A damaged one is rebuilt, and that is said. ``RETINAFLOW_CACHE`` names the folder
(default ``~/.cache/retinaflow``).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from retinaflow.data.column_store import DOCUMENT, FORMAT
from retinaflow.data.image_files import OnBadImage, attach_files
from retinaflow.data.index import AnnotationIndex
from retinaflow.data.openimages import SourceFiles, read_annotations
from retinaflow.data.tables import Fault, Faults, OnBadRow


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
    on_bad_row: OnBadRow = "stop",
    on_bad_image: OnBadImage = "stop",
    say: Callable[[str], None],
) -> LoadedIndex:
    """The index of some published files, from the cache where it is there and whole, else built and cached."""
    place = cache_folder() / "index" / _key(files, images, on_bad_row, on_bad_image)
    if (place / DOCUMENT).exists():
        try:
            index = AnnotationIndex.open(place)
            dropped = pd.DataFrame(index.notes["dropped"], columns=list(Fault._fields))
            return LoadedIndex(index, dropped)
        except (ValueError, KeyError) as error:
            say(f"the cached index is rebuilt: {error}")
    faults = Faults(on_bad_row)
    index = read_annotations(files, faults, progress=say)
    if images:
        index, bad = attach_files(index, images, on_bad_image=on_bad_image)
        faults.found += [Fault(image.image_id, 0, "an image must have a readable file", image.reason) for image in bad]
    dropped = faults.frame()
    try:
        index.save(place, notes={"dropped": dropped.to_numpy().tolist()})
    except OSError as error:
        say(f"the index is not cached: {error}")
        return LoadedIndex(index, dropped)
    return LoadedIndex(AnnotationIndex.open(place), dropped)


def _key(files: SourceFiles, images: Sequence[Path], *options: str) -> str:
    stamps: list[Any] = [FORMAT, *options]
    # A folder's time changes when a file is added or removed; a file replaced in place is caught when it is decoded.
    for path in (*files.all, *images):
        if not path.exists():
            continue
        status = path.stat()
        stamps.append([str(path.resolve()), status.st_size, status.st_mtime_ns])
    stamps.append([len(files.boxes), len(files.image_labels), files.hierarchy is not None])
    return hashlib.sha256(json.dumps(stamps).encode()).hexdigest()[:24]
