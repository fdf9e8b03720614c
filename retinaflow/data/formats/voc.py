"""Pascal VOC data sets -> source sets: one XML file for each image.

Read are the layout of the VOC challenges (``Annotations``, ``JPEGImages``, ``ImageSets/Main/{split}.txt``), of one year
or several, and XML files beside their images or in folders of any name (:mod:`~retinaflow.data.formats.voc_files`). The
image of a file is the one that its ``filename`` names; where there is none, the one of the same name. Corners are
pixels. The challenges count pixels from 1, and ``xmax`` is the last pixel inside (``first_pixel=1``: left edge xmin -
1, right edge xmax); most tools write the edges, from 0. ``auto`` decides by the database that an annotation names.

``difficult`` and ``ignore`` become group-of (a region without loss) or are read as any other box; ``truncated`` and
``occluded`` are flags. A rotated box (``robndbox``, or CVAT's attribute ``rotation``) becomes the upright box around
it.
"""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from retinaflow.data.formats.box_values import number_of, refuse_fractions, upright, yes_or_no
from retinaflow.data.formats.detection_set import FLAGS
from retinaflow.data.formats.folders import FileFinder, ReadableFolders, bare_name, existing, short_name
from retinaflow.data.formats.source import ClassNames, SourceImage, SourceSet, note
from retinaflow.data.formats.voc_files import annotation_files, is_annotation, listed, read_root, report_left_out
from retinaflow.data.image_folders import SUFFIXES
from retinaflow.data.tables import RowErrors
from retinaflow.errors import SettingError, shown
from retinaflow.progress import report
from retinaflow.settings.conversion_settings import ConvertConfig

SIDES = ("xmin", "ymin", "xmax", "ymax")
FLAG_OF_TAG = {"occluded": "occluded", "truncated": "truncated", "difficult": "group_of", "ignore": "group_of"}
_CENTRE = ("cx", "cy", "w", "h", "angle")
_ANNOTATION_FOLDERS = ("annotations", "annotation", "annots", "xml", "xmls", "labels")
_IMAGE_FOLDERS = ("JPEGImages", "images", "Images", "imgs", "img", "image", "data")


def has_voc(folder: Path) -> bool:
    """Whether a folder holds VOC annotations."""
    return any(map(is_annotation, annotation_files(folder)))


def read_voc(config: ConvertConfig, folder: Path, errors: RowErrors, *, classes: ClassNames) -> SourceSet:
    """All annotated images of a folder; an image in several splits belongs to the first that lists it, trainval last.

    Raises DataError for a list of images that cannot be read, SettingError for a link that leads out of ``folder``
    and those of the settings; other broken rules go to ``errors``.
    """
    images = config.images
    for path in images:
        if not path.is_dir():
            raise SettingError(f"images={path}: no such folder")
    source = SourceSet("fraction" if config.box_unit == "fraction" else "pixel", classes)
    readable = ReadableFolders(folder, [*images, *config.linked_folders])
    finder = FileFinder([*images, folder], readable, SUFFIXES)
    rows, unlisted = listed(folder, annotation_files(folder, finder.readable))
    reader = _Reader(config, source, folder, finder, errors)
    for split, path in rows:
        reader.read(split, path)
    used = reader.used | {file for path in unlisted for file in finder.of_stem(path.stem)}
    if config.box_unit == "auto":
        refuse_fractions(source.boxes.corners, str(folder))
    reader.report()
    if not classes.given:
        # VOC has no class list, and the order of the files is arbitrary.
        order = np.argsort(np.array(source.classes.names, dtype=object), kind="stable")
        source.renumber_classes(np.argsort(order).tolist())
    report_left_out(finder, used, unlisted)
    return source


