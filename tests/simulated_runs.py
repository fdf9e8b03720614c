"""Simulated runs of any size: ground-truth boxes on a grid, detectors that find each with a probability, matched by
the metric.

Every image has a difficulty that all detectors share, so that runs are paired as real ones are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from retinaflow.comparison.ground_truth_digest import ground_truth_digest
from retinaflow.comparison.stored_matches import StoredMatches, TrainingCounts
from retinaflow.detections import Detections
from retinaflow.metric.challenge import Scores, average_precision, challenge_scores
from retinaflow.metric.per_class import per_class_table
from retinaflow.taxonomy import Taxonomy

GRID = 6
WORDS = ("Amber", "Birch", "Clover", "Dahlia", "Elm", "Fern", "Ginkgo", "Hazel", "Iris", "Jasmine", "Kale", "Lilac")


@dataclass(frozen=True)
class Annotated:
    """The least that satisfies ``retinaflow.metric.ground_truth.Annotations``."""

    image_ids: NDArray[np.str_]
    box_start: NDArray[np.int64]
    boxes: NDArray[np.float64]
    labels: NDArray[np.int32]
    is_group_of: NDArray[np.bool_]
    is_not_exhaustive: NDArray[np.bool_]
    label_start: NDArray[np.int64]
    verified_class: NDArray[np.int32]
    verified_present: NDArray[np.bool_]
    taxonomy: Taxonomy
    sizes: NDArray[np.integer] = field(default_factory=lambda: np.zeros((0, 2), dtype=np.int64))
    """Not known."""


@dataclass(frozen=True)
class World:
    """Annotated images and the training counts of their classes."""

    annotations: Annotated
    training: TrainingCounts
    difficulty: NDArray[np.float64]
    """``[I]`` shared by all detectors."""


def world(num_classes: int, num_images: int, *, seed: int = 0, boxes_per_image: float = 4.0) -> World:
    """A long tail: class k is met about as 1 / (k + 1), the last one rarest."""
    rng = np.random.default_rng(seed)
    share = 1 / np.arange(1, num_classes + 1)
    share /= share.sum()
    counts = np.maximum(rng.poisson(boxes_per_image, num_images), 1).clip(max=GRID * GRID)
    image = np.repeat(np.arange(num_images), counts)
    labels = rng.choice(num_classes, size=len(image), p=share).astype(np.int32)
    places = np.concatenate([rng.choice(GRID * GRID, size=count, replace=False) for count in counts])
    verified = [rng.choice(num_classes, size=min(3, num_classes), replace=False) for _ in range(num_images)]
    names = tuple(f"{WORDS[k % len(WORDS)]} {k // len(WORDS) + 1}" for k in range(num_classes))
    annotations = Annotated(
        image_ids=np.array([f"image{k:05d}" for k in range(num_images)], dtype=np.str_),
        box_start=np.concatenate([[0], np.cumsum(counts)]),
        boxes=_boxes(places),
        labels=labels,
        is_group_of=np.zeros(len(labels), dtype=bool),
        is_not_exhaustive=np.zeros(len(labels), dtype=bool),
        label_start=np.concatenate([[0], np.cumsum([len(row) for row in verified])]),
        verified_class=np.concatenate(verified).astype(np.int32),
        verified_present=np.zeros(sum(map(len, verified)), dtype=bool),
        taxonomy=Taxonomy(tuple(f"/m/{k:03d}" for k in range(num_classes)), names),
    )
    train_images = np.maximum((share * num_images * 20).astype(np.int64), 3)
    decade = np.log10(train_images)
    bins = np.minimum(((decade - decade.min()) / (np.ptp(decade) + 1e-9) * 5).astype(np.int32), 4)
    return World(annotations, TrainingCounts(train_images, train_images * 2, bins), rng.normal(size=num_images))


def run(
    made: World, skill: float | NDArray[np.float64], *, seed: int, settings: dict[str, object] | None = None
) -> StoredMatches:
    """What is kept of a run of such a detector (:func:`detected`)."""
    ground_truth = made.annotations
    found = detected(made, skill, seed=seed)
    matches = challenge_scores(found, ground_truth).matches
    return StoredMatches(
        matches=matches,
        boxes=found.boxes[matches.detection_row].astype(np.float32),
        class_ids=ground_truth.taxonomy.ids,
        class_names=ground_truth.taxonomy.names,
        training=made.training,
        ground_truth=ground_truth_digest(ground_truth),
        settings={"seed": seed, **(settings or {})},
        evaluated_from={},
    )


def detected(made: World, skill: float | NDArray[np.float64], *, seed: int) -> Detections:
    """A detector that finds a box of class k with probability logistic(``skill[k]`` - the difficulty of the image)."""
    ground_truth = made.annotations
    rng = np.random.default_rng([seed, 1])
    image = np.repeat(np.arange(len(ground_truth.image_ids)), np.diff(ground_truth.box_start))
    skills = np.broadcast_to(np.asarray(skill, dtype=np.float64), (len(ground_truth.taxonomy),))
    chance = 1 / (1 + np.exp(made.difficulty[image] - skills[ground_truth.labels]))
    hit = rng.random(len(image)) < chance
    wrong = rng.random(len(image)) < 0.5
    rows = np.concatenate([np.flatnonzero(hit), np.flatnonzero(wrong)])
    boxes = np.concatenate([ground_truth.boxes[hit], _boxes(rng.integers(GRID * GRID, size=wrong.sum()))])
    score = np.concatenate([rng.beta(4, 2, hit.sum()), rng.beta(2, 4, wrong.sum())]).astype(np.float32)
    return Detections(image[rows].astype(np.int32), ground_truth.labels[rows], score, boxes)


def table_of(kept: StoredMatches, made: World) -> pd.DataFrame:
    """The table per class of such a run."""
    scores = Scores(average_precision(kept.matches), kept.matches.num_truths, kept.matches)
    return per_class_table(
        scores,
        taxonomy=made.annotations.taxonomy,
        bin_of_class=kept.training.bin_of_class,
        images_per_class=kept.training.images,
        boxes_per_class=kept.training.boxes,
    )


def runs(made: World, skill: float | NDArray[np.float64], seeds: Sequence[int], **more: object) -> list[StoredMatches]:
    """One run per seed."""
    return [run(made, skill, seed=seed, **more) for seed in seeds]  # type: ignore[arg-type]


def _boxes(places: NDArray[np.integer]) -> NDArray[np.float64]:
    y, x = np.divmod(places, GRID)
    return np.column_stack([x, y, x + 0.9, y + 0.9]) / GRID
