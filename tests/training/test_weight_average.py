"""The moving average of the weights: its equation, its rise, and that it is what is evaluated and kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from retinaflow.detector.network import RetinaNet
from retinaflow.training.weight_average import WeightAverage


def _fill(model: RetinaNet, value: float) -> RetinaNet:
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(value)
    return model


def test_the_average_rises_as_its_equation_says(lab: Any) -> None:
    """Weights 0, then 1, 2, 3 after steps 1, 2, 3; d = 2/11, 3/12, then the decay 0.25, under 4/13."""
    model = _fill(lab.model(), 0.0)
    average = WeightAverage(model, decay=0.25)
    expected = 0.0
    for step, decay in ((1, 2 / 11), (2, 3 / 12), (3, 0.25)):
        average.update(_fill(model, float(step)))
        expected = decay * expected + (1 - decay) * step
        for name, value in average.model.state_dict().items():
            wanted = expected if value.is_floating_point() else float(step)
            assert value.flatten()[0].item() == pytest.approx(wanted, rel=1e-6), name


def test_weights_that_stand_still_are_their_own_average(lab: Any) -> None:
    model = lab.model(seed=1)
    average = WeightAverage(model, decay=0.9998)
    for _ in range(3):
        average.update(model)
    for name, value in average.model.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=1e-6, atol=0)


def test_the_average_neither_learns_nor_moves_by_itself(lab: Any) -> None:
    trainer = lab.trainer(epochs=1, ema=0.5)
    assert trainer.evaluated_model is not trainer.model
    assert not any(parameter.requires_grad for parameter in trainer.evaluated_model.parameters())
    list(trainer.fit(lab.dataset, lab.buckets, lab.plans))
    assert not trainer.evaluated_model.training
    pairs = zip(trainer.evaluated_model.parameters(), trainer.model.parameters(), strict=True)
    assert any(not torch.equal(mean, last) for mean, last in pairs)


def test_without_a_decay_the_last_weights_are_evaluated(lab: Any) -> None:
    trainer = lab.trainer(epochs=1)
    assert trainer.evaluated_model is trainer.model


def test_averaging_changes_nothing_about_the_training(lab: Any) -> None:
    plain, averaged = lab.trainer(epochs=1), lab.trainer(epochs=1, ema=0.99)
    for trainer in (plain, averaged):
        list(trainer.fit(lab.dataset, lab.buckets, lab.plans))
    state = averaged.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in plain.model.state_dict().items())
