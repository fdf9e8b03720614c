"""The detections of a run's model: those that the run has stored where they are complete, else its model detects again.

Stored detections are those that a run has logged (``predictions.parquet`` or ``predictions.csv``) or has evaluated
from a file. They are complete when matching them again gives the run's own entries.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from retinaflow.comparison.chosen_runs import ChosenRun, called
from retinaflow.data.index import AnnotationIndex
from retinaflow.data.predictions import predictions_frame, read_predictions
from retinaflow.data.tables import RowErrors
from retinaflow.detections import Detections
from retinaflow.ensemble.model_detections import detect_again
from retinaflow.errors import DataError
from retinaflow.inference.checkpoint import Checkpoint
from retinaflow.metric.challenge import match
from retinaflow.metric.matches import Matches
from retinaflow.progress import report
from retinaflow.runs import store
from retinaflow.runs.run import Run

PREDICTIONS = "predictions.parquet"
"""The file that ``merge`` writes its detections to; ``evaluate`` writes ``predictions.csv``."""


def detections_of(run: ChosenRun, evaluated: AnnotationIndex, model: Checkpoint | str) -> tuple[Detections, Matches]:
    """The detections of a run on the images ``evaluated``, and their matches with the ground truth. ``model``: of the
    run, as :func:`~retinaflow.ensemble.model_detections.model_of` gives it."""
    stored = run.stored.matches
    for path in _logged(run):
        found = read_predictions(path, evaluated, RowErrors("stop"))
        if isinstance(model, Checkpoint):
            # As the model has made them, before they were text.
            score, boxes = found.score.astype(np.float32), found.boxes.astype(np.float32)
            found = replace(found, score=score, boxes=boxes)
        matches = match(found, evaluated, group_of_weight=stored.group_of_weight)
        if _same_entries(matches, stored):
            report(f"{called(run)}: {len(found):,} detections of {path.name}")
            # Detections on images without annotations cannot be evaluated, nor written with an ImageID.
            known = found.image_index >= 0
            return (found, matches) if known.all() else _matched(found.take(known), evaluated, stored.group_of_weight)
    return _matched(detect_again(run, evaluated, model), evaluated, stored.group_of_weight)


def _matched(found: Detections, evaluated: AnnotationIndex, group_of_weight: float) -> tuple[Detections, Matches]:
    return found, match(found, evaluated, group_of_weight=group_of_weight)


def _logged(run: ChosenRun) -> Iterator[Path]:
    """Files that may hold all detections of a run."""
    record = run.record
    for name in (PREDICTIONS, "predictions.csv"):
        if not record.experiment_id:
            path = Path(record.run_id) / name
            if path.is_file():
                yield path
        elif record.tags.get("retinaflow.command") != "train":
            try:
                yield store.fetch(record.run_id, name)
            except DataError:
                continue
    evaluated = record.tags.get("retinaflow.evaluated", "")
    if Path(evaluated).suffix and Path(evaluated).is_file() and Path(evaluated).suffix != ".pt":
        yield Path(evaluated)


def _same_entries(found: Matches, stored: Matches) -> bool:
    """Whether two matchings have the same entries. The scores of ``stored`` are float32."""
    return (
        len(found.score) == len(stored.score)
        and np.array_equal(found.class_index, stored.class_index)
        and np.array_equal(found.image_index, stored.image_index)
        and np.array_equal(found.score.astype(np.float32), stored.score.astype(np.float32))
    )


def log_detections(run: Run, detections: Detections, index: AnnotationIndex) -> None:
    """All detections of a merge as a file, as :func:`detections_of` finds it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / PREDICTIONS
        predictions_frame(detections, index).to_parquet(path, index=False)
        run.log_file(path)
