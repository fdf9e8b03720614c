"""Training as a generator: every epoch is one :class:`EpochResult`, and the caller decides what to do with it.

All randomness is a function of (seed, epoch, position in the plan), so the position alone is stored: resuming from
:meth:`Trainer.state`, taken after any step, gives what an uninterrupted training gives, bit for bit on a CPU. One step
is in ``step.py``.

The epoch's images come from ``plans(epoch)``: the loop knows nothing of sampling strategies.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from retinaflow.data.batching import MULTIPLE, AspectBuckets, PlannedBatch, plan_batches
from retinaflow.data.dataset import Batch, BatchLoader, DetectionDataset
from retinaflow.data.images import BadImage
from retinaflow.detector.detection_loss import LossConfig
from retinaflow.detector.device import Precision
from retinaflow.detector.network import RetinaNet
from retinaflow.errors import SettingError, TrainingError
from retinaflow.settings.training_settings import OptimizationSettings
from retinaflow.training.distributed import ALONE, World
from retinaflow.training.divergence import RecentLosses
from retinaflow.training.open_epoch import OpenEpoch
from retinaflow.training.optimizer import learning_rate, load_state, make_optimizer
from retinaflow.training.step import NotFiniteError, Stepper, StepValues, not_finite
from retinaflow.training.synced_norm import sync_batch_norms
from retinaflow.training.weight_average import WeightAverage

STEPS_UNREAD, SECONDS_UNREAD = 10, 2.0
"""On a GPU the losses are read after so many steps or so long, and at the end of an epoch: to read them is to wait for
the device, which then waits for the next step."""


@dataclass(frozen=True)
class StepResult:
    """Values of one step over all ranks, for progress and curves."""

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
    """Of this process in this epoch, waiting for images included."""
    waiting: float
    """Fraction of that time spent waiting for images, in [0, 1]."""


class Trainer:
    """A model with its optimizer and position: what :meth:`fit` advances and a checkpoint stores."""

    def __init__(
        self,
        model: RetinaNet,
        settings: OptimizationSettings,
        *,
        loss: LossConfig,
        precision: Precision,
        device: torch.device,
        workers: int = 0,
        ancestors: Tensor | None = None,
        world: World = ALONE,
        deferred: bool | None = None,
    ) -> None:
        """deferred: see :class:`~retinaflow.training.step.Stepper`; None: on a GPU."""
        if settings.batch_size % world.size:
            raise SettingError(
                f"batch_size must be a multiple of the number of processes, but got batch_size={settings.batch_size}, "
                f"nproc={world.size}"
            )
        self.model = model
        self.settings = settings
        self.precision = precision
        self.workers = workers
        self.device = device
        self.world = world
        self.epoch = 0
        self.step = 0
        self.open = OpenEpoch()
        self.is_sound = True
        """False once the training has failed by its weights, which are then not saved."""
        self._losses = RecentLosses()
        self._average = WeightAverage(model, decay=settings.ema) if settings.ema > 0 else None
        self._deferred = device.type != "cpu" if deferred is None else deferred
        self._last_read = time.monotonic()
        self._failed: NotFiniteError | None = None
        sync_batch_norms(model, world)
        self._optimizer = make_optimizer(model, settings, fused=self._deferred)
        self._stepper = Stepper(
            model,
            self._optimizer,
            loss=loss,
            clip=settings.clip,
            precision=precision,
            device=device,
            ancestors=None if ancestors is None else ancestors.to(device),
            world=world,
            deferred=self._deferred,
        )

    @property
    def evaluated_model(self) -> RetinaNet:
        """The detector to evaluate and to save: the average of the weights where there is one."""
        return self.model if self._average is None else self._average.model

    def images_seen(self, epoch_length: int) -> int:
        """Images since the training began, in epochs of ``epoch_length`` images."""
        return self.epoch * epoch_length + self.open.images

    def state(self) -> dict[str, Any]:
        """What resuming needs besides the weights of ``evaluated_model``; tensors and plain values only.

        It has no random state: every random number is a function of the seed and the position in the plan.
        """
        average = self._average
        return {
            "optimizer": self._optimizer.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "open": vars(self.open) | {"sums": list(self.open.sums)},
            "average_updates": None if average is None else average.updates,
            "last_weights": None if average is None else self.model.state_dict(),
            "class_gradients": self._stepper.class_gradients.cpu(),
        }

    def load(self, weights: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Resume from the weights of ``evaluated_model`` and what :meth:`state` returned."""
        self.evaluated_model.load_state_dict(weights)
        if self._average is not None and state["average_updates"] is not None:
            self.model.load_state_dict(state["last_weights"])
            self._average.updates = state["average_updates"]
        load_state(self._optimizer, state["optimizer"])
        self._stepper.class_gradients.copy_(state["class_gradients"])
        self.epoch, self.step = state["epoch"], state["step"]
        self.open = OpenEpoch(**{**state["open"], "sums": tuple(state["open"]["sums"])})

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
        """Train the remaining epochs. ``plans(epoch)`` returns the image indices of an epoch (from 0), in their order.

        Before the epoch ``rare_augment_from`` (from 0) all images are augmented with the base strength.
        ``after_step`` may raise to stop; on a GPU it is called for some steps at once, and the state is that of the
        last of them. ``on_bad_image`` is called with images that can no longer be read; without it
        such an image is a DataError. A result is yielded while its epoch is still open, so that a state taken before
        :meth:`finish_epoch` (or the next result) leads to the same result again. Raises TrainingError when
        losses or gradients are not finite, and SettingError when a plan is not the one the epoch began with.
        """
        loader = BatchLoader(dataset, workers=self.workers, pin_memory=self.device.type == "cuda")
        bucket_of_image = buckets.assign(np.asarray(dataset.index.sizes))
        while self.epoch < self.settings.epochs:
            epoch, plan = self.epoch, plans(self.epoch)
            self.open.check_plan(plan, epoch)
            batches = plan_batches(
                plan,
                bucket_of_image,
                buckets,
                batch_size=self.settings.batch_size // self.world.size,
                rank=self.world.rank,
                world_size=self.world.size,
            )
            if self.world.size == 1 and self.model.config.batch_norm == "train":
                _check_batch_norm(batches)
            self.model.train()
            # From the present position on: no batch depends on those before it.
            loaded = loader.load(
                batches[self.open.batches :],
                seed=(self.settings.seed, epoch),
                by_class=epoch >= rare_augment_from,
                on_bad_image=on_bad_image,
            )
            yield _train_epoch(self, iter(loaded), len(batches), len(plan), dataset.index.image_ids, after_step)
            if self.epoch == epoch:
                self.finish_epoch()

    def not_finite(self) -> str:
        """A sentence that names the first weight or statistic that is not finite; empty if all are."""
        return not_finite(self.model) or not_finite(self.evaluated_model)

    def check(self) -> bool:
        """Whether the present weights are worth saving: the losses have not grown far above those before.

        Raises TrainingError when they, or the loss of the images of the latest step with them, are not finite. To be
        called on all ranks at once; costs a forward pass.
        """
        problem = self.not_finite()
        again = None if problem else self._stepper.latest_loss()
        if again is not None and not math.isfinite(again):
            problem = f"the loss must be finite, but got {again} for the images of the latest step"
        if problem:
            self.is_sound = False
            raise TrainingError(f"{problem}, after step {self.step}. Lower lr.")
        return not self._losses.diverge(again)

    def finish_epoch(self) -> None:
        """Close the epoch whose result was yielded: a state taken from now on resumes the next one."""
        self.epoch += 1
        self.open = OpenEpoch()

    def take_step(self, batches: Sequence[Batch], lr: float, length: int) -> list[StepResult]:
        """Take one step (none without batches), and count those that are known to be sound: on a CPU this one, on a
        GPU some at once, and all without batches. length: images of an epoch.

        After a step that is not finite :meth:`raise_failure` raises; the state is that before it.
        """
        try:
            if batches:
                self._stepper.take(batches, lr)
                if self._average is not None:
                    self._average.update(self.model, self._stepper.all_finite)
            if batches and not self._must_read():
                return []
            self._last_read = time.monotonic()
            done: Sequence[StepValues] = self._stepper.read()
        except NotFiniteError as error:
            self._failed, done = error, error.before
            if self._average is not None and self._deferred:
                self._average.updates -= error.refused
        return [self._count(values, length) for values in done]

    def _must_read(self) -> bool:
        if not self._deferred or self._stepper.num_pending >= STEPS_UNREAD:
            return True
        # All ranks at once; what asks to stop waits no longer than this either.
        return self.world.any(time.monotonic() - self._last_read >= SECONDS_UNREAD)

    def _count(self, values: StepValues, length: int) -> StepResult:
        self.step += 1
        self._losses.add(values.loss_class + values.loss_box)
        self.open.add(values)
        return StepResult(
            self.step, values.loss_class, values.loss_box, values.lr, values.gradient_norm, self.images_seen(length)
        )

    def raise_failure(self, image_ids: NDArray[np.str_]) -> None:
        """Raise TrainingError when a step was not finite."""
        error = self._failed
        if error is None:
            return
        ids = ", ".join(str(image_ids[image]) for image in error.images)
        # Either these images are to blame, or the weights that the step before has left.
        with contextlib.suppress(TrainingError):
            self.is_sound = self.check()
        loss = error.step.loss_class + error.step.loss_box
        advice = self._losses.advice(loss, self.precision, sound=self.is_sound)
        raise TrainingError(f"{error} at step {self.step + 1}, lr={error.step.lr:.3g}, images {ids}. {advice}")


