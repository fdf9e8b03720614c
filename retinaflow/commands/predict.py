"""``predict``: detections of a trained model on many images, in shards that an interruption does not undo."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pandas as pd

from retinaflow.data.coco_results import CocoResults
from retinaflow.data.images import file_states
from retinaflow.data.skipped_images import SkippedImages
from retinaflow.detector.device import device_of, precision_on
from retinaflow.inference.detector import as_trained
from retinaflow.inference.image_selection import WantedImages, wanted_images
from retinaflow.inference.merged_checkpoint import Model
from retinaflow.inference.prediction_folder import MANIFEST, PredictionFolder
from retinaflow.inference.shard_processes import Work, predict_shards
from retinaflow.interrupts import StopRequest
from retinaflow.progress import ImageProgress, report
from retinaflow.runs import tracking
from retinaflow.runs.datasets import predicted_dataset
from retinaflow.runs.models import TrainedModel
from retinaflow.runs.names import run_name
from retinaflow.runs.run import Run, with_folder
from retinaflow.runs.start import start_run
from retinaflow.settings.commands import PredictConfig
from retinaflow.settings.model_settings import PostprocessSettings
from retinaflow.settings.resolve import changed

MAX_LOGGED_BYTES = 50 << 20
"""A larger file of predictions is not logged with the run, which names it."""


def run(config: PredictConfig) -> Path:
    """Predict what is not done yet, join the shards, log. Returns the file of all predictions."""
    model, called = TrainedModel.find(config.from_run), run_name("predict", config)
    config = as_trained(config, model.checkpoint)
    # The precision is part of the request: a run that is resumed on another machine must not change it unseen.
    config = changed(config, {"precision": precision_on(device_of(), config.precision)})
    wanted = wanted_images(config, model.checkpoint.taxonomy, model.checkpoint.settings)
    file_format = (
        CocoResults(wanted.index, config.prediction_ids) if config.file_format == "json" else config.file_format
    )
    stop = StopRequest(watch_parent=tracking.launched_by_mlflow())
    with (
        PredictionFolder.opened(
            config.output,
            _request(model.checkpoint, config, wanted),
            file_states(wanted.index),
            shard_size=config.shard_size,
            nproc=config.nproc,
            overwrite=config.overwrite,
        ) as folder,
        start_run("predict", config, default_name=called) as run,
    ):
        run.log_params(config.model_dump())
        run.log_json(config.model_dump(mode="json"), "config.json")
        run.log_datasets([predicted_dataset(config, wanted.index, model.checkpoint.settings)])
        run.log_model_input(model.model_id if config.track else None)
        run.set_tags(model.tags() | {"retinaflow.output": str(config.output.absolute())})
        speed = _predict(Work(model.path, config, wanted.index), config, folder, stop)
        path = folder.write_predictions(file_format)
        if config.submission is not None:
            without_file = [image.image_id for image in wanted.unreadable]
            folder.write_submission(config.submission, wanted.index.image_ids, without_file=without_file)
        _log(run, config, wanted, folder, path, speed)
    return path


def _request(checkpoint: Model, config: PredictConfig, wanted: WantedImages) -> dict[str, Any]:
    """What decides the predictions. Batches, processes and file formats do not."""
    index = wanted.index
    ids = [*index.image_ids.tolist(), "", *(image.image_id for image in wanted.unreadable)]
    hasher = hashlib.sha256("\n".join(ids).encode())
    hasher.update(index.sizes.tobytes())
    names = [*PostprocessSettings.model_fields, "image_size", "parents", "precision"]
    settings = config.model_dump(mode="json")
    return {
        "model": checkpoint.digest,
        "settings": {name: settings[name] for name in names},
        "images": {"number of images": len(wanted), "images": hasher.hexdigest()},
    }


def _predict(work: Work, config: PredictConfig, folder: PredictionFolder, stop: StopRequest) -> float | None:
    """Write the shards that are missing. Returns images per second, None when nothing was missing."""
    total, shards = len(work.index), folder.shards
    left = [shard for shard in shards if shard.notes() is None]
    done = total - sum(map(len, left))
    if done:
        report(f"{done:,} of {total:,} images are done already")
    if outdated := sum(shard.path.is_file() for shard in left):
        report(f"{outdated} of {len(shards)} shards are done again: damaged, or image files have changed since")
    with stop, ImageProgress(total, what="predicting", done=done) as progress:
        for finished in predict_shards(work, left, nproc=config.nproc, stop=stop, after_batch=progress.add):
            for image in finished.skipped:
                progress.add(1)
                report(f"skipped {image.image_id}: {image.reason}")
        stop.check()
        return progress.images_per_second if left else None


def _log(
    run: Run, config: PredictConfig, wanted: WantedImages, folder: PredictionFolder, path: Path, speed: float | None
) -> None:
    notes = [notes for shard in folder.shards if (notes := shard.notes())]
    skipped = SkippedImages()
    for image in (image for shard in notes for image in shard.skipped):
        skipped.note(image)
    detections = sum(shard.detections for shard in notes)
    counts = {
        "predict/images": float(len(wanted)),
        "predict/detections": float(detections),
        "predict/skipped_images": float(len(skipped) + len(wanted.unreadable)),
    }
    run.log_metrics(counts if speed is None else {**counts, "predict/images_per_second": speed}, step=0)
    run.log_file(folder.path / MANIFEST)
    left_out: pd.DataFrame = skipped.table(wanted.unreadable_table)
    if len(left_out):
        for target in with_folder(run, config):
            target.log_csv(left_out, "dropped.csv")
    if path.stat().st_size <= MAX_LOGGED_BYTES:
        run.log_file(path)
    at_speed = "" if speed is None else f", {speed:.1f} images/s"
    report(f"{detections:,} detections on {len(wanted):,} images{at_speed}: {path}")
    if len(left_out):
        report(f"{len(left_out):,} images could not be read and have no detections; dropped.csv lists them")
    if config.submission is not None:
        if config.track and config.submission.stat().st_size <= MAX_LOGGED_BYTES:
            run.log_file(config.submission, "submission")
        report(f"submission: {config.submission}")
