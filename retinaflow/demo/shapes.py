"""The pen of the generated demo set, and its vehicles.

A :class:`Pen` fills polygons on two planes of one size: ``pixels`` (RGB) and ``ids`` (which part of which object is
seen there). What is drawn later covers what was drawn before on both: visible boxes and occlusion follow from ``ids``.

Every object is drawn in its own units: its height is 1, y runs from 0 (top) to 1 (where it stands), x is 0 in its
middle. No drawing function keeps state; all chance comes from the generator that is passed in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Color = tuple[int, int, int]
Points = Sequence[tuple[float, float]] | NDArray[np.float64]

SUBPIXEL_BITS = 4
PAINTS: tuple[Color, ...] = (
    (200, 44, 48), (38, 92, 178), (46, 138, 84), (238, 238, 232), (52, 56, 64), (150, 156, 164), (120, 62, 140),
    (226, 120, 44), (62, 160, 176), (132, 90, 60), (232, 190, 60), (222, 130, 160),
)  # fmt: skip
GREENS: tuple[Color, ...] = ((58, 132, 62), (84, 150, 60), (40, 108, 70), (122, 160, 66), (66, 120, 44))
GLASS: Color = (176, 212, 228)
TYRE: Color = (36, 36, 40)


@dataclass(frozen=True)
class Pen:
    """Fills shapes on ``pixels[H, W, 3]`` and ``ids[H, W]`` (both uint8, changed in place) through ``matrix[2, 3]``.

    ``part`` is what a stroke writes into ``ids``; 0 is "no object". ``reach`` collects, per part, how far its strokes
    went in plane pixels, the frame's edge not considered: (x1, y1, x2, y2).
    """

    pixels: NDArray[np.uint8]
    ids: NDArray[np.uint8]
    matrix: NDArray[np.float64]
    reach: dict[int, tuple[float, float, float, float]]
    part: int = 0

    def of(self, part: int) -> Pen:
        """The same pen, for another part."""
        return replace(self, part=part)

    def placed(self, x: float, y: float, *, height: float, stretch: float = 1.0, angle: float = 0.0) -> Pen:
        """A pen for an object ``height`` units tall that stands at (x, y), turned by ``angle`` degrees about it.

        ``stretch`` widens the object; a negative one also mirrors it.
        """
        cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        turn = height * np.array([[cos, -sin], [sin, cos]]) @ np.diag([stretch, 1.0])
        inner = np.column_stack([turn, np.array([x, y]) - turn @ np.array([0.0, 1.0])])
        linear = self.matrix[:, :2]
        return replace(self, matrix=np.column_stack([linear @ inner[:, :2], linear @ inner[:, 2] + self.matrix[:, 2]]))

    def polygon(self, points: Points, color: Color, *, edge: float = 0.0) -> None:
        """Fill a polygon; ``edge`` > 0 gives it an outline that wide (object units) in a darker tone of its colour."""
        corners = np.asarray(points, dtype=np.float64) @ self.matrix[:, :2].T + self.matrix[:, 2]
        fixed: Any = [np.round(corners * (1 << SUBPIXEL_BITS)).astype(np.int32)]
        cv2.fillPoly(self.pixels, fixed, color, cv2.LINE_8, SUBPIXEL_BITS)
        cv2.fillPoly(self.ids, fixed, (self.part,), cv2.LINE_8, SUBPIXEL_BITS)
        if edge > 0:
            (a, b, _), (c, d, _) = self.matrix
            width = max(1, round(edge * math.sqrt(abs(a * d - b * c))))
            cv2.polylines(self.pixels, fixed, True, shade(color, 0.62), width, cv2.LINE_8, SUBPIXEL_BITS)
        (left, top), (right, bottom) = corners.min(axis=0), corners.max(axis=0)
        x1, y1, x2, y2 = self.reach.get(self.part, (math.inf, math.inf, -math.inf, -math.inf))
        self.reach[self.part] = (min(x1, left), min(y1, top), max(x2, right), max(y2, bottom))

    def ellipse(
        self, x: float, y: float, rx: float, ry: float, color: Color, *, turn: float = 0.0, edge: float = 0.0
    ) -> None:
        """Fill an ellipse about (x, y); ``turn`` in degrees."""
        self.polygon(arc(x, y, rx, ry, turn=turn), color, edge=edge)

    def box(
        self, x1: float, y1: float, x2: float, y2: float, color: Color, *, round_by: float = 0.0, edge: float = 0.0
    ) -> None:
        """Fill a rectangle whose corners are rounded by a radius."""
        if round_by <= 0:
            self.polygon([(x1, y1), (x2, y1), (x2, y2), (x1, y2)], color, edge=edge)
            return
        r = min(round_by, (x2 - x1) / 2, (y2 - y1) / 2)
        quarters = [(x2 - r, y1 + r, -90), (x2 - r, y2 - r, 0), (x1 + r, y2 - r, 90), (x1 + r, y1 + r, 180)]
        corners = [arc(x, y, r, r, start=start, sweep=90, steps=5) for x, y, start in quarters]
        self.polygon(np.concatenate(corners), color, edge=edge)

    def line(
        self, x1: float, y1: float, x2: float, y2: float, width: float, color: Color, *, edge: float = 0.0
    ) -> None:
        """A straight stroke of the given width."""
        along = np.array([x2 - x1, y2 - y1])
        side = np.array([-along[1], along[0]]) / max(float(np.hypot(*along)), 1e-9) * width / 2
        a, b = np.array([x1, y1]), np.array([x2, y2])
        self.polygon(np.array([a + side, b + side, b - side, a - side]), color, edge=edge)


def arc(
    x: float,
    y: float,
    rx: float,
    ry: float,
    *,
    turn: float = 0.0,
    start: float = 0.0,
    sweep: float = 360.0,
    steps: int = 26,
) -> NDArray[np.float64]:
    """``[steps, 2]`` points on an ellipse, clockwise as seen; angles in degrees."""
    whole = sweep >= 360
    angles = np.deg2rad(start + sweep / (steps if whole else steps - 1) * np.arange(steps))
    points: NDArray[np.float64] = np.stack([rx * np.cos(angles), ry * np.sin(angles)], axis=1)
    if turn:
        cos, sin = math.cos(math.radians(turn)), math.sin(math.radians(turn))
        points = points @ np.array([[cos, sin], [-sin, cos]])
    points += np.array([x, y])
    return points


def shade(color: Color, factor: float) -> Color:
    """The colour made darker (factor < 1) or brighter (> 1)."""
    r, g, b = (int(min(255, max(0, round(channel * factor)))) for channel in color)
    return r, g, b


def pick(rng: np.random.Generator, colors: Sequence[Color], *, spread: int = 16) -> Color:
    """One of the colours, each channel moved by at most ``spread``."""
    base = np.asarray(colors[int(rng.integers(len(colors)))]) + rng.integers(-spread, spread + 1, size=3)
    r, g, b = (int(channel) for channel in np.clip(base, 0, 255))
    return r, g, b


def wheels(pen: Pen, *, at: Sequence[float], radius: float) -> None:
    """Wheels that stand on y = 1."""
    for x in at:
        pen.ellipse(x, 1 - radius, radius, radius, TYRE)
        pen.ellipse(x, 1 - radius, radius * 0.5, radius * 0.5, (170, 172, 178))


def car_body(pen: Pen, rng: np.random.Generator, *, paint: Color) -> None:
    """What car and taxi have in common: bonnet, cabin of varying length, wheels."""
    rear, front = -rng.uniform(0.38, 0.8), rng.uniform(0.28, 0.42)
    roof = rng.uniform(0.06, 0.14)
    outline = [(-1.1, 0.86), (-1.12, 0.56), (-1.0, 0.44), (rear - 0.2, 0.41), (rear, roof), (front, roof),
               (front + 0.32, 0.43), (1.0, 0.5), (1.12, 0.6), (1.12, 0.86)]  # fmt: skip
    pen.polygon(outline, paint, edge=0.035)
    glass, top = shade(GLASS, rng.uniform(0.55, 1.05)), roof + 0.07
    middle = (rear + front) / 2
    pen.polygon([(rear - 0.1, 0.42), (rear + 0.05, top), (middle - 0.03, top), (middle - 0.03, 0.42)], glass)
    pen.polygon([(middle + 0.03, 0.42), (middle + 0.03, top), (front - 0.03, top), (front + 0.2, 0.42)], glass)
    pen.line(middle, 0.44, middle, 0.82, 0.02, shade(paint, 0.62))
    pen.box(-1.1, 0.76, 1.1, 0.86, shade(paint, 0.72))
    pen.ellipse(1.05, 0.6, 0.06, 0.06, (250, 240, 190))
    pen.ellipse(-1.07, 0.58, 0.05, 0.07, (190, 40, 40))
    wheels(pen, at=(-0.64, 0.64), radius=0.2)


def car(pen: Pen, rng: np.random.Generator) -> None:
    """A car in any paint, some with a plain stripe or a roof rack, so that neither gives a taxi away."""
    paint = pick(rng, PAINTS)
    car_body(pen, rng, paint=paint)
    if rng.random() < 0.25:
        pen.box(-0.98, 0.54, 0.98, 0.6, pick(rng, PAINTS))


def taxi(pen: Pen, rng: np.random.Generator) -> None:
    """A car with a chequered band and a lit sign on its roof; often, but not always, yellow."""
    paint = pick(rng, ((238, 196, 40), (240, 176, 36), (238, 238, 232), (52, 56, 64), (60, 140, 90), (232, 200, 80)))
    pen.box(-0.28, -0.08, 0.22, 0.14, (252, 240, 170), round_by=0.04, edge=0.03)
    car_body(pen, rng, paint=paint)
    side = 0.105
    for column in range(18):
        for row in range(2):
            x, y = -0.95 + column * side, 0.49 + row * side
            pen.box(x, y, x + side, y + side, (30, 30, 32) if (column + row) % 2 else (248, 246, 238))


def bus(pen: Pen, rng: np.random.Generator) -> None:
    """A long box with a row of windows, a door at its front and a destination board."""
    paint = pick(rng, PAINTS)
    pen.box(-1.15, 0.02, 1.15, 0.88, paint, round_by=0.1, edge=0.03)
    glass, count = shade(GLASS, rng.uniform(0.55, 1.0)), int(rng.integers(4, 7))
    width = 1.72 / count
    for window in range(count):
        pen.box(-1.06 + window * width, 0.17, -1.06 + (window + 0.84) * width, 0.46, glass, round_by=0.03)
    pen.box(0.72, 0.17, 0.92, 0.84, shade(glass, 0.8), edge=0.02)
    pen.polygon([(1.0, 0.17), (1.15, 0.17), (1.15, 0.5), (1.0, 0.5)], glass)
    pen.box(-1.14, 0.57, 0.68, 0.66, pick(rng, PAINTS))
    pen.box(0.25, 0.05, 0.98, 0.13, (40, 42, 46))
    pen.ellipse(1.11, 0.74, 0.04, 0.05, (250, 240, 190))
    wheels(pen, at=(-0.7, 0.5), radius=0.15)


def ambulance(pen: Pen, rng: np.random.Generator) -> None:
    """A windowless box behind a cab, with a cross, a band and a beacon; mostly white, as are some buses and cars."""
    paint = pick(rng, ((244, 244, 240), (240, 236, 224), (236, 214, 70), (226, 232, 236)), spread=8)
    mark = pick(rng, ((206, 36, 40), (214, 70, 36), (36, 84, 176), (40, 134, 80)))
    beacon = pick(rng, ((50, 100, 230), (230, 50, 50)))
    pen.box(0.16, -0.06, 0.4, 0.08, beacon, round_by=0.04, edge=0.02)
    pen.polygon([(0.36, 0.22), (0.66, 0.24), (0.86, 0.52), (1.0, 0.58), (1.02, 0.88), (0.36, 0.88)], paint, edge=0.035)
    pen.polygon([(0.48, 0.29), (0.63, 0.29), (0.8, 0.52), (0.48, 0.52)], shade(GLASS, rng.uniform(0.55, 1.0)))
    pen.box(-1.02, 0.02, 0.4, 0.88, paint, round_by=0.05, edge=0.035)
    pen.box(-1.0, 0.64, 1.0, 0.75, mark)
    x, y, arm, half = -0.34, 0.33, 0.21, 0.075
    pen.box(x - arm, y - half, x + arm, y + half, mark)
    pen.box(x - half, y - arm, x + half, y + arm, mark)
    pen.ellipse(0.98, 0.68, 0.04, 0.05, (250, 240, 190))
    wheels(pen, at=(-0.62, 0.58), radius=0.18)
