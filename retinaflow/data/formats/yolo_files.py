"""The files of a YOLO data set: the images of each split, the names of the classes, and what is left out.

Splits come from the first that states any: ``data.yaml`` (a folder, a list of folders, or a text file of paths for each
split), darknet's ``*.data``, lists of images named by split (``train.txt``), folders named by split at any depth. A
split that ``data.yaml`` does not name is taken from the folders. Where nothing states a split all images are train.
Paths may have Windows separators, belong to another machine, or begin with a folder that is not there (``data/``): the
longest end of a path that is a file or folder of the data set counts, never one outside of it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from retinaflow.data.formats.folders import SPLIT_NAMES, ReadableFolders, files_under, split_of_folders
from retinaflow.data.image_folders import SUFFIXES
from retinaflow.data.text_lines import read_lines
from retinaflow.errors import DataError, SettingError, shown
from retinaflow.progress import report

_NAME_FILE = re.compile(r"(classes|obj|_darknet|predefined_classes)\.(txt|names|labels)|.+\.names", re.IGNORECASE)
"""Files with the name of a class in each line."""
_NOT_READ = (".tif", ".tiff", ".gif", ".jfif", ".jp2", ".heic", ".heif", ".avif", ".dng", ".mpo", ".pfm")
"""Suffixes of image files that other programs read."""
_OTHER_KEYS = ("path", "names", "nc", "download", "kpt_shape", "flip_idx", "roboflow", "backup", "classes")


@dataclass
class SplitFiles:
    """Image files by split, in the order of their lists."""

    root: Path
    readable: ReadableFolders
    images_folders: Sequence[Path] = ()
    """Folders of images that a setting names; none: the root holds them."""
    images: dict[str, list[Path]] = field(default_factory=dict)
    lists: set[Path] = field(default_factory=set)
    """Text files of paths, which are no label files."""
    results: set[Path] = field(default_factory=set)
    """Folders of results, which are not searched."""

    def __post_init__(self) -> None:
        tops = list(dict.fromkeys([self.root, *self.images_folders]))
        for top in tops:
            if not top.is_dir():
                raise SettingError(f"images={top}: no such folder")
        own = [path for top in tops for path in files_under(top, self.readable, left_out=self.results)]
        self.all_files = list(_once(own).values())
        """All files of the data set and of the folders of images, each once."""
        searched = [path for top in self.images_folders for path in files_under(top, self.readable)]
        self.all_images = [path for path in searched or self.all_files if path.suffix.lower() in SUFFIXES]

    def folders_of(self, image: Path) -> tuple[str, ...]:
        """The folders between the data set, or the folder that a setting names, and an image."""
        tops = [top for top in (*self.images_folders, self.root) if image.is_relative_to(top)]
        return image.relative_to(tops[0]).parts[:-1] if tops else ()

    def add_folder(self, split: str, folder: Path) -> None:
        """Add all images under a folder."""
        own = files_under(folder, self.readable, left_out=self.results)
        self.images.setdefault(split, []).extend(path for path in own if path.suffix.lower() in SUFFIXES)

    def add_list(self, split: str, path: Path, base: Path) -> None:
        """Add the images that a text file names. A line that names no file stays, as a file that is missing."""
        lines = [(number, line.strip().strip("\"'")) for number, line in enumerate(read_lines(path), 1)]
        found = [self._listed(line, path, base, number) for number, line in lines if line]
        self.images.setdefault(split, []).extend(found)
        self.lists.add(path)

    def _listed(self, line: str, path: Path, base: Path, number: int) -> Path:
        found = self.find(
            line, [path.parent, base, self.root, *self.images_folders], f"{path.name} line {number}: {line}"
        )
        return found or path.parent / line.replace("\\", "/").lstrip("/")

    def find(self, given: str, bases: Sequence[Path], where: str) -> Path | None:
        """The file or folder that a path of any system means, below some folders; None if there is none.

        Raises SettingError for one that is there, but outside of the readable folders.
        """
        text = given.replace("\\", "/")
        bases = list(dict.fromkeys(bases))
        whole = [Path(os.path.normpath(base / text)) for base in (bases[:1] if text.startswith("/") else bases)]
        beyond = [path for path in whole if path.exists()]
        inside = next((path for path in beyond if self.readable.hold(path)), None)
        if inside is not None:
            return inside
        parts = [part for part in text.split("/") if part not in ("", ".", "..") and not part.endswith(":")]
        for start in range(len(parts)):
            for base in bases:
                path = base.joinpath(*parts[start:])
                if path.exists() and self.readable.hold(path):
                    return path
        for path in beyond:
            self.readable.require(path, where)
        return None


def by_document(files: SplitFiles, document: dict[str, Any], path: Path) -> None:
    """Add the image files of each split that data.yaml (``as_written``) names.

    Raises DataError for a training or validation split that is not there, and for one of a name that is not known. A
    missing test split is only reported: exports often name one that they do not hold.
    """
    base = files.root
    if document.get("path"):
        given = files.find(str(document["path"]), [files.root], f"{path.name}: path: {document['path']}")
        # Else a path of the machine on which the set was made; the images were moved together with data.yaml.
        base = given if given is not None and given.is_dir() else base
    for key, given in document.items():
        parts = [part for part in (given if isinstance(given, list) else [given]) if isinstance(part, str) and part]
        split = SPLIT_NAMES.get(str(key).lower())
        if split is None:
            if key not in _OTHER_KEYS and any((base / part.replace("\\", "/")).exists() for part in parts):
                raise DataError(
                    f"{path}: {key}: {shown(given)} names files of an unknown split; call it train, val or test"
                )
            continue
        for part in parts:
            target = files.find(part, [base, files.root], f"{path.name}: {key}: {part}")
            if target is None and str(key).lower() == "eval":
                # The name of a metric, as in darknet's files.
                continue
            if target is None and split == "test" and not files.images.keys().isdisjoint(("train", "validation")):
                report(f"{path.name}: {key}: {part} is no folder or file under {base}, and is left out")
            elif target is None:
                raise DataError(f"{path}: {key}: {part} must be a folder or file under {base}, but is not")
            elif target.is_dir():
                files.add_folder(split, target)
            else:
                files.add_list(split, target, base)


def by_data_file(files: SplitFiles, path: Path) -> None:
    """Add the lists that darknet's ``*.data`` names. Raises DataError for one that is not there.

    Its ``eval`` is no split: it names a metric (``eval=coco``).
    """
    for key, given in data_file(path).items():
        split = SPLIT_NAMES.get(key) if key != "eval" else None
        if split is not None:
            target = files.find(given, [files.root], f"{path.name}: {key} = {given}")
            if target is None or not target.is_file():
                raise DataError(f"{path}: {key} = {given} must be a list of images under {files.root}, but is not")
            files.add_list(split, target, files.root)


def data_file(path: Path) -> dict[str, str]:
    """The lines ``key = value`` of darknet's ``*.data``."""
    pairs = (line.split("#")[0].partition("=") for line in read_lines(path))
    return {key.strip().lower(): value.strip() for key, _, value in pairs if value.strip()}


