"""Cross-fitted calibration of a whole model: no detection is calibrated by a calibrator that was fitted on its image.

The images are divided into folds. Detections on the images of a fold get calibrators that were fitted on the images of
the other folds; the calibrators that are stored are fitted on all images. One method of three is chosen for a class, by
the likelihood of held-out folds: two methods in one class would be two scales. A class with too few ground-truth boxes
keeps its scores.

Cross-fitted scores understate AP, as leaving out does for any ranking: an image with many true positives is missing
from the fit of its own calibrator, which is lower for it. A stored calibrator does not change the AP of a class.

Cost: 16 to 21 fits per class with five folds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from retinaflow.detections import Detections
from retinaflow.metric.matches import Kind, Matches
from retinaflow.statistics.calibration import (
    Calibrator,
    FloatArray,
    Method,
    ScoredDetections,
    check_scores,
    choose_method,
    fit,
    log_loss,
)


def sample_folds(num_images: int, folds: int, *, seed: int) -> NDArray[np.int64]:
    """``[I]`` fold of each image; random folds of nearly equal size."""
    order = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(0xCA1,))).permutation(num_images)
    result = np.empty(num_images, dtype=np.int64)
    result[order] = np.arange(num_images) % folds
    return result


@dataclass(frozen=True)
class CalibratedClass:
    """The stored calibrator of a class, and the mean log loss of its evaluated detections, cross-fitted."""

    class_index: int
    calibrator: Calibrator
    num_truths: float
    num_evaluated: int
    loss_before: float
    loss_after: float


def cross_fitted(
    detections: Detections,
    matches: Matches,
    fold_of_image: NDArray[np.int64],
    *,
    method: Literal["auto", "none", "platt", "isotonic"] = "auto",
    min_ground_truth: int = 20,
) -> tuple[Detections, list[CalibratedClass]]:
    """One model's detections with cross-fitted scores, and the calibrator of each class to store.

    ``matches``: of these detections (``detection_row`` counts their rows). ``fold_of_image [I]``: the images of a fold
    get calibrators of the other folds. A class of fewer ground-truth boxes than ``min_ground_truth`` keeps its scores.
    Raises ValueError for scores outside [0, 1], which only ``none`` takes.
    """
    if method != "none":
        check_scores(detections)
    score = np.asarray(detections.score, dtype=np.float64).copy()
    fold_of_row = fold_of_image[detections.image_index]
    choose: Callable[[ScoredDetections], Method] = choose_method if method == "auto" else lambda evaluated: method
    rows_of_class = np.argsort(detections.class_index, kind="stable")
    start = np.searchsorted(detections.class_index[rows_of_class], np.arange(len(matches.evaluated) + 1))
    found = []
    for k in range(len(matches.evaluated)):
        evaluated = scored_of_class(matches, k, fold_of_image)
        ground_truths, raw = float(matches.num_truths[k]), evaluated.score
        stored, after = Calibrator(), raw
        if ground_truths >= min_ground_truth and len(evaluated):
            rows = rows_of_class[start[k] : start[k + 1]]
            chosen = choose(evaluated)
            stored, after = fit(evaluated, chosen), raw.copy()
            for fold in np.unique(fold_of_row[rows]):
                calibrator = fit(evaluated.take(evaluated.fold != fold), chosen)
                score[rows[fold_of_row[rows] == fold]] = calibrator(score[rows[fold_of_row[rows] == fold]])
                after[evaluated.fold == fold] = calibrator(raw[evaluated.fold == fold])
        found.append(CalibratedClass(k, stored, ground_truths, len(evaluated), *_mean_losses(evaluated, after)))
    return replace(detections, score=score), found


def calibrated_by(calibrators: Sequence[Calibrator], matches: Matches) -> list[CalibratedClass]:
    """Given calibrators, one for each class, with the log loss of evaluated detections before and after them."""
    found = []
    for k, calibrator in enumerate(calibrators):
        evaluated = scored_of_class(matches, k, np.zeros(len(matches.image_ids), dtype=np.int64))
        losses = _mean_losses(evaluated, calibrator(evaluated.score))
        found.append(CalibratedClass(k, calibrator, float(matches.num_truths[k]), len(evaluated), *losses))
    return found


def scored_of_class(matches: Matches, class_index: int, fold_of_image: NDArray[np.int64]) -> ScoredDetections:
    """The true and false positives of a class."""
    start, end = np.searchsorted(matches.class_index, [class_index, class_index + 1])
    entries = np.arange(start, end)[matches.kind[start:end] != Kind.GROUP_OF]
    return ScoredDetections(
        matches.score[entries],
        matches.kind[entries] == Kind.TRUE_POSITIVE,
        fold_of_image[matches.image_index[entries]],
    )


def _mean_losses(evaluated: ScoredDetections, after: FloatArray) -> tuple[float, float]:
    if len(evaluated) == 0:
        return float("nan"), float("nan")
    before = np.asarray(evaluated.score)
    return float(log_loss(before, evaluated.is_true).mean()), float(log_loss(after, evaluated.is_true).mean())
