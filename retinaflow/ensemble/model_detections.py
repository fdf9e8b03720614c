"""The detections of a run's own model on some images, computed again with the settings of its training."""

from __future__ import annotations

from pathlib import Path

from retinaflow.comparison.chosen_runs import ChosenRun, called
from retinaflow.data.index import AnnotationIndex
from retinaflow.data.skipped_images import SkippedImages
from retinaflow.detections import Detections
from retinaflow.errors import DataError, SettingError
from retinaflow.inference.detector import Detector
from retinaflow.interrupts import StopRequest
from retinaflow.progress import report
from retinaflow.runs.models import TrainedModel
from retinaflow.runs.tracking import launched_by_mlflow


def detect_again(run: ChosenRun, images: AnnotationIndex) -> Detections:
    """What the model of a run finds on images that have its classes.

    Raises SettingError for a run without a model, and DataError when the images have other classes.
    """
    model = _model_of(run)
    report(f"{called(run)}: detecting on {len(images):,} images")
    checkpoint = TrainedModel.find(model).checkpoint
    if checkpoint.taxonomy.ids != images.taxonomy.ids:
        raise DataError(f"{model}: the model must have the {images.num_classes} classes that it was evaluated on")
    skipped = SkippedImages()
    with StopRequest(watch_parent=launched_by_mlflow()) as stop:
        return Detector.load(checkpoint).detect(
            images,
            after_batch=lambda count: stop.check(),
            on_bad_image=skipped.add if run.stored.settings.get("on_bad_image") == "skip" else None,
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
