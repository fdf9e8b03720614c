"""Precision, recall, AP by IoU threshold and by slice: the tables ``per_class_details.csv`` and ``slices.csv``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from retinaflow.metric.challenge import ap_by_threshold, average_precision, mean_of_classes
from retinaflow.metric.evaluator import Evaluator
from retinaflow.metric.operating_points import at_threshold, best_f1
from retinaflow.metric.slices import slice_scores
from retinaflow.taxonomy import Taxonomy

SCORE_THRESHOLD = 0.5
"""Score threshold of the reported precision and recall."""


def detail_tables(
    evaluator: Evaluator,
    taxonomy: Taxonomy,
    *,
    group_of_weight: float = 1.0,
    iou_thresholds: Sequence[float] = (),
    score_threshold: float = SCORE_THRESHOLD,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Details per class, in class order, and one row per slice.

    Details: ``class, ap, num_truths``; ``precision, recall, f1`` at the score threshold, ``best_f1`` with its
    ``threshold, precision, recall``; ``ap_iou_50``, ... and their mean ``ap_iou_mean`` for given IoU thresholds;
    ``ap``, ``recall`` and ``num_truths`` of each slice; ``class_id``. Slices: ``slice, mAP, recall`` (means over the
    classes with a ground truth in it), ``num_truths, num_classes``.
    """
    matches = evaluator.matches(group_of_weight=group_of_weight)
    given, best = at_threshold(matches, score_threshold), best_f1(matches)
    at = f"at_{score_threshold:g}"
    columns: dict[str, object] = {
        "class": list(taxonomy.labels),
        "ap": average_precision(matches),
        "num_truths": matches.num_truths,
        f"precision_{at}": given.precision,
        f"recall_{at}": given.recall,
        f"f1_{at}": given.f1,
        "best_f1": best.f1,
        "best_f1_threshold": best.threshold,
        "best_f1_precision": best.precision,
        "best_f1_recall": best.recall,
    }
    by_threshold = ap_by_threshold(evaluator, iou_thresholds, group_of_weight=group_of_weight)
    columns |= {iou_column(threshold): row for threshold, row in zip(iou_thresholds, by_threshold, strict=True)}
    if len(by_threshold):
        columns["ap_iou_mean"] = by_threshold.mean(axis=0)
    rows = []
    for part in slice_scores(evaluator):
        columns |= {f"ap_{part.name}": part.ap, f"recall_{part.name}": part.recall}
        columns[f"num_truths_{part.name}"] = part.num_truths
        has_ground_truth = part.num_truths > 0
        rows.append(
            {
                "slice": part.name,
                "mAP": mean_of_classes(part.ap),
                "recall": mean_of_classes(part.recall),
                "num_truths": float(part.num_truths.sum()),
                "num_classes": int(np.count_nonzero(has_ground_truth)),
            }
        )
    return pd.DataFrame(columns | {"class_id": list(taxonomy.ids)}), pd.DataFrame(rows)


def iou_column(threshold: float) -> str:
    """``ap_iou_50`` for 0.5, ``ap_iou_62.5`` for 0.625."""
    return f"ap_iou_{100 * threshold:.6g}"


def means_by_threshold(per_class: pd.DataFrame, iou_thresholds: Sequence[float]) -> dict[str, float | None]:
    """``mAP_iou_50``, ... and ``mAP_iou_mean`` of :func:`detail_tables`; None where no class has ground truth."""
    columns = [*map(iou_column, iou_thresholds), "ap_iou_mean"] if iou_thresholds else []
    means = {name.replace("ap_", "mAP_", 1): float(per_class[name].mean()) for name in columns}
    return {name: None if np.isnan(value) else value for name, value in means.items()}
