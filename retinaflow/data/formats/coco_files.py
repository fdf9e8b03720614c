"""The files of a COCO data set: annotation files by split, and the folders that usually hold their images."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from retinaflow.data.formats.folders import is_result, short_name, split_of
from retinaflow.errors import DataError
from retinaflow.files import text_encoding

LISTS = ("images", "annotations", "categories")
OWN_INFO = {"description": "written by retinaflow"}
"""``info`` of the files that ``convert`` writes."""


def find_coco(path: Path) -> dict[str, Path]:
    """The annotation files by split: a JSON file itself, or those of a folder with images, annotations and categories.

    Of COCO's own files only those of instances are read (not captions, keypoints, panoptic). Raises DataError for two
    files of one split.
    """
    if path.is_file():
        return {stated_split(path, path.parent) or "train": path}
    folder = path
    nested = [path for path in sorted(folder.glob("*/*.json")) if not is_result(path.parent)]
    files = [path for path in (*sorted(folder.glob("*.json")), *nested) if path.is_file()]
    instances = [path for path in files if path.name.startswith("instances_")]
    found: dict[str, Path] = {}
    for path in instances or [path for path in files if is_coco(path)]:
        split = stated_split(path, folder) or "train"
        if split in found:
            raise DataError(
                f"{folder}: a split must have one annotation file, but {found[split].name} and {path.name} are both "
                f"{split}; give the one to read as data=, or put train, val or test in their names"
            )
        found[split] = path
    return found


def stated_split(path: Path, folder: Path) -> str | None:
    """The split that the name of an annotation file, or a folder between it and ``folder``, states."""
    return split_of(path.stem, *path.relative_to(folder).parent.parts)


def is_coco(path: Path) -> bool:
    """Whether a JSON file looks like COCO. Its text is searched but not parsed, because the files are large."""
    with path.open("rb") as file:
        start = file.read(4)
        encoding = text_encoding(start)
        if encoding != "utf-8-sig":
            encoding += "-le" if start[0] == 0xFF else "-be"
        wanted = {json.dumps(name).encode(encoding.removesuffix("-sig")) for name in LISTS}
        rest = start
        while wanted and (block := file.read(1 << 22)):
            wanted -= {word for word in wanted if word in rest + block}
            rest = block[-64:]
    return not wanted


def image_folders(path: Path, split: str, folder: Path) -> Iterator[Path]:
    """Folders in ``folder`` that usually hold the images of an annotation file."""
    words = [path.stem.removeprefix("instances_"), split, short_name(split)]
    words += ["valid"] if split == "validation" else []
    for base in (base for base in (path.parent, path.parent.parent) if base == folder or folder in base.parents):
        yield from (base, base / "images", base / "data")
        yield from (base / word for word in words)
        yield from (base / "images" / word for word in words)
