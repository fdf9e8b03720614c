"""One training in progress: the trainer is built or resumed, trains its epochs, and is evaluated after some of them."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from retinaflow.data.batching import AspectBuckets
from retinaflow.data.images import BadImage
from retinaflow.data.sampling import first_balanced_epoch
from retinaflow.data.skipped_images import SkippedImages
from retinaflow.data.training_data import TrainingData, epoch_length, plans
from retinaflow.detector.network import RetinaNet
from retinaflow.errors import DataError, Interrupted, SettingError, TrainingError, WorkerError
from retinaflow.inference.checkpoint import Checkpoint, load_checkpoint
from retinaflow.inference.detector import Detector
from retinaflow.interrupts import StopRequest
from retinaflow.metric.chosen_metric import measured
from retinaflow.progress import report
from retinaflow.runs.run import Run
from retinaflow.settings.commands import TrainConfig
from retinaflow.settings.model_settings import DetectorSettings
from retinaflow.training.build import build_dataset, build_trainer, report_missed_boxes
from retinaflow.training.checkpoints import Checkpoints
from retinaflow.training.distributed import ALONE, World
from retinaflow.training.goals import TIME_TO_TARGET, Goals
from retinaflow.training.loop import EpochResult, StepResult, Trainer
from retinaflow.training.progress import Progress
from retinaflow.training.resume import check_progress
from retinaflow.training.validation import Validated, validate


@dataclass(frozen=True)
class EvaluatedEpoch:
    """An evaluation of a training. ``history``: epoch -> AP of each class in class order, of all evaluations so far."""

    validated: Validated
    step: int
    history: Mapping[int, Sequence[float]]


AfterEvaluation = Callable[[EvaluatedEpoch], None]


def ignore(evaluated: EvaluatedEpoch) -> None:
    """Nothing is done after an evaluation."""


class Session:
    """A trainer with its data, the best evaluation and the skipped images. Made by :func:`start_session`.

    Rank 0 prints, logs, saves and scores; all ranks train and detect.
    """

    def __init__(self, config: TrainConfig, data: TrainingData, trainer: Trainer, buckets: AspectBuckets) -> None:
        self.config, self.data, self.trainer, self.buckets = config, data, trainer, buckets
        self.goals = Goals(config, data.evaluated.taxonomy)
        self._best: Validated | None = None
        self._history: dict[int, list[float]] = {}
        self._after_evaluation: AfterEvaluation = ignore
        self.best_step = 0
        """Step of the best evaluation."""
        self._curve: dict[str, Any] | None = None
        self._skipped = SkippedImages()
        self._on_bad_image = self._skipped.add if config.on_bad_image == "skip" else None

    def train(
        self,
        run: Run,
        folder: Path,
        stop: StopRequest,
        *,
        best_before: Path | None = None,
        after_evaluation: AfterEvaluation = ignore,
    ) -> Path:
        """Train the remaining epochs; ``last.pt`` within and after each, ``best.pt`` whenever ``keep_best`` rises.

        Returns the best. ``best_before``: the best checkpoint of the training that is resumed. ``after_evaluation`` is
        called on rank 0 with each evaluation. Raises Interrupted on
        request, TrainingError when the training cannot continue and WorkerError when a loader worker dies.
        """
        self._after_evaluation = after_evaluation
        trainer, length = self.trainer, epoch_length(self.config, self.data)
        checkpoints = Checkpoints(folder, trainer, self.data, self.config, self.buckets)
        if best_before is not None:
            checkpoints.take_over(best_before)
        quiet = not trainer.world.is_first
        self.goals.start()
        with (
            self._logged_at_the_end(run, checkpoints),
            _dead_loader_named(trainer, checkpoints.last),
            Progress(run, trainer, length, stop, quiet=quiet, curve=self._curve) as progress,
        ):
            try:
                self._train_epochs(run, checkpoints, progress, stop)
            except (Interrupted, TrainingError) as reason:
                # Both come between two steps: the state is whole. Weights that have diverged must not replace others.
                if trainer.is_sound:
                    checkpoints.save_last(self._progress(run, progress))
                if isinstance(reason, TrainingError):
                    raise TrainingError(f"{reason} {checkpoints.what_last_holds}") from None
                raise
        return checkpoints.best if checkpoints.best.is_file() else checkpoints.last

    def _train_epochs(self, run: Run, checkpoints: Checkpoints, progress: Progress, stop: StopRequest) -> None:
        config, trainer = self.config, self.trainer

        def after_step(step: StepResult) -> None:
            progress.after_step(step)
            if step.step < trainer.step:
                # Read with later ones, whose state it is.
                return
            # A diverging training is not saved over what was good.
            if trainer.world.any(checkpoints.is_due) and trainer.check():
                checkpoints.save_last(self._progress(run, progress))
            progress.stop_if_asked()

        if self._is_over():
            return
        for epoch in trainer.fit(
            build_dataset(config, self.data),
            self.buckets,
            plans(config, self.data),
            rare_augment_from=first_balanced_epoch(config.epochs, balance_start=config.balance_start),
            after_step=after_step,
            on_bad_image=self._on_bad_image,
        ):
            trainer.check()
            validated = self._validate_epoch(run, epoch, checkpoints, stop)
            self._collect_skipped()
            trainer.finish_epoch()
            progress.after_epoch(epoch, None if validated is None else validated.evaluation.metrics)
            checkpoints.save_last(self._progress(run, progress), must=epoch.epoch == config.epochs)
            if self._is_over():
                break

    def evaluate_best(self, path: Path, stop: StopRequest) -> Validated:
        """Detections and scores of the best checkpoint; evaluated again only when an earlier process wrote it."""
        best = self._best
        if best is None:
            checkpoint = load_checkpoint(path)
            best = self._validate(checkpoint.build(self.trainer.device), checkpoint, stop, ALONE)
        assert best is not None
        return best

    def _validate_epoch(
        self, run: Run, epoch: EpochResult, checkpoints: Checkpoints, stop: StopRequest
    ) -> Validated | None:
        """Evaluate the present weights every ``eval_every`` epochs and after the last; save them when best so far."""
        config, world = self.config, self.trainer.world
        if epoch.epoch % config.eval_every and epoch.epoch != config.epochs:
            return None
        checkpoint = checkpoints.current()
        validated = self._validate(self.trainer.evaluated_model, checkpoint, stop, world)
        outcome, metrics = None, {}
        if validated is not None:
            metrics = measured(validated.evaluation)
            run.log_metrics(validated.evaluation.metrics, step=epoch.step)
            self._history[epoch.epoch] = validated.evaluation.scores.ap.tolist()
            self._after_evaluation(EvaluatedEpoch(validated, epoch.step, self._history))
            outcome = self.goals.value(metrics, epoch=epoch.epoch), self.goals.reaches_target(metrics)
        outcome = world.broadcast(outcome)
        assert outcome is not None
        value, reached = outcome
        if self.goals.add(value, metrics):
            self._best, self.best_step = validated, epoch.step
            checkpoints.save_best(checkpoint)
        if reached:
            self.goals.seconds_to_target = self.goals.seconds
            run.log_metrics({TIME_TO_TARGET: self.goals.seconds_to_target}, step=epoch.step)
        return validated

    def _validate(self, model: RetinaNet, checkpoint: Checkpoint, stop: StopRequest, world: World) -> Validated | None:
        detector = Detector.around(model, checkpoint, DetectorSettings(workers=self.config.workers))
        found = validate(detector, self.data, self.config, stop=stop, world=world, on_bad_image=self._on_bad_image)
        if found is None:
            return None
        named = self.goals.named_classes(measured(found.evaluation))
        evaluation = replace(found.evaluation, metrics={**found.evaluation.metrics, **named})
        return replace(found, evaluation=evaluation)

    def _is_over(self) -> bool:
        return self.goals.is_over(epoch=self.trainer.epoch)

    def _progress(self, run: Run, progress: Progress) -> dict[str, Any]:
        """What a checkpoint stores of this session; :meth:`restore` reads it."""
        return {
            **self.goals.stored(),
            "best_step": self.best_step,
            "history": dict(self._history),
            "skipped": [[image.image_id, image.reason] for image in self._skipped.images],
            "run_id": run.run_id,
            "curve": progress.curve,
        }

    def restore(self, progress: dict[str, Any]) -> None:
        """Continue from what a checkpoint stored."""
        self.goals.restore(progress)
        self._curve = progress["curve"]
        self.best_step, self._history = progress["best_step"], dict(progress["history"])
        for image_id, reason in progress["skipped"]:
            self._skipped.add(BadImage(image_id, reason))

    def _collect_skipped(self) -> None:
        """Bring the images that other ranks skipped to rank 0."""
        for images in self.trainer.world.all_gather(self._skipped.images):
            for image in images:
                self._skipped.add(image)

    @contextlib.contextmanager
    def _logged_at_the_end(self, run: Run, checkpoints: Checkpoints) -> Iterator[None]:
        """Log skipped images and checkpoints, however the block ends."""
        try:
            yield
        finally:
            if self.trainer.world.is_first:
                self._skipped.log(run.log_csv, self.data.dropped)
            checkpoints.log(run)


def start_session(
    config: TrainConfig, data: TrainingData, resumed: Checkpoint | None, *, world: World = ALONE
) -> Session:
    """Build the detector, with the weights of the settings or of a checkpoint to resume from.

    Raises DataError when the ranks read different data, SettingError when settings, data and checkpoint do not fit.
    """
    _refuse_different_data(data, world)
    if resumed is None:
        buckets = AspectBuckets.fit(data.train.sizes, image_size=config.image_size, num_buckets=config.num_buckets)
    else:
        _refuse_other_data(resumed, data)
        buckets = resumed.buckets
    trainer = build_trainer(config, data, world, load=resumed is None)
    session = Session(config, data, trainer, buckets)
    if resumed is not None and resumed.progress is not None:
        try:
            check_progress(resumed.progress)
            trainer.load(resumed.state, resumed.progress)
            session.restore(resumed.progress)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            what = f"it lacks {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:200]
            raise DataError(f"{resumed.origin}: a training of this version cannot resume from it: {what}") from None
        report(f"resumed after step {trainer.step}, in epoch {trainer.epoch + 1}")
    shapes = ", ".join(f"{height}x{width}" for height, width in buckets.shapes)
    where = f"{trainer.device.type} in {world.size} ranks" if world.size > 1 else trainer.device.type
    report(f"{config.backbone} on {where}, {trainer.precision}, images of {shapes} (height x width)")
    if resumed is None and world.is_first:
        report_missed_boxes(config, data, buckets)
    return session


def machine_tags(trainer: Trainer) -> dict[str, str]:
    """Tags of a run: device, number of ranks and precision."""
    return {
        "retinaflow.device": trainer.device.type,
        "retinaflow.precision": trainer.precision,
        "retinaflow.processes": str(trainer.world.size),
    }


def _refuse_different_data(data: TrainingData, world: World) -> None:
    digests = world.all_gather(data.digest)
    if len(set(digests)) > 1:
        raise DataError(f"all ranks must read the same data, but their digests are {', '.join(digests)}, by rank")


def _refuse_other_data(resumed: Checkpoint, data: TrainingData) -> None:
    if resumed.data_digest != data.digest:
        raise SettingError(
            f"resume: the data must be that of the checkpoint, but its digest is {data.digest}, the checkpoint's "
            f"{resumed.data_digest}"
        )


@contextlib.contextmanager
def _dead_loader_named(trainer: Trainer, last: Path) -> Iterator[None]:
    """Turn the death of a loader worker into a WorkerError. The state may be half a step, and is not saved."""
    try:
        yield
    except RuntimeError as error:
        died = re.search(r"DataLoader worker \(pid\S* ([\d, ]+)\)(.*)", str(error))
        if died is None:
            raise
        raise WorkerError(
            f"loader worker {died[1]}{died[2].rstrip(' .')} after step {trainer.step}, often because memory ran out; "
            f"resume= resumes from {last}, with fewer workers= or a smaller batch_size= if it happens again"
        ) from error
