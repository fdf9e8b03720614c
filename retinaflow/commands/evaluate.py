"""``evaluate``: evaluate a trained model on images, or a file of predictions on annotations alone."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import pandas as pd

from retinaflow.comparison.stored_matches import store_matches
from retinaflow.data.bins import ClassBins
from retinaflow.data.index import AnnotationIndex
from retinaflow.data.openimages import predictions_frame, read_image_ids
from retinaflow.data.predictions import read_predictions
from retinaflow.data.skipped_images import SkippedImages
from retinaflow.data.tables import RowErrors
from retinaflow.data.training_data import TrainingData, load_training_data, read_split
from retinaflow.detections import Detections
from retinaflow.interrupts import StopRequest
from retinaflow.metric.challenge import COCO_THRESHOLDS, Evaluator, score
from retinaflow.metric.details import detail_tables, iou_column
from retinaflow.metric.evaluation import expand_to_ancestors
from retinaflow.metric.per_class import class_groups
from retinaflow.metric.result import EvaluationResult, evaluation_of
from retinaflow.progress import report
from retinaflow.reports.evaluation import (
    log_analysis,
    log_figures,
    log_tables,
    metrics_document,
    report_evaluation,
)
from retinaflow.runs.run import FolderRun, Run
from retinaflow.settings.commands import EvaluateConfig, TrainConfig
from retinaflow.settings.fields import as_text
from retinaflow.settings.model_groups import EvaluationSettings, PostprocessSettings
from retinaflow.settings.resolve import resolve
from retinaflow.statistics.bootstrap import bootstrap_intervals

if TYPE_CHECKING:
    from retinaflow.inference.checkpoint import Checkpoint

Given = TypeVar("Given", bound=PostprocessSettings)

# torch and MLflow are imported where they are needed: with track=false a file of predictions is evaluated without them, in
# seconds instead of tens, and in a fraction of the memory.


def run(config: EvaluateConfig) -> EvaluationResult:
    """Evaluate, log, print. Returns scores, table and aggregates."""
    source = _Predictions.open(config) if config.predictions is not None else _Model.open(config)
    config = source.config
    with _started(config) as (stop, run):
        run.log_params(config.model_dump())
        run.log_json(config.model_dump(mode="json"), "config.json")
        run.set_tags({"retinaflow.evaluated": source.name, "retinaflow.data_digest": source.evaluated.digest[:16]})
        detections = source.detections(stop)
        if config.expand_predictions:
            detections = expand_to_ancestors(detections, source.evaluated.taxonomy)
        evaluator = Evaluator(source.evaluated)
        evaluator.add(detections)
        scores = score(evaluator.matches(group_of_weight=config.group_of_weight))
        evaluation = evaluation_of(scores, source.evaluated.taxonomy, source.bins)
        document = metrics_document(evaluation, source.evaluated) | _more(config, source, evaluation)
        details = _details(evaluator, source, config, document)
        if config.bootstrap > 0:
            evaluation, document["intervals"] = _with_intervals(evaluation, source, config)
        run.log_metrics(evaluation.metrics, step=0)
        for target in _targets(config, run):
            _write(target, evaluation, document, detections, source)
            for name, table in details.items():
                target.log_csv(table, name)
        log_analysis(_targets(config, run), evaluation, detections, source.evaluated, errors=config.error_analysis)
        trained = source.checkpoint.settings if isinstance(source, _Model) else None
        store_matches(
            _targets(config, run), evaluation, detections, source.evaluated, source.bins, config, trained=trained
        )
        report_evaluation(evaluation)
        return evaluation


@contextlib.contextmanager
def _started(config: EvaluateConfig) -> Iterator[tuple[StopRequest, Run]]:
    if config.predictions is not None and not config.track:
        with StopRequest() as stop:
            yield stop, FolderRun(config.output)
        return
    from retinaflow.runs import tracking

    with (
        StopRequest(watch_parent=tracking.launched_by_mlflow()) as stop,
        tracking.start_run("evaluate", track=config.track, experiment=config.experiment, output=config.output) as run,
    ):
        yield stop, run


def _more(config: EvaluateConfig, source: _Model | _Predictions, evaluation: EvaluationResult) -> dict[str, object]:
    """What ``metrics.json`` says of an evaluation beyond what it says of a training."""
    reasons = list(evaluation.scores.not_a_challenge_score)
    if config.exhaustive:
        reasons.append("exhaustive=true takes classes without a label as verified absent")
    repeated = evaluation.scores.matches.repeated_ground_truths
    if repeated:
        report(
            f"{repeated:,} ground-truth boxes repeat a box of their class on the same image (a box given under child and parent?)"
        )
    counts = Counter(zip(source.dropped["file"], source.dropped["rule"], strict=True))
    return {
        "not_a_challenge_score": reasons,
        "expanded_predictions": config.expand_predictions,
        "dropped_rows": [{"file": file, "rule": rule, "rows": rows} for (file, rule), rows in counts.items()],
    }


def _details(
    evaluator: Evaluator, source: _Model | _Predictions, config: EvaluateConfig, document: dict[str, object]
) -> dict[str, pd.DataFrame]:
    """The tables of details by file name; means over IoU thresholds that were asked for go into the document."""
    thresholds = COCO_THRESHOLDS if config.iou_thresholds == "coco" else config.iou_thresholds
    per_class, slices = detail_tables(
        evaluator,
        source.evaluated.taxonomy,
        group_of_weight=config.group_of_weight,
        iou_thresholds=thresholds,
        score_threshold=config.report_score,
    )
    if thresholds:
        columns = [*map(iou_column, thresholds), "ap_iou_mean"]
        means = {name.replace("ap_", "mAP_", 1): per_class[name].mean() for name in columns}
        document.update({name: None if np.isnan(value) else float(value) for name, value in means.items()})
    return {"per_class_details.csv": per_class, "slices.csv": slices}


def _targets(config: EvaluateConfig, run: Run) -> list[Run]:
    """The run, and the output folder too when the run is in MLflow."""
    return [run, FolderRun(config.output)] if config.track else [run]


@dataclass(frozen=True)
class _Predictions:
    """Detections from a file, and the annotations they are evaluated by; no image is opened."""

    name: str
    evaluated: AnnotationIndex
    bins: ClassBins
    dropped: pd.DataFrame
    found: Detections
    config: EvaluateConfig

    @staticmethod
    def open(config: EvaluateConfig) -> _Predictions:
        assert config.predictions is not None
        labels = None if config.image_labels == "none" else config.image_labels
        if config.data == "trained" and (not config.boxes or labels == () or config.classes is None):
            raise ValueError(
                "predictions need annotations to be evaluated by: data must be a folder, or boxes, image_labels and "
                "classes must be given, but got data=trained"
            )
        loaded = read_split(
            config,
            [config.eval_split],
            boxes=config.boxes,
            image_labels=labels,
            with_images=False,
            allow_repeats=True,
        )
        index = _only_listed(loaded.index, config)
        errors = RowErrors(config.on_bad_row)
        found = read_predictions(config.predictions, index, errors)
        dropped = pd.concat([loaded.dropped, errors.frame()], ignore_index=True)
        nothing = np.zeros(index.num_classes, dtype=np.int64)
        no_bins = ClassBins(nothing, nothing, np.zeros(1), np.full(index.num_classes, -1, np.int32), "none", 0)
        return _Predictions(str(config.predictions), index, no_bins, dropped, found, config)

    def detections(self, stop: StopRequest) -> Detections:
        """The rows of the file."""
        stop.check()
        return self.found


@dataclass(frozen=True)
class _Model:
    """A checkpoint, and the images it is evaluated on."""

    name: str
    evaluated: AnnotationIndex
    bins: ClassBins
    dropped: pd.DataFrame
    checkpoint: Checkpoint
    config: EvaluateConfig
    skipped: SkippedImages = field(default_factory=SkippedImages)

    @staticmethod
    def open(config: EvaluateConfig) -> _Model:
        from retinaflow.inference.checkpoint import load_checkpoint
        from retinaflow.runs import store

        name = config.from_run or store.last_run("train")
        path = find_checkpoint(name)
        report(f"evaluating {path}")
        checkpoint = load_checkpoint(path)
        config = as_trained(config, checkpoint)
        evaluated, dropped = _evaluated_images(config, checkpoint)
        return _Model(name, evaluated, checkpoint.bins, dropped, checkpoint, config)

    def detections(self, stop: StopRequest) -> Detections:
        """Run the detector over all images."""
        import torch

        from retinaflow.data.batching import AspectBuckets
        from retinaflow.detector.precision import fast_precision
        from retinaflow.inference.batches import detect

        config, checkpoint = self.config, self.checkpoint
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        buckets = checkpoint.buckets
        if config.image_size != "trained":
            buckets = AspectBuckets.fit(
                self.evaluated.sizes, image_size=config.image_size, num_buckets=len(buckets.shapes)
            )
        is_ancestor = torch.from_numpy(self.evaluated.taxonomy.is_ancestor).to(device)
        parts = detect(
            checkpoint.build(device),
            self.evaluated,
            buckets,
            config=config,
            expand_to=is_ancestor if checkpoint.parents == "expand" else None,
            batch_size=config.batch_size,
            workers=max(config.workers, 0),
            device=device,
            precision=fast_precision(device) if config.precision == "auto" else config.precision,
            after_batch=lambda images: stop.check(),
            on_bad_image=self.skipped.add if config.on_bad_image == "skip" else None,
        )
        return Detections.concatenate(list(parts))


def detect_as_trained(
    name: str | Path, evaluated: AnnotationIndex, config: EvaluateConfig, stop: StopRequest
) -> Detections:
    """What a model finds on images that have its classes, by the settings of its training unless ``config`` has others.

    ``name``: what :func:`find_checkpoint` takes. Raises ValueError when the images have other classes than the model.
    """
    from retinaflow.inference.checkpoint import load_checkpoint

    checkpoint = load_checkpoint(find_checkpoint(str(name)))
    if checkpoint.taxonomy.ids != evaluated.taxonomy.ids:
        raise ValueError(f"{name}: the model must have the {evaluated.num_classes} classes that it was evaluated on")
    model = _Model(str(name), evaluated, checkpoint.bins, pd.DataFrame(), checkpoint, as_trained(config, checkpoint))
    return model.detections(stop)


def find_checkpoint(name: str) -> Path:
    """The checkpoint file that a run id, a model URI or a path stands for."""
    from retinaflow.runs import registry, store

    if name.startswith("models:/"):
        return registry.fetch_model(name)
    if Path(name).suffix == ".pt" or Path(name).is_file():
        return Path(name)
    return store.fetch(name, "checkpoints/best.pt")


def as_trained(config: Given, checkpoint: Checkpoint) -> Given:
    """The settings with those of detections and precision from the training, where they were not given."""
    trained = checkpoint.settings
    names = {*EvaluationSettings.model_fields, "precision"} & set(type(config).model_fields) - config.model_fields_set
    return config.model_copy(update={name: trained[name] for name in names if name in trained})


def _evaluated_images(config: EvaluateConfig, checkpoint: Checkpoint) -> tuple[AnnotationIndex, pd.DataFrame]:
    if config.data == "trained":
        _refuse_choice_of_data(config, checkpoint)
        # The settings of the checkpoint are complete; the YAML file that some came from may be gone.
        trained: TrainingData = load_training_data(resolve(TrainConfig, {**checkpoint.settings, "config": None}))
        return trained.evaluated, trained.dropped
    labels = None if config.image_labels == "none" else config.image_labels
    loaded = read_split(config, [config.eval_split], boxes=config.boxes, image_labels=labels)
    index = loaded.index
    missing = [mid for mid in checkpoint.taxonomy.ids if mid not in index.taxonomy.index_of]
    if missing:
        raise ValueError(f"the class list must hold the model's classes, but lacks {', '.join(missing[:5])}")
    classes = np.array([index.taxonomy.index_of[mid] for mid in checkpoint.taxonomy.ids])
    return _only_listed(index.with_classes(classes), config), loaded.dropped


def _refuse_choice_of_data(config: EvaluateConfig, checkpoint: Checkpoint) -> None:
    """What the model was evaluated on in training leaves nothing to choose."""
    same = {name: getattr(EvaluateConfig(), name) for name in _CHOICE_OF_DATA}
    if config.eval_split == checkpoint.settings["eval_split"]:
        same["eval_split"] = config.eval_split
    given = [name for name, value in same.items() if getattr(config, name) != value]
    if given:
        name = given[0]
        raise ValueError(
            f"data must be given for {name} to apply, but got data=trained, {name}={as_text(getattr(config, name))}"
        )


_CHOICE_OF_DATA = ("eval_split", "eval_ids", "boxes", "image_labels", "classes", "hierarchy", "images", "class_group")


def _only_listed(index: AnnotationIndex, config: EvaluateConfig) -> AnnotationIndex:
    if config.eval_ids is None:
        return index
    chosen = np.flatnonzero(np.isin(index.image_ids, read_image_ids(config.eval_ids)))
    if len(chosen) == 0:
        raise ValueError(f"eval_ids={config.eval_ids}: at least one listed image must be in the split, but none is")
    return index.take(chosen)


def _with_intervals(
    evaluation: EvaluationResult, source: _Model | _Predictions, config: EvaluateConfig
) -> tuple[EvaluationResult, dict[str, list[float]]]:
    """The evaluation with columns ``ap_low`` and ``ap_high``, and the intervals of the aggregates by name."""
    taxonomy, bins = source.evaluated.taxonomy, source.bins
    groups = class_groups(bins.images_per_class, bins.bin_of_class, class_ids=taxonomy.ids)
    found = bootstrap_intervals(evaluation.scores.matches, groups=groups, resamples=config.bootstrap, seed=config.seed)
    table = evaluation.table.assign(
        ap_low=evaluation.table["class_id"].map(dict(zip(taxonomy.ids, found.ap_low, strict=True))),
        ap_high=evaluation.table["class_id"].map(dict(zip(taxonomy.ids, found.ap_high, strict=True))),
    )
    named = {"mAP": found.mean, **found.groups}
    bounds = {name: [value.low, value.high] for name, value in named.items() if np.isfinite(value.low)}
    return replace(evaluation, table=table), bounds


def _write(
    run: Run,
    evaluation: EvaluationResult,
    document: dict[str, object],
    detections: Detections,
    source: _Model | _Predictions,
) -> None:
    log_tables(run, evaluation, document)
    if len(source.dropped):
        run.log_csv(source.dropped, "dropped.csv")
    if isinstance(source, _Model):
        source.skipped.log(run.log_csv, source.dropped)
        log_figures(run, evaluation, detections, source.evaluated)
        run.log_csv(predictions_frame(detections, source.evaluated), "predictions.csv")
