"""Detections and ground truth from files, pandas frames or arrays -> scores, in one call.

    from retinaflow.metric.evaluation import evaluate_detections

    found = evaluate_detections(
        "predictions.csv", "boxes.csv", image_labels="labels.csv", classes="classes.csv", hierarchy="hierarchy.json"
    )
    found.mean_ap                  # mean average precision of the Open Images Challenge
    found.per_class                # pandas: class, ap, num_truths, class_id
    found.not_a_challenge_score    # reasons why it is none; empty for a Challenge score

Every table may be a path (CSV or Parquet), a pandas frame or a dict of arrays, in the published columns, boxes
normalised to [0, 1]; predictions may be a Kaggle submission too. An :class:`~retinaflow.data.index.AnnotationIndex` and
:class:`~retinaflow.detections.Detections` are taken as they are. ``docs/metric.md`` explains the rules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from retinaflow.data.annotation_rows import build_annotations
from retinaflow.data.class_files import read_hierarchy, read_taxonomy
from retinaflow.data.index import AnnotationIndex
from retinaflow.data.predictions import read_predictions, source_of
from retinaflow.data.tables import RowErrors
from retinaflow.detections import Detections
from retinaflow.metric.challenge import Evaluator, Scores, ap_by_threshold, score
from retinaflow.metric.details import detail_tables, iou_column
from retinaflow.progress import report
from retinaflow.settings.data_settings import OnBadRow
from retinaflow.taxonomy import Hierarchy, Taxonomy, expand_to_ancestors

Table = str | Path | pd.DataFrame | Mapping[str, ArrayLike]
"""A table in the published columns, in a file (CSV, Parquet) or in memory."""


@dataclass(frozen=True)
class Evaluation:
    """Scores, and the evaluator for further measures; :attr:`scores` has the matches."""

    scores: Scores
    evaluator: Evaluator
    taxonomy: Taxonomy
    iou_thresholds: tuple[float, ...]
    ap_by_iou: NDArray[np.float64]
    """``[T, K]`` AP at each of ``iou_thresholds``."""

    @property
    def mean_ap(self) -> float:
        """Mean over the classes with ground truth at IoU 0.5; NaN when there is none."""
        return self.scores.mean_ap

    @property
    def not_a_challenge_score(self) -> tuple[str, ...]:
        """Reasons why the mean is no Challenge score; empty when it is one."""
        return self.scores.not_a_challenge_score

    @property
    def per_class(self) -> pd.DataFrame:
        """One row per class, in class order: ``class, ap, num_truths``, ``ap_iou_50`` and so on, ``class_id``."""
        columns = {
            iou_column(threshold): row for threshold, row in zip(self.iou_thresholds, self.ap_by_iou, strict=True)
        }
        return pd.DataFrame(
            {
                "class": list(self.taxonomy.labels),
                "ap": self.scores.ap,
                "num_truths": self.scores.num_truths,
                **columns,
                "class_id": list(self.taxonomy.ids),
            }
        )

    def details(self, *, score_threshold: float = 0.5) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Two tables, per class and per slice, see :func:`retinaflow.metric.details.detail_tables`."""
        return detail_tables(
            self.evaluator,
            self.taxonomy,
            group_of_weight=self.scores.matches.group_of_weight,
            iou_thresholds=self.iou_thresholds,
            score_threshold=score_threshold,
        )


