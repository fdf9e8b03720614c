"""``visualize``: pictures of detections, with the ground truth beside them where it is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retinaflow.boxes import iou
from retinaflow.data.class_files import read_taxonomy
from retinaflow.data.images import BadImage, UnreadableImageError, decode
from retinaflow.data.index import AnnotationIndex
from retinaflow.data.openimages import MissingAnnotationsError, find_files
from retinaflow.data.predictions import read_predictions
from retinaflow.data.skipped_images import SkippedImages
from retinaflow.data.tables import RowErrors
from retinaflow.data.training_data import data_folder, load_training_data, read_split
from retinaflow.detections import Detections
from retinaflow.inference.image_selection import WantedImages, is_evaluated, wanted_images
from retinaflow.inference.model import ChosenModel
from retinaflow.inference.shards import Detector, buckets_for
from retinaflow.interrupts import StopRequest
from retinaflow.progress import report
from retinaflow.reports.box_images import DrawnBox, Pixels, drawn, save_image, side_by_side
from retinaflow.runs import tracking
from retinaflow.settings.commands import TrainConfig, VisualizeConfig
from retinaflow.settings.groups import DataSettings
from retinaflow.settings.resolve import resolve
from retinaflow.taxonomy import Taxonomy

SAME_PLACE = 0.6
"""IoU from which a parent's box is taken for a second name of its child's box, and left out."""


def run(config: VisualizeConfig) -> list[Path]:
    """Draw the chosen images. Returns the pictures."""
    model = None if config.predictions is not None and config.data != "trained" else ChosenModel.open(config)
    if model is not None:
        config = model.config
    trained = model.checkpoint.settings if model else {}
    taxonomy = model.checkpoint.taxonomy if model else _taxonomy(config)
    wanted = wanted_images(config, taxonomy, trained, choose=lambda ids: _chosen(config, ids))
    with (
        StopRequest(watch_parent=tracking.launched_by_mlflow()) as stop,
        tracking.start_run("visualize", track=config.track, experiment=config.experiment, output=config.output) as run,
    ):
        run.log_params(config.model_dump())
        run.set_tags(model.tags() if model else {"retinaflow.predictions": str(config.predictions)})
        skipped = SkippedImages()
        found = _detections(config, model, wanted, skipped, stop)
        ground_truth = _ground_truth(config, trained, taxonomy)
        bad = {image.image_id for image in (*wanted.unreadable, *skipped.images)}
        paths = []
        for image, image_id in enumerate(wanted.index.image_ids.tolist()):
            if image_id not in bad:
                path = config.output / "pictures" / f"{image_id}.jpg"
                try:
                    picture = _picture(config, wanted.index, image, found, ground_truth)
                except UnreadableImageError as error:
                    if config.on_bad_image == "stop":
                        raise
                    skipped.add(BadImage(image_id, str(error)))
                    continue
                save_image(picture, path)
                run.log_file(path, "pictures")
                paths.append(path)
        skipped.log(run.log_csv, wanted.unreadable_table)
    folder = config.output / "pictures"
    others = len(set(folder.glob("*.jpg")) - set(paths))
    report(f"{len(paths)} pictures in {folder}{f', beside {others} of earlier calls' if others else ''}")
    return paths


def _chosen(config: VisualizeConfig, ids: NDArray[np.str_]) -> NDArray[np.str_]:
    """The given ids, or a sample by the seed."""
    if config.ids:
        missing = sorted(set(config.ids) - set(ids.tolist()))
        if missing:
            raise ValueError(f"ids must be among the {len(ids):,} images, but {', '.join(missing[:5])} is not")
        return np.array(sorted(set(config.ids)), dtype=np.str_)
    count = min(config.samples, len(ids))
    return np.asarray(np.sort(np.random.default_rng(config.seed).choice(ids, count, replace=False)))


def _taxonomy(config: VisualizeConfig) -> Taxonomy:
    """The class list of a data folder."""
    files = find_files(data_folder(DataSettings(data=config.data)), [], boxes=(), image_labels=None)
    return read_taxonomy(files.classes, files.hierarchy)


def _detections(
    config: VisualizeConfig,
    model: ChosenModel[VisualizeConfig] | None,
    wanted: WantedImages,
    skipped: SkippedImages,
    stop: StopRequest,
) -> Detections:
    """What is to be drawn, parents that only name their child's box again left out."""
    if config.predictions is not None:
        found = read_predictions(config.predictions, wanted.index, RowErrors("stop"))
        found = found.take(found.image_index >= 0)
    else:
        assert model is not None
        detector = Detector(model.checkpoint, config, buckets_for(model.checkpoint, config, wanted.index))
        found = detector.detect(
            wanted.index,
            after_batch=lambda images: stop.check(),
            on_bad_image=skipped.add if config.on_bad_image == "skip" else None,
        )
    found = found.take(found.score >= config.min_score)
    is_ancestor = wanted.index.taxonomy.is_ancestor
    keep = np.ones(len(found), dtype=bool)
    for row in range(len(found)):
        others = np.flatnonzero(
            (found.image_index == found.image_index[row]) & is_ancestor[found.class_index, found.class_index[row]]
        )
        keep[row] = not (iou(found.boxes[[row]], found.boxes[others]) >= SAME_PLACE).any()
    return found.take(keep)


