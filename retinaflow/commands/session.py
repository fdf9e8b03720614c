"""One training in progress: building the detector, its epochs, keeping the best, and judging a checkpoint."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from retinaflow import tracking
from retinaflow.commands.inputs import TrainingData, epoch_length, plans, say
from retinaflow.commands.judging import Judgement, judge, postprocessing
from retinaflow.commands.progress import Progress
from retinaflow.config import TrainConfig
from retinaflow.data.augmentation import Augmentation
from retinaflow.data.batching import AspectBuckets
from retinaflow.data.images import DetectionDataset
from retinaflow.detections import Detections
from retinaflow.detector.loss import LossConfig
from retinaflow.detector.network import HeadNorm, NetworkConfig, RetinaNet, norm_for, trainable_layers_for
from retinaflow.detector.weights import load_weights
from retinaflow.run_files import Run
from retinaflow.training.checkpoint import Checkpoint, load_checkpoint, on_device, save_checkpoint
from retinaflow.training.inference import detect
from retinaflow.training.loop import EpochResult, FitSettings, Trainer
from retinaflow.training.precision import Precision, fast_precision
from retinaflow.training.stopping import StopRequest


@dataclass(frozen=True)
class Resumed:
    """A checkpoint to go on from, the best one before it, and the MLflow run they belong to, if any."""

    checkpoint: Checkpoint
    best: Path | None
    run_id: str | None


def find_resumed(config: TrainConfig) -> Resumed | None:
    """The checkpoint to go on from; for a run id its ``last.pt``, here or among the run's artifacts."""
    if config.resume is None:
        return None
    if Path(config.resume).is_file():
        path, run_id = Path(config.resume), None
    elif Path(config.resume).suffix == ".pt":
        raise FileNotFoundError(f"resume={config.resume}: no such checkpoint file")
    else:
        folder = config.output / config.resume / "checkpoints"
        if not (folder / "last.pt").is_file():
            folder = tracking.fetch(config.resume, "checkpoints")
        path, run_id = folder / "last.pt", config.resume
    checkpoint = load_checkpoint(path)
    if checkpoint.progress is None:
        raise ValueError(f"resume={config.resume}: the checkpoint is for use, not for going on; give a last.pt")
    best = path.with_name("best.pt")
    return Resumed(checkpoint, best if best.is_file() else None, run_id)


