"""The result of evaluating one set of detections: scores, the table per class, and the aggregates that are tracked.

The same for every command that evaluates. Cost: that of :func:`retinaflow.metric.challenge.challenge_scores` and of
:func:`retinaflow.metric.coco.coco_scores`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from retinaflow.detections import Detections
from retinaflow.metric.challenge import Annotations, Scores, challenge_scores
from retinaflow.metric.coco import CocoScores, coco_scores
from retinaflow.metric.per_class import per_class_table, summary
from retinaflow.taxonomy import Taxonomy


class TrainingCounts(Protocol):
    """What is known of each of K classes from the training set, as :class:`retinaflow.data.frequency_bins.ClassBins`
    has it."""

    @property
    def images_per_class(self) -> NDArray[np.int64]: ...
    @property
    def boxes_per_class(self) -> NDArray[np.int64]: ...
    @property
    def bin_of_class(self) -> NDArray[np.int32]:
        """0 is the rarest bin, -1 no bin."""


@dataclass(frozen=True)
class EvaluationResult:
    """``scores`` with the ``table`` of :func:`per_class_table`; ``metrics``: those of :func:`summary` and the main ones
    of the COCO metric."""

    scores: Scores
    table: pd.DataFrame
    metrics: dict[str, float]


def score_detections(
    detections: Detections,
    ground_truth: Annotations,
    counts: TrainingCounts,
    *,
    group_of_weight: float,
) -> EvaluationResult:
    """The Challenge metric and AP by COCO's rules over all images of ``ground_truth``."""
    scores = challenge_scores(detections, ground_truth, group_of_weight=group_of_weight)
    coco = coco_scores(detections, ground_truth, by_area=False)
    return evaluation_of(scores, coco, ground_truth.taxonomy, counts)


def evaluation_of(scores: Scores, coco: CocoScores, taxonomy: Taxonomy, counts: TrainingCounts) -> EvaluationResult:
    """Scores with their table and aggregates. Raises ValueError unless there is one count per class."""
    table = per_class_table(
        scores,
        taxonomy=taxonomy,
        bin_of_class=counts.bin_of_class,
        images_per_class=counts.images_per_class,
        boxes_per_class=counts.boxes_per_class,
    )
    return EvaluationResult(scores, table, summary(table) | coco.main_metrics)
