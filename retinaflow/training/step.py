"""One step: the gradients of a few batches on every rank are summed and clipped, and the weights are updated.

The losses are divided by the positive anchors of the whole step, over all its batches and ranks. So neither
accumulation nor the number of ranks changes what is learned; only the statistics of trained batch norms are those of
one batch (over all ranks). A step whose losses or gradients are not finite is not taken and changes nothing.

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


class NotFiniteError(Exception):
    """A step that was not taken: its loss or gradient is not finite.

    ``images``: those of its batches on all ranks, indices of the annotation index; ``loss``: the sum of its losses.
    """

    def __init__(self, message: str, images: Sequence[int], loss: float) -> None:
        super().__init__(message)
        self.images = images
        self.loss = loss


@dataclass(frozen=True)
class StepValues:
    """Values of one step over all batches and ranks; ``gradient_norm`` before clipping."""

    loss_class: float
    loss_box: float
    gradient_norm: float
    images: int


class Stepper:
    """Takes steps with a model and its optimizer. ``clip``: maximum gradient norm; 0 disables clipping.

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
    ) -> None:
        self._model, self._optimizer = model, optimizer
        self._loss, self._clip, self._ancestors = loss, clip, ancestors
        self._precision, self._device, self._world = precision, device, world
        self.class_gradients = torch.zeros(2, model.num_classes, dtype=torch.float64, device=device)
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        self._statistics = [buffer for norm in norms for buffer in norm.buffers()]
        self._latest: Sequence[Batch] = ()

    def take(self, batches: Sequence[Batch], lr: float) -> StepValues:
        """Update the weights by the gradients of the batches of all ranks. Raises NotFiniteError."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        # The forward pass moves the statistics of batch norms before its loss is known to be finite.
        statistics = self._copied_statistics()
        self._optimizer.zero_grad(set_to_none=True)
        losses, images, class_gradients = self._backward(batches)
        norm = nn.utils.get_total_norm([p.grad for p in self._trained if p.grad is not None])
        loss_class, loss_box, gradient_norm = *losses.tolist(), norm.item()
        if not all(map(math.isfinite, (loss_class, loss_box, gradient_norm))):
            self._restore(statistics)
            own = [image for batch in batches for image in batch.image_index.tolist()]
            loss = loss_class + loss_box
            what = "the loss" if not math.isfinite(loss) else f"the gradient{self._of_parameter()}"
            raise NotFiniteError(
                f"{what} must be finite, but got class {loss_class}, box {loss_box}, gradient norm {gradient_norm}",
                [image for part in self._world.all_gather(own) for image in part],
                loss,
            )
        if self._clip > 0:
            nn.utils.clip_grads_with_norm_(self._trained, self._clip, norm)
        self._optimizer.step()
        self.class_gradients += class_gradients
        self._latest = batches
        return StepValues(loss_class, loss_box, gradient_norm, images)

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

    def _of_parameter(self) -> str:
        """The first parameter whose gradient is not finite, and how many there are; empty when only the norm is."""
        names = [
            name
            for name, parameter in self._model.named_parameters()
            if parameter.grad is not None and not torch.isfinite(parameter.grad).all()
        ]
        more = f" and {len(names) - 1} other parameters" if len(names) > 1 else ""
        return f" of {names[0]}{more}" if names else ""

    def _backward(self, batches: Sequence[Batch]) -> tuple[Tensor, int, Tensor]:
        """Fill the gradients; returns the losses ``[2]`` (class, box), the images and the absolute gradients by class
        ``[2, K]``, over all batches and ranks."""
        if len(batches) == 1 and self._world.size == 1:
            losses = self._losses(batches[0], None)
            losses.total.backward()  # type: ignore[no-untyped-call]
            both = torch.stack([losses.class_loss.detach(), losses.box_loss.detach()])
            return both, len(batches[0]), losses.class_gradients
        sums = torch.zeros(4 + self.class_gradients.numel(), dtype=torch.float64, device=self._device)
        for batch in batches:
            losses = self._losses(batch, 1.0)
            losses.total.backward()  # type: ignore[no-untyped-call]
            positives = losses.num_positives
            values = [losses.class_loss.detach(), losses.box_loss.detach(), positives]
            sums[:4] += torch.stack([*values, positives.new_tensor(len(batch))])
            sums[4:] += losses.class_gradients.flatten()
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
        return sums[:2] / divisor, int(sums[3]), (sums[4:] / divisor).view_as(self.class_gradients)

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
