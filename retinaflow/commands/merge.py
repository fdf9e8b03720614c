"""``merge``: the models of several runs as one: scores calibrated, classes joined or fused, evaluated as a whole."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from retinaflow.comparison.stored_matches import read_matches, write_matches
from retinaflow.data.openimages import predictions_frame
from retinaflow.detections import Detections
from retinaflow.ensemble.fusion import fuse
from retinaflow.ensemble.members import PREDICTIONS, Part, Parts, joined_bins, load_parts
from retinaflow.ensemble.parents import best_of_each_image, expand_to_parents
from retinaflow.interrupts import StopRequest
from retinaflow.metric.matches import Kind
from retinaflow.metric.result import EvaluationResult, score_detections
from retinaflow.progress import report
from retinaflow.reports.calibration_figure import reliability
from retinaflow.reports.evaluation import (
    log_analysis,
    log_figures,
    log_tables,
    metrics_document,
    report_evaluation,
)
from retinaflow.runs import store, tracking
from retinaflow.runs.run import FolderRun, Run
from retinaflow.settings.commands import MergeConfig
from retinaflow.statistics.calibration import Calibrator
from retinaflow.statistics.cross_fitting import (
    CalibratedClass,
    apply_calibrators,
    calibrated_by,
    cross_fitted,
    sample_folds,
)

CALIBRATORS = "calibrators.json"


@dataclass(frozen=True)
class MergeResult:
    """A finished merge: its run, its detections in the classes of all models, and how they were evaluated."""

    run_id: str
    detections: Detections
    evaluation: EvaluationResult


@dataclass(frozen=True)
class _Calibrated:
    """A part with its scores calibrated, and what became of each of its classes."""

    part: Part
    detections: Detections
    classes: list[CalibratedClass]


def run(config: MergeConfig, *, parts: Parts | None = None, name: str | None = None) -> MergeResult:
    """Merge, evaluate, log, print. ``parts``: of these runs, already loaded; ``name``: of the run."""
    with StopRequest(watch_parent=tracking.launched_by_mlflow()) as stop:
        loaded = parts or load_parts(_names(config), stop)
    calibrated = calibrate(loaded, config)
    detections = merge(loaded, [one.detections for one in calibrated], config)
    bins = joined_bins(loaded)
    evaluation = score_detections(detections, loaded.evaluated, bins, group_of_weight=loaded.group_of_weight)
    with tracking.start_run(
        "merge", track=config.track, experiment=config.experiment, output=config.output, name=name
    ) as run:
        targets = [run, FolderRun(config.output)] if config.track else [run]
        run.log_params(config.model_dump())
        run.log_json(config.model_dump(mode="json"), "config.json")
        run.set_tags({"retinaflow.data_digest": loaded.evaluated.digest[:16], **_links(loaded, config)})
        table = _calibration_table(calibrated, loaded)
        run.log_metrics({**evaluation.metrics, **_losses(table)}, step=0)
        document = metrics_document(evaluation, loaded.evaluated) | {"expanded_predictions": config.expand_predictions}
        for target in targets:
            log_tables(target, evaluation, document)
            log_figures(target, evaluation, detections, loaded.evaluated)
            _log_detections(target, detections, loaded)
            _log_calibration(target, calibrated, table)
        log_analysis(targets, evaluation, detections, loaded.evaluated)
        write_matches(
            targets,
            evaluation,
            detections,
            loaded.evaluated,
            bins,
            settings={**config.model_dump(mode="json"), "runs": [part.name for part in loaded.parts]},
            evaluated_from=loaded.parts[0].run.stored.evaluated_from,
        )
        report(_summary(calibrated, loaded))
        report_evaluation(evaluation)
        report(
            f"the merged predictions: {config.output / PREDICTIONS}" + (f", run {run.run_id}" if config.track else "")
        )
        return MergeResult(run.run_id, detections, evaluation)


def calibrate(loaded: Parts, config: MergeConfig) -> list[_Calibrated]:
    """Each part with its calibrated scores: cross-fitted on the evaluated images, or by an earlier merge's calibrators.

    Raises ValueError for calibrators of other models, or fitted on some of the evaluated images.
    """
    if config.calibrators is not None:
        return _by_earlier(loaded, config.calibrators)
    folds = sample_folds(len(loaded.evaluated), config.folds, seed=config.seed)
    result = []
    for part in loaded.parts:
        detections, classes = cross_fitted(
            part.detections, part.matches, folds, method=config.calibration, min_truths=config.min_truths
        )
        result.append(_Calibrated(part, detections, classes))
    return result


def merge(loaded: Parts, detections: Sequence[Detections], config: MergeConfig) -> Detections:
    """The detections of all parts in the classes of the whole: joined, shared classes fused, parents, the best."""
    renamed = [
        replace(found, class_index=part.classes[found.class_index].astype(np.int32))
        for part, found in zip(loaded.parts, detections, strict=True)
    ]
    found = fuse(renamed, loaded.num_models, iou_threshold=config.fusion_iou)
    if config.expand_predictions:
        found = expand_to_parents(found, loaded.evaluated.taxonomy, nms_iou=config.nms_iou)
    return best_of_each_image(found, config.max_detections)


def _names(config: MergeConfig) -> list[str]:
    if config.runs:
        return list(config.runs)
    try:
        last = store.find_run(store.last_run("split"))
    except ValueError:
        raise ValueError(
            f"runs must name what is merged (runs=ID,ID), as there is no finished split in {store.uri()}"
        ) from None
    return last.tags["retinaflow.parts"].split(",")


def _by_earlier(loaded: Parts, name: str) -> list[_Calibrated]:
    folder = Path(name)
    known = (folder / CALIBRATORS).is_file()
    run_id = name if known else store.find_run(name).run_id
    path = folder / CALIBRATORS if known else store.fetch(run_id, CALIBRATORS)
    shared = np.intersect1d(read_matches(run_id).matches.image_ids, loaded.evaluated.image_ids)
    if len(shared):
        raise ValueError(
            f"calibrators={name} must have been fitted on other images than those evaluated, but {len(shared):,} are the "
            f"same, {shared[0]} for example; leave calibrators out, and they are cross-fitted"
        )
    rows = json.loads(path.read_text(encoding="utf-8"))["parts"]
    result = []
    for number, part in enumerate(loaded.parts):
        ids = part.run.stored.class_ids
        if len(rows) != len(loaded.parts) or set(rows[number]["classes"]) != set(ids):
            raise ValueError(
                f"calibrators={name} must be those of the same models in the same order, but it merged "
                f"{', '.join(row['run'] for row in rows)}, whose classes are not those of "
                f"{', '.join(one.name for one in loaded.parts)}"
            )
        calibrators = [Calibrator.from_document(rows[number]["classes"][mid]) for mid in ids]
        detections = apply_calibrators(part.detections, calibrators)
        result.append(_Calibrated(part, detections, calibrated_by(calibrators, part.matches)))
    return result


def _links(loaded: Parts, config: MergeConfig) -> dict[str, str]:
    """Tags with the parts; the description shown on the run's page has links to theirs."""
    lines = [f"**{len(loaded.parts)} models as one**, calibration={config.calibration}", ""]
    for part in loaded.parts:
        record = part.run.record
        place = f"[{record.name}]({record.path})" if record.experiment_id else record.run_id
        lines.append(f"- {place}: {len(part.classes)} classes")
    ids = ",".join(part.run_id for part in loaded.parts)
    return {"retinaflow.parts": ids, "mlflow.note.content": "\n".join(lines)}


