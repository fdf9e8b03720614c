"""Backgrounds of the generated demo set: sky or wall, textured ground, and things that belong to no class.

The unlabelled things (clouds, houses, lamps, benches, balls, kites, posts) are there so that "something is drawn here"
is no evidence for any class.
"""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
from numpy.typing import NDArray

from retinaflow.demo.shapes import PAINTS, Color, Pen, arc, pick, shade

Floats = NDArray[np.float32]

SKIES: tuple[tuple[Color, Color], ...] = (
    ((112, 172, 226), (206, 230, 242)), ((150, 170, 190), (214, 218, 220)), ((238, 160, 110), (250, 222, 180)),
    ((84, 120, 180), (240, 200, 180)), ((180, 206, 214), (236, 238, 230)),
)  # fmt: skip
WALLS: tuple[tuple[Color, Color], ...] = (
    ((226, 214, 196), (206, 192, 172)), ((186, 200, 190), (168, 184, 176)), ((204, 190, 206), (186, 172, 190)),
)  # fmt: skip
GROUNDS: tuple[Color, ...] = (
    (124, 164, 92), (150, 150, 112), (134, 134, 138), (222, 202, 154), (230, 234, 240), (172, 150, 128), (104, 142, 96),
)  # fmt: skip


def backdrop(rng: np.random.Generator, *, height: int, width: int, horizon: float) -> NDArray[np.uint8]:
    """``[height, width, 3]`` uint8 RGB: a gradient above ``horizon`` (fraction of the height), textured ground
    below."""
    scenes = WALLS if rng.random() < 0.18 else SKIES
    top, bottom = (np.asarray(color, dtype=np.float32) for color in scenes[int(rng.integers(len(scenes)))])
    ground = np.asarray(pick(rng, GROUNDS, spread=12), dtype=np.float32)
    rows = np.linspace(0, 1, height, dtype=np.float32)[:, None]
    above = top + (bottom - top) * np.minimum(rows / horizon, 1)
    below = ground * (0.86 + 0.24 * np.clip((rows - horizon) / (1 - horizon), 0, 1))
    image: Floats = np.repeat(np.where(rows < horizon, above, below)[:, None, :], width, axis=1)
    coarse, fine = (clouded(rng, height=height, width=width, cells=cells) for cells in (5, 40))
    grain = 7 * coarse + 6 * fine
    image += grain[..., None] * np.where(rows < horizon, 0.5, 1.0)[:, :, None].astype(np.float32)
    result: NDArray[np.uint8] = np.clip(image, 0, 255).astype(np.uint8)
    return result


def clouded(rng: np.random.Generator, *, height: int, width: int, cells: int) -> Floats:
    """``[height, width]`` float32 smooth noise with deviation about 1 and ``cells`` cells along the longer side."""
    longer = max(height, width)
    rows, columns = max(2, cells * height // longer), max(2, cells * width // longer)
    coarse = rng.standard_normal((rows, columns), dtype=np.float32)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR).astype(np.float32)


def clutter(pen: Pen, rng: np.random.Generator, *, width: float, height: float, horizon: float) -> None:
    """Draw two to six unlabelled things; sizes in plane pixels, ``horizon`` a fraction of the height."""
    ground, unit = horizon * height, float(np.sqrt(width * height))
    pen = replace(pen, part=0, reach={})
    for _ in range(int(rng.integers(0, 3))):
        size = unit * rng.uniform(0.06, 0.13)
        cloud(pen.placed(rng.uniform(0, width), rng.uniform(size, max(1.1 * size, ground * 0.6)), height=size), rng)
    if rng.random() < 0.55:
        x = -rng.uniform(0, 0.2) * unit
        while x < width:
            size = unit * rng.uniform(0.18, 0.42)
            wide = rng.uniform(0.6, 1.1)
            if rng.random() < 0.75:
                house(pen.placed(x + size * wide / 2, ground + 2, height=size, stretch=wide), rng)
            x += size * wide * rng.uniform(1.0, 1.5)
    elif rng.random() < 0.5:
        hill(pen, rng, width=width, ground=ground, size=unit * rng.uniform(0.1, 0.3))
    things = (lamp, bench, ball, kite, post, stone)
    for _ in range(int(rng.integers(1, 5))):
        thing = int(rng.integers(len(things)))
        base = rng.uniform(ground, height) if things[thing] is not kite else rng.uniform(0.2, 0.9) * ground
        size = unit * (0.5 if things[thing] is lamp else 0.13) * rng.uniform(0.7, 1.2)
        things[thing](pen.placed(rng.uniform(0, width), base, height=size, angle=rng.uniform(-4, 4)), rng)


