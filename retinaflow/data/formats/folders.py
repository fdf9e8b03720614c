"""Folders and files of other layouts: names of splits, safe file names, and searches that skip hidden files."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from retinaflow.errors import DataError, shown

SPLIT_NAMES = {
    "train": "train", "training": "train", "trainval": "train",
    "val": "validation", "valid": "validation", "validation": "validation", "dev": "validation",
    "test": "test", "testing": "test",
}  # fmt: skip
"""Names of splits in other layouts -> their names here."""
_SPLIT_WORD = re.compile(r"(?<![a-z])(" + "|".join(sorted(SPLIT_NAMES, key=len, reverse=True)) + r")(?![a-z])")


def split_of(*words: str) -> str | None:
    """The split in the first of some names that holds one (``instances_val2017`` -> validation), or None."""
    for word in words:
        hit = _SPLIT_WORD.search(word.lower())
        if hit:
            return SPLIT_NAMES[hit[1]]
    return None


def safe_name(name: Any, where: str) -> str:
    """A relative path with / of a file name in a data file, which is never trusted as a path.

    Raises DataError, with ``where`` the name was found, for a path that is absolute or leads out of its folder.
    """
    text = str(name).replace("\\", "/")
    path = PurePosixPath(text)
    inside = bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\0" not in text
    if not isinstance(name, str) or not inside or re.match(r"[A-Za-z]:", text):
        raise DataError(f"{where}: a file name must stay inside the image folder, but got {shown(name)}")
    return str(path)


def find_image(name: str, folders: Sequence[Path]) -> Path | None:
    """The first file of that name in some folders."""
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


def existing(folders: Iterator[Path] | Sequence[Path]) -> list[Path]:
    """The existing ones among some folders, each once."""
    return [folder for folder in dict.fromkeys(folders) if folder.is_dir()]


def hidden(path: Path, folder: Path) -> bool:
    """Whether a part of the path below ``folder`` begins with a dot: macOS puts ``._1.jpg`` beside ``1.jpg``."""
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def files_under(folder: Path) -> list[Path]:
    """All files at any depth except hidden ones, sorted.

    Links to folders are followed unless they lead to one that holds ``folder`` itself; each folder is read once.
    """
    found: list[Path] = []
    seen: set[str] = set()
    tops, own = [folder], folder.resolve()
    # Links come last: a folder that is reached both ways keeps its own path, which its label files depend on.
    for top in tops:
        for folder_path, folders, names in os.walk(top):
            real = os.path.realpath(folder_path)
            folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith("."))
            if real not in seen:
                seen.add(real)
                links = [path for name in folders if (path := Path(folder_path, name)).is_symlink()]
                tops += [path for path in links if not own.is_relative_to(path.resolve())]
                found += [Path(folder_path, name) for name in names if not name.startswith(".")]
    return sorted(found)
