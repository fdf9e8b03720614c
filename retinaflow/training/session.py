"""One training in progress: building the detector, its epochs, keeping the best, and evaluating a checkpoint."""

from __future__ import annotations

import re
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from retinaflow.data.augmentation import Augmentation
from retinaflow.data.batching import AspectBuckets
from retinaflow.data.dataset import MAX_REPLACEMENTS, DetectionDataset, keep_rates
from retinaflow.data.images import BadImage
from retinaflow.data.sampling import first_balanced_epoch
from retinaflow.data.skipped_images import SkippedImages
from retinaflow.data.training_data import TrainingData, epoch_length, plans
from retinaflow.detections import Detections
from retinaflow.detector.device import loader_workers
from retinaflow.detector.network import RetinaNet
from retinaflow.detector.precision import fast_precision
from retinaflow.detector.weights import load_weights
from retinaflow.errors import Interrupted, SettingError, TrainingError, WorkerError
from retinaflow.inference.batches import detect, merged
from retinaflow.inference.checkpoint import Checkpoint, load_checkpoint, on_device, save_checkpoint
from retinaflow.interrupts import StopRequest
from retinaflow.metric.result import EvaluationResult, score_detections
from retinaflow.progress import report
from retinaflow.runs.run import Run
from retinaflow.settings.commands import TrainConfig
from retinaflow.settings.resolve import with_absolute_paths
from retinaflow.settings.training_groups import NetworkSettings
from retinaflow.training.anchor_fit import SCALES, BoxSample, advice, class_reach
from retinaflow.training.class_loss import loss_config
from retinaflow.training.compilation import compile_network
from retinaflow.training.distributed import ALONE, World
from retinaflow.training.loop import EpochResult, StepResult, Trainer
from retinaflow.training.progress import Progress


