"""What an evaluation leaves in a run: tables, figures, ``metrics.json``; the same for every command that evaluates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from retinaflow.data.images import UnreadableImageError, decode_sized
from retinaflow.data.index import AnnotationIndex
from retinaflow.detections import Detections
from retinaflow.metric.error_analysis import analyse_errors
from retinaflow.metric.per_class import class_groups
from retinaflow.metric.result import EvaluationResult, TrainingCounts
from retinaflow.progress import report
from retinaflow.reports.class_figures import ap_vs_frequency
from retinaflow.reports.contact_sheet import Panel, contact_sheet
from retinaflow.reports.score_figures import error_costs, precision_recall, rarest_classes, spread_classes
from retinaflow.reports.validation_images import clearest, images_of_classes
from retinaflow.runs.run import Run
from retinaflow.settings.commands import EvaluateConfig
from retinaflow.statistics.bootstrap import bootstrap_intervals
from retinaflow.taxonomy import Taxonomy

SHEET_IMAGES = 12
SHEET_SCORE = 0.3
"""Detections below this score are left off the contact sheet, which would be covered by them."""
_SHEET_PIXELS = 360


def log_tables(run: Run, evaluation: EvaluationResult, document: dict[str, object]) -> None:
    """``per_class_ap.csv``, the same for the table view of ``mlflow ui``, and ``metrics.json``."""
    first = ["class", "ap", "num_truths"]
    table = evaluation.table[
        [*first, *(name for name in evaluation.table if name not in (*first, "class_id")), "class_id"]
    ]
    run.log_csv(table, "per_class_ap.csv")
    # Four digits can be compared by eye; the CSV keeps them all.
    run.log_table(table.round(4), "per_class_ap.json")
    run.log_json(document, "metrics.json")


def log_figures(run: Run, evaluation: EvaluationResult, detections: Detections, index: AnnotationIndex) -> None:
    """``ap_vs_frequency.png`` and ``detections.png``."""
    run.log_figure(ap_vs_frequency(evaluation.table), "ap_vs_frequency.png")
    run.log_figure(detections_sheet(detections, index, evaluation.table), "detections.png")


def log_analysis(
    runs: Sequence[Run],
    evaluation: EvaluationResult,
    detections: Detections,
    index: AnnotationIndex,
    *,
    errors: bool = True,
) -> None:
    """``precision_recall.png``, ``rarest_classes.png`` and, with ``errors``, what each kind of error costs.

    The latter are ``error_analysis.csv``, ``error_analysis.png`` and ``confusions.csv``. Made once for all runs.
    """
    table, matches = evaluation.table, evaluation.scores.matches
    index_of, chosen = index.taxonomy.index_of, spread_classes(evaluation.table)
    figures = {
        "precision_recall.png": precision_recall(matches, table, class_ids=chosen, index_of=index_of),
        "rarest_classes.png": rarest_classes(table),
    }
    tables = {}
    if errors:
        analysis = analyse_errors(matches, detections, index)
        figures["error_analysis.png"] = error_costs(analysis, table)
        tables = {"error_analysis.csv": analysis.table, "confusions.csv": analysis.confusions}
    for run in runs:
        for name, figure in figures.items():
            run.log_figure(figure, name)
        for name, rows in tables.items():
            run.log_csv(rows, name)


def metrics_document(evaluation: EvaluationResult, index: AnnotationIndex) -> dict[str, object]:
    """``metrics.json``: the aggregates, on how many images, and the detections that were left out."""
    scores = evaluation.scores
    return {
        "mAP": scores.mean_ap if np.isfinite(scores.mean_ap) else None,
        "num_classes_in_mean": scores.num_classes_in_mean,
        "num_images": len(index),
        "num_verified_labels": len(index.verified_class),
        "dropped_detections": vars(scores.dropped) | {"total": scores.dropped.total},
        "absorbed_detections": scores.matches.absorbed,
        "repeated_truths": scores.matches.repeated_ground_truths,
        "not_a_challenge_score": list(scores.not_a_challenge_score),
        "metrics": evaluation.metrics,
    }


def rules_document(
    evaluation: EvaluationResult, dropped: pd.DataFrame, config: EvaluateConfig, *, exhaustive: bool
) -> dict[str, object]:
    """What ``evaluate`` adds to :func:`metrics_document`: by which rules it was evaluated, and dropped rows by rule.
    ``exhaustive``: of the data."""
    reasons = list(evaluation.scores.not_a_challenge_score)
    if exhaustive:
        reasons.append("exhaustive=true takes classes without a label as verified absent")
    counts: Counter[tuple[str, str]] = Counter()
    for file, rule, rows in zip(dropped["file"], dropped["rule"], dropped["rows"], strict=True):
        counts[file, rule] += int(rows)
    return {
        "not_a_challenge_score": reasons,
        "expanded_predictions": config.expand_predictions,
        "dropped_rows": [{"file": file, "rule": rule, "rows": rows} for (file, rule), rows in counts.items()],
    }


def with_intervals(
    evaluation: EvaluationResult, taxonomy: Taxonomy, counts: TrainingCounts, config: EvaluateConfig
) -> tuple[EvaluationResult, dict[str, list[float]]]:
    """The evaluation with columns ``ap_low`` and ``ap_high``, and [low, high] of the aggregates by name."""
    groups = class_groups(counts.images_per_class, counts.bin_of_class, class_ids=taxonomy.ids)
    found = bootstrap_intervals(evaluation.scores.matches, groups=groups, resamples=config.bootstrap, seed=config.seed)
    table = evaluation.table.assign(
        ap_low=evaluation.table["class_id"].map(dict(zip(taxonomy.ids, found.ap_low, strict=True))),
        ap_high=evaluation.table["class_id"].map(dict(zip(taxonomy.ids, found.ap_high, strict=True))),
    )
    named = {"mAP": found.mean, **found.groups}
    bounds = {name: [value.low, value.high] for name, value in named.items() if np.isfinite(value.low)}
    return replace(evaluation, table=table), bounds


def detections_sheet(detections: Detections, index: AnnotationIndex, table: pd.DataFrame) -> Figure:
    """Detections against ground truth on a dozen images; classes that only the hierarchy implies are left off.

    The box of a parent class scores higher than the same box of its child, and would hide which child was found.
    """
    detections = detections.take(np.isin(detections.class_index, index.labels))
    panels = [_panel(image, detections, index) for image in images_of_classes(index, table, count=SHEET_IMAGES)]
    return contact_sheet(
        [panel for panel in panels if panel], title=f"Detections (score > {SHEET_SCORE:g}) against ground truth"
    )


def _panel(image: int, detections: Detections, index: AnnotationIndex) -> Panel | None:
    """None when the image cannot be read: whether that stops the run was settled when it was evaluated."""
    rows = slice(index.box_start[image], index.box_start[image + 1])
    found = clearest(detections.take((detections.image_index == image) & (detections.score > SHEET_SCORE)))
    names = index.taxonomy.labels
    try:
        pixels = decode_sized(index, image, longest=_SHEET_PIXELS)
    except UnreadableImageError:
        return None
    return Panel(
        image=pixels,
        title=str(index.image_ids[image]),
        gt_boxes=np.asarray(index.boxes[rows]),
        gt_labels=[names[label] for label in index.labels[rows]],
        gt_group_of=index.is_group_of[rows],
        detection_boxes=found.boxes,
        detection_labels=[names[label] for label in found.class_index],
        detection_scores=found.score,
    )


def report_evaluation(evaluation: EvaluationResult) -> None:
    """Print the aggregates on one line each, why they are not a Challenge score if they are not, and repeated boxes."""
    for name, value in evaluation.metrics.items():
        report(f"{name:<20} {value:.4f}")
    for reason in evaluation.scores.not_a_challenge_score:
        report(f"not an Open Images Challenge score: {reason}")
    if evaluation.scores.mean_ap == 0:
        report(f"no detection matches a ground-truth box; detections left out: {_left_out(evaluation)}")
    repeated = evaluation.scores.matches.repeated_ground_truths
    if repeated:
        report(
            f"{repeated:,} ground-truth boxes repeat a box of their class on the same image (a box given under child "
            "and parent?)"
        )


_REASONS = {
    "unknown_image": "of images that are not evaluated",
    "class_not_evaluated": "of classes that are not evaluated",
    "not_verified": "of classes that are not verified on their image (exhaustive=true if every object has a box)",
    "invalid_box": "without width or height",
    "over_limit": "beyond the 10,000 of an image and class",
    "not_exhaustive": "unmatched, of classes that are not exhaustive on their image",
}


def _left_out(evaluation: EvaluationResult) -> str:
    """The detections that do not count, by reason."""
    counts = {text: getattr(evaluation.scores.dropped, name) for name, text in _REASONS.items()}
    return "; ".join(f"{count:,} {text}" for text, count in counts.items() if count) or "none"
