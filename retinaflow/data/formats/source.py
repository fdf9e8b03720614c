"""SourceSet: the content of the files of another layout, before it is verified against the image files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from retinaflow.data.formats.ids import class_ids
from retinaflow.data.tables import RowErrors
from retinaflow.taxonomy import Taxonomy


@dataclass(frozen=True)
class SourceImage:
    """An image in the list of a source."""

    split: str
    name: str
    """Path in the image folder of the source, with /; the id is made of it."""
    file: Path | None
    """None if there is no such file."""
    size: tuple[int, int] | None = None
    """(height, width) as declared by the source."""


@dataclass
class SourceSet:
    """Classes, images and boxes of a source.

    ``unit``: corners are pixels of the declared size, or fractions of the image. ``boxes`` holds tuples (image, class,
    (x1, y1, x2, y2), flags, file, line): image and class are positions in their lists, flags those of
    ``detection_set.FLAGS``, and line is 0 where ``file`` names more than a file (``train.json annotation 7``).
    """

    unit: Literal["pixel", "fraction"]
    classes: ClassNames
    images: list[SourceImage] = field(default_factory=list)
    boxes: list[tuple[int, int, tuple[float, ...], tuple[bool, ...], str, int]] = field(default_factory=list)
    absent: list[tuple[int, int]] = field(default_factory=list)
    """(image, class) verified absent."""
    federated: bool = False
    """The source lists the classes that were annotated on each image (LVIS); else all classes count as annotated."""

    def leave_out_classes(self, unwanted: set[int]) -> None:
        """Remove classes without a box, and their verified absences."""
        wanted = [index for index in range(len(self.classes.names)) if index not in unwanted]
        now = {before: after for after, before in enumerate(wanted)}
        self.classes.keep(wanted)
        self.boxes = [(box[0], now[box[1]], *box[2:]) for box in self.boxes]
        self.absent = [(image, now[index]) for image, index in self.absent if index in now]


class ClassNames:
    """The classes of a source: those of a given class list, or those found, in the order of their first appearance."""

    def __init__(self, given: Taxonomy | None = None) -> None:
        self.given = given
        self.names: list[str] = list(given.names) if given else []
        self.ids: list[str | None] = list(given.ids) if given else []
        self._index: dict[str | tuple[str, int], int] = {}
        for index, name in enumerate(self.names):
            self._index.setdefault(name, index)
        if given:
            # A name that several classes share is ambiguous; its label (name and id) is not.
            for name in {name for name in given.names if given.names.count(name) > 1}:
                del self._index[name]
            self._index |= {label: index for index, label in enumerate(given.labels)}
            self._index |= {mid: index for index, mid in enumerate(given.ids)}

    def find(self, name: str, *, class_id: str | None = None, number: int = 0) -> int | None:
        """Index of the class of that name (or id). Without a given list a new class is added; else None for one that is
        not in the list.

        ``number``, from 0, distinguishes classes of one name.
        """
        if self.given:
            known = self._index.get(class_id) if class_id else None
            return self._index.get(name) if known is None else known
        key = class_id or ((name, number) if number else name)
        if key not in self._index:
            self._index[key] = len(self.names)
            self.names.append(name)
            self.ids.append(class_id)
        return self._index[key]

    def keep(self, indices: Sequence[int]) -> None:
        """Keep only some of the classes that were found, in that order. find() must not be called afterwards."""
        self.names, self.ids = [self.names[index] for index in indices], [self.ids[index] for index in indices]
        self._index.clear()

    def taxonomy(self) -> Taxonomy:
        """The classes in their order; a class without an id gets one made of its name."""
        if self.given:
            return self.given
        return Taxonomy(tuple(class_ids(self.names, self.ids)), tuple(self.names))


def note(errors: RowErrors, where: str, rule: str, value: str, *, line: int = 0) -> None:
    """Add one error; ``where`` is a file, or a file and what it holds (``train.json annotation 7``)."""
    errors.note(where, rule, np.array([line]), lambda _: value)
