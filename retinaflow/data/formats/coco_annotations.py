"""Annotations of a COCO file -> columns: ids of images and categories as numbers, boxes, areas and flags.

``iscrowd``, and ``ignore``, ``ignored`` or ``difficult`` unless such objects are kept, make a group-of box. Flags may
stand in the annotation or among its ``attributes`` (CVAT). A box with ``attributes.rotation`` (degrees, around its
centre) becomes the upright box around it; an annotation without ``bbox`` gets that of its polygons.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retinaflow.data.formats.box_values import number_of, upright, yes_or_no
from retinaflow.data.formats.detection_set import FLAGS
from retinaflow.data.formats.source import note
from retinaflow.data.tables import RowErrors
from retinaflow.errors import DataError, shown
from retinaflow.progress import report
from retinaflow.settings.conversion_settings import CocoBbox, Difficult

GROUP_OF = 1 << FLAGS.index("group_of")
_IGNORED = ("ignore", "ignored", "difficult")
_NOT_READ = ("segmentation", "keypoints", "score")
_SAME = 0.01
"""Relative difference up to which an area counts as that of a box."""


def key_of(value: Any) -> int | str | None:
    """An id as a key: 0.0 is 0; None for anything that is no id."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    return value


class Numbers:
    """Keys -> numbers in the order of their first appearance."""

    def __init__(self) -> None:
        self.of: dict[int | str, int] = {}

    def __call__(self, key: int | str) -> int:
        """The number of a key."""
        return self.of.setdefault(key, len(self.of))

    def table(self, positions: Mapping[int | str, int], missing: int) -> NDArray[np.int32]:
        """Number -> position of its key; ``missing`` for one that is not listed."""
        return np.array([positions.get(key, missing) for key in self.of] or [missing], dtype=np.int32)


@dataclass
class Annotations:
    """The annotations of one file. Those that break a rule go to ``errors``."""

    name: str
    bbox: CocoBbox
    difficult: Difficult
    errors: RowErrors
    images: Numbers = field(default_factory=Numbers)
    categories: Numbers = field(default_factory=Numbers)
    counts: Counter[str] = field(default_factory=Counter)
    """Annotations by what is reported of them: rotated, of polygons, flags that are unclear, what is not read."""
    example: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._ids, self._numbers = array("i"), array("i")
        self._given, self._area, self._flags = array("d"), array("d"), array("B")

    def add(self, number: int, annotation: Any) -> None:
        """Add one element of the list of annotations."""
        where = f"{self.name} annotation {number}"
        if not isinstance(annotation, dict):
            note(self.errors, where, "an annotation must be an object", shown(annotation))
            return
        image, category = key_of(annotation.get("image_id")), key_of(annotation.get("category_id"))
        for name, key in (("image_id", image), ("category_id", category)):
            if key is None:
                note(self.errors, where, f"{name} must be a number or a text", f"{name}={shown(annotation.get(name))}")
                return
        box = self._box(annotation)
        if box is None:
            rule = "bbox must be four numbers [x, y, width, height]"
            note(self.errors, where, rule, f"bbox={shown(annotation.get('bbox'))}")
            return
        assert image is not None
        assert category is not None
        self._ids.extend((self.images(image), self.categories(category)))
        self._given.extend(box)
        self._area.append(number_of(annotation.get("area")))
        self._flags.append(self._flags_of(annotation))
        self._numbers.append(number)

    def _box(self, annotation: dict[str, Any]) -> tuple[float, float, float, float] | None:
        box = annotation.get("bbox")
        for name in _NOT_READ:
            if annotation.get(name) not in (None, [], {}, ""):
                self.counts[name] += 1
        if not box and isinstance(annotation.get("segmentation"), list):
            box = self._box_of_polygons(annotation["segmentation"])
        if not isinstance(box, list) or len(box) != 4 or any(isinstance(side, bool) for side in box):
            return None
        if not all(isinstance(side, int | float) for side in box):
            return None
        x, y, width, height = map(number_of, box)
        attributes = annotation.get("attributes")
        rotation = number_of(attributes.get("rotation")) if isinstance(attributes, dict) else 0.0
        if math.isfinite(rotation) and rotation % 360 and self.bbox != "corners":
            self.counts["rotated"] += 1
            x1, y1, x2, y2 = upright(x, y, width, height, math.radians(rotation % 360))
            return x1, y1, x2 - x1, y2 - y1
        return x, y, width, height

    def _box_of_polygons(self, polygons: list[Any]) -> list[float] | None:
        values = [value for polygon in polygons if isinstance(polygon, list) for value in polygon]
        if len(values) < 6 or len(values) % 2 or not all(isinstance(value, int | float) for value in values):
            return None
        self.counts["of polygons"] += 1
        across, down = [number_of(value) for value in values[0::2]], [number_of(value) for value in values[1::2]]
        if self.bbox == "corners":
            return [min(across), min(down), max(across), max(down)]
        return [min(across), min(down), max(across) - min(across), max(down) - min(down)]

    def _flags_of(self, annotation: dict[str, Any]) -> int:
        more = annotation.get("attributes")
        attributes = more if isinstance(more, dict) else {}
        flags = 0
        for bit, name in enumerate(FLAGS):
            if name in attributes or name in annotation:
                flags |= self._is_set(name, annotation.get(name), attributes.get(name)) << bit
        if annotation.get("iscrowd"):
            flags |= self._is_set("iscrowd", annotation["iscrowd"], None) * GROUP_OF
        if self.difficult == "group-of":
            for name in _IGNORED:
                if name in attributes or name in annotation:
                    flags |= self._is_set(name, annotation.get(name), attributes.get(name)) * GROUP_OF
        return flags

    def _is_set(self, name: str, *values: Any) -> bool:
        answers = [yes_or_no(value) for value in values]
        if None in answers:
            self.counts["unclear"] += 1
            self.example.setdefault("unclear", f"{name}={shown(values[answers.index(None)], limit=40)}")
        return True in answers

    def columns(self) -> Columns:
        """All annotations, as views of what was collected: nothing can be added afterwards."""
        ids = np.asarray(self._ids).reshape(-1, 2)
        return Columns(
            image=ids[:, 0],
            category=ids[:, 1],
            given=np.asarray(self._given).reshape(-1, 4),
            area=np.asarray(self._area),
            flags=np.asarray(self._flags),
            numbers=np.asarray(self._numbers),
        )

    def report(self) -> None:
        """Report what was read in another form, or not at all."""
        texts = {
            "rotated": "annotations are rotated: the upright boxes around them are read",
            "of polygons": "annotations have no bbox: those of their polygons are read",
            "unclear": f"flags are neither yes nor no ({self.example.get('unclear')} for example) and count as no",
            "segmentation": "annotations have a segmentation, which is not read: only boxes are",
            "keypoints": "annotations have keypoints, which are not read",
            "score": "annotations have a score, which is not read: scores are of detections, not of ground truth",
        }
        for what, text in texts.items():
            if self.counts[what]:
                report(f"{self.name}: {self.counts[what]:,} {text}")


