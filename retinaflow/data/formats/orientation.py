"""EXIF orientation: boxes drawn on the rotated image -> boxes on the stored pixels, and back.

Cameras store an image as the sensor saw it, with a note on how to rotate it. Annotation tools in a browser show it
rotated; boxes of retinaflow, as those of Open Images, refer to the stored pixels. Orientations 5 to 8 exchange width
and height.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from retinaflow.data.image_headers import header_size
from retinaflow.data.image_sizes import THREADS

SWAPPED = (5, 6, 7, 8)
"""Orientations whose rotation exchanges width and height."""
_BACK = {1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}
"""The orientation that undoes another."""


class Header(NamedTuple):
    """Size as stored and EXIF orientation, from the header of an image file."""

    height: int
    width: int
    orientation: int


def read_header(path: Path) -> Header | str:
    """The header (orientation 1 where none is given), or the reason why the file cannot be read."""
    size = header_size(path)
    if isinstance(size, str):
        return size
    try:
        with Image.open(path) as image:
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError):
        orientation = 1
    return Header(*size, orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1)


def orientations_of(files: Sequence[Path]) -> list[int]:
    """The orientation of each image file, read by threads."""
    with ThreadPoolExecutor(THREADS) as threads:
        return [1 if isinstance(header, str) else header.orientation for header in threads.map(read_header, files)]


def to_stored(boxes: NDArray[np.float64], orientation: int) -> NDArray[np.float64]:
    """``boxes [N, 4]`` xyxy in [0, 1] of the rotated image -> of the stored one."""
    x1, y1, x2, y2 = boxes.T
    corners = {
        1: (x1, y1, x2, y2),
        2: (1 - x2, y1, 1 - x1, y2),
        3: (1 - x2, 1 - y2, 1 - x1, 1 - y1),
        4: (x1, 1 - y2, x2, 1 - y1),
        5: (y1, x1, y2, x2),
        6: (y1, 1 - x2, y2, 1 - x1),
        7: (1 - y2, 1 - x2, 1 - y1, 1 - x1),
        8: (1 - y2, x1, 1 - y1, x2),
    }
    return np.stack(corners[orientation], axis=1)


def to_rotated(boxes: NDArray[np.float64], orientation: int) -> NDArray[np.float64]:
    """``boxes [N, 4]`` xyxy in [0, 1] of the stored image -> of the rotated one."""
    return to_stored(boxes, _BACK[orientation])
