"""SourceSet: the content of the files of another layout, before it is verified against the image files."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from retinaflow.data.formats.detection_set import FLAGS
from retinaflow.data.formats.ids import class_ids, plain_text, same_name
from retinaflow.data.tables import RowErrors
from retinaflow.errors import shown
from retinaflow.progress import report
from retinaflow.taxonomy import Taxonomy


@dataclass(frozen=True, slots=True)
class SourceImage:
    """An image in the list of a source."""

    split: str
    name: str
    """Path in the image folder of the source, with /; the id is made of it."""
    file: Path | None
    """None if there is no such file."""
    size: tuple[int, int] | None = None
    """(height, width) as declared by the source."""


class Box(NamedTuple):
    """A row of :class:`SourceBoxes`."""

    image: int
    class_index: int
    corners: tuple[float, ...]
    """x1, y1, x2, y2 in the unit of the set."""
    flags: tuple[bool, ...]
    """As :data:`~retinaflow.data.formats.detection_set.FLAGS`."""
    where: str
    """File, or a file and what it holds (``train.json annotation 7``)."""
    line: int
    """Line of the file; 0 where ``where`` names more than a file."""


class SourceBoxes:
    """The boxes of a source as columns: about 50 bytes for each."""

    def __init__(self) -> None:
        self._image, self._class, self._file, self._number = array("i"), array("i"), array("i"), array("i")
        self._corners, self._flags = array("d"), array("B")
        self._files: list[tuple[str, str]] = []
        self._file_of: dict[tuple[str, str], int] = {}

    def __len__(self) -> int:
        return len(self._image)

    def add(
        self,
        image: int,
        class_index: int,
        corners: tuple[float, float, float, float],
        flags: int = 0,
        *,
        file: str,
        number: int,
        what: str = "",
    ) -> None:
        """Add one box: bit f of ``flags`` is FLAGS[f]; ``number`` is a line of the file, or counts its ``what``
        (``annotation``, ``object``)."""
        key = (file, what)
        if key not in self._file_of:
            self._file_of[key] = len(self._files)
            self._files.append(key)
        self._image.append(image)
        self._class.append(class_index)
        self._corners.extend(corners)
        self._flags.append(flags)
        self._file.append(self._file_of[key])
        self._number.append(number)

    def extend(
        self,
        image: NDArray[np.integer],
        class_index: NDArray[np.integer],
        corners: NDArray[np.float64],
        flags: NDArray[np.uint8],
        *,
        file: str,
        numbers: NDArray[np.integer],
        what: str,
    ) -> None:
        """Add many boxes of one file, as columns."""
        self._files.append((file, what))
        self._image.frombytes(image.astype(np.int32).tobytes())
        self._class.frombytes(class_index.astype(np.int32).tobytes())
        self._corners.frombytes(corners.astype(np.float64).tobytes())
        self._flags.frombytes(flags.tobytes())
        self._file.frombytes(np.full(len(image), len(self._files) - 1, dtype=np.int32).tobytes())
        self._number.frombytes(numbers.astype(np.int32).tobytes())

    def __getitem__(self, row: int) -> Box:
        file, what = self._files[self._file[row]]
        number = self._number[row]
        flags = tuple(bool(self._flags[row] >> bit & 1) for bit in range(len(FLAGS)))
        where, line = (f"{file} {what} {number}", 0) if what else (file, number)
        return Box(self._image[row], self._class[row], tuple(self._corners[4 * row : 4 * row + 4]), flags, where, line)

    @property
    def image(self) -> NDArray[np.int32]:
        """``[N]`` position of each box's image in the list of images."""
        return np.frombuffer(self._image, dtype=np.int32) if len(self) else np.zeros(0, dtype=np.int32)

    @property
    def class_index(self) -> NDArray[np.int32]:
        """``[N]`` position of each box's class among the names; may be written to."""
        return np.frombuffer(self._class, dtype=np.int32) if len(self) else np.zeros(0, dtype=np.int32)

    @property
    def corners(self) -> NDArray[np.float64]:
        """``[N, 4]`` xyxy in the unit of the set."""
        return np.frombuffer(self._corners, dtype=np.float64).reshape(-1, 4) if len(self) else np.zeros((0, 4))

    @property
    def flags(self) -> NDArray[np.uint8]:
        """``[N]`` bit f is FLAGS[f]."""
        return np.frombuffer(self._flags, dtype=np.uint8) if len(self) else np.zeros(0, dtype=np.uint8)


@dataclass
class SourceSet:
    """Classes, images and boxes of a source. ``unit``: corners are pixels of the declared size, or fractions."""

    unit: Literal["pixel", "fraction"]
    classes: ClassNames
    images: list[SourceImage] = field(default_factory=list)
    boxes: SourceBoxes = field(default_factory=SourceBoxes)
    absent: list[tuple[int, int]] = field(default_factory=list)
    """(image, class) verified absent."""
    incomplete: list[tuple[int, int]] = field(default_factory=list)
    """(image, class) of which some objects have no box (LVIS: not exhaustive)."""
    federated: bool = False
    """The source lists the classes that were annotated on each image (LVIS); else all classes count as annotated."""

    def renumber_classes(self, now: Sequence[int]) -> None:
        """Give each class another position, or -1 to one without a box, which is removed with its absences."""
        order = sorted((after, before) for before, after in enumerate(now) if after >= 0)
        self.classes.keep([before for _, before in order])
        self.boxes.class_index[:] = np.asarray(now, dtype=np.int32)[self.boxes.class_index]
        self.absent = [(image, now[index]) for image, index in self.absent if now[index] >= 0]
        self.incomplete = [(image, now[index]) for image, index in self.incomplete if now[index] >= 0]


class ClassNames:
    """The classes of a source: those of a given class list, or those found, in the order of their first appearance.

    Names are in Unicode's composed form (NFC), without control characters.
    """

    def __init__(self, given: Taxonomy | None = None) -> None:
        self.given = given
        self.names: list[str] = list(given.names) if given else []
        self.ids: list[str | None] = list(given.ids) if given else []
        self._index: dict[str | tuple[str, int], int] = {}
        for index, name in enumerate(self.names):
            self._index.setdefault(plain_text(name), index)
        if given:
            # A name that several classes share is ambiguous; its label (name and id) is not.
            for name in {name for name, count in Counter(map(plain_text, given.names)).items() if count > 1}:
                del self._index[name]
            self._index |= {plain_text(label): index for index, label in enumerate(given.labels)}
            self._index |= {mid: index for index, mid in enumerate(given.ids)}

    def find(self, name: str, *, class_id: str | None = None, number: int = 0) -> int | None:
        """Index of the class of that name (or id). Without a given list a new class is added; else None for one that is
        not in the list.

        ``number``, from 0, distinguishes classes of one name.
        """
        name = plain_text(name)
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


def report_alike(names: Sequence[str]) -> None:
    """Report classes whose names are equal, or differ only in case or Unicode form: often they are one class."""
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(same_name(name), []).append(name)
    for group in (group for group in alike.values() if len(group) > 1):
        quoted = ", ".join(shown(name, limit=60) for name in group[:4])
        report(
            f"{len(group)} classes have the same name or differ only in upper and lower case ({quoted}); they stay "
            f"{len(group)} classes with ids of their own: rename them if they are one"
        )


def note(errors: RowErrors, where: str, rule: str, value: str, *, line: int = 0) -> None:
    """Add one error; ``where`` is a file, or a file and what it holds (``train.json annotation 7``)."""
    errors.note(where, rule, np.array([line]), lambda _: value)