def cloud(pen: Pen, rng: np.random.Generator) -> None:
    """A few pale balls in a row."""
    for x in (-0.9, -0.3, 0.4, 1.0):
        pen.ellipse(x, 0.6, 0.6, rng.uniform(0.25, 0.5), (244, 246, 248))


def house(pen: Pen, rng: np.random.Generator) -> None:
    """A block with dim windows."""
    wall = pick(rng, ((176, 150, 132), (160, 168, 176), (198, 188, 164), (138, 120, 126), (150, 160, 146)))
    pen.box(-0.5, 0.0, 0.5, 1.0, wall)
    for row in range(4):
        for column in range(3):
            pen.box(-0.4 + 0.3 * column, 0.1 + 0.22 * row, -0.2 + 0.3 * column, 0.24 + 0.22 * row, shade(wall, 0.72))


def hill(pen: Pen, rng: np.random.Generator, *, width: float, ground: float, size: float) -> None:
    """A ridge along the horizon; a straight pen in plane pixels."""
    tone = pick(rng, ((128, 150, 140), (150, 160, 180), (120, 140, 110)))
    xs = np.linspace(0, width, 9)
    ridge = np.column_stack([xs, ground - size * rng.uniform(0.2, 1.0, size=9)])
    pen.polygon(np.concatenate([ridge, [[width, ground + 2], [0, ground + 2]]]), tone)


def lamp(pen: Pen, rng: np.random.Generator) -> None:
    """A street lamp."""
    steel = pick(rng, ((70, 74, 80), (110, 112, 116)))
    pen.line(0, 0.1, 0, 1.0, 0.03, steel)
    pen.line(0, 0.1, 0.14, 0.06, 0.025, steel)
    pen.ellipse(0.16, 0.08, 0.06, 0.03, (250, 240, 200))


def bench(pen: Pen, rng: np.random.Generator) -> None:
    """A park bench."""
    wood = pick(rng, ((140, 96, 60), (110, 80, 60), (80, 110, 90)))
    for y in (0.1, 0.3, 0.55):
        pen.box(-1.0, y, 1.0, y + 0.13, wood)
    for x in (-0.8, 0.8):
        pen.line(x, 0.1, x, 1.0, 0.1, (60, 60, 64))


def ball(pen: Pen, rng: np.random.Generator) -> None:
    """A ball with a band."""
    pen.ellipse(0, 0.5, 0.5, 0.5, pick(rng, PAINTS), edge=0.05)
    pen.polygon(arc(0, 0.5, 0.5, 0.18), pick(rng, PAINTS))


def kite(pen: Pen, rng: np.random.Generator) -> None:
    """A kite in the sky."""
    pen.polygon([(0, -0.1), (0.4, 0.35), (0, 1.0), (-0.4, 0.35)], pick(rng, PAINTS), edge=0.04)
    pen.polygon([(0, -0.1), (0.4, 0.35), (0, 0.35)], pick(rng, PAINTS))


def post(pen: Pen, rng: np.random.Generator) -> None:
    """A pillar box."""
    paint = pick(rng, PAINTS)
    pen.box(-0.25, 0.0, 0.25, 1.0, paint, round_by=0.2, edge=0.04)
    pen.box(-0.15, 0.25, 0.15, 0.32, (30, 30, 30))


def stone(pen: Pen, rng: np.random.Generator) -> None:
    """A boulder."""
    pen.polygon(
        arc(0, 0.75, rng.uniform(0.4, 0.7), 0.3, steps=9, turn=rng.uniform(0, 20)),
        pick(rng, ((140, 136, 132), (116, 114, 118))),
        edge=0.04,
    )