def by_lists(files: SplitFiles) -> None:
    """Add the lists of images in the root that are named by split (``train.txt``).

    Raises DataError for one whose lines name no image of the data set.
    """
    for path in sorted(files.root.glob("*.txt")):
        split = SPLIT_NAMES.get(path.stem.lower())
        lines = [line.strip() for line in read_lines(path) if line.strip()] if split is not None else []
        if split is None or not lines:
            continue
        suffixes = [Path(line.replace("\\", "/")).suffix.lower() for line in lines]
        if not any(suffix in SUFFIXES for suffix in suffixes):
            raise DataError(
                f"{path}: the list of a split must name an image file in each line, but line 1 is {shown(lines[0])}; "
                "correct the list, or rename it if it lists no images"
            )
        files.add_list(split, path, files.root)


def by_folders(files: SplitFiles) -> None:
    """Add the images in folders that are named by split, for splits that have none yet; all as train if there is no
    such folder."""
    stated = set(files.images)
    found: dict[str, list[Path]] = {}
    taken = {path for paths in files.images.values() for path in paths}
    for path in files.all_images:
        split = split_of_folders(files.folders_of(path))
        if split is not None and split not in stated and path not in taken:
            found.setdefault(split, []).append(path)
    for split, paths in found.items() if stated else ():
        report(f"nothing names a {split} split, so the {len(paths):,} images in folders of that name are it")
    files.images |= found
    if not files.images:
        files.images["train"] = files.all_images


def name_file(files: SplitFiles) -> Path | None:
    """The file of class names that is nearest to the root. Raises DataError for two that differ."""
    own = [path for path in files.all_files if _NAME_FILE.fullmatch(path.name) and path.is_relative_to(files.root)]
    own.sort(key=lambda path: len(path.parts))
    for path in own[1:]:
        if len(path.parts) == len(own[0].parts) and read_lines(path) != read_lines(own[0]):
            raise DataError(
                f"{files.root}: the class names must be in one file, but {own[0].name} and {path.name} differ; remove "
                "or rename one of them"
            )
    return own[0] if own else None


def report_left_out(files: SplitFiles, used: Iterable[Path], labels: Iterable[Path]) -> None:
    """Report images that are not ``used``, label files that are not among ``labels``, and folders of results."""
    known = _once(used)
    others = [path for real, path in _once(files.all_files).items() if real not in known]
    unread = [path for path in others if path.suffix.lower() in _NOT_READ]
    loose = [path for path in others if path.suffix.lower() in SUFFIXES]
    if unread:
        kinds = ", ".join(SUFFIXES)
        report(f"{len(unread):,} image files are left out, {unread[0]} for example: only {kinds} are read")
    if loose:
        report(f"{len(loose):,} image files are in no split and are left out, {loose[0]} for example")
    of_unused = {path.stem for path in (*unread, *loose)}
    read = _once([*labels, *files.lists])
    alone = [
        path for path in others if path.suffix.lower() == ".txt" and path.stem not in of_unused and holds_labels(path)
    ]
    alone = [path for real, path in _once(alone).items() if real not in read]
    if alone:
        report(f"{len(alone):,} label files have no image file and are left out, {alone[0]} for example")
    if files.results:
        report(f"{sorted(files.results)[0]} and what is in it is left out: a folder of results")


def _once(paths: Iterable[Path]) -> dict[Path, Path]:
    """Real path -> the first path that leads there. Only folders are resolved: a file that is a link keeps its name."""
    real: dict[Path, Path] = {}
    found: dict[Path, Path] = {}
    for path in paths:
        if path.parent not in real:
            real[path.parent] = path.parent.resolve()
        found.setdefault(real[path.parent] / path.name, path)
    return found


def holds_labels(path: Path) -> bool:
    """Whether the first row of a text file is a class and at least four numbers, unlike that of other text files."""
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        words = next((line.split() for line in file if line.strip()), [])
    try:
        return len([float(word) for word in words[1:]]) >= 4
    except ValueError:
        return False
