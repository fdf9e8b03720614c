"""``merge``: the models of several runs as one: scores calibrated, classes joined or fused, evaluated as a whole."""

from __future__ import annotations

from dataclasses import dataclass

from retinaflow.comparison.stored_matches import write_matches
from retinaflow.detections import Detections
from retinaflow.ensemble.calibrated_members import (
    calibrate,
    calibration_summary,
    calibration_table,
    log_calibration,
    mean_losses,
)
from retinaflow.ensemble.member_detections import PREDICTIONS, log_detections
from retinaflow.ensemble.members import Ensemble, ensemble_bins, load_ensemble, parts_of_last_split
from retinaflow.ensemble.merged_model import FILE, merged_model
from retinaflow.inference.merged_checkpoint import MergedCheckpoint, save_merged
from retinaflow.inference.merged_detections import merge_detections
from retinaflow.metric.result import EvaluationResult, score_detections
from retinaflow.progress import report
from retinaflow.reports.evaluation_artifacts import (
    log_analysis,
    log_figures,
    log_tables,
    metrics_document,
    report_evaluation,
)
from retinaflow.runs.datasets import DatasetInput, evaluated_dataset
from retinaflow.runs.logged_model import model_of_run
from retinaflow.runs.run import Run, with_folder
from retinaflow.runs.start import start_run
from retinaflow.settings.commands import MergeConfig
from retinaflow.settings.model_settings import JoinSettings
from retinaflow.settings.resolve import with_absolute_paths


@dataclass(frozen=True)
class MergeResult:
    """A finished merge: its run, its detections in the classes of all models, and how they were evaluated."""

    run_id: str
    detections: Detections
    evaluation: EvaluationResult


def run(
    config: MergeConfig, *, ensemble: Ensemble | None = None, name: str | None = None, with_model: bool = True
) -> MergeResult:
    """Merge, evaluate, log, print. ``ensemble``: the models, where they are loaded already; ``name``: of the run;
    ``with_model``: whether it leaves a model. Raises SettingError where its files would replace others' files."""
    ensemble = ensemble or load_ensemble(config.runs or parts_of_last_split(), register_as=config.register_as)
    calibrated = calibrate(ensemble, config)
    detections = merge_detections(
        [one.detections for one in calibrated],
        [member.classes for member in ensemble.members],
        ensemble.evaluated.taxonomy,
        config.part(JoinSettings),
    )
    bins = ensemble_bins(ensemble)
    evaluation = score_detections(detections, ensemble.evaluated, bins, group_of_weight=ensemble.group_of_weight)
    with start_run("merge", config, name=name, default_name="merge") as run:
        targets = with_folder(run, config)
        run.log_params(config.model_dump())
        run.log_json(config.model_dump(mode="json"), "config.json")
        run.set_tags({"retinaflow.data_digest": ensemble.evaluated.digest[:16], **_links(ensemble, config)})
        source = ensemble.members[0].run.stored.evaluated_from
        dataset = evaluated_dataset(source["settings"], ensemble.evaluated)
        run.log_datasets([dataset])
        for member in ensemble.members if config.track else ():
            run.log_model_input(model_of_run(member.run_id))
        table = calibration_table(calibrated, ensemble)
        run.log_metrics({**evaluation.metrics, **mean_losses(table)}, step=0)
        document = metrics_document(evaluation, ensemble.evaluated) | {
            "expanded_predictions": config.expand_predictions
        }
        for target in targets:
            log_tables(target, evaluation, document)
            log_figures(target, evaluation, detections, ensemble.evaluated)
            log_detections(target, detections, ensemble.evaluated)
            log_calibration(target, calibrated, table)
        log_analysis(targets, evaluation, detections, ensemble.evaluated)
        settings = {**with_absolute_paths(config), "runs": [member.name for member in ensemble.members]}
        write_matches(
            targets, evaluation, detections, ensemble.evaluated, bins, settings=settings, evaluated_from=source
        )
        report(calibration_summary(calibrated, ensemble))
        report_evaluation(evaluation)
        if with_model:
            _log_model(run, merged_model(ensemble, calibrated, bins, config), config, dataset)
        report(f"merged predictions: {config.output / PREDICTIONS}" + (f", run {run.run_id}" if config.track else ""))
        return MergeResult(run.run_id, detections, evaluation)


def _log_model(run: Run, model: MergedCheckpoint | str, config: MergeConfig, dataset: DatasetInput) -> None:
    path = config.output / FILE
    if isinstance(model, str):
        # Nobody is to take the model of an earlier merge for this one's.
        path.unlink(missing_ok=True)
        report(f"the merge leaves no model: {model}")
        return
    save_merged(model, path)
    run.log_file(path, FILE.parent.name)
    run.log_model(path, register_as=config.register_as, step=0, dataset=dataset)
    report(f"merged model: {path}")


def _links(ensemble: Ensemble, config: MergeConfig) -> dict[str, str]:
    """Tags with the members; the description shown on the run's page has links to theirs."""
    lines = [f"**{len(ensemble.members)} models as one**, calibration={config.calibration}", ""]
    for member in ensemble.members:
        record = member.run.record
        place = f"[{record.name}]({record.path})" if record.experiment_id else record.run_id
        lines.append(f"- {place}: {len(member.classes)} classes")
    ids = ",".join(member.run_id for member in ensemble.members)
    return {"retinaflow.parts": ids, "mlflow.note.content": "\n".join(lines)}
