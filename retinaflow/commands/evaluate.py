"""``evaluate``: a trained model, or a file of predictions, evaluated on annotated images."""

from __future__ import annotations

from retinaflow.comparison.stored_matches import store_matches
from retinaflow.data.predictions import predictions_frame
from retinaflow.data.skipped_images import SkippedImages
from retinaflow.metric.challenge import COCO_THRESHOLDS, Evaluator, score
from retinaflow.metric.coco import coco_scores
from retinaflow.metric.details import detail_tables, means_by_threshold
from retinaflow.metric.result import EvaluationResult, evaluation_of
from retinaflow.reports import evaluation_artifacts as reports
from retinaflow.reports.detections_page import log_page
from retinaflow.runs.datasets import evaluated_dataset
from retinaflow.runs.evaluated_detections import detections_to_evaluate
from retinaflow.runs.names import description, run_name
from retinaflow.runs.run import with_folder
from retinaflow.runs.start import start_run
from retinaflow.settings.commands import EvaluateConfig
from retinaflow.taxonomy import expand_to_ancestors

# torch and MLflow are imported where they are needed: a file of predictions is evaluated in seconds, with track=false.


def run(config: EvaluateConfig) -> EvaluationResult:
    """Evaluate, log, print. Returns scores, table and aggregates."""
    source = detections_to_evaluate(config)
    config, index, bins, dropped = source.config, source.index, source.bins, source.images.dropped
    skipped = SkippedImages()
    with start_run("evaluate", config, default_name=run_name("evaluate", config)) as run:
        run.log_params(config.model_dump())
        run.log_json(config.model_dump(mode="json"), "config.json")
        tags = {"retinaflow.evaluated": source.name, "retinaflow.data_digest": index.digest[:16]}
        run.set_tags(tags | dict(source.tags))
        dataset = evaluated_dataset(source.images.settings, index)
        run.log_datasets([dataset])
        detections, whole = source.detect(skipped), source.images.index
        coco = coco_scores(detections, whole).of_classes(source.classes)
        detections = expand_to_ancestors(detections, whole.taxonomy) if config.expand_predictions else detections
        detections = detections.of_classes(source.classes)
        evaluator = Evaluator(index)
        evaluator.add(detections)
        scores = score(evaluator.matches(group_of_weight=config.group_of_weight))
        evaluation = evaluation_of(scores, coco, index.taxonomy, bins)
        document = reports.metrics_document(evaluation, index) | reports.rules_document(
            evaluation, dropped, config, exhaustive=source.images.settings["exhaustive"]
        )
        thresholds = COCO_THRESHOLDS if config.iou_thresholds == "coco" else config.iou_thresholds
        per_class, slices = detail_tables(
            evaluator,
            index.taxonomy,
            group_of_weight=config.group_of_weight,
            iou_thresholds=thresholds,
            score_threshold=config.report_score,
        )
        per_class["coco_ap"] = coco.class_ap
        document |= means_by_threshold(per_class, thresholds) | {"coco": coco.metrics(prefix="")}
        if config.bootstrap > 0:
            evaluation, document["intervals"] = reports.with_intervals(evaluation, index.taxonomy, bins, config)
        run.log_metrics(evaluation.metrics, step=0)
        run.log_model_input(source.model_id, evaluated_on=dataset)
        targets = with_folder(run, config)
        for target in targets:
            reports.log_tables(target, evaluation, document)
            target.log_csv(per_class, "per_class_details.csv")
            target.log_csv(slices, "slices.csv")
            if len(dropped):
                target.log_csv(dropped, "dropped.csv")
            if source.trained is not None:
                skipped.log(target.log_csv, dropped)
                reports.log_figures(target, evaluation, detections, index)
                target.log_csv(predictions_frame(detections, index), "predictions.csv")
        if config.samples:
            log_page(targets, evaluation, detections, index, images=config.samples)
        reports.log_analysis(targets, evaluation, detections, index, errors=config.error_analysis)
        store_matches(targets, evaluation, detections, index, bins, config, trained=source.trained)
        run.set_description(description(evaluation.metrics, dataset, lines=(f"Evaluated: {source.name}",)))
        reports.report_evaluation(evaluation)
        return evaluation