@dataclass(frozen=True)
class Columns:
    """N annotations: ``image``, ``category`` (numbers), ``given [N, 4]`` as bbox stands, ``area`` (NaN: none),
    ``flags`` and ``numbers`` (from 1, in their list)."""

    image: NDArray[np.int32]
    category: NDArray[np.int32]
    given: NDArray[np.float64]
    area: NDArray[np.float64]
    flags: NDArray[np.uint8]
    numbers: NDArray[np.int32]


def corners_of(columns: Columns, bbox: CocoBbox, *, name: str) -> NDArray[np.float64]:
    """``[N, 4]`` xyxy. Raises DataError where auto finds that areas contradict sizes."""
    if bbox == "auto":
        _refuse_corners(columns, name)
    given = columns.given
    with np.errstate(all="ignore"):
        return given if bbox == "corners" else np.concatenate([given[:, :2], given[:, :2] + given[:, 2:]], axis=1)


def _refuse_corners(columns: Columns, name: str) -> None:
    x, y, width, height = columns.given.T
    with np.errstate(all="ignore"):
        known = np.isfinite(columns.area) & (columns.area > 0) & (width > x) & (height > y)
        as_sizes = np.abs(columns.area / (width * height) - 1) < _SAME
        off = [np.abs(columns.area / ((width - x + more) * (height - y + more)) - 1) < _SAME for more in (0, 1)]
    as_corners = known & ~as_sizes & (off[0] | off[1])
    if known.any() and as_corners.sum() > 0.5 * np.isfinite(columns.area).sum():
        first = int(np.flatnonzero(as_corners)[0])
        raise DataError(
            f"{name} annotation {columns.numbers[first]}: bbox must be [x, y, width, height], but area contradicts it: "
            f"bbox={columns.given[first].tolist()} with area={columns.area[first]:g}, as [x1, y1, x2, y2] would have "
            f"({int(as_corners.sum()):,} of {len(x):,} annotations); give coco_bbox=corners if they are corners, or "
            "coco_bbox=size to read them as sizes all the same"
        )
