"""Positions of the things on a demo image, and how each kind is drawn.

Positions are random, with little overlap, except that crowds of people may stand closer; an eighth of the things is cut
by the left or right edge. Group-of clusters are two rows of small members that touch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from retinaflow.demo.people import person
from retinaflow.demo.plan import PEOPLE, Thing
from retinaflow.demo.plants import palm_tree, rose, sunflower, tree
from retinaflow.demo.shapes import Pen, ambulance, bus, car, taxi

Rect = tuple[float, float, float, float]


@dataclass(frozen=True)
class Form:
    """How a kind is drawn: width in heights, usual height as a fraction of sqrt(area), and drawing function."""

    width: float
    heights: tuple[float, float]
    tilt: float
    draw: Callable[[Pen, np.random.Generator], None] | None = None


FORMS = {
    "Man": Form(0.52, (0.7, 0.98), 4),
    "Woman": Form(0.52, (0.66, 0.94), 4),
    "Car": Form(2.3, (0.24, 0.4), 4, car),
    "Taxi": Form(2.3, (0.24, 0.4), 4, taxi),
    "Bus": Form(2.35, (0.32, 0.5), 3, bus),
    "Ambulance": Form(2.1, (0.32, 0.48), 3, ambulance),
    "Sunflower": Form(0.68, (0.42, 0.72), 14, sunflower),
    "Rose": Form(0.68, (0.42, 0.72), 14, rose),
    "Tree": Form(0.75, (0.6, 1.0), 4, tree),
    "Palm tree": Form(0.85, (0.6, 1.0), 4, palm_tree),
}


@dataclass(frozen=True)
class Pose:
    """Position of a thing (its foot, plane pixels), its height, stretch (negative: mirrored) and tilt in degrees."""

    x: float
    y: float
    height: float
    stretch: float
    tilt: float
    rect: Rect


def lay_out(
    things: tuple[Thing, ...],
    rng: np.random.Generator,
    *,
    width: int,
    height: int,
    horizon: float,
    shrink: float,
) -> list[Pose]:
    """A pose per thing, chosen among a few random ones for little overlap with those before."""
    poses: list[Pose] = []
    crowding = shrink * float(np.interp(len(things), [1, 2, 3, 5, 8], [1.05, 0.92, 0.82, 0.7, 0.58]))
    allowed = 0.4 if sum(thing.kind in PEOPLE for thing in things) >= 5 else 0.2
    for thing in things:
        # Decided once, not in every try: the edges are emptiest, so the least overlap would favour cut things.
        cut = not thing.group and rng.random() < 0.12
        tries: list[tuple[float, Pose]] = []
        for _ in range(24):
            pose = random_pose(thing, rng, width=width, height=height, horizon=horizon, crowding=crowding, cut=cut)
            worst = max((overlap(pose.rect, other.rect) for other in poses), default=0.0)
            tries.append((worst, pose))
            if worst <= allowed:
                break
        poses.append(min(tries, key=lambda pair: pair[0])[1])
    return poses


def random_pose(
    thing: Thing, rng: np.random.Generator, *, width: int, height: int, horizon: float, crowding: float, cut: bool
) -> Pose:
    """A random pose inside the image, or ``cut`` by its left or right edge; feet below the horizon if that fits."""
    form, unit = FORMS[thing.kind], float(np.sqrt(width * height))
    # Those with hats are taller, or their hats would be too small to see at 160 pixels.
    tall = unit * crowding * rng.uniform(*form.heights) * (1.15 if thing.hat else 1.0)
    stretch = float(rng.uniform(0.88, 1.14))
    if thing.group:
        # Two rows of small ones, each over its neighbour: wide as the front row, a third taller than one of them.
        tall, stretch = tall * 0.62, (1 + 0.7 * ((thing.group + 1) // 2 - 1)) / 1.32
    wide = tall * form.width * stretch
    fit = min(1.0, 0.94 * width / wide, 0.9 * height / tall)
    tall, wide = tall * fit, wide * fit
    lowest = max(horizon * height + 0.1 * tall, 1.13 * tall + 2)
    y = float(rng.uniform(min(lowest, 0.985 * height), 0.985 * height))
    room = max(0.0, width / 2 - wide / 2 - 0.07 * tall)  # a tilted thing reaches a little further
    x = width / 2 + float(rng.uniform(-room, room))
    if cut:
        inside = rng.uniform(0.55, 0.8) * wide
        x = inside - wide / 2 if rng.random() < 0.5 else width - inside + wide / 2
    mirrored = 1.0 if rng.random() < 0.5 else -1.0
    rect = (x - wide / 2, y - tall, x + wide / 2, y)
    return Pose(x, y, tall, stretch * mirrored, float(rng.uniform(-form.tilt, form.tilt)), rect)


def overlap(a: Rect, b: Rect) -> float:
    """Intersection over the smaller area."""
    wide, tall = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    smaller = min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))
    return max(0.0, wide) * max(0.0, tall) / smaller


def draw_thing(pen: Pen, rng: np.random.Generator, *, thing: Thing, pose: Pose, parts: tuple[int, int, int]) -> None:
    """Draw a thing, or all members of a cluster, under the ids of its parts."""
    if not thing.group:
        at = pen.placed(pose.x, pose.y, height=pose.height, stretch=pose.stretch, angle=pose.tilt)
        draw_one(at, rng, thing=thing, parts=parts)
        return
    x1, _, x2, _ = pose.rect
    front = (thing.group + 1) // 2
    half = (x2 - x1) / (1 + 0.7 * (front - 1)) / 2
    size = half * 2 / FORMS[thing.kind].width
    for row, count in enumerate((thing.group - front, front)):
        # The row behind stands higher and in the gaps of the row in front, so that every member is seen.
        offset = 0.7 * half if row == 0 and count < front else 0.35 * half if row == 0 else 0.0
        for number in range(count):
            x = x1 + half + offset + 1.4 * half * number
            foot, stretch = pose.y - (1 - row) * 0.3 * size, rng.uniform(0.92, 1.08)
            draw_one(
                pen.placed(x, foot, height=size * rng.uniform(0.9, 1.02), stretch=stretch),
                rng,
                thing=thing,
                parts=parts,
            )


def draw_one(pen: Pen, rng: np.random.Generator, *, thing: Thing, parts: tuple[int, int, int]) -> None:
    """Draw one object with a pen that is set to its pose."""
    draw = FORMS[thing.kind].draw
    if draw is None:
        person(pen, rng, kind=thing.kind, torso=thing.torso, hat=thing.hat, parts=parts)
    else:
        draw(pen.of(parts[0]), rng)