class Session:
    """One training in progress: the trainer, what it trains on, and the best so far."""

    def __init__(self, config: TrainConfig, data: TrainingData, trainer: Trainer, buckets: AspectBuckets) -> None:
        self.config = config
        self.data = data
        self.trainer = trainer
        self.buckets = buckets
        self.best = float("-inf")
        self._best_found: tuple[Detections, Judgement] | None = None

    @staticmethod
    def start(config: TrainConfig, data: TrainingData, resumed: Checkpoint | None) -> Session:
        """Build the detector, with weights from the settings or from a checkpoint to go on from."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        precision = fast_precision(device) if config.precision == "auto" else config.precision
        buckets = (
            resumed.buckets
            if resumed
            else AspectBuckets.fit(
                data.train.sizes, image_size=_number(config.image_size), num_buckets=_number(config.num_buckets)
            )
        )
        model = RetinaNet(_network(config, data.train.num_classes), seed=config.seed)
        if resumed is None:
            report = load_weights(model, config.weights)
            say(str(report))
        else:
            _refuse_other_data(resumed, data)
            model.load_state_dict(resumed.state)
        model = on_device(model, device)
        ancestors = torch.from_numpy(data.train.taxonomy.is_ancestor)
        trainer = Trainer(
            model,
            fit_settings(config, precision=precision, device=device),
            device=device,
            ancestors=None if config.parents == "ignore" else ancestors,
        )
        session = Session(config, data, trainer, buckets)
        if resumed is not None and resumed.progress is not None:
            trainer.load_state(resumed.progress)
            session.best = resumed.progress["best"]
        shapes = ", ".join(f"{height}x{width}" for height, width in buckets.shapes)
        say(f"{config.backbone} on {device.type}, {precision}, images of {shapes} (height x width)")
        return session

    def train(self, run: Run, folder: Path, stop: StopRequest, *, best_before: Path | None = None) -> Path:
        """The remaining epochs; ``last.pt`` after each, ``best.pt`` whenever val/mAP rises. Returns the best.

        ``best_before``: the best checkpoint of the training that is gone on with.
        """
        config, trainer = self.config, self.trainer
        assert isinstance(config.eval_every, int)
        augmentation = Augmentation.by_rarity(
            self.data.bins, base=config.augment, rare=config.rare_augment, vertical_flip=config.vertical_flip
        )
        dataset = DetectionDataset(self.data.train, augmentation)
        best = folder / "best.pt"
        if best_before is not None and best_before.resolve() != best.resolve():
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(best_before, best)
        try:
            with Progress(run, trainer, epoch_length(config, self.data), stop) as progress:
                for epoch in trainer.fit(
                    dataset, self.buckets, plans(config, self.data), after_step=progress.after_step
                ):
                    last_epoch = epoch.epoch == trainer.settings.epochs
                    value = None
                    if epoch.epoch % config.eval_every == 0 or last_epoch:
                        value = self._evaluate(run, epoch, best, stop)
                    save_checkpoint(self.checkpoint(progress=True), folder / "last.pt")
                    progress.after_epoch(epoch, value)
        finally:
            for path in (folder / "last.pt", best):
                if path.is_file():
                    run.log_file(path, "checkpoints")
        return best if best.is_file() else folder / "last.pt"

    def _evaluate(self, run: Run, epoch: EpochResult, best: Path, stop: StopRequest) -> float:
        """Judge the present weights; keep them, and what they found, when they are the best so far."""
        found = self._judge(self.trainer.model, stop)
        metrics = found[1].metrics
        run.log_metrics(metrics, step=epoch.step)
        # No class with truth: every epoch is as good as any, and the last one is kept.
        value = metrics.get("val/mAP", float(epoch.epoch))
        if value > self.best:
            self.best, self._best_found = value, found
            save_checkpoint(self.checkpoint(progress=False), best)
        return value

    def machine_tags(self) -> dict[str, str]:
        """What the machine decided: where it computes and with which arithmetic."""
        trainer = self.trainer
        return {"retinaflow.device": trainer.device.type, "retinaflow.precision": trainer.settings.precision}

    def judge_best(self, path: Path, stop: StopRequest) -> tuple[Detections, Judgement]:
        """Detections and scores of the best checkpoint, judged anew only when an earlier process wrote it."""
        return self._best_found or self._judge(load_checkpoint(path).build(self.trainer.device), stop)

    def _judge(self, model: RetinaNet, stop: StopRequest) -> tuple[Detections, Judgement]:
        trainer, config = self.trainer, self.config
        expand = config.parents == "expand"
        parts = detect(
            model,
            self.data.judged,
            self.buckets,
            config=postprocessing(config),
            expand_to=torch.from_numpy(self.data.judged.taxonomy.is_ancestor).to(trainer.device) if expand else None,
            workers=trainer.settings.workers,
            device=trainer.device,
            precision=trainer.settings.precision,
            after_batch=lambda images: stop.check(),
        )
        detections = Detections.concatenate(list(parts))
        bins = self.data.scored_bins or self.data.bins
        judgement = judge(detections, self.data.judged, bins, group_of_weight=config.group_of_weight)
        return detections, judgement

    def checkpoint(self, *, progress: bool) -> Checkpoint:
        """The present state as a checkpoint, with or without what going on needs."""
        trainer = self.trainer
        return Checkpoint(
            network=trainer.model.config,
            state={name: value.cpu() for name, value in trainer.model.state_dict().items()},
            taxonomy=self.data.train.taxonomy,
            bins=self.data.bins,
            buckets=self.buckets,
            parents=self.config.parents,
            settings=self.config.model_dump(mode="json"),
            data_digest=self.data.digest,
            epoch=trainer.epoch,
            progress={**trainer.state(), "best": self.best} if progress else None,
        )


def fit_settings(config: TrainConfig, *, precision: Precision, device: torch.device) -> FitSettings:
    """The optimisation settings, with what depends on data and machine filled in."""
    automatic = min(8, torch.get_num_threads()) if device.type == "cuda" else 0
    return FitSettings(
        epochs=_number(config.epochs),
        batch_size=_number(config.batch_size),
        lr=float(config.lr),
        weight_decay=config.weight_decay,
        warmup=config.warmup,
        clip=config.clip,
        precision=precision,
        workers=automatic if config.workers < 0 else config.workers,
        seed=config.seed,
        loss=LossConfig(
            gamma=config.focal_gamma,
            alpha=config.focal_alpha,
            learn_ancestors=config.parents == "learn",
            box_loss=config.box_loss,
        ),
    )


def _network(config: TrainConfig, num_classes: int) -> NetworkConfig:
    return NetworkConfig(
        backbone=config.backbone,
        num_classes=num_classes,
        anchor_scale=float(config.anchor_scale),
        trainable_layers=trainable_layers_for(config.weights),
        norm=norm_for(config.weights),
        head_norm=_resolved_norm(config),
        head_depth=_number(config.head_depth),
        fpn_channels=_number(config.fpn_channels),
    )


def _resolved_norm(config: TrainConfig) -> HeadNorm:
    if config.head_norm == "auto":
        raise ValueError("auto settings must be resolved before use, but got head_norm=auto")
    return config.head_norm


def _number(value: int | str) -> int:
    """A setting that may have been ``auto``: :func:`retinaflow.resolving.resolve` has filled it in."""
    if not isinstance(value, int):
        raise ValueError(f"auto settings must be resolved before use, but got {value!r}")
    return value


def _refuse_other_data(resumed: Checkpoint, data: TrainingData) -> None:
    if resumed.data_digest != data.digest:
        raise ValueError(
            f"resume: the data must be that of the checkpoint, but its digest is {data.digest}, the checkpoint's "
            f"{resumed.data_digest}"
        )
