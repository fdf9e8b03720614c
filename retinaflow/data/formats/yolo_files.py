"""The files of a YOLO folder: the images of each split, their label files, and the files that are left out.

``data.yaml`` names the images of each split (a folder, a list of folders, or a text file of paths); without one,
``images/{split}`` or ``{split}/images`` are read, or else every image as train. Folders are read at any depth and
through links (:func:`~retinaflow.data.formats.folders.files_under`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from retinaflow.data.formats.folders import SPLIT_NAMES, files_under, split_of
from retinaflow.data.images import SUFFIXES
from retinaflow.data.text_lines import read_lines
from retinaflow.errors import DataError, SettingError

NAME_FILES = ("classes.txt", "labels/classes.txt", "obj.names")
_NOT_READ = (".tif", ".tiff", ".gif", ".jfif", ".jp2", ".heic", ".heif", ".avif", ".dng", ".mpo", ".pfm")
"""Suffixes of image files that other programs read."""


@dataclass
class SplitFiles:
    """Image files by split, in the order of their lists, and the folders that were searched."""

    images: dict[str, list[Path]] = field(default_factory=dict)
    folders: list[Path] = field(default_factory=list)
    lists: set[Path] = field(default_factory=set)
    """Text files of paths, which are no label files."""

    def add_folder(self, split: str, folder: Path) -> None:
        """Add all images under a folder. Raises SettingError if there is no such folder."""
        if not folder.is_dir():
            raise SettingError(f"images={folder}: no such folder")
        self.images.setdefault(split, []).extend(_images_under(folder))
        self.folders.append(folder)

    def add_list(self, split: str, path: Path, base: Path) -> None:
        """Add the images that a text file names."""
        lines = [line.strip() for line in read_lines(path) if line.strip()]
        found = [_listed_file(line, path.parent, base) for line in lines]
        self.images.setdefault(split, []).extend(found)
        self.folders += dict.fromkeys(file.parent for file in found if file.parent.is_dir())
        self.lists.add(path)


def in_folders(folders: Sequence[Path]) -> SplitFiles:
    """All images of some folders, as the split train."""
    files = SplitFiles({"train": []})
    for folder in folders:
        files.add_folder("train", folder)
    return files


def by_document(document: dict[str, Any], path: Path, report: Callable[[str], None]) -> SplitFiles:
    """Image files of each split that data.yaml names. Raises DataError if the training or validation split is missing.

    A missing test split is only reported: exports often name one that they do not hold.
    """
    base = path.parent / str(document.get("path") or "")
    if not base.is_dir():
        # A path of the machine on which the set was made; the images were moved together with data.yaml.
        base = path.parent
    files = SplitFiles()
    for key, split in SPLIT_NAMES.items():
        given = document.get(key)
        for part in map(str, given if isinstance(given, list) else [given] if given else []):
            target = _target(base, path.parent, part)
            if target is None and split == "test" and not files.images.keys().isdisjoint(("train", "validation")):
                report(f"{path.name}: {key}: {part} is no folder or file under {base}, and is left out")
            elif target is None:
                raise DataError(f"{path}: {key}: {part} must be a folder or file under {base}, but is not")
            elif target.is_dir():
                files.add_folder(split, target)
            else:
                files.add_list(split, target, base)
    return files


def _target(base: Path, beside: Path, part: str) -> Path | None:
    # Roboflow writes ../train/images for a folder beside the file.
    tries = [base / part, beside / part, *([beside / part[3:]] if part.startswith("../") else [])]
    return next((path for path in tries if path.exists()), None)


def _listed_file(line: str, beside: Path, base: Path) -> Path:
    """The file of a line in a list of images: relative to the list (./) or to the set, or absolute."""
    tries = [Path(line), beside / line, base / line]
    return next(
        (path for path in tries if path.is_absolute() and path.is_file()),
        next((path for path in tries[1:] if path.is_file()), beside / line),
    )


def _images_under(folder: Path) -> list[Path]:
    return [path for path in files_under(folder) if path.suffix.lower() in SUFFIXES]


def by_folder(root: Path) -> SplitFiles:
    """``images/{split}``, ``{split}/images``, or else all images as train. The name of a split may be part of a
    folder's name, as in ``train2017``."""
    files = SplitFiles()
    for folder in sorted([*root.glob("images/*"), *root.glob("*/images")]):
        split = split_of(folder.name if folder.parent.name == "images" else folder.parent.name)
        if split is not None and folder.is_dir():
            files.add_folder(split, folder)
    if not files.images:
        return in_folders([root])
    # Images elsewhere under the root are in no split; they are reported.
    files.folders.append(root)
    return files


def label_file(image: Path) -> Path:
    """The label file of an image by Ultralytics' rule: labels instead of the last folder named images, else beside
    it."""
    parts = list(image.parts)
    for position in range(len(parts) - 2, -1, -1):
        if parts[position] == "images":
            parts[position] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def report_left_out(files: SplitFiles, used: Iterable[Path], report: Callable[[str], None]) -> None:
    """Report images in the same folders that are not ``used``, and label files without an image."""
    known = _once(used)
    around = _once(path for folder in dict.fromkeys(files.folders) for path in files_under(folder))
    others = [path for real, path in around.items() if real not in known]
    unread = [path for path in others if path.suffix.lower() in _NOT_READ]
    loose = [path for path in others if path.suffix.lower() in SUFFIXES]
    if unread:
        kinds = ", ".join(SUFFIXES)
        report(f"{len(unread):,} image files are left out, {unread[0]} for example: only {kinds} are read")
    if loose:
        report(f"{len(loose):,} image files are in no split and are left out, {loose[0]} for example")
    labels = dict.fromkeys([*files.folders, *(label_file(folder / "image").parent for folder in files.folders)])
    texts = _once(path for folder in labels for path in files_under(folder) if path.suffix == ".txt")
    of_images = _once([*map(label_file, [*known.values(), *unread, *loose]), *files.lists])
    alone = [path for real, path in texts.items() if real not in of_images and _holds_labels(path)]
    if alone:
        report(f"{len(alone):,} label files have no image file and are left out, {alone[0]} for example")


def _once(paths: Iterable[Path]) -> dict[Path, Path]:
    """Real path -> the first path that leads there. Only folders are resolved: a file that is a link keeps its name."""
    real: dict[Path, Path] = {}
    found: dict[Path, Path] = {}
    for path in paths:
        if path.parent not in real:
            real[path.parent] = path.parent.resolve()
        found.setdefault(real[path.parent] / path.name, path)
    return found


def _holds_labels(path: Path) -> bool:
    """Whether the first row of a text file is a class and at least four numbers, unlike that of other text files."""
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        words = next((line.split() for line in file if line.strip()), [])
    try:
        return len([float(word) for word in words[1:]]) >= 4
    except ValueError:
        return False
