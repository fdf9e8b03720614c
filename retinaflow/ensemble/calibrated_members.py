"""The members of an ensemble with calibrated scores, and what calibration did to each of their classes.

Scores are cross-fitted on the evaluated images, or calibrated by the calibrators of an earlier merge on other images.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from retinaflow.comparison.stored_matches import read_matches
from retinaflow.detections import Detections
from retinaflow.ensemble.members import Ensemble, Member
from retinaflow.errors import DataError, SettingError
from retinaflow.files import read_json
from retinaflow.metric.matches import Kind
from retinaflow.reports.score_figures import reliability
from retinaflow.runs import store
from retinaflow.runs.run import Run
from retinaflow.settings.commands import MergeConfig
from retinaflow.settings.resolve import refuse_without_effect
from retinaflow.statistics.calibration import Calibrator, apply_calibrators
from retinaflow.statistics.cross_fitting import (
    CalibratedClass,
    calibrated_by,
    cross_fitted,
    sample_folds,
)

CALIBRATORS = "calibrators.json"


@dataclass(frozen=True)
class CalibratedMember:
    """A member with its scores calibrated, and the calibration of each of its classes."""

    member: Member
    detections: Detections
    classes: list[CalibratedClass]


def calibrate(ensemble: Ensemble, config: MergeConfig) -> list[CalibratedMember]:
    """Each member with calibrated scores: cross-fitted on the evaluated images, or by calibrators of an earlier merge.

    Raises SettingError for calibrators of other models, or fitted on some of the evaluated images.
    """
    if config.calibrators is not None:
        fitting = ("calibration", "min_ground_truth", "folds")
        refuse_without_effect(config, fitting, beside=f"calibrators={config.calibrators}")
        return _by_earlier(ensemble, config.calibrators)
    folds = sample_folds(len(ensemble.evaluated), config.folds, seed=config.seed)
    result = []
    for member in ensemble.members:
        detections, classes = cross_fitted(
            member.detections,
            member.matches,
            folds,
            method=config.calibration,
            min_ground_truth=config.min_ground_truth,
        )
        result.append(CalibratedMember(member, detections, classes))
    return result


def calibration_table(calibrated: Sequence[CalibratedMember], ensemble: Ensemble) -> pd.DataFrame:
    """One row per model and class: what was chosen, and the mean log loss of its evaluated detections."""
    taxonomy = ensemble.evaluated.taxonomy
    return pd.DataFrame(
        [
            {
                "run": one.member.name,
                "class": taxonomy.labels[one.member.classes[row.class_index]],
                "method": row.calibrator.method,
                "num_truths": row.num_truths,
                "evaluated_detections": row.num_evaluated,
                "log_loss_before": row.loss_before,
                "log_loss_after": row.loss_after,
                "class_id": taxonomy.ids[one.member.classes[row.class_index]],
            }
            for one in calibrated
            for row in one.classes
        ]
    )


def mean_losses(table: pd.DataFrame) -> dict[str, float]:
    """``calibration/log_loss_before`` and ``_after``: means over the evaluated detections of a calibration table."""
    evaluated = table[table["evaluated_detections"] > 0]
    if evaluated.empty:
        return {}
    return {
        f"calibration/{name}": float(np.average(evaluated[name], weights=evaluated["evaluated_detections"]))
        for name in ("log_loss_before", "log_loss_after")
    }


def calibration_summary(calibrated: Sequence[CalibratedMember], ensemble: Ensemble) -> str:
    """One line: models, classes, shared classes, and how many classes each method calibrates."""
    methods = Counter(row.calibrator.method for one in calibrated for row in one.classes)
    shared = int((ensemble.num_models > 1).sum())
    counted = ", ".join(f"{methods[method]} {method}" for method in ("platt", "isotonic", "none") if methods[method])
    what = f"{len(ensemble.members)} models, {ensemble.evaluated.num_classes} classes, {shared} of them shared"
    return f"{what}; calibration: {counted}"


def log_calibration(run: Run, calibrated: Sequence[CalibratedMember], table: pd.DataFrame) -> None:
    """``calibration.csv``, ``calibrators.json`` and ``calibration.png``."""
    run.log_csv(table, "calibration.csv")
    run.log_json({"parts": [_calibrators(one) for one in calibrated]}, CALIBRATORS)
    before, after, is_true = (
        np.concatenate(columns) for columns in zip(*map(_evaluated_scores, calibrated), strict=True)
    )
    run.log_figure(reliability(before, after, is_true), "calibration.png")


def _by_earlier(ensemble: Ensemble, name: str) -> list[CalibratedMember]:
    folder = Path(name)
    known = (folder / CALIBRATORS).is_file()
    run_id = name if known else store.find_run(name).run_id
    path = folder / CALIBRATORS if known else store.fetch(run_id, CALIBRATORS)
    shared = np.intersect1d(read_matches(run_id).matches.image_ids, ensemble.evaluated.image_ids)
    if len(shared):
        raise SettingError(
            f"calibrators={name} must have been fitted on other images than those evaluated, but {len(shared):,} "
            f"are the same, {shared[0]} for example; without calibrators, scores are cross-fitted"
        )
    rows = _parts_of(path)
    result = []
    for number, member in enumerate(ensemble.members):
        ids = member.run.stored.class_ids
        if len(rows) != len(ensemble.members) or set(rows[number]["classes"]) != set(ids):
            raise SettingError(
                f"calibrators={name} must be those of the same models in the same order, but it merged "
                f"{', '.join(str(row.get('run')) for row in rows)}, whose classes are not those of "
                f"{', '.join(one.name for one in ensemble.members)}"
            )
        calibrators = [Calibrator.from_document(rows[number]["classes"][mid]) for mid in ids]
        detections = apply_calibrators(member.detections, calibrators)
        result.append(CalibratedMember(member, detections, calibrated_by(calibrators, member.matches)))
    return result


def _parts_of(path: Path) -> list[dict[str, Any]]:
    document = read_json(path)
    parts = document.get("parts") if isinstance(document, dict) else None
    classes = [one.get("classes") for one in parts if isinstance(one, dict)] if isinstance(parts, list) else []
    if not isinstance(parts, list) or [type(one) for one in classes] != [dict] * len(parts):
        raise DataError(f"{path}: must be the {CALIBRATORS} of a merge, with parts that have classes; merge again")
    return parts


def _calibrators(one: CalibratedMember) -> dict[str, object]:
    ids = one.member.run.stored.class_ids
    return {
        "run": one.member.name,
        "run_id": one.member.run_id,
        "classes": {ids[row.class_index]: row.calibrator.to_document() for row in one.classes},
    }


def _evaluated_scores(
    one: CalibratedMember,
) -> tuple[NDArray[np.floating], NDArray[np.floating], NDArray[np.bool_]]:
    """Scores before and after calibration, and whether a true positive, of the detections that were evaluated."""
    matches = one.member.matches
    entries = matches.kind != Kind.GROUP_OF
    rows = matches.detection_row[entries]
    return one.member.detections.score[rows], one.detections.score[rows], matches.kind[entries] == Kind.TRUE_POSITIVE
