"""Steps whose values are read some at once, as on a GPU: the same training, and the host waits for nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from retinaflow.data.dataset import Batch
from retinaflow.detector import detection_loss
from retinaflow.detector.anchors import AnchorGrid, anchor_grid
from retinaflow.detector.detection_loss import LossConfig
from retinaflow.detector.network import RetinaNet
from retinaflow.errors import TrainingError
from retinaflow.settings.training_settings import NetworkSettings
from retinaflow.training import loop
from retinaflow.training.distributed import ALONE
from retinaflow.training.loop import StepResult, Trainer
from retinaflow.training.step import Stepper


def _all(trainer: Trainer) -> dict[str, Tensor]:
    """Every tensor of a trainer's state, by a name."""
    found = {f"model {name}": value for name, value in trainer.model.state_dict().items()}
    found |= {f"average {name}": value for name, value in trainer.evaluated_model.state_dict().items()}
    state = trainer.state()
    for number, values in state["optimizer"]["state"].items():
        found |= {f"{number} {name}": value for name, value in values.items() if value is not None}
    return {**found, "class gradients": state["class_gradients"]}


def _assert_same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert not [name for name in first if not torch.equal(first[name], second[name])]


@pytest.mark.parametrize(
    "recipe", [{}, {"ema": 0.9, "equalized_scale": 8.0}, {"batch_size": 2, "accumulate": 2}],
    ids=["plain", "average and equalized", "accumulated"],
)  # fmt: skip
def test_a_training_read_some_steps_at_once_is_the_training_read_each_step(recipe: Any, lab: Any) -> None:
    found = []
    for deferred in (False, True):
        trainer = lab.trainer(epochs=2, deferred=deferred, **recipe)
        steps: list[StepResult] = []
        means = [
            (epoch.step, epoch.images, epoch.loss_class, epoch.loss_box)
            for epoch in trainer.fit(lab.dataset, lab.buckets, lab.plans, after_step=steps.append)
        ]
        found.append((steps, means, _all(trainer)))
    (steps, means, state), (other_steps, other_means, other_state) = found
    assert other_steps == steps
    assert len(steps) > 5
    assert other_means == means
    _assert_same(state, other_state)


class _Break(Exception):
    """Stops a training."""


