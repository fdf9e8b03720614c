"""Folders and files of other layouts: splits in their names, names that are never trusted as paths, and searches.

A file is read only where it lies in the data folder, or in a folder that a setting names (:class:`ReadableFolders`):
lists and links of a data set from elsewhere must not bring other files of this machine into what is written. Searches
skip hidden files, and the results of this program and of MLflow, which are no photographs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from retinaflow.data.formats.ids import same_name
from retinaflow.errors import DataError, SettingError, shown
from retinaflow.progress import report

SPLIT_NAMES = {
    "train": "train", "training": "train", "trainval": "train",
    "val": "validation", "valid": "validation", "validation": "validation", "dev": "validation",
    "eval": "validation", "test": "test", "testing": "test",
}  # fmt: skip
"""Names of splits in other layouts -> their names here."""
_WORDS = "|".join(sorted(SPLIT_NAMES, key=len, reverse=True))
_SPLIT_WORD = re.compile(rf"(?<![a-z])({_WORDS})(?![a-z])")
_SPLIT_FOLDER = re.compile(
    rf"(?:(?:obj|images?|imgs?|labels?|instances|annotations?|coco|voc)?[\d_. -]*)({_WORDS})"
    r"[\d_. -]*(?:set|split|data|images?|imgs?|labels?|annotations?)?"
)
_RESULTS = ("outputs", "mlruns", "mlartifacts")
_OWN_FILES = ("retinaflow.yaml", "explore.html", "comparison.html", "bins.json", "per_class_ap.csv", "MLmodel")
_OWN_TABLE, _OWN_HEADER = "images.csv", b"ImageID,Width,Height,Origin"


def short_name(split: str) -> str:
    """The name of a split in other layouts."""
    return "val" if split == "validation" else split


def split_of(*words: str) -> str | None:
    """The split in the first of some names that holds one (``instances_val2017`` -> validation), or None."""
    for word in words:
        hit = _SPLIT_WORD.search(word.lower())
        if hit:
            return SPLIT_NAMES[hit[1]]
    return None


def split_of_folders(parts: Sequence[str]) -> str | None:
    """The split that the folders of a path name (``images/train2017``, ``obj_valid_data``), the innermost first.

    Only a folder named by nothing else counts: ``crash_test`` may hold photographs of any split.
    """
    hits = (_SPLIT_FOLDER.fullmatch(part.lower()) for part in reversed(parts))
    return next((SPLIT_NAMES[hit[1]] for hit in hits if hit), None)


def safe_name(name: Any, where: str) -> str:
    """A relative path with / of a file name in a data file, which is never trusted as a path.

    Raises DataError, with ``where`` the name was found, for a path that is absolute or leads out of its folder.
    """
    text = str(name).replace("\\", "/") if isinstance(name, str) else ""
    path = PurePosixPath(text)
    inside = bool(path.parts) and not path.is_absolute() and ".." not in path.parts
    if not inside or re.match(r"[A-Za-z]+:", text) or not _is_name(text):
        raise DataError(f"{where}: a file name must stay inside the image folder, but got {shown(name)}")
    return str(path)


def bare_name(name: Any) -> str | None:
    """The last part of a file name or address of any system, or None where there is none."""
    text = re.sub(r"[?#].*", "", name) if isinstance(name, str) and "://" in name else name
    last = text.replace("\\", "/").split("/")[-1].strip() if isinstance(text, str) else ""
    return last if last not in ("", ".", "..") and _is_name(last) else None


def _is_name(text: str) -> bool:
    """Whether a file can have this name: no part is longer than file systems allow, or holds what no text file can."""
    if re.search("[\0\ud800-\udfff]", text):
        return False
    return len(text) <= 4096 and all(len(part.encode()) <= 255 for part in text.split("/"))


class ReadableFolders:
    """The folders whose files may be read, links resolved: that of the data, and those that settings name."""

    def __init__(self, data: Path, others: Iterable[Path] = ()) -> None:
        self.data = data
        self._real = tuple(os.path.realpath(folder) for folder in (data, *others))
        self._parents: dict[Path, bool] = {}

    def hold(self, path: Path) -> bool:
        """Whether a file or folder lies in one of them, wherever links lead."""
        parent = path.parent
        if parent not in self._parents:
            self._parents[parent] = self._inside(os.path.realpath(parent))
        if path.is_symlink():
            return self._inside(os.path.realpath(path))
        return self._parents[parent] or self._inside(os.path.realpath(path))

    def require(self, path: Path, where: str = "") -> Path:
        """The path. Raises SettingError for one that leads out; ``where`` names what refers to it."""
        if not self.hold(path):
            real = Path(os.path.realpath(path))
            folder = real if real.is_dir() else real.parent
            raise SettingError(
                f"{where or path} leads out of {self.data}, to {real}; if that is wanted, give linked_folders={folder}"
            )
        return path

    def _inside(self, real: str) -> bool:
        return any(real == folder or real.startswith(folder.rstrip("/\\") + os.sep) for folder in self._real)


def existing(folders: Iterator[Path] | Sequence[Path]) -> list[Path]:
    """The existing ones among some folders, each once."""
    return [folder for folder in dict.fromkeys(folders) if folder.is_dir()]


class Contents(NamedTuple):
    """A folder that was searched: what it holds except hidden files, by name, and its time of change in ns before."""

    path: Path
    entries: list[os.DirEntry[str]]
    changed_ns: int


def folders_under(
    folder: Path, *, enter: Callable[[Path], bool] = lambda path: True, seen: set[str] | None = None
) -> Iterator[Contents]:
    """A folder and those below it at any depth, each once, except hidden ones and those that ``enter`` refuses.

    Links to folders are followed, unless they lead to one that holds ``folder`` itself. They come last: a folder that
    is reached both ways keeps its own path. ``seen``: folders, links resolved, that several searches share. A folder
    that may not be read is reported.
    """
    seen = set() if seen is None else seen
    own = os.path.realpath(folder)
    pending, links = [(folder, own)], list[tuple[Path, str]]()
    while pending or links:
        path, real = pending.pop() if pending else links.pop(0)
        if real in seen:
            continue
        seen.add(real)
        try:
            if path != folder and not enter(path):
                continue
            changed = path.stat().st_mtime_ns
            with os.scandir(path) as found:
                entries = sorted((entry for entry in found if not entry.name.startswith(".")), key=_name_of)
        except OSError as error:
            if path == folder:
                raise
            report(f"{path}: the folder is left out, as it cannot be read: {error.strerror}")
            continue
        below = [(entry, Path(entry.path)) for entry in entries if _holds(entry.is_dir)]
        # The last one is read first.
        pending += [(inner, str(Path(real, inner.name))) for entry, inner in reversed(below) if not entry.is_symlink()]
        outer = [(inner, os.path.realpath(inner)) for entry, inner in below if entry.is_symlink()]
        links += [(inner, target) for inner, target in outer if not Path(own).is_relative_to(target)]
        yield Contents(path, entries, changed)


def _name_of(entry: os.DirEntry[str]) -> str:
    return entry.name


def is_regular(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a regular file, or a link to one."""
    return _holds(entry.is_file)


