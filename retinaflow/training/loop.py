"""Training as a generator: every epoch is one :class:`EpochResult`, and what to do with it is the caller's business.

All randomness is a function of (seed, epoch, place in the plan), so the place alone is remembered: resuming from
:meth:`Trainer.state`, taken after any step, gives what an uninterrupted training gives, bit for bit on a CPU. What a
step is stands in ``step``.

The epoch's images come from ``plans(epoch)``: the loop knows nothing of sampling strategies.
"""

from __future__ import annotations

import math
import statistics
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from retinaflow.data.batching import AspectBuckets, PlannedBatch, plan_batches
from retinaflow.data.dataset import Batch, BatchLoader, DetectionDataset
from retinaflow.data.images import BadImage
from retinaflow.detector.device import Precision
from retinaflow.detector.loss import LossConfig
from retinaflow.detector.network import RetinaNet
from retinaflow.training.averaging import WeightAverage
from retinaflow.training.distributed import ALONE, World
from retinaflow.training.optimizer import OptimizerName, make_optimizer
from retinaflow.training.schedule import Schedule, learning_rate
from retinaflow.training.step import NotFinite, Stepper
from retinaflow.training.synced_norm import sync_batch_norms

RECENT_LOSSES = 50
"""Steps whose losses are remembered, to see whether the loss had grown when a step fails."""


@dataclass(frozen=True)
class FitSettings:
    """Everything about the optimisation; meanings as in ``TrainConfig``. ``workers``: of each process."""

    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    warmup: float
    clip: float
    precision: Precision
    workers: int
    seed: int
    loss: LossConfig
    optimizer: OptimizerName = "adamw"
    momentum: float = 0.9
    schedule: Schedule = "cosine"
    milestones: tuple[float, ...] = ()
    lr_drop: float = 0.1
    accumulate: int = 1
    ema: float = 0.0


@dataclass(frozen=True)
class StepResult:
    """Figures of one step over all processes, for progress and curves."""

    step: int
    loss_class: float
    loss_box: float
    lr: float
    gradient_norm: float
    """Before clipping."""
    images: int
    """Images seen since the training began."""


@dataclass(frozen=True)
class EpochResult:
    """Means over the images of one epoch; ``epoch`` counts from 1."""

    epoch: int
    step: int
    loss_class: float
    loss_box: float
    lr: float
    images: int
    images_per_second: float
    """Of what this process did of the epoch, waiting for images included."""
    waiting: float
    """Share of that time spent waiting for images, in [0, 1]."""


@dataclass
class _Open:
    """The epoch in progress. ``batches``: done, of each process. ``sums``: of class and box loss times images."""

    batches: int = 0
    images: int = 0
    sums: tuple[float, float] = (0.0, 0.0)
    plan: int = 0
    """Checksum of the epoch's plan, which a resumed training must find again."""


