"""From the plan of an image to its pixels and boxes.

Things are placed, drawn from back to front on a plane three times too large, and the boxes are read from what is still
seen of every part, so occlusion and truncation are true of the pixels. Pure: the same plan and generator state give the
same image. Cost: about 14 ms an image.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from retinaflow.demo.background import backdrop, clouded, clutter
from retinaflow.demo.layout import Rect, draw_thing, lay_out
from retinaflow.demo.plan import ScenePlan, Thing
from retinaflow.demo.shapes import Pen

SUPERSAMPLING = 3
LONGEST_SIDE = 256
PARTS = 3
ASPECTS = ((4, 3), (3, 4), (3, 2), (2, 3), (1, 1), (16, 9), (2, 1), (1, 2))
ASPECT_SHARES = (0.3, 0.2, 0.16, 0.08, 0.14, 0.05, 0.04, 0.03)
ATTEMPTS = 10
CUT = 2 * SUPERSAMPLING  # plane pixels beyond the edge from which on an object counts as truncated


@dataclass(frozen=True)
class DrawnBox:
    """A box of one class, sides as fractions of the image: 0 <= x1 < x2 <= 1, the same for y."""

    name: str
    x1: float
    y1: float
    x2: float
    y2: float
    occluded: bool
    truncated: bool
    group_of: bool


def draw_scene(plan: ScenePlan, rng: np.random.Generator) -> tuple[NDArray[np.uint8], tuple[DrawnBox, ...]]:
    """The image (uint8 RGB, longest side ``LONGEST_SIDE``) and a box per part of every thing, hidden ones included.

    An image on which something is mostly covered is drawn again, a little smaller each time; the best attempt counts.
    """
    aspect = ASPECTS[int(rng.choice(len(ASPECTS), p=ASPECT_SHARES))]
    width, height = (round(LONGEST_SIDE * side / max(aspect)) for side in aspect)
    best: tuple[float, NDArray[np.uint8], tuple[DrawnBox, ...]] | None = None
    for attempt in range(ATTEMPTS):
        seen, pixels, boxes = draw_once(plan, rng, size=(height, width), shrink=0.93**attempt)
        if best is None or seen > best[0]:
            best = seen, pixels, boxes
        if seen >= 0.45:
            break
    assert best is not None
    return develop(best[1], rng, size=(height, width)), best[2]


def draw_once(
    plan: ScenePlan, rng: np.random.Generator, *, size: tuple[int, int], shrink: float
) -> tuple[float, NDArray[np.uint8], tuple[DrawnBox, ...]]:
    """One attempt: the smallest fraction of any part that is seen, the large plane, and the boxes."""
    height, width = (side * SUPERSAMPLING for side in size)
    horizon = float(rng.uniform(0.35, 0.62))
    small = backdrop(rng, height=size[0], width=size[1], horizon=horizon)
    pixels = cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR).astype(np.uint8)
    ids = np.zeros((height, width), dtype=np.uint8)
    pen = Pen(pixels, ids, np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), {})
    clutter(pen, rng, width=width, height=height, horizon=horizon)
    poses = lay_out(plan.things, rng, width=width, height=height, horizon=horizon, shrink=shrink)
    full: dict[int, int] = {}  # by the first id of a part: person and body share one, which is the person's
    for index in sorted(range(len(poses)), key=lambda i: poses[i].y):
        first = 1 + PARTS * index
        draw_thing(pen, rng, thing=plan.things[index], pose=poses[index], parts=(first, first + 1, first + 2))
        full |= {parts[0]: count_pixels(pen, parts) for _, parts in shown_parts(plan.things[index], first)}
    return read_boxes(plan.things, pen, full=full)


def shown_parts(thing: Thing, first: int) -> list[tuple[str, range]]:
    """(class, ids of the pixels that are its own): a person is body, garment and hat; ``first`` is the body's id."""
    whole = range(first, first + PARTS)
    return [(n, p) for n, p in ((thing.kind, whole), (thing.torso, whole[1:2]), (thing.hat, whole[2:])) if n]


def reach_of(pen: Pen, parts: range) -> Rect:
    """How far the strokes of these parts went, plane pixels, the frame's edge not considered."""
    sides = np.array([pen.reach[part] for part in parts if part in pen.reach])
    return *sides[:, :2].min(axis=0), *sides[:, 2:].max(axis=0)


def mask_of(pen: Pen, parts: range) -> tuple[NDArray[np.bool_], int, int]:
    """Where these parts are seen, in a window around them, and the window's left and top."""
    x1, y1, x2, y2 = reach_of(pen, parts)
    left, top = max(0, int(x1) - 2), max(0, int(y1) - 2)
    window = pen.ids[top : max(0, int(y2) + 3), left : max(0, int(x2) + 3)]
    return (window >= parts[0]) & (window <= parts[-1]), left, top


def count_pixels(pen: Pen, parts: range) -> int:
    """How many pixels show these parts."""
    return int(np.count_nonzero(mask_of(pen, parts)[0]))


def read_boxes(
    things: tuple[Thing, ...], pen: Pen, *, full: dict[int, int]
) -> tuple[float, NDArray[np.uint8], tuple[DrawnBox, ...]]:
    """Boxes around what is seen of every part; ``full`` has the pixels each part had before later things covered it."""
    height, width = pen.ids.shape
    boxes, least = [], 1.0
    for index, thing in enumerate(things):
        for name, parts in shown_parts(thing, 1 + PARTS * index):
            mask, shift_x, shift_y = mask_of(pen, parts)
            seen = int(np.count_nonzero(mask)) / max(1, full[parts[0]])
            least = min(least, seen)
            if seen == 0:
                continue
            rows, columns = np.flatnonzero(mask.any(axis=1)) + shift_y, np.flatnonzero(mask.any(axis=0)) + shift_x
            x1, x2 = float(columns[0]) / width, float(columns[-1] + 1) / width
            y1, y2 = float(rows[0]) / height, float(rows[-1] + 1) / height
            left, top, right, bottom = reach_of(pen, parts)
            cut = bool(left < -CUT or top < -CUT or right > width + CUT or bottom > height + CUT)
            boxes.append(DrawnBox(name, x1, y1, x2, y2, seen < 0.92, cut, thing.group > 0))
    return least, pen.pixels, tuple(boxes)


def develop(pixels: NDArray[np.uint8], rng: np.random.Generator, *, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Down to the image's size, then light: brightness, contrast, colour cast, uneven light, blur and grain."""
    height, width = size
    image = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA).astype(np.float32)
    gain = rng.uniform(0.78, 1.14) * (1 + rng.uniform(-0.07, 0.07, size=3))
    image = (image - 128) * rng.uniform(0.82, 1.1) + 128
    light = 1 + 0.07 * clouded(rng, height=height, width=width, cells=2)
    image *= (light[..., None] * gain).astype(np.float32)
    if rng.random() < 0.3:
        image = cv2.GaussianBlur(image, (0, 0), float(rng.uniform(0.5, 0.9))).astype(np.float32)
    image += rng.standard_normal((height, width, 1), dtype=np.float32) * np.float32(rng.uniform(1, 7))
    return np.clip(np.round(image), 0, 255).astype(np.uint8)
