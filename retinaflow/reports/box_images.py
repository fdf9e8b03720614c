"""Boxes drawn into an image at its own size: class name and score in the colour of the class.

A class has the same colour in every image, whatever other classes there are: the colour is computed from the class id.
Names are written where they cover no other name, as far as there is space. Pixels in, pixels out.
"""

from __future__ import annotations

import colorsys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from retinaflow.files import atomic_file
from retinaflow.reports.figure_style import font_file

Pixels = NDArray[np.uint8]
Rectangle = tuple[float, float, float, float]

_BAR_LINES = 1.9
"""Height of the line of text above an image, in font sizes."""
_GAP = 8
"""Pixels between two images."""


@dataclass(frozen=True)
class DrawnBox:
    """A box to draw: xyxy, normalised to [0, 1]; ``score`` is None for ground truth."""

    box: Rectangle
    class_id: str
    name: str
    score: float | None = None
    own_color: tuple[int, int, int] | None = None
    """Instead of that of the class."""

    @property
    def color(self) -> tuple[int, int, int]:
        """RGB."""
        return self.own_color or class_color(self.class_id)

    @property
    def text(self) -> str:
        """The text at the box."""
        return self.name if self.score is None else f"{self.name} {self.score:.2f}"


def class_color(class_id: str) -> tuple[int, int, int]:
    """The RGB colour of a class: any hue, bright enough to be seen on a dark photograph."""
    number = zlib.crc32(class_id.encode())
    hue, strength, value = (number & 0xFFFF) / 0x10000, number >> 16 & 0xFF, number >> 24 & 0xFF
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.6 + 0.4 * strength / 255, 0.75 + 0.25 * value / 255)
    return round(red * 255), round(green * 255), round(blue * 255)


def drawn(image: Pixels, boxes: Sequence[DrawnBox], *, title: str) -> Pixels:
    """The image ``[H, W, 3]`` RGB with its boxes, the best on top, below a line with the title."""
    canvas = Image.fromarray(image)
    pen = ImageDraw.Draw(canvas)
    width, height = canvas.size
    size = _font_size(width, height)
    line = max(2, size // 7)
    ordered = sorted(boxes, key=lambda box: (box.score is not None, box.score or 0.0))
    for box in ordered:
        pen.rectangle(_pixels(box.box, width, height), outline=box.color, width=line)
    taken: list[Rectangle] = []
    # The best first, so that it gets the best position.
    for box in reversed(ordered):
        taken.append(_write(pen, box, (width, height), size, taken))
    return _with_title(canvas, title, size)


def side_by_side(images: Sequence[Pixels]) -> Pixels:
    """Images of one height in a row, with a white gap."""
    gap = np.full((images[0].shape[0], _GAP, 3), 255, dtype=np.uint8)
    parts = [part for canvas in images for part in (gap, canvas)]
    return np.concatenate(parts[1:], axis=1)


def save_image(canvas: Pixels, path: Path) -> None:
    """Write an image in the file format of the suffix; a file that is there is replaced, not written into."""
    with atomic_file(path) as partial:
        Image.fromarray(canvas).save(partial, Image.registered_extensions()[path.suffix.lower()], quality=92)


def _write(
    pen: ImageDraw.ImageDraw, box: DrawnBox, image: tuple[int, int], size: int, taken: Sequence[Rectangle]
) -> Rectangle:
    """Write the text of a box where it covers least. Returns its rectangle."""
    font, pad = _font(box.text, size), max(2, size // 6)
    text_width = pen.textlength(box.text, font=font) + 2 * pad
    text_height = float(size + 2 * pad)
    x1, y1, x2, y2 = _pixels(box.box, *image)
    # Above, below, then inside the corners.
    corners = [
        (x1, y1 - text_height),
        (x2 - text_width, y1 - text_height),
        (x1, y2),
        (x1, y1),
        (x2 - text_width, y1),
        (x1, y2 - text_height),
        (x2 - text_width, y2 - text_height),
    ]
    rectangles = [_inside(left, top, text_width, text_height, image) for left, top in corners]
    chosen = min(rectangles, key=lambda one: sum(_overlap(one, other) for other in taken))
    color = box.color
    pen.rectangle(chosen, fill=color)
    is_bright = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] > 140
    pen.text(
        (chosen[0] + pad, chosen[1] + pad), box.text, font=font, fill="black" if is_bright else "white", anchor="la"
    )
    return chosen


def _with_title(canvas: Image.Image, title: str, size: int) -> Pixels:
    bar = round(size * _BAR_LINES)
    whole = Image.new("RGB", (canvas.width, canvas.height + bar), "white")
    whole.paste(canvas, (0, bar))
    font, text = _font(title, size), title
    pen = ImageDraw.Draw(whole)
    while len(text) > 2 and pen.textlength(text, font=font) > canvas.width - size:
        text = f"{text[:-2]}…"
    pen.text((size // 2, bar // 2), text, font=font, fill="black", anchor="lm")
    return np.asarray(whole)


def _pixels(box: Rectangle, width: int, height: int) -> Rectangle:
    """Pixels of the image, corners in order and inside, so that any box of a file can be drawn."""
    xs = sorted(min(max(value, 0.0), 1.0) * (width - 1) for value in (box[0], box[2]))
    ys = sorted(min(max(value, 0.0), 1.0) * (height - 1) for value in (box[1], box[3]))
    return xs[0], ys[0], xs[1], ys[1]


def _inside(left: float, top: float, width: float, height: float, image: tuple[int, int]) -> Rectangle:
    left = max(0.0, min(left, image[0] - width - 1))
    top = max(0.0, min(top, image[1] - height - 1))
    return left, top, left + width, top + height


def _overlap(a: Rectangle, b: Rectangle) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _font_size(width: int, height: int) -> int:
    return max(11, round(max(width, height) / 58))


def _font(text: str, size: int) -> ImageFont.FreeTypeFont:
    return _opened(font_file(text), size)


@lru_cache
def _opened(file: Path, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(file), size)
