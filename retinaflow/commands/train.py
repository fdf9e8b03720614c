"""``train``: data, bins, a detector, epochs, and the best of them evaluated and logged."""

from __future__ import annotations

import multiprocessing
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from retinaflow.comparison.stored_matches import StoredMatches, store_matches
from retinaflow.data.training_data import TrainingData, load_training_data
from retinaflow.interrupts import StopRequest
from retinaflow.metric.result import EvaluationResult
from retinaflow.progress import report
from retinaflow.reports.bins_and_exposure import log_bins, log_exposure
from retinaflow.reports.evaluation_artifacts import (
    log_analysis,
    log_figures,
    log_tables,
    metrics_document,
    report_evaluation,
)
from retinaflow.reports.training_history import log_evaluation
from retinaflow.runs import tracking
from retinaflow.runs.datasets import training_datasets
from retinaflow.runs.names import description, run_name
from retinaflow.runs.run import CHECKPOINTS, Run
from retinaflow.settings.commands import TrainConfig
from retinaflow.training.earlier_training import after_restart, is_restart, own_training, training_key, training_tags
from retinaflow.training.fit_to_data import fit_to_data
from retinaflow.training.goals import check_metrics
from retinaflow.training.launch import is_rank_0, printing_on_rank_0, ranks
from retinaflow.training.resume import prepare
from retinaflow.training.run_folder import folder_name_of, refuse_second_training, report_finished, training_run
from retinaflow.training.session import Session, machine_tags, start_session


@dataclass(frozen=True)
class TrainResult:
    """A finished training: its run, its best checkpoint, the evaluation of that, and what a comparison needs of it."""

    run_id: str
    checkpoint: Path
    evaluation: EvaluationResult
    matches: StoredMatches


def run(config: TrainConfig, *, data: TrainingData | None = None, name: str | None = None) -> TrainResult | None:
    """Train as configured; on rank 0 alone it returns. None: ``resume=auto`` has found a finished training.

    ``data``: already loaded data of the same settings; ``name``: of the run, when another command trains."""
    # A checkpoint of ``main`` is that of a training like any other.
    config = config.part(TrainConfig)
    # Rank 0 finds the checkpoint to resume from: it may be on its machine alone.
    prepared = prepare(config) if is_rank_0() else None
    with ranks(prepared[0].nproc if prepared else 1) as world, printing_on_rank_0(world), ExitStack() as owned:
        # Of torchrun's agents, not all need to count a restart.
        if world.any(is_restart()) and prepared and name is None:
            prepared = after_restart(prepared[0]), prepared[1]
        prepared = world.broadcast(prepared)
        assert prepared is not None
        config, resumed = prepared
        if world.is_first:
            refuse_second_training(config, resumed, folder_name=folder_name_of(config, resumed, name))
        with world.first_on_machine():
            data = data or load_training_data(config)
        called = run_name("train", config)
        config = config if resumed else fit_to_data(config, data.train)
        key = training_key(config, data.digest)
        found = owned.enter_context(own_training(key, config, resumed, world))
        config, resumed = found.config, found.resumed
        if found.finished is not None:
            report_finished(found.finished, config, world)
            return None
        if world.is_first:
            check_metrics(config, data)
        folder_name = folder_name_of(config, resumed, name)
        with (
            StopRequest(watch_parent=_has_parent() or not world.is_first) as stop,
            training_run(config, resumed, world, name=name, called=called, folder_name=folder_name) as run,
        ):
            folder = config.output / (run.run_id if config.track else folder_name) / CHECKPOINTS
            if world.is_first:
                run.set_tags(training_tags(key, config, resumed))
                _log_inputs(run, config, data)
            session = start_session(config, data, resumed.checkpoint if resumed else None, world=world)
            run.set_tags(machine_tags(session.trainer))
            best_before, shown = resumed.best if resumed else None, partial(log_evaluation, run, data.evaluated)
            best = session.train(run, folder, stop, best_before=best_before, after_evaluation=shown)
            if not world.is_first:
                sys.exit(0)
            return _conclude(run, session, best, stop)


def _has_parent() -> bool:
    """Whether another process started this one and waits for it."""
    return tracking.launched_by_mlflow() or multiprocessing.parent_process() is not None


def _log_inputs(run: Run, config: TrainConfig, data: TrainingData) -> None:
    run.log_params(config.model_dump())
    run.log_json(config.model_dump(mode="json"), "config.json")
    run.set_tags({"retinaflow.data_digest": data.digest})
    run.log_datasets(training_datasets(config.model_dump(), data))
    log_bins(run, data)
    log_exposure(run, config, data)


def _conclude(run: Run, session: Session, best: Path, stop: StopRequest) -> TrainResult:
    """Evaluate the best checkpoint, and log its results and the model."""
    data, config = session.data, session.config
    validated = session.evaluate_best(best, stop)
    detections, evaluation = validated.detections, validated.evaluation
    best_metrics = {f"best/{name.removeprefix('val/')}": value for name, value in evaluation.metrics.items()}
    run.log_metrics(best_metrics, step=session.trainer.step)
    log_tables(run, evaluation, metrics_document(evaluation, data.evaluated))
    log_figures(run, evaluation, detections, data.evaluated)
    log_analysis([run], evaluation, detections, data.evaluated)
    matches = store_matches([run], evaluation, detections, data.evaluated, data.bins, config)
    trained, dataset = training_datasets(config.model_dump(), data)
    run.log_model(best, register_as=config.register_as, step=session.best_step, dataset=dataset)
    command = f"`python -m retinaflow evaluate --from_run {run.run_id if config.track else best}`"
    run.set_description(
        description(evaluation.metrics, dataset, trained=trained, num_bins=data.bins.num_bins, lines=(command,))
    )
    report_evaluation(evaluation)
    report(f"run {run.run_id}, best checkpoint {best}")
    return TrainResult(run.run_id, best, evaluation, matches)
