"""The model behind a run, and its detections: those that the run has stored where they are complete, else its model
detects again.

Stored detections are those that a run has logged (``predictions.parquet`` or ``predictions.csv``) or has evaluated
from a file. They are complete when matching them again gives the run's own entries.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from retinaflow.comparison.chosen_runs import PREDICTIONS as OF_FILE
from retinaflow.comparison.chosen_runs import ChosenRun, called
from retinaflow.data.index import AnnotationIndex
from retinaflow.data.predictions import predictions_frame, read_predictions
from retinaflow.data.skipped_images import SkippedImages
from retinaflow.data.tables import RowErrors
from retinaflow.detections import Detections
from retinaflow.errors import DataError, SettingError
from retinaflow.files import read_json
from retinaflow.inference.checkpoint import Checkpoint
from retinaflow.inference.detector import Detector
from retinaflow.inference.merged_checkpoint import OF_DETECTIONS, MergedCheckpoint
from retinaflow.interrupts import StopRequest
from retinaflow.metric.challenge import match
from retinaflow.metric.matches import Matches
from retinaflow.progress import report
from retinaflow.runs import store
from retinaflow.runs.models import TrainedModel
from retinaflow.runs.run import CHECKPOINTS, Run
from retinaflow.runs.tracking import launched_by_mlflow

PREDICTIONS = "predictions.parquet"
"""The file that ``merge`` writes its detections to; ``evaluate`` writes ``predictions.csv``."""


def detections_of(run: ChosenRun, evaluated: AnnotationIndex, model: Checkpoint | str) -> tuple[Detections, Matches]:
    """The detections of a run on the images ``evaluated``, and their matches with the ground truth. ``model``: of the
    run, as :func:`model_of` gives it."""
    stored = run.stored.matches
    for path in _logged(run):
        # Rows of classes that were not evaluated, or that were dropped, are none of its entries.
        found = read_predictions(path, evaluated, RowErrors("drop"), ids=_ids_of(run))
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


def _ids_of(run: ChosenRun) -> Path | None:
    """The COCO file of the ids in an evaluated file of COCO results."""
    ids = run.stored.evaluated_from["settings"].get("prediction_ids")
    return None if ids is None else Path(ids)


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


def model_of(run: ChosenRun) -> Checkpoint | str:
    """The model that gives the detections of a run of ``train`` or ``evaluate``, with the settings by which it gave
    them; a text where there is none: the reason."""
    tags = run.record.tags
    if "retinaflow.parts" in tags:
        members = tags["retinaflow.parts"]
        return f"{called(run)} is a merge itself; name the runs that it has merged instead: runs={members}"
    if run.stored.settings.get(OF_FILE) is not None:
        return f"{called(run)} is the evaluation of a file, {run.stored.settings[OF_FILE]}, whose model is not here"
    try:
        found = _evaluated(run) if "retinaflow.evaluated" in tags else _trained(run)
    except (SettingError, DataError) as error:
        return str(error)
    if isinstance(found, Checkpoint) and found.taxonomy.ids != run.stored.class_ids:
        return f"{called(run)} was evaluated with other classes than its model has"
    return found


def _trained(run: ChosenRun) -> Checkpoint | str:
    """The best model of a training."""
    own = Path(run.record.run_id) / CHECKPOINTS / "best.pt"
    return _one_network(run, TrainedModel.find(run.record.run_id if run.record.experiment_id else own))


def _evaluated(run: ChosenRun) -> Checkpoint | str:
    """The model that ``evaluate`` has evaluated, with the settings of the evaluation."""
    tags, settings = run.record.tags, _settings_of(run)
    again = "evaluate it again with evaluate, and merge that run"
    if "retinaflow.model_digest" not in tags:
        return f"{called(run)} was made by an earlier version, which has not noted which model it evaluated; {again}"
    if settings["expand_predictions"]:
        return (
            f"{called(run)} has detections of parent classes that its model does not make; give merge "
            "expand_predictions=true instead of evaluate"
        )
    if settings["image_size"] != "trained":
        return f"{called(run)} was evaluated at image_size={settings['image_size']}, at which its model was not trained"
    # An alias may belong to another version by now.
    model = TrainedModel.find(tags.get("retinaflow.model_run") or tags["retinaflow.evaluated"])
    found = _one_network(run, model)
    if isinstance(found, str):
        return found
    if found.digest[: len(tags["retinaflow.model_digest"])] != tags["retinaflow.model_digest"]:
        return f"{model.path} holds another model than the one that {called(run)} has evaluated; {again}"
    return replace(found, settings={**found.settings, **{name: settings[name] for name in OF_DETECTIONS}})


def _one_network(run: ChosenRun, model: TrainedModel) -> Checkpoint | str:
    found = model.checkpoint
    if isinstance(found, MergedCheckpoint):
        members = ",".join(member.run for member in found.members)
        return f"the model of {called(run)} is merged itself; name runs of its members instead: runs={members}"
    return replace(found, progress=None)


def _settings_of(run: ChosenRun) -> Mapping[str, Any]:
    """All settings of an evaluation."""
    name, folder = "config.json", Path(run.record.run_id)
    found = read_json(store.fetch(run.record.run_id, name) if run.record.experiment_id else folder / name)
    assert isinstance(found, dict)
    return found


def detect_again(run: ChosenRun, images: AnnotationIndex, model: Checkpoint | str) -> Detections:
    """What the model of a run finds on images that have its classes. Raises SettingError for a run without a model."""
    if isinstance(model, str):
        raise SettingError(f"{called(run)} has not stored all of its detections, and no model that makes them: {model}")
    report(f"{called(run)}: detecting on {len(images):,} images")
    skipped = SkippedImages()
    with StopRequest(watch_parent=launched_by_mlflow()) as stop:
        found = Detector.load(model).detect(
            images,
            after_batch=lambda count: stop.check(),
            on_bad_image=skipped.add if run.stored.settings.get("on_bad_image") == "skip" else None,
        )
    stop.check()
    return found
