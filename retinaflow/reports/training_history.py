"""How a training went, evaluation by evaluation: AP per class over time, and curves of the rarest classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from retinaflow.data.index import AnnotationIndex
from retinaflow.detections import Detections
from retinaflow.reports.validation_images import log_validation_images, plain_name
from retinaflow.runs.run import Run
from retinaflow.training.session import EvaluatedEpoch

HISTORY = "per_class_history.csv"
CURVES = 5
"""Number of rarest classes with a curve: one for each of hundreds of classes would fill the page."""


def log_evaluation(run: Run, index: AnnotationIndex, one: EvaluatedEpoch, *, images: bool = True) -> None:
    """Log what changes from one evaluation of a training to the next; ``images``: the validation images too, first, as
    those of step 0, without detections."""
    table = one.validated.evaluation.table
    log_history(run, one.history, table, index, step=one.step)
    if images:
        if len(one.history) == 1:
            # The Image Grid opens at step 0, and shows nothing at a step without an image.
            log_validation_images(run, Detections.empty(), index, table, step=0)
        log_validation_images(run, one.validated.detections, index, table, step=one.step)


def log_history(
    run: Run, history: Mapping[int, Sequence[float]], table: pd.DataFrame, index: AnnotationIndex, *, step: int
) -> None:
    """``per_class_history.csv`` of all evaluations so far, and a point of the curves ``rare/CLASS`` of the last one.

    ``history``: epoch -> AP of each class in class order. ``table``: of the last evaluation, one row per class, rarest
    first.
    """
    run.log_csv(history_table(history, table, index), HISTORY)
    run.log_metrics(rare_metrics(table), step=step)


def history_table(history: Mapping[int, Sequence[float]], table: pd.DataFrame, index: AnnotationIndex) -> pd.DataFrame:
    """One row per class in the order of ``table``: class, training images, AP after each evaluated epoch, class id."""
    rows = [index.taxonomy.index_of[mid] for mid in table["class_id"]]
    columns = {f"epoch_{epoch}": [history[epoch][row] for row in rows] for epoch in sorted(history)}
    first = table[["class", "train_images"]].reset_index(drop=True)
    return pd.concat([first, pd.DataFrame(columns), table[["class_id"]].reset_index(drop=True)], axis=1)


def rare_metrics(table: pd.DataFrame) -> dict[str, float]:
    """AP of the rarest classes that have ground truth and training images, as ``rare/CLASS``."""
    known = table[table["ap"].notna() & (table["train_images"] > 0)].head(CURVES)
    metrics: dict[str, float] = {}
    for label, mid, ap in zip(known["class"], known["class_id"], known["ap"], strict=True):
        name = f"rare/{plain_name(str(label)) or plain_name(str(mid))}"
        metrics[name if name not in metrics else f"{name} {plain_name(str(mid))}"] = float(ap)
    return metrics
