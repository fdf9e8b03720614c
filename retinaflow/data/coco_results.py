"""Detections as COCO results JSON -> rows in the published columns, and back.

A results file is a list of ``{"image_id", "category_id", "bbox": [x, y, width, height], "score"}``, boxes in pixels.
Which image and class an id stands for is in a COCO file of the images (``prediction_ids``); a file of predictions that
lists its own images and categories needs none. Without either, an image id is the id of an image as a text or a number
(``000000391895`` is 391895, as in COCO), and a category id is the id of a class or counts the class list from 1.

What is written by these rules is read back by them: ids are the same, and numbers the same float32 values.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pa_compute

from retinaflow.data.annotation_rows import CORNERS
from retinaflow.data.formats.box_values import number_of
from retinaflow.data.formats.json_lists import first_character, list_elements
from retinaflow.data.index import AnnotationIndex
from retinaflow.data.tables import RowErrors, Table, TextColumn
from retinaflow.errors import DataError, SettingError, shown
from retinaflow.files import read_json
from retinaflow.progress import report


@dataclass
class CocoIds:
    """Image and category ids of COCO -> ids here, and (width, height) of images by their id here."""

    images: dict[Any, str] = field(default_factory=dict)
    classes: dict[Any, str] = field(default_factory=dict)
    sizes: dict[str, tuple[float, float]] = field(default_factory=dict)

    @staticmethod
    def of(index: AnnotationIndex, file: Path | None) -> CocoIds:
        """The ids of a COCO file, or those of the data. Raises SettingError for a file that does not exist, and
        DataError for one of another content."""
        here = _ids_here(index)
        if file is not None and not file.is_file():
            raise SettingError(f"prediction_ids={file}: no such file")
        return here if file is None else _ids_of_document(read_json(file), file, index, here)


def read_coco_results(path: Path, index: AnnotationIndex, errors: RowErrors, *, ids: Path | None = None) -> Table:
    """One row per detection: ImageID, LabelName, Score and the normalised corners; a line is the number of an entry.

    Ids that stand for nothing known stay as they are. Raises DataError for a file that is no such list, and when the
    sizes of no image are known; entries that break a rule go to ``errors``.
    """
    start = first_character(path)
    if start not in ("[", "{"):
        raise DataError(f"{path}: COCO results must be a list of detections, but begin with {shown(start)}")
    document = read_json(path) if start == "{" else None
    entries = list_elements(path) if document is None else iter(_listed(document, "annotations", path))
    known, here = CocoIds.of(index, ids), set(map(str, index.image_ids))
    if ids is None and document is not None:
        known = _ids_of_document(document, path, index, known)
    elif ids is None:
        _report_assumed_classes(known, index)
    rows: dict[str, list[Any]] = {name: [] for name in ("ImageID", "LabelName", "Score", *CORNERS)}
    lines: list[int] = []
    without_size = 0
    for number, entry in enumerate(entries, 1):
        flaw = _flaw(entry)
        if flaw is not None:
            errors.note(path.name, flaw, np.array([number]), lambda _, entry=entry: shown(entry))  # type: ignore[misc]
            continue
        image = known.images.get(entry["image_id"], str(entry["image_id"]))
        width, height = known.sizes.get(image, (0.0, 0.0))
        if not width and image in here:
            without_size += 1
        x, y, w, h = map(float, entry["bbox"])
        sides = (x / width, y / height, (x + w) / width, (y + h) / height) if width and height else (0.0,) * 4
        values = (
            image,
            known.classes.get(entry["category_id"], str(entry["category_id"])),
            float(entry["score"]),
            *sides,
        )
        for name, value in zip(rows, values, strict=True):
            rows[name].append(value)
        lines.append(number)
    if without_size:
        raise DataError(
            f"{path}: boxes in JSON are in pixels, but the sizes of {without_size:,} images are not known; give the "
            "folder of the images as images=, their sizes as size_table=, or a COCO file of them as prediction_ids="
        )
    return Table(
        path,
        {name: np.array(rows[name], dtype=np.float64) for name in ("Score", *CORNERS)},
        {
            name: TextColumn.encode(pa.chunked_array([pa.array(rows[name], pa.string())]))
            for name in ("ImageID", "LabelName")
        },
        np.array(lines, dtype=np.int64),
    )


def _flaw(entry: Any) -> str | None:
    """The rule that an entry breaks, or None."""
    if not isinstance(entry, dict) or not {"image_id", "category_id", "bbox", "score"} <= set(entry):
        return "a detection must have image_id, category_id, bbox and score"
    if not all(_is_id(entry[key]) for key in ("image_id", "category_id")):
        return "image_id and category_id must be numbers or texts"
    box = entry["bbox"]
    if not isinstance(box, list) or len(box) != 4 or not all(_is_number(side) for side in box):
        return "bbox must be four numbers [x, y, width, height]"
    return None if _is_number(entry["score"]) else "score must be a number"


def _is_id(value: Any) -> bool:
    """Whether a value is a whole number, or a text that a file can hold (half of a character is none)."""
    return type(value) is int or (
        isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)
    )


def _is_number(value: Any) -> bool:
    return not isinstance(value, str) and math.isfinite(number_of(value))


def _ids_here(index: AnnotationIndex) -> CocoIds:
    """What ids stand for where no file names them."""
    ids = list(map(str, index.image_ids))
    numbers = Counter(int(text) for text in ids if text.isdecimal())
    images: dict[Any, str] = {int(text): text for text in ids if text.isdecimal() and numbers[int(text)] == 1}
    classes: dict[Any, str] = dict(enumerate(index.taxonomy.ids, 1))
    if any(mid.isdecimal() for mid in index.taxonomy.ids):
        classes = {int(mid): mid for mid in index.taxonomy.ids if mid.isdecimal()}
    sizes = {
        text: (float(width), float(height))
        for text, (height, width) in zip(ids, index.sizes.tolist(), strict=True)
        if width
    }
    return CocoIds({**images, **{text: text for text in ids}}, classes, sizes)


def _ids_of_document(document: Any, path: Path, index: AnnotationIndex, here: CocoIds) -> CocoIds:
    """What the ids of a COCO file stand for."""
    found = CocoIds(sizes=dict(here.sizes))
    known, taxonomy = set(map(str, index.image_ids)), index.taxonomy
    for image in _listed(document, "images", path):
        if not isinstance(image, Mapping) or not isinstance(image.get("id"), int | str):
            raise DataError(f"{path}: an image must have an id, but got {shown(image)}")
        name = PurePosixPath(str(image.get("file_name") or image.get("coco_url") or image["id"]).replace("\\", "/"))
        options = [name.stem, "__".join(name.with_suffix("").parts), str(image["id"])]
        found.images[image["id"]] = next((option for option in options if option in known), name.stem)
        sides = [float(image[key]) for key in ("width", "height") if _is_number(image.get(key)) and image[key] > 0]
        if len(sides) == 2:
            found.sizes[found.images[image["id"]]] = sides[0], sides[1]
    for category in _listed(document, "categories", path):
        if not isinstance(category, Mapping) or not isinstance(category.get("id"), int | str):
            raise DataError(f"{path}: a category must have an id, but got {shown(category)}")
        title, mid = str(category.get("name", "")), category.get("label_name")
        named = [taxonomy.index_of[mid]] if mid in taxonomy.index_of else taxonomy.named(title)
        if len(named) > 1:
            ids_of_name = ", ".join(taxonomy.ids[one] for one in named)
            raise DataError(
                f"{path}: category {category['id']}: {shown(title)} is the name of several classes; give its id as "
                f"label_name ({ids_of_name})"
            )
        found.classes[category["id"]] = taxonomy.ids[named[0]] if named else title
    return found


def _listed(document: Any, name: str, path: Path) -> list[Any]:
    if not isinstance(document, Mapping) or not isinstance(document.get(name), list):
        raise DataError(f"{path}: a COCO file must hold a list of {name}, but holds none")
    return list(document[name])


def _report_assumed_classes(known: CocoIds, index: AnnotationIndex) -> None:
    first = next(iter(known.classes.items()), None)
    if first is not None:
        name = index.taxonomy.names[index.taxonomy.index_of[first[1]]]
        report(
            f"category ids are taken in the order of the class list: {first[0]} is {name}, and so on; the COCO file "
            "that defines them can be given as prediction_ids="
        )


class CocoResults:
    """Writes detections on the images of ``index`` as COCO results, with the ids of a COCO file or of the data.

    Raises DataError when the file has no image, or no class, of ``index``. What else it lacks is printed and left out,
    since the file gives it no id.
    """

    def __init__(self, index: AnnotationIndex, file: Path | None) -> None:
        ids = CocoIds.of(index, file)
        # Of several ids of one image the first: its number, where its name is one.
        self._images = {here: json.dumps(there) for there, here in reversed(ids.images.items())}
        self._classes = {here: json.dumps(there) for there, here in reversed(ids.classes.items())}
        self._sizes = ids.sizes
        if file is None:
            self._classes = {mid: json.dumps(mid) for mid in index.taxonomy.ids} | self._classes
            return
        names = dict(zip(index.taxonomy.ids, index.taxonomy.labels, strict=True))
        self._report_missing(file, "images", list(map(str, index.image_ids)), self._images)
        self._report_missing(
            file, "classes", [names[mid] for mid in names], {names[m]: "" for m in self._classes if m in names}
        )

    @staticmethod
    def _report_missing(file: Path, what: str, wanted: Sequence[str], there: Mapping[str, str]) -> None:
        missing = [name for name in wanted if name not in there]
        if wanted and len(missing) == len(wanted):
            raise DataError(f"{file}: it must list the {what} of the predictions, but lists none of them ({wanted[0]})")
        if missing:
            report(
                f"{file} lacks {len(missing):,} of {len(wanted):,} {what} ({missing[0]}): their detections are left out"
            )

    def write(self, tables: Iterable[pa.Table], path: Path) -> None:
        """Detections in the published columns, table by table, as one list."""
        with path.open("w", encoding="utf-8") as file:
            separator = "["
            for table in tables:
                for entry in self._entries(table):
                    file.write(separator + entry)
                    separator = ",\n"
            file.write("[]\n" if separator == "[" else "]\n")

    def _entries(self, table: pa.Table) -> Iterator[str]:
        # By their shortest text, as in a CSV file, so that both files hold the same numbers.
        columns = (
            pa_compute.cast(pa_compute.cast(table[name], pa.string()), pa.float64()) for name in ("Score", *CORNERS)
        )
        numbers = zip(*(column.to_pylist() for column in columns), strict=True)
        rows = zip(table["ImageID"].to_pylist(), table["LabelName"].to_pylist(), numbers, strict=True)
        for image_id, mid, (score, *corners) in rows:
            image, category = self._images.get(image_id), self._classes.get(mid)
            if image is None or category is None:
                continue
            width, height = self._sizes[image_id]
            x1, y1, x2, y2 = corners
            bbox = f"[{x1 * width!r}, {y1 * height!r}, {(x2 - x1) * width!r}, {(y2 - y1) * height!r}]"
            yield f'{{"image_id": {image}, "category_id": {category}, "bbox": {bbox}, "score": {score!r}}}'