@pytest.mark.parametrize("bad", [1, 2, 3], ids="step {}".format)
@pytest.mark.parametrize("recipe", [{"ema": 0.9, "equalized_scale": 8.0}, {"optimizer": "sgd"}], ids=["adamw", "sgd"])
def test_the_state_is_that_before_a_step_that_is_not_finite_however_late_it_is_read(
    bad: int, recipe: Any, lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = lab.trainer(epochs=1, deferred=True, **recipe)
    seen: list[Tensor] = []
    trainer.model.register_forward_pre_hook(lambda model, inputs: seen.append(inputs[0].clone()))

    def ruined(gradient: Tensor) -> Tensor:
        # The images of that step ruin it whenever they are seen, as an image of the user would.
        is_bad = len(seen) >= bad and torch.equal(seen[-1], seen[bad - 1])
        return gradient * (float("nan") if is_bad else 1.0)

    name = "head.regression_head.bbox_reg.bias"
    trainer.model.get_parameter(name).register_hook(ruined)
    steps: list[int] = []
    with pytest.raises(TrainingError, match=rf"the gradient of {name} must be finite.* at step {bad}, lr="):
        list(trainer.fit(lab.dataset, lab.buckets, lab.plans, after_step=lambda step: steps.append(step.step)))
    assert steps == list(range(1, bad))
    assert trainer.is_sound
    # It was read only after steps that followed.
    assert len(seen) > bad

    monkeypatch.setattr(loop, "STEPS_UNREAD", 1)
    alone = lab.trainer(epochs=1, deferred=True, **recipe)

    def stop(result: StepResult) -> None:
        if result.step == bad - 1:
            raise _Break

    if bad > 1:
        with pytest.raises(_Break):
            list(alone.fit(lab.dataset, lab.buckets, lab.plans, after_step=stop))
    assert (trainer.step, trainer.open.batches, trainer.open.images) == (
        alone.step,
        alone.open.batches,
        alone.open.images,
    )
    assert trainer.open.sums == alone.open.sums
    assert trainer.state()["average_updates"] == alone.state()["average_updates"]
    _assert_same(_all(alone), _all(trainer))


class NoHostWait(TorchDispatchMode):
    """Fails on an operation for which the host waits for the device: one whose result has a size or a value that only
    the device knows, or a copy to or from it that is not asynchronous."""

    WAITING = ("_local_scalar_dense", "nonzero", "unique", "bincount", "masked_select", "is_nonzero", "equal.default")

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        name, given = str(function), kwargs or {}
        on_device = any(isinstance(value, Tensor) and value.device.type != "cpu" for value in args)
        assert not (on_device and any(word in name for word in self.WAITING)), name
        result = function(*args, **given)
        if name.startswith(("aten._to_copy", "aten.copy_")):
            source = args[0] if name.startswith("aten._to_copy") else args[1]
            if source.device.type != result.device.type:
                asynchronous = given.get("non_blocking", False) or (len(args) > 2 and args[2])
                assert asynchronous, f"{name} from {source.device} to {result.device} waits"
        if name.startswith("aten.index"):
            assert not any(index is not None and index.dtype == torch.bool for index in args[1]), f"{name} by a mask"
        return result


def _batch(classes: int, *, regions: int) -> Batch:
    nothing = torch.zeros(regions, dtype=torch.int64)
    corners = torch.tensor([[4.0, 4.0, 40.0, 40.0]])
    return Batch(
        torch.zeros(2, 3, 64, 64, dtype=torch.uint8),
        corners.repeat(3, 1),
        torch.zeros(3, dtype=torch.int64),
        torch.tensor([0, 0, 1]),
        corners.repeat(regions, 1),
        nothing,
        nothing,
        torch.ones(2, classes, dtype=torch.bool),
        torch.zeros(2, dtype=torch.int64),
    )


@pytest.mark.parametrize("batches", [1, 2], ids="{} batches a step".format)
@pytest.mark.parametrize("batch_norm", ["train", "frozen"])
@pytest.mark.parametrize(
    "loss",
    [LossConfig(), LossConfig(equalized_scale=8.0, box_loss="giou"), LossConfig(gamma=torch.ones(5), alpha=None)],
    ids=["focal", "equalized and giou", "by class"],
)
def test_no_step_on_a_gpu_waits_for_the_device(
    batches: int, batch_norm: Any, loss: LossConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced on tensors that have no values, with the operations that a GPU would compute."""
    classes, meta = 5, torch.device("meta")
    network = NetworkSettings(
        backbone="resnet18", head_norm="group", head_depth=1, fpn_channels=64, batch_norm=batch_norm
    )
    monkeypatch.setattr(detection_loss, "is_fused", lambda logits: True)
    model = RetinaNet(network, classes).to(meta).train()
    anchors = anchor_grid((64, 64)).boxes.to(meta)
    monkeypatch.setattr(model, "anchors", lambda size: AnchorGrid(anchors, size, ()))
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], 0.1)
    # The fused optimizers, which the test before this one uses, are not made for tensors without values.
    monkeypatch.setattr(optimizer, "step", lambda: None)
    stepper = Stepper(
        model,
        optimizer,
        loss=loss,
        clip=5.0,
        precision="float32",
        device=meta,
        ancestors=torch.zeros(classes, classes, dtype=torch.bool, device=meta),
        world=ALONE,
        deferred=True,
    )
    given = [_batch(classes, regions=number) for number in range(batches)]
    with NoHostWait():
        for _ in range(2):
            stepper.take(given, 1e-3)
    assert stepper.num_pending == 2


@pytest.mark.parametrize(
    "wait",
    [
        lambda values: values.cpu(),
        lambda values: values.nonzero(),
        lambda values: values.sum().item(),
        lambda values: values[values > 0],
        lambda values: torch.ones(3).to("meta"),
    ],
    ids=["a copy", "nonzero", "a number", "a mask", "a copy to it"],
)
def test_the_check_of_waits_finds(wait: Any) -> None:
    values = torch.ones(3, device="meta")
    with NoHostWait(), pytest.raises((AssertionError, RuntimeError, NotImplementedError)):
        wait(values)
