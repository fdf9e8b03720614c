"""A population of images with known true AP, to see how often intervals cover it.

Classes come on a grid: how many images of a sample hold them (``IMAGES_WITH_CLASS``, the rarest 3 of 300) times how
good the detector is (AP of about 0.08, 0.5, 0.8 and 0.98). An image holds one ground truth of a class or a few more. A
hidden hardness of the image lowers the scores of all its ground-truth boxes and lifts those of its wrong detections, so
that images, not boxes, are independent. The second run sees the same ground-truth boxes with the same difficulty, noise
of its own, and a better detector. What is simulated are matches: boxes play no part in intervals.
"""

from __future__ import annotations

import numpy as np

from retinaflow.metric.challenge import average_precision
from retinaflow.metric.matches import Dropped, Kind, Matches

IMAGES = 300
IMAGES_WITH_CLASS = (3, 6, 10, 20, 50, 150)
QUALITIES = ((-1.2, 0.2, 2.0), (0.3, 0.9, 1.0), (1.2, 1.8, 0.6), (2.8, 2.6, 0.2))
"""How easily ground-truth boxes are found, how far their scores lie above those of wrong detections, wrong detections
per ground truth."""
GAIN = 0.25
"""What the second run is better by."""


def draw_runs(
    rng: np.random.Generator,
    num_images: int,
    *,
    images_with_class: tuple[int, ...] = IMAGES_WITH_CLASS,
    copies: int = 1,
) -> tuple[Matches, Matches]:
    """Two runs on one sample. Class ``(copy * len(images_with_class) + i) * 4 + j`` is of size i and quality j."""
    grid = [(size, *quality) for _ in range(copies) for size in images_with_class for quality in QUALITIES]
    hardness = rng.normal(size=num_images)
    ground_truths: list[np.ndarray] = []
    entries: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for label, (size, ease, separation, wrong_rate) in enumerate(grid):
        holders = np.flatnonzero(rng.random(num_images) < size / IMAGES)
        ground_truth = np.repeat(holders, 1 + rng.poisson(0.5, len(holders)))
        others = np.flatnonzero(rng.random(num_images) < 2 * size / IMAGES)
        verified = np.concatenate([holders, others])
        wrong = np.repeat(verified, rng.poisson(wrong_rate * 2 / 3, len(verified)))
        ground_truths.append(np.column_stack([ground_truth, np.full(len(ground_truth), label)]))
        clear = rng.normal(size=len(ground_truth)) - 0.7 * hardness[ground_truth]
        alluring = rng.normal(size=len(wrong)) + 0.3 * hardness[wrong]
        for run, gain in zip(entries, (0.0, GAIN), strict=True):
            right_score = 0.85 * clear + 0.5 * rng.normal(size=len(ground_truth)) + gain
            wrong_score = 0.85 * alluring + 0.5 * rng.normal(size=len(wrong))
            found, kept = right_score + ease > 0, rng.random(len(wrong)) < 0.8
            run.append(_columns(ground_truth[found], label, right_score[found] + separation, Kind.TRUE_POSITIVE))
            run.append(_columns(wrong[kept], label, wrong_score[kept], Kind.FALSE_POSITIVE))
    first, second = (
        _matches(np.concatenate(run), np.concatenate(ground_truths), num_images, len(grid)) for run in entries
    )
    return first, second


def true_ap(seed: int = 0, num_images: int = 40_000) -> tuple[np.ndarray, np.ndarray]:
    """AP of both runs for each quality ``[4]``: it does not depend on the size, which changes ground truth and wrong
    alike."""
    runs = draw_runs(np.random.default_rng(seed), num_images, images_with_class=(150,))
    first, second = (average_precision(run) for run in runs)
    return first, second


def _columns(image: np.ndarray, label: int, score: np.ndarray, kind: Kind) -> np.ndarray:
    return np.column_stack([image, np.full(len(image), label), score, np.full(len(image), int(kind))])


def _matches(entries: np.ndarray, ground_truths: np.ndarray, num_images: int, num_classes: int) -> Matches:
    entries = entries[np.lexsort((-entries[:, 2], entries[:, 1]))]
    pair, count = np.unique(ground_truths[:, 1] * num_images + ground_truths[:, 0], return_counts=True)
    return Matches(
        image_index=entries[:, 0].astype(np.int64),
        class_index=entries[:, 1].astype(np.int64),
        score=entries[:, 2],
        kind=entries[:, 3].astype(np.int8),
        weight=np.ones(len(entries)),
        detection_row=np.arange(len(entries)),
        gt_image=pair % num_images,
        gt_class=pair // num_images,
        gt_count=count.astype(np.float64),
        image_ids=np.arange(num_images).astype(np.str_),
        evaluated=np.ones(num_classes, dtype=bool),
        dropped=Dropped(0, 0, 0, 0, 0),
        absorbed=0,
        verified_labels=0,
        repeated_ground_truths=0,
        iou_threshold=0.5,
        group_of_weight=1.0,
    )
