"""``visualize``: images with detections, and ground truth beside them where it is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from retinaflow.data.class_files import read_taxonomy
from retinaflow.data.images import BadImage, UnreadableImageError
from retinaflow.data.openimages import find_files
from retinaflow.data.predictions import read_predictions
from retinaflow.data.skipped_images import SkippedImages
from retinaflow.data.tables import RowErrors
from retinaflow.data.training_data import data_folder
from retinaflow.detections import Detections
from retinaflow.errors import SettingError
from retinaflow.inference.detector import Detector, as_trained
from retinaflow.inference.image_selection import WantedImages, known_ground_truth, wanted_images
from retinaflow.inference.merged_checkpoint import Model
from retinaflow.interrupts import StopRequest
from retinaflow.progress import report
from retinaflow.reports.box_images import save_image
from retinaflow.reports.detection_images import detection_image, without_parents
from retinaflow.reports.detections_page import log_sample_page
from retinaflow.runs import tracking
from retinaflow.runs.datasets import predicted_dataset
from retinaflow.runs.models import TrainedModel
from retinaflow.runs.names import run_name
from retinaflow.runs.run import with_folder
from retinaflow.runs.start import start_run
from retinaflow.settings.commands import VisualizeConfig
from retinaflow.settings.data_settings import DataSettings
from retinaflow.settings.model_settings import refuse_settings_of_model
from retinaflow.taxonomy import Taxonomy

FOLDER = "pictures"


def run(config: VisualizeConfig) -> list[Path]:
    """Write an image file for each chosen image. Returns their paths."""
    called = run_name("visualize", config)
    needs_model = config.predictions is None or config.data == "trained"
    refuse_settings_of_model(config, "parents", *([] if needs_model else ["from_run"]))
    model = TrainedModel.find(config.from_run) if needs_model else None
    checkpoint = model.checkpoint if model else None
    config = as_trained(config, checkpoint) if checkpoint else config
    trained = checkpoint.settings if checkpoint else {}
    taxonomy = checkpoint.taxonomy if checkpoint else _taxonomy(config)
    wanted = wanted_images(config, taxonomy, trained, choose=lambda ids: _chosen(config, ids))
    stop = StopRequest(watch_parent=tracking.launched_by_mlflow())
    with start_run("visualize", config, default_name=called) as run:
        run.log_params(config.model_dump())
        run.log_model_input(model.model_id if model and config.track else None)
        run.set_tags(model.tags() if model else {"retinaflow.predictions": str(config.predictions)})
        run.log_datasets([predicted_dataset(config, wanted.index, trained)])
        skipped = SkippedImages()
        found = _detections(config, checkpoint, wanted, skipped, stop)
        ground_truth = known_ground_truth(config, taxonomy, trained) if config.ground_truth else None
        paths = []
        for image, image_id in enumerate(wanted.index.image_ids.tolist()):
            if image_id in {bad.image_id for bad in skipped.images}:
                continue
            try:
                pixels = detection_image(
                    wanted.index,
                    image,
                    found,
                    ground_truth,
                    title=f"detections, score at least {config.min_score:g}",
                    longest_side=config.longest_side,
                )
            except UnreadableImageError as error:
                if config.on_bad_image == "stop":
                    raise
                skipped.add(BadImage(image_id, str(error)))
                continue
            path = config.output / FOLDER / f"{image_id}.jpg"
            save_image(pixels, path)
            run.log_file(path, FOLDER)
            paths.append(path)
        log_sample_page(with_folder(run, config), wanted.index, found, ground_truth, score=config.min_score)
        skipped.log(run.log_csv, wanted.unreadable_table)
    folder = config.output / FOLDER
    others = len(set(folder.glob("*.jpg")) - set(paths))
    report(f"{len(paths)} images in {folder}{f', beside {others} of earlier calls' if others else ''}")
    return paths


def _chosen(config: VisualizeConfig, ids: NDArray[np.str_]) -> NDArray[np.str_]:
    """The given ids, or a sample by the seed."""
    if config.ids:
        missing = sorted(set(config.ids) - set(ids.tolist()))
        if missing:
            raise SettingError(f"ids must be among the {len(ids):,} images, but {', '.join(missing[:5])} is not")
        return np.array(sorted(set(config.ids)), dtype=np.str_)
    count = min(config.samples, len(ids))
    return np.asarray(np.sort(np.random.default_rng(config.seed).choice(ids, count, replace=False)))


def _taxonomy(config: VisualizeConfig) -> Taxonomy:
    """The class list of a data folder."""
    files = find_files(data_folder(DataSettings(data=config.data)), [], boxes=(), image_labels=None)
    return read_taxonomy(files.classes, files.hierarchy)


def _detections(
    config: VisualizeConfig,
    checkpoint: Model | None,
    wanted: WantedImages,
    skipped: SkippedImages,
    stop: StopRequest,
) -> Detections:
    """Of the file or of the model, from the minimum score on."""
    index = wanted.index
    if config.predictions is not None:
        found = read_predictions(config.predictions, index, RowErrors("stop"), ids=config.prediction_ids)
        found = found.take(found.image_index >= 0)
    else:
        assert checkpoint is not None
        detector = Detector.load(checkpoint, config, parents=config.parents, sizes=index.sizes)
        with stop:
            found = detector.detect(
                index,
                after_batch=lambda images: stop.check(),
                on_bad_image=skipped.add if config.on_bad_image == "skip" else None,
            )
        stop.check()
    return without_parents(found.take(found.score >= config.min_score), index.taxonomy)
