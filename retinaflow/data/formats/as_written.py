"""Boxes as the files of a layout hold them: what is written is checked with the digits that the file keeps.

Each layout rounds: the published one to nine decimals of the image, COCO to six of a pixel, YOLO to eight of the image,
VOC to whole pixels. A box of no width, or two equal ones, that only rounding makes would be refused by every reader.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from retinaflow.data.formats.coco_writer import bbox_of
from retinaflow.data.formats.detection_set import CORNERS, DetectionSet
from retinaflow.data.formats.orientation import to_stored
from retinaflow.data.formats.published_writer import rounded
from retinaflow.data.formats.source import note
from retinaflow.data.formats.voc_writer import whole_pixels
from retinaflow.data.formats.yolo_writer import row_values
from retinaflow.data.tables import RowErrors
from retinaflow.settings.conversion_settings import Layout


def as_read(
    corners: NDArray[np.float64], sizes: NDArray[np.float64], orientation: NDArray[np.int64], target: Layout
) -> NDArray[np.float64]:
    """``corners [N, 4]`` xyxy in [0, 1] after writing and reading again; ``sizes [N, 2]``: width, height as stored;
    ``orientation [N]``: EXIF orientation of the image that YOLO's boxes refer to."""
    if target == "openimages":
        return rounded(corners)
    scale = np.concatenate([sizes, sizes], axis=1)
    if target == "voc":
        return np.asarray(whole_pixels(corners, sizes) / scale)
    if target == "coco":
        given = bbox_of(corners, sizes)
        return np.asarray(np.clip(np.concatenate([given[:, :2], given[:, :2] + given[:, 2:]], axis=1) / scale, 0, 1))
    given = row_values(corners, orientation)
    half = given[:, 2:] / 2
    read = np.asarray(np.clip(np.concatenate([given[:, :2] - half, given[:, :2] + half], axis=1), 0, 1))
    for kind in np.unique(orientation[orientation > 1]):
        read[orientation == kind] = to_stored(read[orientation == kind], int(kind))
    return read


def has_area(corners: NDArray[np.float64]) -> NDArray[np.bool_]:
    """``[N]`` boxes with a width and a height above 0."""
    return np.asarray((corners[:, 0] < corners[:, 2]) & (corners[:, 1] < corners[:, 3]))


def is_first(
    image: NDArray[np.integer], classes: NDArray[np.integer], corners: NDArray[np.float64]
) -> NDArray[np.bool_]:
    """``[N]`` boxes that do not repeat the image, class and corners of an earlier one."""
    frame = pd.DataFrame(corners, columns=list(CORNERS))
    frame["image"], frame["class"] = image, classes
    return ~frame.duplicated().to_numpy()


def writable(found: DetectionSet, target: Layout, errors: RowErrors) -> DetectionSet:
    """The set without boxes that ``target`` cannot hold, which go to ``errors`` under the id of their image.

    Raises DataError for them unless ``errors`` drops rows.
    """
    image = found.boxes["image"].to_numpy(dtype=np.int64)
    classes = found.boxes["class"].to_numpy(dtype=np.int64)
    sizes = found.images[["width", "height"]].to_numpy(dtype=np.float64)[image]
    orientation = found.images["orientation"].to_numpy(dtype=np.int64)[image]
    written = as_read(found.corners, sizes, orientation, target)
    area = has_area(written)
    first = np.ones(len(written), dtype=bool)
    first[area] = is_first(image[area], classes[area], written[area])
    ids, labels, corners = found.images["image_id"].to_numpy(), found.taxonomy.labels, found.corners
    for valid, rule in (
        (area, f"a box must have a width and a height above 0 as it is written ({target})"),
        (first, f"a box must be given once, also as it is written ({target})"),
    ):
        for row in np.flatnonzero(~valid).tolist():
            sides = ", ".join(f"{name}={value:.12g}" for name, value in zip(CORNERS, corners[row], strict=True))
            note(errors, f"image {ids[image[row]]}, {labels[classes[row]]}", rule, sides)
    errors.settle()
    return found if (area & first).all() else replace(found, boxes=found.boxes[area & first].reset_index(drop=True))
