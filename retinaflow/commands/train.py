"""``train``: data, bins, a detector, epochs, and the best of them judged and logged."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from retinaflow import tracking
from retinaflow.commands.binning import log_bins, log_exposure
from retinaflow.commands.inputs import TrainingData, load_training_data, say
from retinaflow.commands.judging import Judgement, log_pictures, log_tables, metrics_document, say_judgement
from retinaflow.commands.kept import keep_matches
from retinaflow.commands.session import Session, find_resumed
from retinaflow.config import TrainConfig
from retinaflow.run_files import Run
from retinaflow.training.stopping import StopRequest


@dataclass(frozen=True)
class TrainResult:
    """A finished training: its run, best checkpoint and how that was judged."""

    run_id: str
    checkpoint: Path
    judgement: Judgement


def run(config: TrainConfig, *, data: TrainingData | None = None, name: str | None = None) -> TrainResult:
    """Train as configured. ``data``: already loaded data of the same settings; ``name``: of the run."""
    resumed = find_resumed(config)
    data = data or load_training_data(config)
    with (
        StopRequest(watch_parent=tracking.launched_by_mlflow()) as stop,
        tracking.start_run(
            "train",
            track=config.track,
            experiment=config.experiment,
            output=config.output / (name or "train"),
            name=name,
            resume=resumed.run_id if resumed else None,
        ) as run,
    ):
        folder = config.output / (run.run_id if config.track else name or "train") / "checkpoints"
        _log_inputs(run, config, data)
        session = Session.start(config, data, resumed.checkpoint if resumed else None)
        run.set_tags(session.machine_tags())
        best = session.train(run, folder, stop, best_before=resumed.best if resumed else None)
        detections, judgement = session.judge_best(best, stop)
        run.log_metrics(
            {f"best/{name.removeprefix('val/')}": v for name, v in judgement.metrics.items()}, step=session.trainer.step
        )
        log_tables(run, judgement, metrics_document(judgement, data.judged))
        log_pictures(run, judgement, detections, data.judged)
        keep_matches([run], judgement, detections, data.judged, data.bins, config)
        tracking.log_model(run, best, register_as=config.register_as)
        say_judgement(judgement)
        say(f"run {run.run_id}, best checkpoint {best}")
        return TrainResult(run.run_id, best, judgement)


def _log_inputs(run: Run, config: TrainConfig, data: TrainingData) -> None:
    run.log_params(config.model_dump())
    run.log_json(config.model_dump(mode="json"), "config.json")
    run.set_tags({"retinaflow.data_digest": data.digest})
    log_bins(run, data)
    log_exposure(run, config, data)