def evaluate_detections(
    predictions: Detections | Table,
    ground_truth: AnnotationIndex | Table,
    *,
    image_labels: Table | None = None,
    classes: str | Path | Mapping[str, str] | None = None,
    hierarchy: str | Path | Mapping[str, Any] | None = None,
    group_of_weight: float = 1.0,
    iou_thresholds: Sequence[float] = (),
    expand_predictions: bool = False,
    on_bad_row: OnBadRow = "stop",
) -> Evaluation:
    """Evaluate predictions by the rules of the Open Images Challenge.

    ``ground_truth``: boxes (with ``image_labels``, ``classes`` and ``hierarchy``, see :func:`read_ground_truth`) or an
    index.
    ``predictions``: columns ``ImageID, LabelName, Score, XMin, XMax, YMin, YMax``, a Kaggle submission, or
    ``Detections`` whose images are those of the index. ``group_of_weight`` in [0, 1]: 1 is the Challenge.
    ``iou_thresholds``: further thresholds to give AP at (:data:`~retinaflow.metric.challenge.COCO_THRESHOLDS`).
    ``expand_predictions`` copies each detection to its class's ancestors first. Raises FileNotFoundError, and
    ValueError naming file, line, rule and value; with ``on_bad_row="drop"`` invalid rows are left out.
    """
    if isinstance(ground_truth, AnnotationIndex):
        if image_labels is not None or classes is not None or hierarchy is not None:
            raise ValueError("an index has its image_labels, classes and hierarchy; give none of them beside it")
        index = ground_truth
    else:
        index = read_ground_truth(
            ground_truth, image_labels=image_labels, classes=classes, hierarchy=hierarchy, on_bad_row=on_bad_row
        )
    if isinstance(predictions, Detections):
        detections = predictions
    else:
        detections = read_detections(predictions, index, on_bad_row=on_bad_row)
    if expand_predictions:
        detections = expand_to_ancestors(detections, index.taxonomy)
    evaluator = Evaluator(index)
    evaluator.add(detections)
    scores = score(evaluator.matches(group_of_weight=group_of_weight))
    by_iou = ap_by_threshold(evaluator, iou_thresholds, group_of_weight=group_of_weight)
    return Evaluation(scores, evaluator, index.taxonomy, tuple(iou_thresholds), by_iou)


def read_ground_truth(
    boxes: Table,
    *,
    image_labels: Table | None = None,
    classes: str | Path | Mapping[str, str] | None = None,
    hierarchy: str | Path | Mapping[str, Any] | None = None,
    on_bad_row: OnBadRow = "stop",
) -> AnnotationIndex:
    """Published annotations as an index, without images.

    ``boxes``: ``ImageID, LabelName, XMin, XMax, YMin, YMax`` and, where there are any, ``IsGroupOf`` and the other
    flags. ``image_labels``: ``ImageID, LabelName, Confidence``. ``classes``: the class list, or a mapping id -> name in
    class order; required. ``hierarchy``: the published JSON, as file or parsed. Errors as in
    :func:`evaluate_detections`.
    """
    taxonomy = _taxonomy(classes, hierarchy)
    errors = RowErrors(on_bad_row)
    labels = [] if image_labels is None else [source_of(image_labels, "image_labels")]
    index = build_annotations(taxonomy, [source_of(boxes, "boxes")], labels, errors, allow_repeats=True)
    for notice in errors.notices:
        report(notice)
    return index


def read_detections(predictions: Table, ground_truth: AnnotationIndex, *, on_bad_row: OnBadRow = "stop") -> Detections:
    """Predictions as columns that count images and classes of ``ground_truth``.

    Errors as in :func:`evaluate_detections`.
    """
    errors = RowErrors(on_bad_row)
    return read_predictions(source_of(predictions, "predictions"), ground_truth, errors, explain=True)


def _taxonomy(
    classes: str | Path | Mapping[str, str] | None, hierarchy: str | Path | Mapping[str, Any] | None
) -> Taxonomy:
    if classes is None:
        raise ValueError("the class list must be given as classes= (a file, or a dict of id and name), but is not")
    tree_file = Path(hierarchy) if isinstance(hierarchy, str | Path) else None
    if isinstance(classes, Mapping):
        links = read_hierarchy(tree_file) if tree_file else Hierarchy()
        taxonomy = Taxonomy(tuple(classes), tuple(classes.values()), links)
    else:
        taxonomy = read_taxonomy(Path(classes), tree_file)
    if isinstance(hierarchy, Mapping):
        return Taxonomy(taxonomy.ids, taxonomy.names, Hierarchy.from_tree(dict(hierarchy)))
    return taxonomy
