"""The plan of every image of the demo set, decided before anything is drawn.

The plan is a pure function of (split, number of images, seed) and costs milliseconds, so the long tail can be read and
tested without drawing. Training counts fall from several hundred objects to six. Validation is much flatter, at least
30 objects of every drawn class, because an average precision over five ground-truth boxes measures nothing; the
published validation sets are annotated more densely than training too. Objects look alike in both.

Not everything drawn is annotated: on ``HIDDEN_FRACTION`` of the training images that show one of the ``hideable``
classes, that class gets neither boxes nor an image-level label, as happens in Open Images. In validation all that is
seen is verified, and more classes are verified absent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class DemoClass:
    """A class of the demo set.

    ``train`` and ``validation`` are the objects drawn at ``TRAIN_IMAGES`` and ``VALIDATION_IMAGES`` images, group-of
    clusters not counted; 0 for a parent without boxes of its own. Everyone without a coat wears a shirt.
    """

    name: str
    mid: str
    parent: str | None = None
    train: int = 0
    validation: int = 0
    hideable: bool = False


TRAIN_IMAGES, VALIDATION_IMAGES = 900, 300
HIDDEN_FRACTION = 0.15
CLASSES: tuple[DemoClass, ...] = (
    DemoClass("Person", "/m/01g317"),
    DemoClass("Man", "/m/04yx4", "Person", 620, 150),
    DemoClass("Woman", "/m/03bt1vf", "Person", 260, 85),
    DemoClass("Clothing", "/m/09j2d"),
    DemoClass("Shirt", "/m/01n4qj", "Clothing", 650, 165, hideable=True),
    DemoClass("Coat", "/m/01xygc", "Clothing", 230, 70),
    DemoClass("Hat", "/m/02dl1y", "Clothing"),
    DemoClass("Sun hat", "/m/02wbtzl", "Hat", 60, 44),
    DemoClass("Fedora", "/m/02fq_6", "Hat", 9, 30),
    DemoClass("Vehicle", "/m/07yv9"),
    DemoClass("Land vehicle", "/m/01prls", "Vehicle"),
    DemoClass("Car", "/m/0k4j", "Land vehicle", 420, 110, hideable=True),
    DemoClass("Bus", "/m/01bjv", "Land vehicle", 100, 48),
    DemoClass("Taxi", "/m/0pg52", "Land vehicle", 28, 36),
    DemoClass("Ambulance", "/m/012n7d", "Land vehicle", 6, 30),
    DemoClass("Flower", "/m/0c9ph5"),
    DemoClass("Sunflower", "/m/0ftb8", "Flower", 150, 60),
    DemoClass("Rose", "/m/06m11", "Flower", 19, 34),
    DemoClass("Tree", "/m/07j7r", None, 240, 75, hideable=True),
    DemoClass("Palm tree", "/m/0cdl1", "Tree", 13, 32),
)
PEOPLE = ("Man", "Woman")
WORN = ("Shirt", "Coat", "Sun hat", "Fedora")
GROUPS = {"Man": 0.025, "Sunflower": 0.03, "Car": 0.015, "Tree": 0.015}
PARENT = {spec.name: spec.parent for spec in CLASSES}


@dataclass(frozen=True)
class Thing:
    """One object, or a group-of cluster of ``group`` touching ones, with what it wears."""

    kind: str
    torso: str = ""
    hat: str = ""
    group: int = 0

    @property
    def classes(self) -> tuple[str, ...]:
        """Classes that this thing shows, itself first."""
        return tuple(name for name in (self.kind, self.torso, self.hat) if name)


@dataclass(frozen=True)
class ScenePlan:
    """One image: its id, what stands on it, the classes left unannotated, and those verified absent."""

    image_id: str
    things: tuple[Thing, ...]
    hidden: frozenset[str]
    absent: tuple[str, ...]

    @property
    def present(self) -> frozenset[str]:
        """Classes that have boxes here."""
        return frozenset(name for thing in self.things for name in thing.classes) - self.hidden


def plan_split(split: str, *, images: int, seed: int) -> tuple[ScenePlan, ...]:
    """The images of ``split`` ("train" or "validation"), in the order of their ids."""
    training = split == "train"
    if images < 1:
        raise ValueError(f"a demo split needs at least one image, but got {images} for {split}")
    rng = np.random.default_rng([seed, 1 if training else 2])
    fraction = images / (TRAIN_IMAGES if training else VALIDATION_IMAGES)
    wanted = {
        spec.name: max(1, round(fraction * (spec.train if training else spec.validation)))
        for spec in CLASSES
        if spec.train
    }
    scenes = deal(rng, people(rng, wanted), rest(rng, wanted), images=images)
    add_groups(rng, scenes)
    hidden = hide(rng, scenes) if training else [set() for _ in scenes]
    ids = sorted({f"{'0' if training else '1'}{rng.bytes(8).hex()[1:]}" for _ in range(images)})
    return tuple(
        ScenePlan(image_id, tuple(things), frozenset(lost), absent_classes(rng, things, dense=not training))
        for image_id, things, lost in zip(ids, scenes, hidden, strict=True)
    )


def people(rng: np.random.Generator, wanted: dict[str, int]) -> list[Thing]:
    """Everyone, in random order: coats and hats are spread over men and women alike."""
    kinds = [kind for kind in PEOPLE for _ in range(wanted[kind])]
    count = len(kinds)
    torsos = ["Coat"] * wanted["Coat"]
    hats = ["Sun hat"] * wanted["Sun hat"] + ["Fedora"] * wanted["Fedora"]
    columns = (kinds, torsos + ["Shirt"] * (count - len(torsos)), hats + [""] * (count - len(hats)))
    orders = [rng.permutation(count) for _ in columns]
    rows = ([column[i] for i in order] for column, order in zip(columns, orders, strict=True))
    return [Thing(kind, torso, hat) for kind, torso, hat in zip(*rows, strict=True)]


def rest(rng: np.random.Generator, wanted: dict[str, int]) -> list[Thing]:
    """Everything that is no person, in random order."""
    things = [Thing(name) for name, count in wanted.items() if name not in (*PEOPLE, *WORN) for _ in range(count)]
    return [things[i] for i in rng.permutation(len(things))]


def deal(rng: np.random.Generator, persons: list[Thing], others: list[Thing], *, images: int) -> list[list[Thing]]:
    """Spread all things over the images: 6% crowds of people, 3% empty, the others one to about five by chance."""
    scenes: list[list[Thing]] = []
    left = list(persons)
    for _ in range(round(0.06 * images)):
        size = min(int(rng.integers(5, 8)), max(0, len(left) - images // 4))
        scenes.append([left.pop() for _ in range(size)])
    empty = round(0.03 * images)
    open_scenes = images - len(scenes) - empty
    pool = left + others
    pool = [pool[i] for i in rng.permutation(len(pool))]
    # Every open image gets one thing first, the surplus goes where chance puts it, with a preference for few.
    slots: list[list[Thing]] = [[pool.pop()] for _ in range(min(open_scenes, len(pool)))]
    while pool:
        pair = rng.integers(len(slots), size=2)
        target = min((slots[int(i)] for i in pair), key=len) if rng.random() < 0.4 else slots[int(pair[0])]
        target.append(pool.pop())
    scenes += slots + [[] for _ in range(images - len(scenes) - len(slots))]
    return [scenes[i] for i in rng.permutation(images)]


def add_groups(rng: np.random.Generator, scenes: list[list[Thing]]) -> None:
    """Put a group-of cluster on some images that hold at most two things and none of its own kind."""
    for kind, fraction in GROUPS.items():
        free = [
            i
            for i, things in enumerate(scenes)
            if len(things) <= 2 and all(t.kind != kind and not t.group for t in things)
        ]
        for i in rng.permutation(free)[: max(1, round(fraction * len(scenes)))]:
            scenes[int(i)].append(Thing(kind, "Shirt" if kind in PEOPLE else "", group=int(rng.integers(6, 10))))


def hide(rng: np.random.Generator, scenes: Sequence[Sequence[Thing]]) -> list[set[str]]:
    """Per image, the classes that are shown but left without boxes and labels."""
    hidden: list[set[str]] = [set() for _ in scenes]
    for spec in CLASSES:
        if spec.hideable:
            shown = [i for i, things in enumerate(scenes) if any(spec.name in thing.classes for thing in things)]
            for i in rng.permutation(shown)[: round(HIDDEN_FRACTION * len(shown))]:
                hidden[int(i)].add(spec.name)
    return hidden


def ancestors(name: str) -> list[str]:
    """The class's parent, its parent, and so on."""
    parent = PARENT[name]
    return [] if parent is None else [parent, *ancestors(parent)]


def absent_classes(rng: np.random.Generator, things: Sequence[Thing], *, dense: bool) -> tuple[str, ...]:
    """Classes verified absent: none that is shown (hidden or not) or an ancestor of one; lookalikes of the shown first.

    A lookalike has the parent of a shown class, or is its child. ``dense`` (validation): 85% of the lookalikes and 30%
    of the others; else 50% and 12%.
    """
    shown = {name for thing in things for name in thing.classes}
    taken = shown | {parent for name in shown for parent in ancestors(name)}
    families = shown | {parent for name in shown if (parent := PARENT[name])}
    lookalike, other = (0.85, 0.3) if dense else (0.5, 0.12)
    chances = [lookalike if spec.parent in families else other for spec in CLASSES]
    numbers = rng.random(len(CLASSES))
    return tuple(
        spec.name
        for spec, number, chance in zip(CLASSES, numbers, chances, strict=True)
        if spec.name not in taken and number < chance
    )
