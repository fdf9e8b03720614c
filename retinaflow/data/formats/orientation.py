"""EXIF orientation: boxes drawn on the turned picture -> boxes on the stored pixels, and back.

Cameras store a picture as the sensor saw it and note how to turn it. Annotation tools in a browser show it turned;
retinaflow, like Open Images, means the stored pixels. Orientations 5 to 8 exchange width and height.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from retinaflow.data.image_sizes import THREADS
from retinaflow.data.images import header_size

SWAPPED = (5, 6, 7, 8)
"""Orientations in which the turned picture has the stored one's height as width."""
_BACK = {1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}
"""The orientation that undoes another."""


class Header(NamedTuple):
    """What the head of an image file says."""

    height: int
    width: int
    orientation: int


def read_header(path: Path) -> Header | str:
    """Size as stored, and orientation (1 where none is noted); or what is wrong with the file."""
    size = header_size(path)
    if isinstance(size, str):
        return size
    try:
        with Image.open(path) as image:
            noted = image.getexif().get(ExifTags.Base.Orientation, 1)
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError):
        noted = 1
    return Header(*size, noted if isinstance(noted, int) and 1 <= noted <= 8 else 1)


def orientations_of(files: Sequence[Path]) -> list[int]:
    """The orientation of each image file, read by threads."""
    with ThreadPoolExecutor(THREADS) as threads:
        return [1 if isinstance(head, str) else head.orientation for head in threads.map(read_header, files)]


def to_stored(boxes: NDArray[np.float64], orientation: int) -> NDArray[np.float64]:
    """``boxes [N, 4]`` xyxy in [0, 1] of the turned picture -> of the stored one."""
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


def to_turned(boxes: NDArray[np.float64], orientation: int) -> NDArray[np.float64]:
    """``boxes [N, 4]`` xyxy in [0, 1] of the stored picture -> of the turned one."""
    return to_stored(boxes, _BACK[orientation])
