"""One step: the gradients of a few batches on every rank are summed and clipped, and the weights are updated.

The losses are divided by the positive anchors of the whole step, over all its batches and ranks. So neither
accumulation nor the number of ranks changes what is learned; only the statistics of trained batch norms are those of
one batch (over all ranks). A step whose losses or gradients are not finite is not taken and changes nothing.

On a CPU the host reads the losses of each step. On a GPU that would let it wait for the device, and the device then for
the next step, so there the device itself leaves out what is not finite, and the host reads the losses of many steps.

The equalized focal loss takes its exponents from the absolute gradients by class of all steps before: they are the same
for all batches of a step, on all ranks.

Gradients are summed after the backward pass, without DistributedDataParallel: the divisor is known only then.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from retinaflow.data.dataset import Batch
from retinaflow.detector.detection_loss import LossConfig, Losses, detection_loss
from retinaflow.detector.device import Precision, autocast
from retinaflow.detector.gradient_ratio import gradient_ratio
from retinaflow.detector.network import RetinaNet
from retinaflow.detector.targets import Targets
from retinaflow.training.distributed import World
from retinaflow.training.optimizer import set_learning_rate


@dataclass(frozen=True)
class StepValues:
    """Values of one step over all batches and ranks; ``gradient_norm`` before clipping."""

    loss_class: float
    loss_box: float
    gradient_norm: float
    images: int
    batches: int
    """Of this rank."""
    lr: float

    @property
    def is_finite(self) -> bool:
        """Whether the step was taken."""
        return all(map(math.isfinite, (self.loss_class, self.loss_box, self.gradient_norm)))


class NotFiniteError(Exception):
    """A step that was not taken: its loss or gradient is not finite.

    ``images``: those of its batches on all ranks, indices of the annotation index; ``step``: its values; ``before``:
    the steps since the last read that were taken before it; ``refused``: how many were not, itself included.
    """

    def __init__(
        self, message: str, images: Sequence[int], step: StepValues, before: Sequence[StepValues], refused: int
    ) -> None:
        super().__init__(message)
        self.images = images
        self.step = step
        self.before = before
        self.refused = refused


@dataclass(frozen=True)
class _Pending:
    """A step whose values ``[4]`` (class loss, box loss, gradient norm, images) are still on the device."""

    batches: Sequence[Batch]
    values: Tensor
    lr: float
    is_first: bool
    """Whether the optimizer had no state before it."""


class Stepper:
    """Takes steps with a model and its optimizer. ``clip``: maximum gradient norm; 0 disables clipping.

    deferred: :meth:`take` leaves the decision whether a step is finite to the device, so that the host runs ahead of
    it and learns the values at the next :meth:`read`. After a step that is not finite none is taken any more: the
    weights stay those before it. Needs a fused optimizer.
    class_gradients: ``[2, K]`` float64, :attr:`Losses.class_gradients` summed over all steps.
    """

    def __init__(
        self,
        model: RetinaNet,
        optimizer: torch.optim.Optimizer,
        *,
        loss: LossConfig,
        clip: float,
        precision: Precision,
        device: torch.device,
        ancestors: Tensor | None,
        world: World,
        deferred: bool = False,
    ) -> None:
        self._model, self._optimizer = model, optimizer
        self._loss, self._clip, self._ancestors = loss.to(device), clip, ancestors
        self._precision, self._device, self._world = precision, device, world
        self.class_gradients = torch.zeros(2, model.num_classes, dtype=torch.float64, device=device)
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        self._statistics = [buffer for norm in norms for buffer in norm.buffers()]
        self.all_finite = torch.ones((), dtype=torch.bool, device=device) if deferred else None
        """Scalar of the device: whether all steps were; None where the host decides."""
        self._pending: list[_Pending] = []
        self._latest: Sequence[Batch] = ()

    @property
    def num_pending(self) -> int:
        """Steps since the last :meth:`read`."""
        return len(self._pending)

    def take(self, batches: Sequence[Batch], lr: float) -> None:
        """Update the weights by the gradients of the batches of all ranks. Raises NotFiniteError unless deferred."""
        set_learning_rate(self._optimizer, lr)
        # The forward pass moves the statistics of batch norms before its loss is known to be finite.
        statistics = self._copied_statistics()
        self._optimizer.zero_grad(set_to_none=True)
        losses, class_gradients = self._backward(batches)
        norm = nn.utils.get_total_norm([p.grad for p in self._trained if p.grad is not None])
        values = torch.cat([losses[:2], norm.double().reshape(1), losses[2:]])
        self._pending.append(_Pending(batches, values, lr, not self._optimizer.state))
        if self.all_finite is None:
            if not _values(self._pending[0], values.tolist()).is_finite:
                self._restore(statistics)
                self.read()
        else:
            self.all_finite &= values.isfinite().all()
            self._optimizer.found_inf = (~self.all_finite).float()  # type: ignore[attr-defined]
            # Gradients that are not finite are left as they are, to be named.
            norm = torch.where(self.all_finite, norm, 0.0)
            class_gradients = torch.where(self.all_finite, class_gradients, 0.0)
            self._restore_unless(self.all_finite, statistics)
        if self._clip > 0:
            nn.utils.clip_grads_with_norm_(self._trained, self._clip, norm)
        self._optimizer.step()
        self.class_gradients += class_gradients

    def read(self) -> list[StepValues]:
        """The values of the steps since the last call; waits for the device. Raises NotFiniteError. To be called on
        all ranks after the same steps."""
        if not self._pending:
            return []
        pending, self._pending = self._pending, []
        rows = torch.stack([step.values for step in pending]).tolist()
        done = [_values(step, row) for step, row in zip(pending, rows, strict=True)]
        bad = next((number for number, values in enumerate(done) if not values.is_finite), len(done))
        if bad > 0:
            self._latest = pending[bad - 1].batches
        if bad < len(done):
            raise self._error(pending, done, bad)
        return done

    def _error(self, pending: Sequence[_Pending], done: Sequence[StepValues], bad: int) -> NotFiniteError:
        step, values = pending[bad], done[bad]
        if bad < len(pending) - 1:
            # The gradients are those of a later step, but the weights are those before this one.
            statistics = self._copied_statistics()
            self._optimizer.zero_grad(set_to_none=True)
            self._backward(step.batches)
            self._restore(statistics)
        if step.is_first:
            # What an optimizer makes of a step that is not taken is not its state.
            self._optimizer.state.clear()
        own = [image for batch in step.batches for image in batch.image_index.tolist()]
        is_loss = not math.isfinite(values.loss_class + values.loss_box)
        what = "the loss" if is_loss else f"the gradient{self._of_parameter()}"
        return NotFiniteError(
            f"{what} must be finite, but got class {values.loss_class}, box {values.loss_box}, "
            f"gradient norm {values.gradient_norm}",
            [image for part in self._world.all_gather(own) for image in part],
            values,
            done[:bad],
            len(done) - bad,
        )

    def latest_loss(self) -> float | None:
        """The loss that the images of the latest step have with the present weights, over all ranks; None before the
        first step. Changes nothing; to be called on all ranks at once."""
        if not self._latest:
            return None
        statistics = self._copied_statistics()
        sums = torch.zeros(2, dtype=torch.float64, device=self._device)
        with torch.no_grad():
            for batch in self._latest:
                losses = self._losses(batch, 1.0)
                sums += torch.stack([losses.total, losses.num_positives])
        self._restore(statistics)
        total = self._world.sum_(sums)
        return float(total[0] / total[1].clamp(min=1))

    def _copied_statistics(self) -> list[Tensor]:
        return [buffer.clone() for buffer in self._statistics]

    def _restore(self, statistics: Sequence[Tensor]) -> None:
        for buffer, old in zip(self._statistics, statistics, strict=True):
            buffer.copy_(old)

    def _restore_unless(self, kept: Tensor, statistics: Sequence[Tensor]) -> None:
        """:meth:`_restore` where the scalar ``kept`` of the device is False; a few operations for all of them."""
        for kind in {buffer.dtype for buffer in self._statistics}:
            now = [buffer for buffer in self._statistics if buffer.dtype == kind]
            old = [buffer for buffer in statistics if buffer.dtype == kind]
            joined, before = (torch.cat([one.flatten() for one in side]) for side in (now, old))
            chosen: Tensor = torch.where(kept, joined, before)
            parts = torch.split(chosen, [buffer.numel() for buffer in now])
            torch._foreach_copy_(now, [part.view_as(one) for part, one in zip(parts, now, strict=True)])

    def _of_parameter(self) -> str:
        """The first parameter whose gradient is not finite, and how many there are; empty when only the norm is."""
        names = [
            name
            for name, parameter in self._model.named_parameters()
            if parameter.grad is not None and not torch.isfinite(parameter.grad).all()
        ]
        more = f" and {len(names) - 1} other parameters" if len(names) > 1 else ""
        return f" of {names[0]}{more}" if names else ""

    def _backward(self, batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
        """Fill the gradients; returns class loss, box loss and number of images ``[3]`` float64 and the absolute
        gradients by class ``[2, K]``, over all batches and ranks."""
        if len(batches) == 1 and self._world.size == 1:
            losses = self._losses(batches[0], None)
            losses.total.backward()  # type: ignore[no-untyped-call]
            values = [losses.class_loss.detach(), losses.box_loss.detach()]
            images = torch.full_like(values[0], len(batches[0]))
            return torch.stack([*values, images]).double(), losses.class_gradients
        sums = torch.zeros(4 + self.class_gradients.numel(), dtype=torch.float64, device=self._device)
        for batch in batches:
            own = self._losses(batch, 1.0)
            own.total.backward()  # type: ignore[no-untyped-call]
            positives = own.num_positives
            values = [own.class_loss.detach(), own.box_loss.detach(), positives]
            sums[:4] += torch.stack([*values, torch.full_like(positives, len(batch))])
            sums[4:] += own.class_gradients.flatten()
        self._world.sum_(sums)
        gradients = []
        for parameter in self._trained:
            # A parameter that no batch of this rank reached takes part in the sum all the same.
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            gradients.append(parameter.grad)
        self._world.sum_all_(gradients)
        divisor = sums[2].clamp(min=1)
        for gradient in gradients:
            gradient.div_(divisor)
        return torch.cat([sums[:2] / divisor, sums[3:4]]), (sums[4:] / divisor).view_as(self.class_gradients)

    def _losses(self, batch: Batch, normaliser: float | None) -> Losses:
        batch = batch.to(self._device)
        with autocast(self._device, self._precision):
            output = self._model(batch.images)
        anchors = self._model.anchors((batch.images.shape[2], batch.images.shape[3])).boxes
        return detection_loss(
            output,
            anchors,
            targets_of(batch),
            config=self._loss,
            ancestors=self._ancestors,
            normaliser=normaliser,
            ratio=gradient_ratio(self.class_gradients),
        )


def _values(step: _Pending, row: Sequence[float]) -> StepValues:
    loss_class, loss_box, gradient_norm, images = row
    return StepValues(loss_class, loss_box, gradient_norm, int(images), len(step.batches), step.lr)


def not_finite(model: RetinaNet) -> str:
    """A sentence that names the first weight or statistic that is not finite; empty if all are."""
    names = [
        name
        for name, value in model.state_dict().items()
        if value.is_floating_point() and not torch.isfinite(value).all()
    ]
    more = f" and {len(names) - 1} other tensors" if len(names) > 1 else ""
    return f"weights must be finite, but {names[0]}{more} hold other values" if names else ""


def targets_of(batch: Batch) -> Targets:
    """The ground truth of a batch in the form the detector's loss takes."""
    return Targets(
        batch.boxes,
        batch.labels,
        batch.owner,
        batch.ignore_boxes,
        batch.ignore_labels,
        batch.ignore_owner,
        batch.negatives,
    )