def _check_batch_norm(batches: Sequence[PlannedBatch]) -> None:
    """Raise SettingError for a batch in which batch norm has one value per channel, whose variance is nothing."""
    if any(len(batch.images) == 1 and batch.shape == (MULTIPLE, MULTIPLE) for batch in batches):
        raise SettingError(
            f"batch_norm=train needs more than one value per channel, but a batch of one image of {MULTIPLE} x "
            f"{MULTIPLE} pixels has one in its smallest feature map; give a larger image_size or batch_size, or more "
            "images per epoch (epoch_length)"
        )


def _train_epoch(
    trainer: Trainer,
    loaded: Iterator[Batch],
    batches: int,
    length: int,
    image_ids: NDArray[np.str_],
    after_step: Callable[[StepResult], None],
) -> EpochResult:
    settings, epoch = trainer.settings, trainer.open
    steps = -(-batches // settings.accumulate) * settings.epochs
    start, before, waited = time.perf_counter(), epoch.images, 0.0
    lr, taken = learning_rate(max(trainer.step - 1, 0), steps, settings), trainer.step
    while True:
        asked = time.perf_counter()
        part = list(islice(loaded, settings.accumulate))
        waited += time.perf_counter() - asked
        if part:
            lr = learning_rate(taken, steps, settings)
            taken += 1
        for result in trainer.take_step(part, lr, length):
            after_step(result)
        trainer.raise_failure(image_ids)
        if not part:
            break
    seconds = max(time.perf_counter() - start, 1e-9)
    return EpochResult(
        epoch=trainer.epoch + 1,
        step=trainer.step,
        loss_class=epoch.sums[0] / max(epoch.images, 1),
        loss_box=epoch.sums[1] / max(epoch.images, 1),
        lr=lr,
        images=(trainer.epoch + 1) * length,
        images_per_second=(epoch.images - before) / seconds,
        waiting=waited / seconds,
    )
