"""Files that are there whole or not at all, whatever ends the process or the power in between."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PARTIAL = ".partial"


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A name beside ``path`` to write to. When the block ends in order the file is flushed to disk and renamed.

    Only for a file that one process writes at a time.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Always the same name, so that what a killed process left behind is overwritten.
    partial = path.with_name(f".{path.name}{_PARTIAL}")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
        _flush_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def remove_partial_files(folder: Path) -> None:
    """Remove what killed processes left half written in a folder that nobody else is writing to."""
    for left in folder.glob(f".*{_PARTIAL}"):
        left.unlink(missing_ok=True)


def _flush_folder(folder: Path) -> None:
    """Makes a rename last through a loss of power, where the system knows folders as files."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
