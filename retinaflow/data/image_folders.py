"""Image files in folders: those of some ids, and all of them.

An id is looked for in the folders themselves first, in their order; what is not there is looked for at any depth below
them. Hidden files, results of this program and of MLflow, and what is no regular file (a named pipe) are no images.
Ids are compared in one Unicode form (NFC), so a name that macOS has taken apart is found.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from retinaflow.data.formats.folders import folders_under, is_regular, is_result, require_utf8
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
    folders: Sequence[Path] = ()
    """The folders that were given."""
    searched: Mapping[str, int] = field(default_factory=dict)
    """Every folder that was searched, and its time of change in ns before: while these hold, so do the files."""


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
    searched: dict[str, int] = {}
    walks = _walks(folders, root, searched)
    direct, deep = _Found(), _Found()
    for walk in walks:
        for prefix, entries in islice(walk, 1):
            _enter(direct, prefix, entries, wanted=None)
    wanted = {name for name in names if name not in direct.files}
    if wanted:
        for prefix, entries in chain.from_iterable(walks):
            _enter(deep, prefix, entries, wanted=wanted)
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
    for file in files:
        if not file.isascii():
            require_utf8(root / file)
    return LocatedFiles(root, np.array(files, dtype=np.str_), reasons, folders, searched)


def _walks(
    folders: Sequence[Path], root: Path, searched: dict[str, int]
) -> list[Iterator[tuple[str, list[os.DirEntry[str]]]]]:
    """For each folder the folders below it, itself first: path under the root, and contents. None is in two of them.

    The images of other splits are left out. What was searched is noted in ``searched``.
    """
    seen: set[str] = set()

    def walk(folder: Path) -> Iterator[tuple[str, list[os.DirEntry[str]]]]:
        def enter(path: Path) -> bool:
            is_of_other_split = len(folders) > 1 and path.parent == folder and path.name in SPLIT_FOLDERS
            return not is_of_other_split and not is_result(path)

        prefix = folder.resolve().relative_to(root)
        for contents in folders_under(folder, enter=enter, seen=seen):
            searched[str(contents.path.absolute())] = contents.changed_ns
            yield str(prefix / contents.path.relative_to(folder)), contents.entries

    return [walk(folder) for folder in folders]


def _enter(found: _Found, prefix: str, entries: list[os.DirEntry[str]], *, wanted: set[str] | None) -> None:
    """Add the files in a folder, sorted: of the ``wanted`` ids, or of all that are not known from an earlier folder."""
    known = set(found.files) if wanted is None else ()
    for entry in entries:
        stem, dot, suffix = entry.name.rpartition(".")
        name, kind = normal_id(stem), f"{dot}{suffix.lower()}"
        is_image = kind in SUFFIXES
        if not (is_image or kind in OTHER_SUFFIXES) or name in known or (wanted is not None and name not in wanted):
            continue
        path = entry.name if prefix == "." else f"{prefix}/{entry.name}"
        if not is_image:
            found.others.setdefault(name, f"{path} is not read: an image must be one of {', '.join(SUFFIXES)}")
        elif not is_regular(entry):
            found.others.setdefault(name, f"{path} is no regular file")
        elif found.files.setdefault(name, path) != path:
            found.again.setdefault(name, path)


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

    def enter(path: Path) -> bool:
        if is_result(path):
            leave_out("folders of results", path)
            return False
        return True

    for contents in folders_under(folder.absolute(), enter=enter):
        for entry in contents.entries:
            path = Path(entry.path)
            if path.suffix.lower() in OTHER_SUFFIXES:
                leave_out(f"files that are none of {', '.join(SUFFIXES)}", path)
            elif path.suffix.lower() in SUFFIXES:
                require_utf8(path)
                if is_regular(entry):
                    yield path
                else:
                    leave_out("files that are no regular files", path)
    for why, count in left_out.items():
        report(f"{folder}: {count:,} {why} are left out, {examples[why]} for example")
