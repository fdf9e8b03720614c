"""The trees and flowers of the generated demo set, drawn with the :class:`~retinaflow.demo.shapes.Pen`.

Only the bloom of a flower belongs to its box; its stem is drawn as background.
"""

from __future__ import annotations

import numpy as np

from retinaflow.demo.shapes import GREENS, Color, Pen, arc, pick, shade

LEAVES: tuple[Color, ...] = (*GREENS, (196, 128, 52), (178, 84, 50))
BARKS: tuple[Color, ...] = ((112, 80, 54), (92, 70, 56), (140, 108, 78))
PETALS: tuple[Color, ...] = ((244, 200, 44), (240, 160, 40), (214, 58, 62), (236, 136, 168), (244, 236, 222))


def tree(pen: Pen, rng: np.random.Generator) -> None:
    """A trunk under a crown of overlapping balls: round, or slim like a poplar."""
    leaf, bark = pick(rng, LEAVES), pick(rng, BARKS)
    wide = rng.uniform(0.24, 0.42)
    pen.polygon([(-0.035, 0.5), (0.035, 0.5), (0.06, 1.0), (-0.06, 1.0)], bark, edge=0.012)
    angles = np.linspace(0, 2 * np.pi, 7, endpoint=False) + rng.uniform(0, 1)
    balls = [(wide * 0.58 * np.cos(a), 0.36 + 0.17 * np.sin(a)) for a in angles]
    for tone, lift in ((0.72, 0.0), (1.0, 0.015), (1.16, 0.06)):
        for x, y in balls:
            size = rng.uniform(0.42, 0.5) * (1.0 if tone < 1.1 else 0.45)
            shrink = 1.0 if tone < 1.0 else 0.82
            pen.ellipse(x - lift, y - lift, wide * size * shrink, 0.19 * shrink * (size / 0.46), shade(leaf, tone))
    pen.ellipse(0.0, 0.34, wide * 0.5, 0.16, leaf)


def palm_tree(pen: Pen, rng: np.random.Generator) -> None:
    """A bare, bent trunk with rings under a star of drooping fronds."""
    leaf, bark, lean = pick(rng, LEAVES), pick(rng, BARKS), rng.uniform(-0.14, 0.14)
    heights = np.linspace(0, 1, 9)
    spine = [(lean * (1 - t) ** 2, 0.26 + 0.74 * t) for t in heights]
    left = [(x - 0.03 - 0.025 * t, y) for (x, y), t in zip(spine, heights, strict=True)]
    right = [(x + 0.03 + 0.025 * t, y) for (x, y), t in zip(spine, heights, strict=True)]
    pen.polygon(left + right[::-1], bark, edge=0.012)
    for x, y in spine[1:-1]:
        pen.line(x - 0.035, y, x + 0.035, y + 0.01, 0.012, shade(bark, 0.66))
    fronds = int(rng.integers(8, 11))
    for number in range(fronds):
        angle = np.pi * (1.12 * number / (fronds - 1) - 0.06) + rng.uniform(-0.08, 0.08)
        reach, x, y = rng.uniform(0.36, 0.46), lean, 0.25
        tip = (x - reach * np.cos(angle), y - 0.2 * np.sin(angle) + 0.16)
        top = (x - 0.55 * reach * np.cos(angle), y - 0.29 * np.sin(angle) - 0.02)
        low = (x - 0.5 * reach * np.cos(angle), y - 0.17 * np.sin(angle) + 0.04)
        pen.polygon([(x, y - 0.02), top, tip, low, (x, y + 0.03)], shade(leaf, rng.uniform(0.72, 1.15)), edge=0.008)
    for offset in (-0.04, 0.03):
        pen.ellipse(lean + offset, 0.28, 0.03, 0.03, (104, 70, 44))


def stem(pen: Pen, rng: np.random.Generator) -> None:
    """A stem with two leaves, below the bloom; not a part of it."""
    green, ground = pick(rng, GREENS), pen.of(0)
    ground.line(0, 0.5, 0, 1.0, 0.045, green)
    for side in (-1, 1):
        y = rng.uniform(0.72, 0.86)
        ground.ellipse(side * 0.12, y, 0.13, 0.05, shade(green, rng.uniform(0.85, 1.1)), turn=-side * 28, edge=0.01)


def sunflower(pen: Pen, rng: np.random.Generator) -> None:
    """Two rings of pointed rays about a dark, dotted disc."""
    stem(pen, rng)
    petal = pick(rng, PETALS[:2] if rng.random() < 0.7 else PETALS)
    count, turn = int(rng.integers(12, 17)), rng.uniform(0, 30)
    for ring, length in ((0.84, 1.0), (1.0, 0.86)):
        for number in range(count):
            angle = np.deg2rad(turn + 360 * (number + (0.5 if ring < 1 else 0.0)) / count)
            out, side = np.array([np.cos(angle), np.sin(angle)]), np.array([-np.sin(angle), np.cos(angle)])
            middle = np.array([0.0, 0.33])
            points = [
                middle,
                middle + 0.2 * out + 0.055 * side,
                middle + 0.33 * length * out,
                middle + 0.2 * out - 0.055 * side,
            ]
            pen.polygon(np.array(points), shade(petal, ring), edge=0.008)
    disc = pick(rng, ((88, 54, 34), (60, 42, 34), (112, 76, 36)))
    pen.ellipse(0, 0.33, 0.14, 0.14, disc, edge=0.015)
    for number in range(10):
        angle, far = number * 2.4, 0.035 * np.sqrt(number)
        pen.ellipse(far * np.cos(angle), 0.33 + far * np.sin(angle), 0.014, 0.014, shade(disc, 1.6))


def rose(pen: Pen, rng: np.random.Generator) -> None:
    """Broad round petals folded about each other in a spiral, without a disc."""
    stem(pen, rng)
    petal = pick(rng, PETALS)
    turn = rng.uniform(0, 72)
    for number in range(5):
        angle = np.deg2rad(turn + 72 * number)
        x, y = 0.15 * np.cos(angle), 0.33 + 0.15 * np.sin(angle)
        pen.ellipse(
            x, y, 0.18, 0.16, shade(petal, 0.78 + 0.06 * (number % 3)), turn=float(np.rad2deg(angle)) + 90, edge=0.014
        )
    pen.ellipse(0, 0.33, 0.21, 0.21, shade(petal, 0.94), edge=0.014)
    for ring, radius in enumerate((0.19, 0.14, 0.09, 0.05)):
        for third in range(3):
            start = turn + 120 * third + 47 * ring
            outer = arc(0, 0.33, radius, radius, start=start, sweep=104, steps=9)
            inner = arc(0, 0.33, radius * 0.66, radius * 0.66, start=start + 8, sweep=88, steps=9)[::-1]
            pen.polygon(np.concatenate([outer, inner]), shade(petal, 0.6 if ring % 2 else 1.14))
    pen.ellipse(0, 0.33, 0.03, 0.03, shade(petal, 0.5))
