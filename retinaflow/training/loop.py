"""Training as a generator: every epoch is one :class:`EpochResult`, and what to do with it is the caller's business.

AdamW, linear warm-up and cosine decay by step, clipped gradients. All randomness is a function of (seed, epoch, place
in the plan), so going on from a checkpoint gives what an uninterrupted training gives, bit for bit on a CPU. A
non-finite loss stops the training and names the images of the batch.

The epoch's images come from ``plans(epoch)``: the loop knows nothing of sampling strategies.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from retinaflow.data.batching import AspectBuckets, plan_batches
from retinaflow.data.image_files import BadImage
from retinaflow.data.images import Batch, BatchLoader, DetectionDataset
from retinaflow.detector.loss import LossConfig, detection_loss
from retinaflow.detector.network import RetinaNet
from retinaflow.detector.targets import Targets
from retinaflow.training.precision import Precision, autocast


@dataclass(frozen=True)
class FitSettings:
    """Everything about the optimisation; meanings as in ``TrainConfig``."""

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


@dataclass(frozen=True)
class StepResult:
    """Figures of one step, for progress and curves."""

    step: int
    loss_class: float
    loss_box: float
    lr: float
    images: int
    """Images seen since the training began."""


@dataclass(frozen=True)
class EpochResult:
    """Means over the steps of one epoch; ``epoch`` counts from 1."""

    epoch: int
    step: int
    loss_class: float
    loss_box: float
    lr: float
    images: int
    images_per_second: float


class Trainer:
    """A model with its optimizer and position: what :meth:`fit` moves on and a checkpoint keeps."""

    def __init__(
        self, model: RetinaNet, settings: FitSettings, *, device: torch.device, ancestors: Tensor | None = None
    ) -> None:
        self.model = model
        self.settings = settings
        self.device = device
        self.epoch = 0
        self.step = 0
        self._ancestors = None if ancestors is None else ancestors.to(device)
        # Fused: one pass over the weights instead of ten, which counts when a batch is small.
        self._optimizer = torch.optim.AdamW(_parameter_groups(model, settings.weight_decay), lr=settings.lr, fused=True)

    def state(self) -> dict[str, Any]:
        """Everything but the weights that going on needs; tensors and plain values only."""
        return {"optimizer": self._optimizer.state_dict(), "epoch": self.epoch, "step": self.step}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state` gave."""
        self._optimizer.load_state_dict(state["optimizer"])
        self.epoch, self.step = state["epoch"], state["step"]

    def fit(
        self,
        dataset: DetectionDataset,
        buckets: AspectBuckets,
        plans: Callable[[int], NDArray[np.int64]],
        *,
        after_step: Callable[[StepResult], None] = lambda result: None,
        on_bad_image: Callable[[BadImage], None] | None = None,
    ) -> Iterator[EpochResult]:
        """Train the remaining epochs. ``plans(epoch)`` gives the image indices of an epoch (from 0), in drawing order.

        ``after_step`` may raise to stop. ``on_bad_image`` is told of images that cannot be read any more; without it
        such an image is a ValueError. Raises FloatingPointError when a loss is not finite.
        """
        settings = self.settings
        loader = BatchLoader(dataset, workers=settings.workers, pin_memory=self.device.type == "cuda")
        bucket_of_image = buckets.assign(np.asarray(dataset.index.sizes))
        while self.epoch < settings.epochs:
            plan = plans(self.epoch)
            batches = plan_batches(plan, bucket_of_image, buckets, batch_size=settings.batch_size)
            total_steps = settings.epochs * len(batches)
            self.model.train()
            start, sums, images = time.perf_counter(), np.zeros(2), 0
            for batch in loader.load(batches, seed=(settings.seed, self.epoch), on_bad_image=on_bad_image):
                lr = learning_rate(self.step, total_steps, highest=settings.lr, warmup=settings.warmup)
                losses = self._train_on(batch, lr, dataset)
                images += len(batch)
                sums += np.array(losses) * len(batch)
                self.step += 1
                after_step(StepResult(self.step, *losses, lr, self.epoch * len(plan) + images))
            self.epoch += 1
            means = sums / max(images, 1)
            speed = images / (time.perf_counter() - start)
            yield EpochResult(
                self.epoch, self.step, float(means[0]), float(means[1]), lr, self.epoch * len(plan), speed
            )

    def _train_on(self, batch: Batch, lr: float, dataset: DetectionDataset) -> tuple[float, float]:
        batch = batch.to(self.device)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        with autocast(self.device, self.settings.precision):
            output = self.model(batch.images)
        anchors = self.model.anchors((batch.images.shape[2], batch.images.shape[3])).boxes
        losses = detection_loss(
            output, anchors, targets_of(batch), config=self.settings.loss, ancestors=self._ancestors
        )
        values = losses.class_loss.item(), losses.box_loss.item()
        if not all(map(math.isfinite, values)):
            ids = ", ".join(str(dataset.index.image_ids[image]) for image in batch.image_index.tolist())
            raise FloatingPointError(
                f"the loss must be finite, but got class {values[0]}, box {values[1]} at step {self.step}, "
                f"lr={lr:.3g}, images {ids}. Lower lr, or look at these images."
            )
        self._optimizer.zero_grad(set_to_none=True)
        losses.total.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        self._optimizer.step()
        return values


def targets_of(batch: Batch) -> Targets:
    """The truth of a batch in the form the detector's loss takes."""
    return Targets(
        batch.boxes,
        batch.labels,
        batch.owner,
        batch.ignore_boxes,
        batch.ignore_labels,
        batch.ignore_owner,
        batch.negatives,
    )


def learning_rate(step: int, total_steps: int, *, highest: float, warmup: float) -> float:
    """Linear from 0 over the ``warmup`` share of the steps, then half a cosine to 0 (Loshchilov and Hutter 2017)."""
    rising = max(round(warmup * total_steps), 1)
    if step < rising:
        return highest * (step + 1) / rising
    done = (step - rising) / max(total_steps - rising, 1)
    return highest * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices and kernels decay; biases and the scales of norms do not."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in learning if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in learning if p.dim() <= 1], "weight_decay": 0.0},
    ]
