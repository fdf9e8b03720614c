"""``predict``: detections of a trained model on many images, in shards that an interruption does not undo."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pandas as pd

from retinaflow.data.images import BadImage, file_states
from retinaflow.data.skipped_images import SkippedImages
from retinaflow.detector.device import device_of
from retinaflow.detector.precision import fast_precision
from retinaflow.inference.image_selection import WantedImages, wanted_images
from retinaflow.inference.model import ChosenModel
from retinaflow.inference.prediction_folder import MANIFEST, PredictionFolder
from retinaflow.inference.prediction_shards import write_predictions, write_submission
from retinaflow.inference.shards import Work, buckets_for, predict_shards
from retinaflow.interrupts import StopRequest
from retinaflow.progress import ImageProgress, report
from retinaflow.runs import tracking
from retinaflow.runs.run import FolderRun, Run
from retinaflow.settings.commands import PredictConfig
from retinaflow.settings.model_groups import PostprocessSettings

MOST_LOGGED_BYTES = 50 << 20
"""A larger file of predictions is not logged with the run, which names it."""


def run(config: PredictConfig) -> Path:
    """Predict what is not done yet, put the shards together, log. Returns the file of all predictions."""
    model = ChosenModel.open(config)
    config = _with_precision(model.config)
    wanted = wanted_images(config, model.checkpoint.taxonomy, model.checkpoint.settings)
    with (
        StopRequest(watch_parent=tracking.launched_by_mlflow()) as stop,
        PredictionFolder.opened(
            config.output,
            _request(model, config, wanted),
            file_states(wanted.index),
            shard_size=config.shard_size,
            nproc=config.nproc,
            overwrite=config.overwrite,
        ) as folder,
        tracking.start_run("predict", track=config.track, experiment=config.experiment, output=config.output) as run,
    ):
        run.log_params(config.model_dump())
        run.log_json(config.model_dump(mode="json"), "config.json")
        run.set_tags(model.tags() | {"retinaflow.output": str(config.output.absolute())})
        figures = _predict(model, config, wanted, folder, stop)
        path = _write_files(config, wanted, folder)
        _log(run, config, wanted, folder, path, figures)
    return path


def _with_precision(config: PredictConfig) -> PredictConfig:
    """The arithmetic is part of the request: a run that is resumed elsewhere must not change it unseen."""
    precision = fast_precision(device_of()) if config.precision == "auto" else config.precision
    return config.model_copy(update={"precision": precision})


def _request(model: ChosenModel[PredictConfig], config: PredictConfig, wanted: WantedImages) -> dict[str, Any]:
    """What decides the predictions. Batches, processes and file formats do not."""
    index = wanted.index
    ids = [*index.image_ids.tolist(), "", *(image.image_id for image in wanted.unreadable)]
    hasher = hashlib.sha256("\n".join(ids).encode())
    hasher.update(index.sizes.tobytes())
    names = [*PostprocessSettings.model_fields, "image_size", "parents", "precision"]
    settings = config.model_dump(mode="json")
    return {
        "model": model.checkpoint.digest,
        "settings": {name: settings[name] for name in names},
        "images": {"number of images": len(wanted), "images": hasher.hexdigest()},
    }


def _predict(
    model: ChosenModel[PredictConfig],
    config: PredictConfig,
    wanted: WantedImages,
    folder: PredictionFolder,
    stop: StopRequest,
) -> dict[str, float]:
    """Do the shards that are not there. Returns figures of this process's work."""
    left = [shard for shard in folder.shards if shard.notes() is None]
    done = len(wanted.index) - sum(shard.last - shard.first for shard in left)
    if done:
        report(f"{done:,} of {len(wanted.index):,} images are done already")
    if outdated := sum(shard.path.is_file() for shard in left):
        report(f"{outdated} of {len(folder.shards)} shards are done again: damaged, or image files have changed since")
    work = Work(
        model.path,
        wanted.index,
        buckets_for(model.checkpoint, config, wanted.index),
        config,
        skip_bad_images=config.on_bad_image == "skip",
    )
    with ImageProgress(len(wanted.index), what="predicting", done=done) as progress:
        for finished in predict_shards(work, left, nproc=config.nproc, stop=stop, after_batch=progress.add):
            for image_id, reason in finished.notes["skipped"]:
                progress.add(1)
                report(f"skipped {image_id}: {reason}")
        return {"predict/images_per_second": progress.images_per_second} if left else {}


def _write_files(config: PredictConfig, wanted: WantedImages, folder: PredictionFolder) -> Path:
    shards = folder.shards
    path = folder.path / f"predictions.{config.file_format}"
    write_predictions((shard.path for shard in shards), path)
    if config.submission is not None:
        ids = wanted.index.image_ids
        write_submission(
            ((shard.path, ids[shard.first : shard.last].tolist()) for shard in shards),
            config.submission,
            without_file=[image.image_id for image in wanted.unreadable],
        )
    return path


def _log(
    run: Run,
    config: PredictConfig,
    wanted: WantedImages,
    folder: PredictionFolder,
    path: Path,
    figures: dict[str, float],
) -> None:
    notes = [shard.notes() or {} for shard in folder.shards]
    skipped = SkippedImages()
    for image_id, reason in (pair for note in notes for pair in note["skipped"]):
        skipped.note(BadImage(image_id, reason))
    counts = {
        "predict/images": float(len(wanted)),
        "predict/detections": float(sum(note["detections"] for note in notes)),
        "predict/skipped_images": float(len(skipped) + len(wanted.unreadable)),
    }
    run.log_metrics({**counts, **figures}, step=0)
    run.log_file(folder.path / MANIFEST)
    left_out: pd.DataFrame = skipped.table(wanted.unreadable_table)
    if len(left_out):
        for target in [run, FolderRun(folder.path)] if config.track else [run]:
            target.log_csv(left_out, "dropped.csv")
    if path.stat().st_size <= MOST_LOGGED_BYTES:
        run.log_file(path)
    if config.submission is not None and config.track and config.submission.stat().st_size <= MOST_LOGGED_BYTES:
        run.log_file(config.submission, "submission")
    speed = f", {figures['predict/images_per_second']:.1f} images/s" if figures else ""
    report(f"{counts['predict/detections']:,.0f} detections on {len(wanted):,} images{speed}: {path}")
    if len(left_out):
        report(f"{len(left_out):,} images could not be read and have no detections; dropped.csv lists them")
    if config.submission is not None:
        report(f"submission: {config.submission}")