def _log_detections(run: Run, detections: Detections, loaded: Parts) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / PREDICTIONS
        predictions_frame(detections, loaded.evaluated).to_parquet(path, index=False)
        run.log_file(path)


def _log_calibration(run: Run, calibrated: Sequence[_Calibrated], table: pd.DataFrame) -> None:
    run.log_csv(table, "calibration.csv")
    run.log_json({"parts": [_calibrators(one) for one in calibrated]}, CALIBRATORS)
    before, after, right = (np.concatenate(columns) for columns in zip(*map(_scores_by_class, calibrated), strict=True))
    run.log_figure(reliability(before, after, right), "calibration.png")


def _calibrators(one: _Calibrated) -> dict[str, object]:
    ids = one.part.run.stored.class_ids
    return {
        "run": one.part.name,
        "run_id": one.part.run_id,
        "classes": {ids[row.class_index]: row.calibrator.to_document() for row in one.classes},
    }


def _scores_by_class(
    one: _Calibrated,
) -> tuple[NDArray[np.floating], NDArray[np.floating], NDArray[np.bool_]]:
    """Scores before and after calibration, and whether right, of the detections that were evaluated."""
    matches = one.part.matches
    entries = matches.kind != Kind.GROUP_OF
    rows = matches.detection_row[entries]
    return one.part.detections.score[rows], one.detections.score[rows], matches.kind[entries] == Kind.TRUE_POSITIVE


def _calibration_table(calibrated: Sequence[_Calibrated], loaded: Parts) -> pd.DataFrame:
    """One row per model and class: what was chosen, and the mean log loss of its evaluated detections."""
    taxonomy = loaded.evaluated.taxonomy
    return pd.DataFrame(
        [
            {
                "run": one.part.name,
                "class": taxonomy.labels[one.part.classes[row.class_index]],
                "method": row.calibrator.method,
                "num_truths": row.num_truths,
                "judged_detections": row.num_evaluated,
                "log_loss_before": row.loss_before,
                "log_loss_after": row.loss_after,
                "class_id": taxonomy.ids[one.part.classes[row.class_index]],
            }
            for one in calibrated
            for row in one.classes
        ]
    )


def _losses(table: pd.DataFrame) -> dict[str, float]:
    evaluated = table[table["judged_detections"] > 0]
    if evaluated.empty:
        return {}
    return {
        f"calibration/{name}": float(np.average(evaluated[name], weights=evaluated["judged_detections"]))
        for name in ("log_loss_before", "log_loss_after")
    }


def _summary(calibrated: Sequence[_Calibrated], loaded: Parts) -> str:
    methods = Counter(row.calibrator.method for one in calibrated for row in one.classes)
    shared = int((loaded.num_models > 1).sum())
    counted = ", ".join(f"{methods[method]} {method}" for method in ("platt", "isotonic", "none") if methods[method])
    what = f"{len(loaded.parts)} models, {loaded.evaluated.num_classes} classes, {shared} of them shared"
    return f"{what}; calibration: {counted}"
