"""``evaluate``: judge a trained model on images, or a file of predictions on annotations alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from retinaflow import tracking
from retinaflow.commands.inputs import TrainingData, load_training_data, read_split, say
from retinaflow.commands.judging import Judgement, judge, log_judgement, metrics_document, postprocessing, say_judgement
from retinaflow.config import EvaluateConfig, TrainConfig
from retinaflow.data.batching import AspectBuckets
from retinaflow.data.bins import ClassBins
from retinaflow.data.index import AnnotationIndex
from retinaflow.data.openimages import predictions_frame, read_image_ids, read_predictions
from retinaflow.data.tables import Faults
from retinaflow.detections import Detections
from retinaflow.resolving import resolve
from retinaflow.run_files import FolderRun, Run
from retinaflow.scoring.bootstrap import Intervals, bootstrap_intervals
from retinaflow.scoring.report import class_groups
from retinaflow.training.checkpoint import Checkpoint, load_checkpoint
from retinaflow.training.inference import detect
from retinaflow.training.precision import fast_precision
from retinaflow.training.stopping import StopRequest


def run(config: EvaluateConfig) -> Judgement:
    """Judge, log, print. Returns scores, table and aggregates."""
    source = _Predictions.open(config) if config.predictions is not None else _Model.open(config)
    with (
        StopRequest(watch_parent=tracking.launched_by_mlflow()) as stop,
        tracking.start_run("evaluate", track=config.track, experiment=config.experiment, output=config.output) as run,
    ):
        run.log_params(config.model_dump())
        run.log_json(config.model_dump(mode="json"), "config.json")
        run.set_tags({"retinaflow.judged": source.name, "retinaflow.data_digest": source.judged.digest[:16]})
        detections = source.detections(stop)
        if config.expand_predictions:
            detections = expand_to_ancestors(detections, source.judged)
        judgement = judge(detections, source.judged, source.bins, group_of_weight=config.group_of_weight)
        intervals = _intervals(config, judgement, source)
        run.log_metrics(judgement.metrics, step=0)
        for target in _targets(config, run):
            _write(target, judgement, intervals, detections, source)
        say_judgement(judgement)
        return judgement


def _targets(config: EvaluateConfig, run: Run) -> list[Run]:
    """The run, and the output folder too when the run is in MLflow."""
    return [run, FolderRun(config.output)] if config.track else [run]


@dataclass(frozen=True)
class _Predictions:
    """Detections from a file, and the annotations they are judged by; no image is opened."""

    name: str
    judged: AnnotationIndex
    bins: ClassBins
    found: Detections

    @staticmethod
    def open(config: EvaluateConfig) -> _Predictions:
        assert config.predictions is not None
        labels = None if config.image_labels == "none" else config.image_labels
        index = read_split(
            config, [config.eval_split], boxes=config.boxes, image_labels=labels, with_images=False
        ).index
        index = _only_listed(index, config)
        found = read_predictions(config.predictions, index, Faults(config.on_bad_row))
        nothing = np.zeros(index.num_classes, dtype=np.int64)
        no_bins = ClassBins(nothing, nothing, np.zeros(1), np.full(index.num_classes, -1, np.int32), "none", 0)
        return _Predictions(str(config.predictions), index, no_bins, found)

    def detections(self, stop: StopRequest) -> Detections:
        """The rows of the file."""
        stop.check()
        return self.found


@dataclass(frozen=True)
class _Model:
    """A checkpoint, and the images it is judged on."""

    name: str
    judged: AnnotationIndex
    bins: ClassBins
    checkpoint: Checkpoint
    config: EvaluateConfig

    @staticmethod
    def open(config: EvaluateConfig) -> _Model:
        name = config.from_run or tracking.last_run("train")
        path = find_checkpoint(name)
        say(f"judging {path}")
        checkpoint = load_checkpoint(path)
        judged = _judged_images(config, checkpoint)
        return _Model(name, judged, checkpoint.bins, checkpoint, config)

    def detections(self, stop: StopRequest) -> Detections:
        """Run the detector over all images."""
        config, checkpoint = self.config, self.checkpoint
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        buckets = checkpoint.buckets
        if config.image_size != "trained":
            buckets = AspectBuckets.fit(
                self.judged.sizes, image_size=config.image_size, num_buckets=len(buckets.shapes)
            )
        is_ancestor = torch.from_numpy(self.judged.taxonomy.is_ancestor).to(device)
        parts = detect(
            checkpoint.build(device),
            self.judged,
            buckets,
            config=postprocessing(config),
            expand_to=is_ancestor if checkpoint.parents == "expand" else None,
            batch_size=config.batch_size,
            workers=max(config.workers, 0),
            device=device,
            precision=fast_precision(device) if config.precision == "auto" else config.precision,
            after_batch=lambda images: stop.check(),
        )
        return Detections.concatenate(list(parts))


def find_checkpoint(name: str) -> Path:
    """The checkpoint file that a run id, a model URI or a path stands for."""
    if name.startswith("models:/"):
        return tracking.fetch_model(name)
    if Path(name).suffix == ".pt" or Path(name).is_file():
        return Path(name)
    return tracking.fetch(name, "checkpoints/best.pt")


def _judged_images(config: EvaluateConfig, checkpoint: Checkpoint) -> AnnotationIndex:
    if config.data == "trained":
        trained: TrainingData = load_training_data(resolve(TrainConfig, checkpoint.settings))
        return trained.judged
    labels = None if config.image_labels == "none" else config.image_labels
    index = read_split(config, [config.eval_split], boxes=config.boxes, image_labels=labels).index
    missing = [mid for mid in checkpoint.taxonomy.ids if mid not in index.taxonomy.index_of]
    if missing:
        raise ValueError(f"the class list must hold the model's classes, but lacks {', '.join(missing[:5])}")
    classes = np.array([index.taxonomy.index_of[mid] for mid in checkpoint.taxonomy.ids])
    return _only_listed(index.with_classes(classes), config)


def _only_listed(index: AnnotationIndex, config: EvaluateConfig) -> AnnotationIndex:
    if config.eval_ids is None:
        return index
    chosen = np.flatnonzero(np.isin(index.image_ids, read_image_ids(config.eval_ids)))
    if len(chosen) == 0:
        raise ValueError(f"eval_ids={config.eval_ids}: at least one listed image must be in the split, but none is")
    return index.take(chosen)


def expand_to_ancestors(detections: Detections, index: AnnotationIndex) -> Detections:
    """Each detection followed by copies of it for all ancestors of its class."""
    row, ancestor = np.nonzero(index.taxonomy.is_ancestor[detections.class_index])
    rows = np.concatenate([np.arange(len(detections)), row])
    classes = np.concatenate([detections.class_index, ancestor.astype(np.int32)])
    order = np.argsort(rows, kind="stable")
    copies = detections.take(rows[order])
    return Detections(copies.image_index, classes[order], copies.score, copies.boxes)


def _intervals(config: EvaluateConfig, judgement: Judgement, source: _Model | _Predictions) -> Intervals | None:
    if config.bootstrap == 0:
        return None
    bins = source.bins
    groups = class_groups(bins.images_per_class, bins.bin_of_class, class_ids=source.judged.taxonomy.ids)
    return bootstrap_intervals(judgement.scores.matches, groups=groups, resamples=config.bootstrap, seed=config.seed)


def _write(
    run: Run,
    judgement: Judgement,
    intervals: Intervals | None,
    detections: Detections,
    source: _Model | _Predictions,
) -> None:
    document = metrics_document(judgement, source.judged)
    if intervals is not None:
        named = {"mAP": intervals.mean, **intervals.groups}
        document["intervals"] = {
            name: [value.low, value.high] for name, value in named.items() if value.low == value.low
        }
        low = dict(zip(source.judged.taxonomy.ids, intervals.ap_low, strict=True))
        high = dict(zip(source.judged.taxonomy.ids, intervals.ap_high, strict=True))
        judgement.table["ap_low"] = judgement.table["class_id"].map(low)
        judgement.table["ap_high"] = judgement.table["class_id"].map(high)
    if isinstance(source, _Model):
        log_judgement(run, judgement, detections, source.judged)
        run.log_csv(predictions_frame(detections, source.judged), "predictions.csv")
    else:
        run.log_csv(judgement.table, "per_class_ap.csv")
        run.log_table(judgement.table, "per_class_ap.json")
    run.log_json(document, "metrics.json")
