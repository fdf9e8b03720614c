"""``train``: data, bins, a detector, epochs, and the best of them evaluated and logged."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from retinaflow.commands.binning import log_bins, log_exposure
from retinaflow.comparison.stored_matches import store_matches
from retinaflow.data.training_data import TrainingData, load_training_data
from retinaflow.interrupts import StopRequest
from retinaflow.metric.result import EvaluationResult
from retinaflow.progress import report
from retinaflow.reports.evaluation import (
    log_analysis,
    log_figures,
    log_tables,
    metrics_document,
    report_evaluation,
)
from retinaflow.runs import store, tracking
from retinaflow.runs.run import NullRun, Run
from retinaflow.settings.commands import TrainConfig
from retinaflow.training.distributed import World
from retinaflow.training.launch import is_rank_0, ranks
from retinaflow.training.resume import Resumed, find_resumed, resumed_settings
from retinaflow.training.session import Session


@dataclass(frozen=True)
class TrainResult:
    """A finished training: its run, best checkpoint and how that was evaluated."""

    run_id: str
    checkpoint: Path
    evaluation: EvaluationResult


def run(
    config: TrainConfig,
    *,
    data: TrainingData | None = None,
    name: str | None = None,
    tags: Mapping[str, str] = MappingProxyType({}),
) -> TrainResult:
    """Train as configured. ``data``: already loaded data of the same settings; ``name`` and ``tags``: of the run.

    Of several processes only the first one returns; the others exit when their part is done.
    """
    # What is trained and from where is the first one's to find out; it may lie on its machine alone.
    prepared = _prepared(config) if is_rank_0() else None
    with ranks(prepared[0].nproc if prepared else 1) as world, _speaking(world):
        prepared = world.broadcast(prepared)
        assert prepared is not None
        config, resumed = prepared
        folder_name = name or (resumed.run_id if resumed and not config.track else "train")
        with world.first_on_machine():
            data = data or load_training_data(config)
        _refuse_different_data(data, world)
        with (
            StopRequest(watch_parent=tracking.launched_by_mlflow() or not world.is_first) as stop,
            _run(config, name, folder_name, resumed, world) as run,
        ):
            folder = config.output / (run.run_id if config.track else folder_name) / "checkpoints"
            if world.is_first:
                run.set_tags(tags)
                _log_inputs(run, config, data)
            session = Session.start(config, data, resumed.checkpoint if resumed else None, world=world)
            run.set_tags(session.machine_tags())
            best = session.train(run, folder, stop, best_before=resumed.best if resumed and world.is_first else None)
            if not world.is_first:
                sys.exit(0)
            return _concluded(run, session, best, stop)


def _refuse_different_data(data: TrainingData, world: World) -> None:
    digests = world.all_gather(data.digest)
    if len(set(digests)) > 1:
        raise ValueError(f"all processes must read the same data, but their digests are {', '.join(digests)}, by rank")


def _prepared(config: TrainConfig) -> tuple[TrainConfig, Resumed | None]:
    """The settings to train by, and what to resume from."""
    resumed = find_resumed(config)
    return (resumed_settings(config, resumed.checkpoint), resumed) if resumed else (config, None)


@contextlib.contextmanager
def _speaking(world: World) -> Iterator[None]:
    """The first process alone prints."""
    with contextlib.ExitStack() as stack:
        if not world.is_first:
            nowhere = stack.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        yield


def _run(
    config: TrainConfig, name: str | None, folder_name: str, resumed: Resumed | None, world: World
) -> contextlib.AbstractContextManager[Run]:
    if not world.is_first:
        return contextlib.nullcontext(NullRun())
    resume = resumed.run_id if resumed else None
    if resume is not None and config.track and not store.has_run(resume):
        report(f"the checkpoint's run {resume} is not in {store.uri()}: a new run resumes it")
        resume = None
    return tracking.start_run(
        "train",
        track=config.track,
        experiment=config.experiment,
        output=config.output / folder_name,
        name=name,
        resume=resume,
    )


def _log_inputs(run: Run, config: TrainConfig, data: TrainingData) -> None:
    run.log_params(config.model_dump())
    run.log_json(config.model_dump(mode="json"), "config.json")
    run.set_tags({"retinaflow.data_digest": data.digest})
    log_bins(run, data)
    log_exposure(run, config, data)


def _concluded(run: Run, session: Session, best: Path, stop: StopRequest) -> TrainResult:
    """Evaluate the best checkpoint, log what it is worth, and the model."""
    data, config = session.data, session.config
    detections, evaluation = session.evaluate_best(best, stop)
    run.log_metrics(
        {f"best/{name.removeprefix('val/')}": v for name, v in evaluation.metrics.items()}, step=session.trainer.step
    )
    log_tables(run, evaluation, metrics_document(evaluation, data.evaluated))
    log_figures(run, evaluation, detections, data.evaluated)
    log_analysis([run], evaluation, detections, data.evaluated)
    store_matches([run], evaluation, detections, data.evaluated, data.bins, config)
    run.log_model(best, register_as=config.register_as)
    report_evaluation(evaluation)
    report(f"run {run.run_id}, best checkpoint {best}")
    return TrainResult(run.run_id, best, evaluation)
