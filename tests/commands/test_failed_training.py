"""A training that goes wrong keeps what was good: what ``last.pt`` and ``best.pt`` hold afterwards, and the message."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from retinaflow.commands import train
from retinaflow.errors import TrainingError
from retinaflow.inference.checkpoint import load_checkpoint
from retinaflow.training.loop import Trainer

pytestmark = pytest.mark.trains
EVERY_STEP = 1e-9
"""Minutes between checkpoints."""
STEPS = 3
"""Of an epoch."""


def _set(name: str, value: float) -> Callable[[Trainer], None]:
    def ruin(trainer: Trainer) -> None:
        trainer.model.state_dict()[name].fill_(value)

    return ruin


def _blame_images(trainer: Trainer) -> None:
    parameter = trainer.model.get_parameter("head.regression_head.bbox_reg.bias")
    parameter.register_hook(lambda gradient: gradient * float("nan"))


OVERFLOW = _set("backbone.fpn.layer_blocks.0.0.weight", 1e30)
NOT_A_NUMBER = _set("head.regression_head.bbox_reg.weight", float("nan"))
STATISTIC = _set("backbone.body.bn1.running_var", float("inf"))


def _settings(workshop: Any, folder: Path, **given: Any) -> Any:
    return workshop.settings(
        track="false", output=str(folder), epoch_length=4 * STEPS, save_minutes=EVERY_STEP, **given
    )


def _fails(
    config: Any, monkeypatch: pytest.MonkeyPatch, happens: Callable[[Trainer], None], *, after: int
) -> tuple[str, Path]:
    """The message of a training in which something happens after a step, and its folder of checkpoints."""
    take_step = Trainer.take_step

    def taken(trainer: Trainer, *arguments: Any) -> Any:
        done = take_step(trainer, *arguments)
        if trainer.step == after:
            happens(trainer)
        return done

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "take_step", taken)
        with pytest.raises(TrainingError) as caught:
            train.run(config)
    return str(caught.value), config.output / "train" / "checkpoints"


def _weights(workshop: Any, folder: Path) -> dict[str, Tensor]:
    """The last weights of a training that nothing happens to."""

    def make() -> dict[str, Tensor]:
        return load_checkpoint(train.run(_settings(workshop, folder)).checkpoint.with_name("last.pt")).state

    weights: dict[str, Tensor] = workshop.once("a sound training", make)
    return weights


@pytest.mark.slow
@pytest.mark.parametrize(
    ("happens", "words", "sound"),
    [
        pytest.param(OVERFLOW, "the loss must be finite, but got", 3, id="weights too large for a loss"),
        pytest.param(NOT_A_NUMBER, "weights must be finite, but head.regression_head.bbox_reg.weight", 3, id="a NaN"),
        pytest.param(STATISTIC, "weights must be finite, but backbone.body.bn1.running_var", 3, id="a statistic"),
        pytest.param(_blame_images, "the gradient of head.regression_head.bbox_reg.bias must be", 4, id="the images"),
    ],
)
def test_last_holds_the_last_step_whose_weights_were_sound_and_can_be_resumed(
    happens: Callable[[Trainer], None], words: str, sound: int, workshop: Any, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    message, folder = _fails(_settings(workshop, tmp_path), monkeypatch, happens, after=4)
    assert message.startswith(words)
    assert message.endswith(f"{folder / 'last.pt'} holds the state after step {sound}.")
    assert "Lower lr." in message or happens is _blame_images
    checkpoint = load_checkpoint(folder / "last.pt")
    assert checkpoint.progress is not None
    assert checkpoint.progress["step"] == sound
    assert all(torch.isfinite(value).all() for value in checkpoint.state.values() if value.is_floating_point())
    # The best of the first epoch is there still.
    assert load_checkpoint(folder / "best.pt").epoch == 0

    result = train.run(_settings(workshop, tmp_path / "resumed", resume=str(folder / "last.pt")))
    ours = load_checkpoint(result.checkpoint.with_name("last.pt")).state
    expected = _weights(workshop, tmp_path / "whole")
    assert not [name for name in expected if not torch.equal(ours[name], expected[name])]


@pytest.mark.parametrize("happens", [OVERFLOW, NOT_A_NUMBER], ids=["overflow", "a NaN"])
def test_weights_that_the_last_step_of_an_epoch_ruins_are_not_evaluated(
    happens: Callable[[Trainer], None], workshop: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _settings(workshop, tmp_path).model_copy(update={"save_minutes": 0.0})
    message, folder = _fails(config, monkeypatch, happens, after=STEPS)
    assert message.endswith(f"after step {STEPS}. Lower lr. No checkpoint has been written.")
    assert not list(folder.glob("*.pt"))
