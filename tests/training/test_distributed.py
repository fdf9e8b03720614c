"""Two ranks, here two threads that meet in memory, compute what one computes, to rounding."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from retinaflow.data.dataset import DetectionDataset
from retinaflow.training.distributed import World
from retinaflow.training.loop import StepResult, Trainer
from retinaflow.training.synced_norm import SyncedBatchNorm2d, sync_batch_norms

T = TypeVar("T")


class _Meeting:
    def __init__(self) -> None:
        self.barrier = threading.Barrier(2, timeout=300)
        self.box: list[Any] = [None, None]


class ThreadWorld(World):
    """A rank of two in one process."""

    def __init__(self, rank: int, meeting: _Meeting) -> None:
        super().__init__(rank, 2, rank)
        object.__setattr__(self, "meeting", meeting)

    def all_gather(self, value: T) -> list[T]:
        meeting: _Meeting = self.meeting  # type: ignore[attr-defined]
        meeting.box[self.rank] = value
        meeting.barrier.wait()
        values = list(meeting.box)
        meeting.barrier.wait()
        return values

    def sum_(self, values: Tensor) -> Tensor:
        return values.copy_(sum(self.all_gather(values.clone())))  # type: ignore[arg-type]

    def sum_all_(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            self.sum_(tensor)


def _both(work: Callable[[ThreadWorld], T]) -> list[T]:
    meeting = _Meeting()
    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(lambda rank: work(ThreadWorld(rank, meeting)), range(2)))


@pytest.mark.parametrize("sizes", [(2, 2), (3, 1)], ids=["equal parts", "unequal parts"])
def test_a_batch_norm_of_two_ranks_is_that_of_the_whole_batch(sizes: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    # Away from zero, where E[x^2] - E[x]^2 loses digits.
    images = torch.randn(4, 3, 5, 6, generator=generator) * torch.tensor([1.0, 0.1, 5.0])[:, None, None] + 10
    upstream = torch.randn(4, 3, 5, 6, generator=generator)

    def norm() -> nn.BatchNorm2d:
        made = nn.BatchNorm2d(3)
        with torch.no_grad():
            made.weight.copy_(torch.tensor([1.0, 2.0, -0.5]))
            made.bias.copy_(torch.tensor([0.0, 1.0, 2.0]))
        return made

    def backward(layer: nn.Module, part: slice) -> dict[str, Tensor]:
        given = images[part].clone().requires_grad_()
        output = layer(given)
        output.backward(upstream[part])
        assert given.grad is not None
        found = {"output": output.detach(), "input": given.grad}
        return (
            found
            | {f"grad {n}": p.grad for n, p in layer.named_parameters() if p.grad is not None}
            | layer.state_dict()
        )

    whole = backward(norm(), slice(0, 4))
    parts = [slice(0, sizes[0]), slice(sizes[0], 4)]
    first, second = _both(lambda world: backward(SyncedBatchNorm2d(norm(), world), parts[world.rank]))
    for name in ("output", "input"):
        torch.testing.assert_close(torch.cat([first[name], second[name]]), whole[name], rtol=1e-4, atol=1e-4)
    for name in ("grad weight", "grad bias"):
        torch.testing.assert_close(first[name] + second[name], whole[name], rtol=1e-4, atol=1e-4)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(first[name], whole[name], rtol=1e-5, atol=1e-5)
        assert torch.equal(first[name], second[name])


def test_a_synced_norm_keeps_the_names_of_a_network_and_normalises_alone_in_use(lab: Any) -> None:

    plain, synced = lab.model(), lab.model()
    sync_batch_norms(synced, World(0, 2, 0))
    assert plain.state_dict().keys() == synced.state_dict().keys()
    assert any(isinstance(module, SyncedBatchNorm2d) for module in synced.modules())
    images = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    with torch.inference_mode():
        assert torch.equal(plain.eval()(images).class_logits, synced.eval()(images).class_logits)


@pytest.mark.parametrize("scale", [None, 8.0], ids=["focal", "equalized"])
def test_two_ranks_take_the_steps_of_one(scale: float | None, lab: Any) -> None:
    """A learning rate so small that rounding is not carried on from step to step."""
    recipe = {"optimizer": "sgd", "momentum": 0.0, "schedule": "constant", "lr": 1e-5, "clip": 0.0}

    # Threads must not share the augmentation's pipelines, as processes do not.
    dataset = DetectionDataset(lab.index)

    def trained(world: World) -> tuple[list[StepResult], dict[str, Tensor], list[int], Tensor]:
        trainer: Trainer = lab.trainer(epochs=1, world=world, equalized_scale=scale, **recipe)
        steps: list[StepResult] = []
        result = list(trainer.fit(dataset, lab.buckets, lab.plans, after_step=steps.append))
        gradients = trainer.state()["class_gradients"]
        return steps, trainer.model.state_dict(), [epoch.images for epoch in result], gradients

    alone, weights, images, gradients = trained(World())
    assert bool(gradients.any()) is (scale is not None)
    for steps, others, seen, same in _both(trained):
        torch.testing.assert_close(same, gradients, rtol=1e-4, atol=1e-9)
        assert seen == images
        assert [step.images for step in steps] == [step.images for step in alone]
        for name in ("loss_class", "loss_box", "gradient_norm"):
            values = ([getattr(step, name) for step in taken] for taken in (steps, alone))
            np.testing.assert_allclose(*values, rtol=1e-3 if name == "gradient_norm" else 1e-5)
        for key, value in weights.items():
            torch.testing.assert_close(
                others[key], value, rtol=1e-3, atol=1e-5, msg=lambda text, key=key: f"{key} {text}"
            )
