"""Detection sets -> Pascal VOC: an XML file for each image, and lists of the splits.

Boxes are written in whole pixels, which other tools expect, so edges move by up to half a pixel.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from retinaflow.data.formats.detection_set import FLAGS, DetectionSet
from retinaflow.data.formats.folders import short_name
from retinaflow.data.formats.voc import FLAG_OF_TAG, SIDES
from retinaflow.settings.conversion_settings import FirstPixel


def whole_pixels(corners: NDArray[np.float64], sizes: NDArray[np.float64]) -> NDArray[np.int64]:
    """``[N, 4]`` edges in whole pixels, from 0, of xyxy in [0, 1]; at least one pixel wide and high.

    ``sizes [N, 2]``: width, height.
    """
    low, high = np.round(corners[:, :2] * sizes), np.round(corners[:, 2:] * sizes)
    # What rounding would leave no pixel gets the one in which it begins.
    low = np.clip(np.where(low < high, low, np.floor(corners[:, :2] * sizes)), 0, sizes - 1)
    high = np.clip(high, low + 1, sizes)
    return np.concatenate([low, high], axis=1).astype(np.int64)


def write_voc(found: DetectionSet, folder: Path, files: Sequence[str], *, first_pixel: FirstPixel = "auto") -> None:
    """``Annotations/{image_id}.xml`` and ``ImageSets/Main/{split}.txt``; ``files``: names in ``JPEGImages``."""
    annotations, lists = folder / "Annotations", folder / "ImageSets" / "Main"
    annotations.mkdir()
    lists.mkdir(parents=True)
    start = np.searchsorted(found.boxes["image"].to_numpy(dtype=np.int64), np.arange(len(found.images) + 1))
    sizes = found.images[["width", "height"]].to_numpy(dtype=np.int64)
    image_of_box = found.boxes["image"].to_numpy(dtype=np.int64)
    sides = whole_pixels(found.corners, sizes[image_of_box].astype(np.float64))
    # Only the left and upper edge move where pixels count from 1: the last pixel is inside.
    sides[:, :2] += first_pixel == "1"
    flags = found.boxes[list(FLAGS)].to_numpy(dtype=bool)
    names = [found.taxonomy.labels[index] for index in found.boxes["class"]]
    for image, image_id in enumerate(found.images["image_id"]):
        root = _document(files[image], sizes[image], from_1=first_pixel == "1")
        for box in range(int(start[image]), int(start[image + 1])):
            own_flags = dict(zip(FLAGS, flags[box].tolist(), strict=True))
            _write_object(root, names[box], sides[box].tolist(), own_flags)
        tree = ElementTree.ElementTree(root)
        ElementTree.indent(tree)
        tree.write(annotations / f"{image_id}.xml", encoding="utf-8")
    for split in found.splits:
        ids = found.images["image_id"][found.images["split"] == split]
        (lists / f"{short_name(split)}.txt").write_text("".join(f"{name}\n" for name in ids), encoding="utf-8")


def _document(file: str, size: np.ndarray, *, from_1: bool) -> ElementTree.Element:
    root = ElementTree.Element("annotation")
    ElementTree.SubElement(root, "folder").text = "JPEGImages"
    ElementTree.SubElement(root, "filename").text = file
    if from_1:
        # A name by which readers recognise that pixels count from 1, as in the challenges.
        ElementTree.SubElement(ElementTree.SubElement(root, "source"), "database").text = "The VOC convention"
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
        ElementTree.SubElement(element, tag).text = str(int(flags[FLAG_OF_TAG[tag]]))
    box = ElementTree.SubElement(element, "bndbox")
    for side, value in zip(SIDES, sides, strict=True):
        ElementTree.SubElement(box, side).text = str(value)
