"""Image files in folders: those of some ids, and all of them.

An id is looked for in the folders themselves first, in their order; what is not there is looked for at any depth below
them. Hidden files, results of this program and of MLflow, and what is no regular file (a named pipe) are no images.
Ids are compared in one Unicode form (NFC), so a name that macOS has taken apart is found.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from retinaflow.data.formats.folders import is_result
from retinaflow.data.openimages import SPLIT_FOLDERS, normal_id
from retinaflow.errors import DataError, SettingError
from retinaflow.progress import report

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
OTHER_SUFFIXES = (".tif", ".tiff", ".gif", ".heic", ".heif", ".avif", ".jp2", ".jxl", ".dng", ".dcm")
"""Image files of other types: they are not read, and counted."""


@dataclass(frozen=True)
class LocatedFiles:
    """Where the files of some ids are: ``files [I]`` under ``root``, empty where there is none."""

    root: Path
    files: NDArray[np.str_]
    reasons: dict[int, str]
    """Why there is no file, where something with the name of the id is there."""


@dataclass
class _Found:
    files: dict[str, str] = field(default_factory=dict)
    """Id -> path under the root."""
    others: dict[str, str] = field(default_factory=dict)
    """Id -> what has its name and is no image file."""
    again: dict[str, str] = field(default_factory=dict)
    """Id -> a second file of it in the same folder, or, below the folders, anywhere."""


def locate_files(image_ids: NDArray[np.str_], folders: Sequence[Path]) -> LocatedFiles:
    """The files of some ids. Ids with two files in one folder are reported with an example; the first by name counts.

    Raises SettingError for a folder that does not exist, and DataError for an id with two files at other depths.
    """
    for folder in folders:
        if not folder.is_dir():
            raise SettingError(f"images={folder}: no such folder")
    root = Path(os.path.commonpath([folder.resolve() for folder in folders])) if folders else Path()
    names = [normal_id(str(image_id)) for image_id in image_ids]
    direct = _Found()
    for folder in folders:
        _enter(direct, folder, root, wanted=None)
    wanted = {name for name in names if name not in direct.files}
    deep = _Found()
    if wanted:
        own = {folder.resolve() for folder in folders}
        for below in (below for folder in folders for below in _subfolders(folder, own)):
            _enter(deep, below, root, wanted=wanted)
        twice = next(iter(deep.again), None)
        if twice is not None:
            raise DataError(
                f"an image id must stand for one file, but {twice} is {deep.files[twice]} and {deep.again[twice]} in "
                f"{root}; give the folder to use as images="
            )
    again = [name for name in names if name in direct.again]
    if again:
        report(
            f"{len(again):,} image ids have more than one file; the first by name is used: {direct.files[again[0]]}, "
            f"not {direct.again[again[0]]}, for example"
        )
    files = [direct.files.get(name) or deep.files.get(name, "") for name in names]
    others = {**deep.others, **direct.others}
    reasons = {row: others[names[row]] for row, file in enumerate(files) if not file and names[row] in others}
    return LocatedFiles(root, np.array(files, dtype=np.str_), reasons)


def _enter(found: _Found, folder: Path, root: Path, *, wanted: set[str] | None) -> None:
    """Add the files in a folder: of the ``wanted`` ids, or of all that are not known from an earlier folder."""
    prefix = os.path.relpath(folder.resolve(), root)
    known = set(found.files) if wanted is None else ()
    with os.scandir(folder) as entries:
        # Sorted, so that the first match is always the same.
        ordered = sorted(entries, key=lambda entry: entry.name)
    for entry in ordered:
        stem, dot, suffix = entry.name.rpartition(".")
        name, kind = normal_id(stem), f"{dot}{suffix.lower()}"
        is_image = kind in SUFFIXES
        if not (is_image or kind in OTHER_SUFFIXES) or name in known or (wanted is not None and name not in wanted):
            continue
        path = entry.name if prefix == "." else f"{prefix}/{entry.name}"
        if not is_image:
            found.others.setdefault(name, f"{path} is not read: an image must be one of {', '.join(SUFFIXES)}")
        elif not entry.is_file():
            found.others.setdefault(name, f"{path} is no regular file")
        elif found.files.setdefault(name, path) != path:
            found.again.setdefault(name, path)


def _subfolders(folder: Path, own: set[Path]) -> Iterator[Path]:
    """The folders below a folder, at any depth, sorted; not those of other splits, and none of ``own``."""
    for parent, names, _ in os.walk(folder):
        top = Path(parent)
        names[:] = sorted(
            name
            for name in names
            if not name.startswith(".")
            and not is_result(top / name)
            and (top / name).resolve() not in own
            and not (top == folder and len(own) > 1 and name in SPLIT_FOLDERS)
        )
        if top != folder:
            yield top


def images_under(folder: Path) -> Iterator[Path]:
    """The image files of a folder and its subfolders, absolute and sorted. What is left out is reported.

    Raises SettingError for a folder that does not exist, and DataError for a file name that is not UTF-8.
    """
    if not folder.is_dir():
        raise SettingError(f"images={folder}: no such folder")
    left_out: Counter[str] = Counter()
    examples: dict[str, str] = {}

    def leave_out(why: str, path: Path) -> None:
        left_out[why] += 1
        examples.setdefault(why, os.path.relpath(path, folder.absolute()))

    for parent, folders, names in os.walk(folder.absolute()):
        for name in [name for name in folders if not name.startswith(".") and is_result(Path(parent, name))]:
            leave_out("folders of results", Path(parent, name))
            folders.remove(name)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(name for name in names if not name.startswith(".")):
            path = Path(parent, name)
            if path.suffix.lower() in OTHER_SUFFIXES:
                leave_out(f"files that are none of {', '.join(SUFFIXES)}", path)
            elif path.suffix.lower() in SUFFIXES:
                if any("\ud800" <= character <= "\udfff" for character in str(path)):
                    raise DataError(f"{os.fsencode(path)!r}: a file name must be UTF-8; rename the file or its folder")
                if path.is_file():
                    yield path
                else:
                    leave_out("files that are no regular files", path)
    for why, count in left_out.items():
        report(f"{folder}: {count:,} {why} are left out, {examples[why]} for example")
