"""Pascal VOC folders <-> detection sets: one XML file for each image.

Read are the layout of the VOC challenges (``Annotations``, ``JPEGImages``, ``ImageSets/Main/{split}.txt``), of one year
or several, and XML files beside their images or in folders named by split. Corners are pixels. The challenges count
pixels from 1, and ``xmax`` is the last pixel inside (``first_pixel=1``: left edge xmin - 1, right edge xmax); most
tools write the edges, from 0. ``auto`` decides by the database that an annotation names.

``difficult`` becomes group-of (a region without loss) or is read as any other box; ``truncated`` and ``occluded`` are
flags. Boxes are written in whole pixels, which other tools expect, so edges move by up to half a pixel.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from retinaflow.data.formats.detection_set import FLAGS, DetectionSet
from retinaflow.data.formats.folders import existing, find_image
from retinaflow.data.formats.source import ClassNames, SourceImage, SourceSet, note
from retinaflow.data.formats.voc_files import annotation_files, listed, read_root, report_left_out
from retinaflow.data.images import SUFFIXES
from retinaflow.data.tables import RowErrors
from retinaflow.settings.conversion_settings import Difficult, FirstPixel

SHORT = {"validation": "val"}
"""Names of splits in VOC."""
_SIDES = ("xmin", "ymin", "xmax", "ymax")
_FLAG_OF_TAG = {"occluded": "occluded", "truncated": "truncated", "difficult": "group_of"}


def has_voc(folder: Path) -> bool:
    """Whether a folder holds VOC annotations."""
    return next(annotation_files(folder), None) is not None


def read_voc(
    folder: Path,
    errors: RowErrors,
    *,
    classes: ClassNames,
    images: Sequence[Path] = (),
    first_pixel: FirstPixel = "auto",
    difficult: Difficult = "group-of",
    report: Callable[[str], None] = lambda line: None,
) -> SourceSet:
    """All annotated images of a folder; an image in several splits belongs to the first that lists it, trainval last.

    Raises DataError for a list of images that cannot be read; other broken rules go to ``errors``. ``report`` gets a
    line about what is left out.
    """
    source = SourceSet("pixel", classes)
    rows, unlisted = listed(folder)
    seen: set[Path] = set()
    used = {_image_by_stem(path, _image_folders(path, folder, "train", images)) or path for path in unlisted}
    for split, path in rows:
        if path in seen:
            continue
        seen.add(path)
        if not path.is_file():
            note(errors, path.name, "a listed image must have an annotation file", "none")
            continue
        folders = _image_folders(path, folder, split, images)
        file = _image_by_stem(path, folders)
        root = read_root(path, errors)
        if root is None:
            used.add(file or path)
            continue
        kind = root.findtext("source/database", "").strip()
        one_based = first_pixel == "1" or (first_pixel == "auto" and kind.startswith("The VOC"))
        file = file or _image_by_name(root, folders)
        used.add(file or path)
        name = (file or path).relative_to(folder).as_posix() if (file or path).is_relative_to(folder) else path.stem
        image = len(source.images)
        source.images.append(SourceImage(split, name, file, _size(root)))
        for number, found in enumerate(root.findall("object"), 1):
            where = f"{path.name} object {number}"
            _object(source, found, where, image, errors, one_based=one_based, keep_difficult=difficult == "keep")
    if not classes.given:
        _in_order_of_names(source)
    report_left_out(folder, used, unlisted, report)
    return source


def _size(root: ElementTree.Element) -> tuple[int, int] | None:
    """The declared (height, width); None if it is missing or 0, as some tools write it."""
    sides = _number(root.findtext("size/height")), _number(root.findtext("size/width"))
    return (int(sides[0]), int(sides[1])) if sides[0] >= 1 and sides[1] >= 1 else None


def _number(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return float("nan")


def _image_folders(path: Path, folder: Path, split: str, images: Sequence[Path]) -> list[Path]:
    """Folders that may hold the image of an annotation file."""
    bases = [path.parent, path.parent.parent, folder]
    parts = ("JPEGImages", "images", "Images", split, SHORT.get(split, split))
    return existing([*images, path.parent, *(base / part for base in bases for part in parts)])


def _image_by_stem(path: Path, folders: Sequence[Path]) -> Path | None:
    """The image with the name of an annotation file."""
    suffixes = [*SUFFIXES, *(suffix.upper() for suffix in SUFFIXES)]
    tries = (folder / f"{path.stem}{suffix}" for folder in folders for suffix in suffixes)
    return next((file for file in tries if file.is_file()), None)


def _image_by_name(root: ElementTree.Element, folders: Sequence[Path]) -> Path | None:
    """The image that an annotation file names."""
    # Tools often write a path of the machine on which they ran.
    name = (root.findtext("filename") or "").strip().replace("\\", "/").split("/")[-1]
    return find_image(name, folders) if name not in ("", ".", "..") else None


def _object(
    source: SourceSet,
    found: ElementTree.Element,
    where: str,
    image: int,
    errors: RowErrors,
    *,
    one_based: bool,
    keep_difficult: bool,
) -> None:
    name = (found.findtext("name") or "").strip()
    if not name:
        note(errors, where, "an object must have a name", "none")
        return
    sides = [found.findtext(f"bndbox/{side}") for side in _SIDES]
    x1, y1, x2, y2 = map(_number, sides)
    if not np.isfinite([x1, y1, x2, y2]).all():
        shown = ", ".join(f"{side}={text}" for side, text in zip(_SIDES, sides, strict=True))
        note(errors, where, "bndbox must hold four numbers", shown)
        return
    index = source.classes.find(name)
    if index is None:
        note(errors, where, "name must be in the class list", f"name={name!r}")
        return
    if one_based:
        x1, y1 = x1 - 1, y1 - 1
    flags = [False] * len(FLAGS)
    for tag, flag in _FLAG_OF_TAG.items():
        if tag != "difficult" or not keep_difficult:
            flags[FLAGS.index(flag)] = (found.findtext(tag) or "").strip().lower() in ("1", "true")
    source.boxes.append((image, index, (x1, y1, x2, y2), tuple(flags), where, 0))


def _in_order_of_names(source: SourceSet) -> None:
    """Sort the classes by name: VOC has no class list, and the order of the files is arbitrary."""
    order = sorted(range(len(source.classes.names)), key=lambda index: source.classes.names[index])
    position = {old: new for new, old in enumerate(order)}
    source.classes.names = [source.classes.names[index] for index in order]
    source.classes.ids = [source.classes.ids[index] for index in order]
    source.boxes = [(image, position[index], *rest) for image, index, *rest in source.boxes]  # type: ignore[misc]


def write_voc(found: DetectionSet, folder: Path, files: Sequence[str], *, first_pixel: FirstPixel = "auto") -> None:
    """``Annotations/{image_id}.xml`` and ``ImageSets/Main/{split}.txt``; ``files``: names in ``JPEGImages``."""
    annotations, lists = folder / "Annotations", folder / "ImageSets" / "Main"
    annotations.mkdir()
    lists.mkdir(parents=True)
    start = np.searchsorted(found.boxes["image"].to_numpy(dtype=np.int64), np.arange(len(found.images) + 1))
    sizes = found.images[["width", "height"]].to_numpy(dtype=np.int64)
    corners, flags = found.corners, found.boxes[list(FLAGS)].to_numpy(dtype=bool)
    names = [found.taxonomy.labels[index] for index in found.boxes["class"]]
    for image, image_id in enumerate(found.images["image_id"]):
        root = _document(files[image], sizes[image])
        for box in range(int(start[image]), int(start[image + 1])):
            own_flags = dict(zip(FLAGS, flags[box].tolist(), strict=True))
            _write_object(root, names[box], _whole_pixels(corners[box], sizes[image], first_pixel), own_flags)
        tree = ElementTree.ElementTree(root)
        ElementTree.indent(tree)
        tree.write(annotations / f"{image_id}.xml", encoding="utf-8")
    for split in found.splits:
        ids = found.images["image_id"][found.images["split"] == split]
        (lists / f"{SHORT.get(split, split)}.txt").write_text("".join(f"{name}\n" for name in ids), encoding="utf-8")


def _document(file: str, size: np.ndarray) -> ElementTree.Element:
    root = ElementTree.Element("annotation")
    ElementTree.SubElement(root, "folder").text = "JPEGImages"
    ElementTree.SubElement(root, "filename").text = file
    sides = ElementTree.SubElement(root, "size")
    for side, value in zip(("width", "height", "depth"), (*size.tolist(), 3), strict=True):
        ElementTree.SubElement(sides, side).text = str(value)
    ElementTree.SubElement(root, "segmented").text = "0"
    return root


def _write_object(root: ElementTree.Element, name: str, sides: list[int], flags: dict[str, bool]) -> None:
    element = ElementTree.SubElement(root, "object")
    ElementTree.SubElement(element, "name").text = name
    ElementTree.SubElement(element, "pose").text = "Unspecified"
    for tag in ("truncated", "difficult", "occluded"):
        ElementTree.SubElement(element, tag).text = str(int(flags[_FLAG_OF_TAG[tag]]))
    box = ElementTree.SubElement(element, "bndbox")
    for side, value in zip(_SIDES, sides, strict=True):
        ElementTree.SubElement(box, side).text = str(value)


def _whole_pixels(corners: np.ndarray, size: np.ndarray, first_pixel: FirstPixel) -> list[int]:
    """The sides in whole pixels, at least one pixel wide and high."""
    low = np.minimum(np.round(corners[:2] * size), size - 1).astype(int)
    high = np.maximum(np.round(corners[2:] * size).astype(int), low + 1)
    return [*(low + (first_pixel == "1")).tolist(), *high.tolist()]