class Trainer:
    """A model with its optimizer and position: what :meth:`fit` moves on and a checkpoint keeps."""

    def __init__(
        self,
        model: RetinaNet,
        settings: FitSettings,
        *,
        device: torch.device,
        ancestors: Tensor | None = None,
        world: World = ALONE,
    ) -> None:
        if settings.batch_size % world.size:
            raise ValueError(
                f"batch_size must be a multiple of the number of processes, but got batch_size={settings.batch_size}, "
                f"nproc={world.size}"
            )
        self.model = model
        self.settings = settings
        self.device = device
        self.world = world
        self.epoch = 0
        self.step = 0
        self._open = _Open()
        self._losses: deque[float] = deque(maxlen=RECENT_LOSSES)
        self._average = WeightAverage(model, decay=settings.ema) if settings.ema > 0 else None
        sync_batch_norms(model, world)
        self._optimizer = make_optimizer(
            settings.optimizer,
            model,
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            momentum=settings.momentum,
        )
        self._stepper = Stepper(
            model,
            self._optimizer,
            loss=settings.loss,
            clip=settings.clip,
            precision=settings.precision,
            device=device,
            ancestors=None if ancestors is None else ancestors.to(device),
            world=world,
        )

    @property
    def best_guess(self) -> RetinaNet:
        """The detector to evaluate and to keep: the average of the weights where there is one."""
        return self.model if self._average is None else self._average.model

    def images_seen(self, epoch_length: int) -> int:
        """Images since the training began, in epochs of ``epoch_length`` images."""
        return self.epoch * epoch_length + self._open.images

    def state(self) -> dict[str, Any]:
        """Everything but the weights of ``best_guess`` that going on needs; tensors and plain values only.

        No random state is in it: every draw is a function of the seed and the place in the plan.
        """
        average = self._average
        return {
            "optimizer": self._optimizer.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "open": vars(self._open) | {"sums": list(self._open.sums)},
            "average_updates": None if average is None else average.updates,
            "last_weights": None if average is None else self.model.state_dict(),
        }

    def load(self, weights: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Go on from the weights of ``best_guess`` and what :meth:`state` gave."""
        self.best_guess.load_state_dict(weights)
        if self._average is not None and state["average_updates"] is not None:
            self.model.load_state_dict(state["last_weights"])
            self._average.updates = state["average_updates"]
        self._optimizer.load_state_dict(state["optimizer"])
        self.epoch, self.step = state["epoch"], state["step"]
        self._open = _Open(**{**state["open"], "sums": tuple(state["open"]["sums"])})

    def fit(
        self,
        dataset: DetectionDataset,
        buckets: AspectBuckets,
        plans: Callable[[int], NDArray[np.int64]],
        *,
        rare_augment_from: int = 0,
        after_step: Callable[[StepResult], None] = lambda result: None,
        on_bad_image: Callable[[BadImage], None] | None = None,
    ) -> Iterator[EpochResult]:
        """Train the remaining epochs. ``plans(epoch)`` gives the image indices of an epoch (from 0), in drawing order.

        Before the epoch ``rare_augment_from`` (from 0) all images are augmented with the base strength.
        ``after_step`` may raise to stop. ``on_bad_image`` is told of images that cannot be read any more; without it
        such an image is a ValueError. A result is given while its epoch is still open, so that a state taken before
        :meth:`finish_epoch` (or asking for the next result) leads to the same result again. Raises FloatingPointError
        when losses or gradients are not finite, and ValueError when a plan is not the one the training began with.
        """
        workers = self.settings.workers
        loader = BatchLoader(dataset, workers=workers, pin_memory=self.device.type == "cuda")
        bucket_of_image = buckets.assign(np.asarray(dataset.index.sizes))
        while self.epoch < self.settings.epochs:
            epoch, plan = self.epoch, self._checked(plans(self.epoch))
            batches = plan_batches(
                plan,
                bucket_of_image,
                buckets,
                batch_size=self.settings.batch_size // self.world.size,
                rank=self.world.rank,
                world_size=self.world.size,
            )
            self.model.train()
            loaded = self._loaded(loader, batches, epoch >= rare_augment_from, on_bad_image)
            yield self._train_epoch(loaded, len(batches), len(plan), dataset, after_step)
            if self.epoch == epoch:
                self.finish_epoch()

    def finish_epoch(self) -> None:
        """Close the epoch whose result was given: a state taken from now on resumes the next one."""
        self.epoch += 1
        self._open = _Open()

    def _checked(self, plan: NDArray[np.int64]) -> NDArray[np.int64]:
        checksum = zlib.crc32(np.ascontiguousarray(plan).tobytes())
        if self._open.batches and self._open.plan != checksum:
            raise ValueError(
                f"epoch {self.epoch + 1} must be resumed by the plan it began with, but the settings give another "
                "one; leave out those that change the drawing of images (epochs changes when balance_start ends)"
            )
        self._open.plan = checksum
        return plan

    def _loaded(
        self,
        loader: BatchLoader,
        batches: Sequence[PlannedBatch],
        by_class: bool,
        on_bad_image: Callable[[BadImage], None] | None,
    ) -> Iterator[Batch]:
        """The epoch's batches from the present place on; what a batch is does not depend on those before it."""
        seed = self.settings.seed, self.epoch
        left = batches[self._open.batches :]
        return iter(loader.load(left, seed=seed, by_class=by_class, on_bad_image=on_bad_image))

    def _train_epoch(
        self,
        loaded: Iterator[Batch],
        batches: int,
        length: int,
        dataset: DetectionDataset,
        after_step: Callable[[StepResult], None],
    ) -> EpochResult:
        settings, progress = self.settings, self._open
        steps = -(-batches // settings.accumulate) * settings.epochs
        start, before, waited = time.perf_counter(), progress.images, 0.0
        lr = self._learning_rate(max(self.step - 1, 0), steps)
        while True:
            asked = time.perf_counter()
            part = list(islice(loaded, settings.accumulate))
            waited += time.perf_counter() - asked
            if not part:
                break
            lr = self._learning_rate(self.step, steps)
            try:
                done = self._stepper.take(part, lr)
            except NotFinite as fault:
                raise FloatingPointError(self._described(fault, lr, dataset)) from None
            if self._average is not None:
                self._average.update(self.model)
            self.step += 1
            self._losses.append(done.loss_class + done.loss_box)
            progress.batches += len(part)
            progress.images += done.images
            sums = progress.sums
            progress.sums = sums[0] + done.loss_class * done.images, sums[1] + done.loss_box * done.images
            seen = self.epoch * length + progress.images
            after_step(StepResult(self.step, done.loss_class, done.loss_box, lr, done.gradient_norm, seen))
        seconds = max(time.perf_counter() - start, 1e-9)
        return EpochResult(
            epoch=self.epoch + 1,
            step=self.step,
            loss_class=progress.sums[0] / max(progress.images, 1),
            loss_box=progress.sums[1] / max(progress.images, 1),
            lr=lr,
            images=(self.epoch + 1) * length,
            images_per_second=(progress.images - before) / seconds,
            waiting=waited / seconds,
        )

    def _learning_rate(self, step: int, steps: int) -> float:
        settings = self.settings
        return learning_rate(
            step,
            steps,
            highest=settings.lr,
            warmup=settings.warmup,
            schedule=settings.schedule,
            milestones=settings.milestones,
            drop=settings.lr_drop,
        )

    def _described(self, fault: NotFinite, lr: float, dataset: DetectionDataset) -> str:
        ids = ", ".join(str(dataset.index.image_ids[image]) for image in fault.images)
        advice = (
            f"The loss has grown from {statistics.median(self._losses):.3g}: lower lr."
            if has_grown([*self._losses, fault.loss])
            else "The losses before were ordinary: look at these images and their boxes"
            + ("." if self.settings.precision == "float32" else ", or try precision=float32.")
        )
        return f"{fault} at step {self.step}, lr={lr:.3g}, images {ids}. {advice}"


def has_grown(losses: Sequence[float]) -> bool:
    """Whether the latest finite losses (up to three, the last is the newest) are more than twice the median of those
    before them; False when fewer than two are before."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    earlier = finite[:-3] or finite[:-1]
    return len(earlier) >= 2 and max(finite[-3:]) > 2 * statistics.median(earlier)