def _ground_truth(config: VisualizeConfig, trained: dict[str, Any], taxonomy: Taxonomy) -> AnnotationIndex | None:
    """The annotations of the split, None where there are none; images of a folder have none."""
    if not config.ground_truth or config.images:
        return None
    if is_evaluated(config, trained):
        return load_training_data(resolve(TrainConfig, {**trained, "config": None})).evaluated
    data = str(trained["data"]) if config.data == "trained" else config.data
    try:
        # Boxes alone are drawn: which classes are absent does not matter.
        settings, only = DataSettings(data=data, exhaustive=True), [config.split]
        index = read_split(
            settings, only, boxes=(), image_labels=None, with_images=False, allow_repeats=True, fill_in=False
        ).index
    except MissingAnnotationsError as error:
        report(f"detections alone are drawn: {error}")
        return None
    known = [index.taxonomy.index_of[mid] for mid in taxonomy.ids if mid in index.taxonomy.index_of]
    return index.with_classes(np.array(known)) if len(known) < len(index.taxonomy) else index


def _picture(
    config: VisualizeConfig, index: AnnotationIndex, image: int, found: Detections, ground_truth: AnnotationIndex | None
) -> Pixels:
    """The image with its detections, and the ground truth on its left."""
    height, width = (int(side) for side in index.sizes[image])
    longest, most = max(height, width), config.longest_side
    scale = most / longest if longest > most else max(1.0, most / 2 / longest)
    target = max(round(height * scale), 1), max(round(width * scale), 1)
    pixels = decode(index.file_of(image), (height, width), target)
    own = found.take(found.image_index == image)
    ids, names = index.taxonomy.ids, index.taxonomy.labels
    boxes = [
        DrawnBox(tuple(box), ids[label], names[label], float(score))
        for box, label, score in zip(own.boxes.tolist(), own.class_index.tolist(), own.score.tolist(), strict=True)
    ]
    image_id = str(index.image_ids[image])
    detections = drawn(pixels, boxes, title=f"detections, score at least {config.min_score:g}: {image_id}")
    if ground_truth is None or image_id not in ground_truth.image_ids:
        return detections
    place = int(np.flatnonzero(ground_truth.image_ids == image_id)[0])
    return side_by_side([drawn(pixels, _gt_boxes(ground_truth, place), title=f"ground truth: {image_id}"), detections])


def _gt_boxes(ground_truth: AnnotationIndex, image: int) -> list[DrawnBox]:
    rows = range(int(ground_truth.box_start[image]), int(ground_truth.box_start[image + 1]))
    ids, names = ground_truth.taxonomy.ids, ground_truth.taxonomy.labels
    return [
        DrawnBox(
            tuple(ground_truth.boxes[row].tolist()),
            ids[ground_truth.labels[row]],
            f"group of {names[ground_truth.labels[row]]}"
            if ground_truth.is_group_of[row]
            else names[ground_truth.labels[row]],
        )
        for row in rows
    ]