def _holds(test: Callable[[], bool]) -> bool:
    try:
        return test()
    except OSError:
        # A link that leads in a circle, or to where this user may not look.
        return False


def require_utf8(path: Path) -> None:
    """Raise DataError for a path that is not UTF-8: no table of results could hold it."""
    if re.search("[\ud800-\udfff]", str(path)):
        raise DataError(f"{os.fsencode(path)!r}: a file name must be UTF-8; rename the file or its folder")


def files_under(
    folder: Path, readable: ReadableFolders | None = None, *, left_out: set[Path] | None = None
) -> list[Path]:
    """All regular files of :func:`folders_under`, sorted.

    Folders of results are skipped and added to ``left_out``. Raises SettingError for a link that leads out of the
    ``readable`` folders (None: such links are skipped), DataError for a name that is not UTF-8.
    """
    own_folder = ReadableFolders(folder)

    def may_be_read(path: Path) -> bool:
        if not path.is_symlink():
            return True
        return own_folder.hold(path) if readable is None else bool(readable.require(path))

    def enter(path: Path) -> bool:
        require_utf8(path)
        if not may_be_read(path):
            return False
        if is_result(path):
            if left_out is not None:
                left_out.add(path)
            return False
        return True

    found: list[Path] = []
    for contents in folders_under(folder, enter=enter):
        for entry in contents.entries:
            if is_regular(entry):
                path = Path(entry.path)
                require_utf8(path)
                if not entry.is_symlink() or may_be_read(path):
                    found.append(path)
    return sorted(found)


def is_result(folder: Path) -> bool:
    """Whether a folder holds results of this program or of MLflow, whose images are no photographs."""
    if folder.name in _RESULTS or any((folder / name).is_file() for name in _OWN_FILES):
        return True
    table = folder / _OWN_TABLE
    if not table.is_file():
        return False
    with table.open("rb") as file:
        return file.read(len(_OWN_HEADER)) == _OWN_HEADER


class FileFinder:
    """Files by the names that data files give them: as they are, else in other Unicode form or case if that is unique.

    Folders are searched only when a name is not found as it is.
    """

    def __init__(self, folders: Sequence[Path], readable: ReadableFolders, suffixes: Sequence[str]) -> None:
        self.folders, self.readable, self.suffixes = list(folders), readable, tuple(suffixes)
        self._by_path: dict[str, list[Path]] | None = None
        self._by_name: dict[str, list[Path]] = {}
        self._by_stem: dict[str, list[Path]] = {}

    def at(self, name: str, folders: Sequence[Path]) -> Path | None:
        """The first file of that relative name in some folders.

        Raises SettingError for one that leads out of the readable folders.
        """
        for folder in folders:
            if (folder / name).is_file():
                return self.readable.require(folder / name)
        paths = self._paths()
        for folder in folders:
            hits = paths.get(same_name(str(folder / name)), [])
            if len(hits) == 1:
                return hits[0]
        return None

    def named(self, name: str) -> list[Path]:
        """All files of that name, in whichever folder: exactly, or else in another form."""
        self._paths()
        hits = self._by_name.get(same_name(name), [])
        return [path for path in hits if path.name == name] or hits

    def of_stem(self, stem: str) -> list[Path]:
        """All files of that name without its suffix, in whichever folder: exactly, or else in another form."""
        self._paths()
        hits = self._by_stem.get(same_name(stem), [])
        return [path for path in hits if path.stem == stem] or hits

    def all(self) -> list[Path]:
        """All files in the folders."""
        return [path for hits in self._paths().values() for path in hits]

    def _paths(self) -> dict[str, list[Path]]:
        if self._by_path is None:
            self._by_path = {}
            seen: set[Path] = set()
            for path in (path for folder in self.folders for path in files_under(folder, self.readable)):
                real = Path(os.path.realpath(path.parent), path.name)
                if path.suffix.lower() in self.suffixes and real not in seen:
                    seen.add(real)
                    self._by_path.setdefault(same_name(str(path)), []).append(path)
                    self._by_name.setdefault(same_name(path.name), []).append(path)
                    self._by_stem.setdefault(same_name(path.stem), []).append(path)
        return self._by_path