class _Reader:
    """Reads one annotation file after another into a source."""

    def __init__(
        self, config: ConvertConfig, source: SourceSet, folder: Path, finder: FileFinder, errors: RowErrors
    ) -> None:
        self.used: set[Path] = set()
        """Image files that belong to an annotation file."""
        self._config, self._source, self._folder = config, source, folder
        self._finder, self._errors = finder, errors
        self._seen: set[Path] = set()
        self._folders: dict[tuple[Path, str], list[Path]] = {}
        self._counts: Counter[str] = Counter()
        self._unclear = ""

    def read(self, split: str, path: Path) -> None:
        """Add the image of an annotation file with its boxes, unless it was read before."""
        if path in self._seen:
            return
        self._seen.add(path)
        if not path.is_file():
            note(self._errors, path.name, "a listed image must have an annotation file", "none")
            return
        root = read_root(path, self._errors)
        if root is None:
            self.used.update(self._finder.of_stem(path.stem))
            return
        file = self._image(path, root, split)
        if file in self.used:
            note(self._errors, path.name, "an image must have one annotation file", f"a second one for {file}")
            return
        if file is not None:
            self.used.add(file)
        kind = root.findtext("source/database", "").strip()
        first = self._config.voc_first_pixel
        is_one_based = first == "1" or (first == "auto" and kind.startswith("The VOC"))
        shown_path = file or path
        relative = shown_path.is_relative_to(self._folder)
        name = shown_path.relative_to(self._folder).as_posix() if relative else shown_path.name
        self._source.images.append(SourceImage(split, name, file, _size(root)))
        for number, found in enumerate(root.findall("object"), 1):
            self._object(found, path.name, number, offset=int(is_one_based))

    def _image(self, path: Path, root: ElementTree.Element, split: str) -> Path | None:
        """The image that an annotation file names, or of which it has the name; None if there is no one such file."""
        key = (path.parent, split)
        if key not in self._folders:
            self._folders[key] = _image_folders(path, self._folder, split, self._config.images)
        folders = self._folders[key]
        # Tools often write a path of the machine on which they ran.
        name = bare_name(root.findtext("filename") or "")
        if name is not None and (file := self._finder.at(name, folders)):
            return file
        tries = [self._finder.named(name), self._finder.of_stem(name)] if name is not None else []
        for hits in (*tries, self._finder.of_stem(path.stem)):
            for folder in folders:
                beside = [file for file in hits if file.parent == folder]
                if len(beside) == 1:
                    return beside[0]
            if len(hits) == 1:
                return hits[0]
            if hits:
                value = f"{hits[0]} and {hits[1]}"
                note(self._errors, path.name, "filename must name the image where several have the name", value)
                return None
        return None

    def _object(self, found: ElementTree.Element, file: str, number: int, *, offset: int) -> None:
        where = f"{file} object {number}"
        name = (found.findtext("name") or "").strip()
        if not name:
            note(self._errors, where, "an object must have a name", "none")
            return
        corners = self._corners(found, where, offset)
        if corners is None:
            return
        index = self._source.classes.find(name)
        if index is None:
            note(self._errors, where, "name must be in the class list", f"name={shown(name)}")
            return
        flags = 0
        for tag, flag in FLAG_OF_TAG.items():
            if flag != "group_of" or self._config.difficult == "group-of":
                flags |= self._is_set(tag, found.findtext(tag)) << FLAGS.index(flag)
        self._source.boxes.add(
            len(self._source.images) - 1, index, corners, flags, file=file, number=number, what="object"
        )

    def _corners(self, found: ElementTree.Element, where: str, offset: int) -> tuple[float, float, float, float] | None:
        rotated = found.find("robndbox")
        names: tuple[str, ...] = SIDES if rotated is None or found.find("bndbox") is not None else _CENTRE
        tag = "bndbox" if names == SIDES else "robndbox"
        texts = [found.findtext(f"{tag}/{side}") for side in names]
        values = [number_of(text) for text in texts]
        if not all(map(math.isfinite, values)):
            pairs = zip(names, texts, strict=True)
            shown_pairs = ", ".join(f"{side}={shown(text, limit=40, quotes=False)}" for side, text in pairs)
            rule = f"{tag} must hold {'four' if names == SIDES else 'five'} numbers"
            note(self._errors, where, rule, shown_pairs)
            return None
        if names == SIDES:
            x1, y1, x2, y2 = values
            return self._turned(found, (x1 - offset, y1 - offset, x2, y2))
        self._counts["rotated"] += 1
        x, y, width, height, angle = values
        return upright(x - width / 2, y - height / 2, width, height, angle)

    def _turned(
        self, found: ElementTree.Element, corners: tuple[float, float, float, float]
    ) -> tuple[float, float, float, float]:
        """The corners, or those of the upright box around them where an attribute gives a rotation in degrees."""
        for attribute in found.findall("attributes/attribute"):
            if (attribute.findtext("name") or "").strip() == "rotation":
                degrees = number_of(attribute.findtext("value"))
                if math.isfinite(degrees) and degrees % 360:
                    self._counts["rotated"] += 1
                    x1, y1, x2, y2 = corners
                    return upright(x1, y1, x2 - x1, y2 - y1, math.radians(degrees % 360))
        return corners

    def _is_set(self, tag: str, text: str | None) -> bool:
        answer = yes_or_no(text)
        if answer is None:
            self._counts["unclear"] += 1
            self._unclear = self._unclear or f"{tag}={shown(text, limit=40)}"
        return answer is True

    def report(self) -> None:
        """Report what was read in another form."""
        if count := self._counts["rotated"]:
            report(f"{count:,} objects are rotated: the upright boxes around them are read")
        if count := self._counts["unclear"]:
            report(f"{count:,} flags are neither yes nor no ({self._unclear} for example) and count as no")


def _size(root: ElementTree.Element) -> tuple[int, int] | None:
    """The declared (height, width); None if it is missing or 0, as some tools write it."""
    height, width = number_of(root.findtext("size/height")), number_of(root.findtext("size/width"))
    return (int(height), int(width)) if 1 <= height < 1 << 24 and 1 <= width < 1 << 24 else None


def _image_folders(path: Path, folder: Path, split: str, images: Sequence[Path]) -> list[Path]:
    """Folders that may hold the image of an annotation file."""
    parts = path.parent.relative_to(folder).parts if path.is_relative_to(folder) else ()
    found = [*images]
    for position in reversed(range(len(parts))):
        if parts[position].lower() in _ANNOTATION_FOLDERS:
            before, after = folder.joinpath(*parts[:position]), parts[position + 1 :]
            found += [before.joinpath(name, *after) for name in _IMAGE_FOLDERS]
            break
    bases = [base for base in (path.parent, path.parent.parent, folder) if base == folder or folder in base.parents]
    names = (*_IMAGE_FOLDERS, split, short_name(split))
    return existing([*found, path.parent, *(base / name for base in bases for name in names), *bases])
