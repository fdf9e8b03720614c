"""The detections of a run's model: those that the run has stored where they are complete, else the model detects again.

Stored detections are those that a run has logged (``predictions.parquet`` or ``predictions.csv``) or has evaluated
from a file. They are complete when matching them again gives the run's own entries. A model detects by the settings of
its training.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from retinaflow.comparison.chosen_runs import ChosenRun, called
from retinaflow.data.index import AnnotationIndex
from retinaflow.data.predictions import read_predictions
from retinaflow.data.skipped_images import SkippedImages
from retinaflow.data.tables import RowErrors
from retinaflow.detections import Detections
from retinaflow.errors import DataError, SettingError
from retinaflow.inference.detector import Detector
from retinaflow.interrupts import StopRequest
from retinaflow.metric.challenge import match
from retinaflow.metric.matches import Matches
from retinaflow.progress import report
from retinaflow.runs import store
from retinaflow.runs.models import TrainedModel
from retinaflow.runs.tracking import launched_by_mlflow

PREDICTIONS = "predictions.parquet"
"""The file that ``merge`` writes its detections to; ``evaluate`` writes ``predictions.csv``."""


def detections_of(run: ChosenRun, evaluated: AnnotationIndex) -> tuple[Detections, Matches]:
    """The detections of a run on the images ``evaluated``, and their matches with the ground truth."""
    stored = run.stored.matches
    for path in _logged(run):
        found = read_predictions(path, evaluated, RowErrors("stop"))
        matches = match(found, evaluated, group_of_weight=stored.group_of_weight)
        if _same_entries(matches, stored):
            report(f"{called(run)}: {len(found):,} detections of {path.name}")
            # Detections on images without annotations cannot be evaluated, nor written with an ImageID.
            known = found.image_index >= 0
            return (found, matches) if known.all() else _matched(found.take(known), evaluated, stored.group_of_weight)
    model = _model_of(run)
    report(f"{called(run)}: detecting on {len(evaluated):,} images")
    checkpoint = TrainedModel.find(model).checkpoint
    if checkpoint.taxonomy.ids != evaluated.taxonomy.ids:
        raise DataError(f"{model}: the model must have the {evaluated.num_classes} classes that it was evaluated on")
    skipped = SkippedImages()
    with StopRequest(watch_parent=launched_by_mlflow()) as stop:
        found = Detector.load(checkpoint).detect(
            evaluated,
            after_batch=lambda images: stop.check(),
            on_bad_image=skipped.add if run.stored.settings.get("on_bad_image") == "skip" else None,
        )
    return _matched(found, evaluated, stored.group_of_weight)


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


def _model_of(run: ChosenRun) -> Path | str:
    """The checkpoint of a training. Raises SettingError for a run that has none."""
    record = run.record
    if not record.experiment_id:
        path = Path(record.run_id) / "checkpoints" / "best.pt"
        if path.is_file():
            return path
    elif record.tags.get("retinaflow.command") == "train":
        return record.run_id
    raise SettingError(
        f"{called(run)} has neither a model of its own nor all of its detections; evaluate its model again with "
        "evaluate and merge that run"
    )
