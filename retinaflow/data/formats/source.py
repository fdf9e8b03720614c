"""SourceSet: what the files of another layout say, in their own terms, before it is measured against the images."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np

from retinaflow.data.formats.names import class_ids
from retinaflow.data.tables import RowErrors
from retinaflow.taxonomy import Taxonomy

SPLIT_NAMES = {
    "train": "train", "training": "train", "trainval": "train",
    "val": "validation", "valid": "validation", "validation": "validation", "dev": "validation",
    "test": "test", "testing": "test",
}  # fmt: skip
"""How splits are called elsewhere -> how they are called here."""
_SPLIT_WORD = re.compile(r"(?<![a-z])(" + "|".join(sorted(SPLIT_NAMES, key=len, reverse=True)) + r")(?![a-z])")


@dataclass(frozen=True)
class SourceImage:
    """An image that a source lists."""

    split: str
    name: str
    """Path under the source's image folder, with /, from which its id is made."""
    file: Path | None
    """None: there is no such file."""
    size: tuple[int, int] | None = None
    """(height, width) that the source declares."""


@dataclass
class SourceSet:
    """Classes, images and boxes of a source.

    ``unit``: corners are pixels of the declared size, or shares of the image. ``boxes`` holds tuples (image, class,
    (x1, y1, x2, y2), flags, file, line): image and class are places in their lists, flags those of
    ``detection_set.FLAGS``, line 0 where ``file`` says the whole place.
    """

    unit: Literal["pixel", "share"]
    classes: ClassNames
    images: list[SourceImage] = field(default_factory=list)
    boxes: list[tuple[int, int, tuple[float, ...], tuple[bool, ...], str, int]] = field(default_factory=list)
    absent: list[tuple[int, int]] = field(default_factory=list)
    """(image, class) verified absent."""
    federated: bool = False
    """The source says which classes were looked for on an image (LVIS); else everything was, as far as it says."""

    def leave_out_classes(self, unwanted: set[int]) -> None:
        """Take out classes without a box, and what is said of their absence."""
        kept = [place for place in range(len(self.classes.names)) if place not in unwanted]
        now = {before: after for after, before in enumerate(kept)}
        self.classes.keep(kept)
        self.boxes = [(box[0], now[box[1]], *box[2:]) for box in self.boxes]
        self.absent = [(image, now[index]) for image, index in self.absent if index in now]


class ClassNames:
    """The classes of a source: given by a class list, or found one by one in the order in which they come."""

    def __init__(self, given: Taxonomy | None = None) -> None:
        self.given = given
        self.names: list[str] = list(given.names) if given else []
        self.ids: list[str | None] = list(given.ids) if given else []
        self._place: dict[str | tuple[str, int], int] = {}
        for place, name in enumerate(self.names):
            self._place.setdefault(name, place)
        if given:
            # A name that several classes share cannot say which is meant; its label (name and id) can.
            for name in {name for name in given.names if given.names.count(name) > 1}:
                del self._place[name]
            self._place |= {label: place for place, label in enumerate(given.labels)}
            self._place |= {mid: place for place, mid in enumerate(given.ids)}

    def find(self, name: str, *, class_id: str | None = None, number: int = 0) -> int | None:
        """The class of that name (or id), entered if the list is not given; None if it is not in the given list.

        ``number`` tells classes of one name apart, from 0.
        """
        if self.given:
            known = self._place.get(class_id) if class_id else None
            return self._place.get(name) if known is None else known
        key = class_id or ((name, number) if number else name)
        if key not in self._place:
            self._place[key] = len(self.names)
            self.names.append(name)
            self.ids.append(class_id)
        return self._place[key]

    def keep(self, places: Sequence[int]) -> None:
        """Leave out all but some of the classes that were found; no more are looked for afterwards."""
        self.names, self.ids = [self.names[place] for place in places], [self.ids[place] for place in places]
        self._place.clear()

    def taxonomy(self) -> Taxonomy:
        """The classes in their order; those without an id get one made of their name."""
        if self.given:
            return self.given
        return Taxonomy(tuple(class_ids(self.names, self.ids)), tuple(self.names))


def split_of(*words: str) -> str | None:
    """The split that the first of some names speaks of (``instances_val2017`` -> validation), or None."""
    for word in words:
        hit = _SPLIT_WORD.search(word.lower())
        if hit:
            return SPLIT_NAMES[hit[1]]
    return None


def safe_name(name: Any, place: str) -> str:
    """A file name with folders, with /; a name from a data file is never trusted as a path.

    Raises ValueError for one that is absolute or leads out of its folder.
    """
    text = str(name).replace("\\", "/")
    path = PurePosixPath(text)
    inside = bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\0" not in text
    if not isinstance(name, str) or not inside or re.match(r"[A-Za-z]:", text):
        raise ValueError(f"{place}: a file name must stay inside the image folder, but got {name!r:.120}")
    return str(path)


def note(errors: RowErrors, place: str, rule: str, value: str, *, line: int = 0) -> None:
    """One fault of a source."""
    errors.note(place, rule, np.array([line]), lambda _: value)


def find_image(name: str, folders: Sequence[Path]) -> Path | None:
    """The first file of that name in some folders."""
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


def existing(folders: Iterator[Path] | Sequence[Path]) -> list[Path]:
    """Those of some folders that exist, each once."""
    return [folder for folder in dict.fromkeys(folders) if folder.is_dir()]