class Session:
    """One training in progress: the trainer, what it trains on, and the best so far.

    Of several processes the first one prints, logs, saves and scores; all of them train and detect.
    """

    def __init__(
        self, config: TrainConfig, data: TrainingData, trainer: Trainer, buckets: AspectBuckets, world: World = ALONE
    ) -> None:
        self.config = config
        self.data = data
        self.trainer = trainer
        self.buckets = buckets
        self.world = world
        self.best = float("-inf")
        self.without_gain = 0
        """Evaluations since the best one."""
        self._best_found: tuple[Detections, EvaluationResult] | None = None
        self._curve: dict[str, Any] | None = None
        self._last_saved = float("-inf")
        self._skipped = SkippedImages()
        self._on_bad_image = self._skipped.add if config.on_bad_image == "skip" else None

    @staticmethod
    def start(config: TrainConfig, data: TrainingData, resumed: Checkpoint | None, *, world: World = ALONE) -> Session:
        """Build the detector, with weights from the settings or from a checkpoint to resume from."""
        device = torch.device("cuda", world.local_rank) if torch.cuda.is_available() else torch.device("cpu")
        precision = fast_precision(device) if config.precision == "auto" else config.precision
        buckets = (
            resumed.buckets
            if resumed
            else AspectBuckets.fit(data.train.sizes, image_size=config.image_size, num_buckets=config.num_buckets)
        )
        model = RetinaNet(config.part(NetworkSettings), data.train.num_classes, seed=config.seed)
        if resumed is None:
            with world.first_on_machine():
                report(str(load_weights(model, config.weights)))
        else:
            _refuse_other_data(resumed, data)
        model = on_device(model, device)
        if config.compile:
            compile_network(model, device)
        ancestors = torch.from_numpy(data.train.taxonomy.is_ancestor)
        trainer = Trainer(
            model,
            config,
            loss=loss_config(config, data.bins, learn_ancestors=config.parents == "learn"),
            precision=precision,
            device=device,
            workers=loader_workers(config.workers, device),
            ancestors=None if config.parents == "ignore" else ancestors,
            world=world,
        )
        session = Session(config, data, trainer, buckets, world)
        if resumed is not None and resumed.progress is not None:
            trainer.load(resumed.state, resumed.progress)
            session.best, session.without_gain = resumed.progress["best"], resumed.progress["without_gain"]
            session._curve = resumed.progress["curve"]
            for image_id, reason in resumed.progress["skipped"]:
                session._skipped.add(BadImage(image_id, reason))
            report(f"resumed after step {trainer.step}, in epoch {trainer.epoch + 1}")
        shapes = ", ".join(f"{height}x{width}" for height, width in buckets.shapes)
        many = f" in {world.size} processes" if world.size > 1 else ""
        report(f"{config.backbone} on {device.type}{many}, {precision}, images of {shapes} (height x width)")
        if resumed is None and world.is_first:
            _report_missed_boxes(config, data, buckets)
        return session

    def train(self, run: Run, folder: Path, stop: StopRequest, *, best_before: Path | None = None) -> Path:
        """The remaining epochs; ``last.pt`` within and after each, ``best.pt`` whenever ``keep_best`` rises.

        Returns the best. ``best_before``: the best checkpoint of the training that is resumed.
        """
        config, trainer = self.config, self.trainer
        dataset = self._dataset()
        best, last = folder / "best.pt", folder / "last.pt"
        if best_before is not None and best_before.resolve() != best.resolve():
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(best_before, best)
        length = epoch_length(config, self.data)
        try:
            with Progress(run, trainer, length, stop, quiet=not self.world.is_first, curve=self._curve) as progress:

                def after_step(step: StepResult) -> None:
                    progress.after_step(step)
                    self._save_when_due(last, run, progress)
                    progress.stop_if_asked()

                if not self._is_over():
                    for epoch in trainer.fit(
                        dataset,
                        self.buckets,
                        plans(config, self.data),
                        rare_augment_from=first_balanced_epoch(config.epochs, balance_start=config.balance_start),
                        after_step=after_step,
                        on_bad_image=self._on_bad_image,
                    ):
                        evaluation = self._evaluate(run, epoch, best, stop)
                        self._collect_skipped()
                        trainer.finish_epoch()
                        progress.after_epoch(epoch, None if evaluation is None else evaluation.metrics)
                        self._save(last, run, progress, must=epoch.epoch == trainer.settings.epochs)
                        if self._is_over():
                            break
        except (Interrupted, TrainingError) as reason:
            # Both come between two steps: the state is whole.
            self._save(last, run, progress)
            if isinstance(reason, TrainingError):
                raise TrainingError(f"{reason} The state before this step is in {last}.") from None
            raise
        except RuntimeError as error:
            died = re.search(r"DataLoader worker \(pid\S* ([\d, ]+)\)(.*)", str(error))
            if died is None:
                raise
            # Its death interrupts whatever was being done: the state may be half a step, and is not saved.
            raise WorkerError(
                f"loader worker {died[1]}{died[2].rstrip(' .')} after step {trainer.step}, often for want of memory; "
                f"resume= resumes from {last}, with fewer workers= or a smaller batch_size= if it happens again"
            ) from error
        finally:
            if self.world.is_first:
                self._skipped.log(run.log_csv, self.data.dropped)
            for path in (last, best):
                if self.world.is_first and path.is_file():
                    run.log_file(path, "checkpoints")
        return best if best.is_file() else last

    def _dataset(self) -> DetectionDataset:
        """The training images, augmented as the settings say."""
        config = self.config
        augmentation = Augmentation.by_rarity(
            self.data.bins,
            base=config.augment,
            rare=config.rare_augment,
            balance=config.balance,
            vertical_flip=config.vertical_flip,
        )
        return DetectionDataset(
            self.data.train,
            augmentation,
            replacements=MAX_REPLACEMENTS if self._on_bad_image else 0,
            keep_rate=keep_rates(self.data.train, most=config.max_boxes_per_class),
        )

    def _collect_skipped(self) -> None:
        """What the other ranks skipped, to the first one."""
        for images in self.world.all_gather(self._skipped.images):
            for image in images:
                self._skipped.add(image)

    def _is_over(self) -> bool:
        """Whether early stopping ends the training here."""
        patience = self.config.patience
        over = 0 < patience <= self.without_gain and self.trainer.epoch < self.trainer.settings.epochs
        if over:
            report(f"early stop: {self.config.keep_best} has not risen in {self.without_gain} evaluations")
        return over

    def _save_when_due(self, path: Path, run: Run, progress: Progress) -> None:
        """Within an epoch: after the first step and then every ``save_minutes``."""
        seconds = self.config.save_minutes * 60
        if seconds > 0 and time.monotonic() - self._last_saved >= seconds:
            self._save(path, run, progress)

    def _save(self, path: Path, run: Run, progress: Progress, *, must: bool = False) -> None:
        """Write the checkpoint to resume from. One that cannot be written stops only a training that ends with it
        (``must``): the last whole one is still there, and the next may find room."""
        if not self.world.is_first:
            return
        self._last_saved = time.monotonic()
        try:
            save_checkpoint(self.checkpoint(progress={"run_id": run.run_id, "curve": progress.curve}), path)
        except OSError as error:
            if must:
                raise
            report(f"no checkpoint at step {self.trainer.step}, training goes on: {error}")

    def _evaluate(self, run: Run, epoch: EpochResult, best: Path, stop: StopRequest) -> EvaluationResult | None:
        """Evaluate the present weights when their turn has come; keep them, and what they found, when best so far."""
        every = self.config.eval_every
        if epoch.epoch % every and epoch.epoch != self.trainer.settings.epochs:
            return None
        found = self._evaluate_model(self.trainer.evaluated_model, stop, self.world)
        value = None
        if found is not None:
            run.log_metrics(found[1].metrics, step=epoch.step)
            value = found[1].metrics.get(self.config.keep_best)
            if value is None:
                # No class with ground truth: every epoch is as good as any.
                report(f"{self.config.keep_best} cannot be measured on these images: the last epoch is kept")
                value = float(epoch.epoch)
        value = self.world.broadcast(value)
        assert value is not None
        self.without_gain += 1
        if value > self.best:
            self.best, self.without_gain, self._best_found = value, 0, found
            if self.world.is_first:
                save_checkpoint(self.checkpoint(), best)
        return None if found is None else found[1]

    def machine_tags(self) -> dict[str, str]:
        """What the machine decided: where it computes, in how many processes and with which arithmetic."""
        trainer = self.trainer
        return {
            "retinaflow.device": trainer.device.type,
            "retinaflow.precision": trainer.precision,
            "retinaflow.processes": str(self.world.size),
        }

    def evaluate_best(self, path: Path, stop: StopRequest) -> tuple[Detections, EvaluationResult]:
        """Detections and scores of the best checkpoint, evaluated anew only when an earlier process wrote it."""
        found = self._best_found or self._evaluate_model(load_checkpoint(path).build(self.trainer.device), stop, ALONE)
        assert found is not None
        return found

    def _evaluate_model(
        self, model: RetinaNet, stop: StopRequest, world: World
    ) -> tuple[Detections, EvaluationResult] | None:
        """Each process detects on its share of the images; the first one scores them all, the others get None."""
        trainer, config = self.trainer, self.config
        expand = config.parents == "expand"
        parts: list[Detections] = []
        try:
            for found in detect(
                model,
                self.data.evaluated,
                self.buckets,
                config=config,
                expand_to=torch.from_numpy(self.data.evaluated.taxonomy.is_ancestor).to(trainer.device)
                if expand
                else None,
                workers=trainer.workers,
                device=trainer.device,
                precision=trainer.precision,
                rank=world.rank,
                world_size=world.size,
                after_batch=lambda images: stop.check(),
                on_bad_image=self._on_bad_image,
            ):
                parts.append(found)
        except Interrupted:
            pass
        # All leave together: a process that went alone would leave the others waiting for it.
        if world.any(stop.reason is not None):
            raise Interrupted(stop.reason or "another rank was asked to stop")
        gathered = world.gather(parts)
        if gathered is None:
            return None
        detections = merged(gathered)
        bins = self.data.scored_bins or self.data.bins
        evaluation = score_detections(detections, self.data.evaluated, bins, group_of_weight=config.group_of_weight)
        return detections, evaluation

    def checkpoint(self, *, progress: dict[str, Any] | None = None) -> Checkpoint:
        """The present state as a checkpoint; ``progress``: what going on needs besides the training's own state."""
        trainer = self.trainer
        skipped = [[image.image_id, image.reason] for image in self._skipped.images]
        own = {"best": self.best, "without_gain": self.without_gain, "skipped": skipped}
        return Checkpoint(
            network=trainer.model.config,
            state={name: value.cpu() for name, value in trainer.evaluated_model.state_dict().items()},
            taxonomy=self.data.train.taxonomy,
            bins=self.data.bins,
            buckets=self.buckets,
            parents=self.config.parents,
            settings=with_absolute_paths(self.config),
            data_digest=self.data.digest,
            epoch=trainer.epoch,
            progress=None if progress is None else {**trainer.state(), **own, **progress},
        )


def _report_missed_boxes(config: TrainConfig, data: TrainingData, buckets: AspectBuckets) -> None:
    # Heads that are loaded have learned with their anchors.
    scales = SCALES if config.weights in ("none", "imagenet") else ()
    sample, anchor_scale = BoxSample.draw(data.train), config.anchor_scale
    line = advice(class_reach(sample, buckets, anchor_scale), sample, buckets, anchor_scale, scales=scales)
    if line:
        report(line)


def _refuse_other_data(resumed: Checkpoint, data: TrainingData) -> None:
    if resumed.data_digest != data.digest:
        raise SettingError(
            f"resume: the data must be that of the checkpoint, but its digest is {data.digest}, the checkpoint's "
            f"{resumed.data_digest}"
        )
