"""The training loop: it learns, repeats itself bit for bit, and says which images broke it."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from retinaflow.data.batching import AspectBuckets
from retinaflow.errors import SettingError, TrainingError
from retinaflow.inference.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from retinaflow.settings.training_settings import OptimizationSettings
from retinaflow.training.distributed import World
from retinaflow.training.divergence import RecentLosses, has_grown
from retinaflow.training.loop import StepResult, Trainer
from retinaflow.training.optimizer import learning_rate

HAND_WORKED = [
    # Ten steps, two of them rising: 1/2, 1, then half a cosine over the other eight.
    pytest.param(0, 10, 0.2, 0.5, id="half way up"),
    pytest.param(1, 10, 0.2, 1.0, id="top of the rise"),
    pytest.param(2, 10, 0.2, 1.0, id="start of the cosine"),
    # (4 - 2) / 8 = 1/4 of the way: (1 + cos 45 degrees) / 2.
    pytest.param(4, 10, 0.2, (1 + 2**-0.5) / 2, id="a quarter down"),
    pytest.param(6, 10, 0.2, 0.5, id="half way down"),
    pytest.param(10, 10, 0.2, 0.0, id="after the last step"),
    pytest.param(12, 10, 0.2, 0.0, id="further on"),
    pytest.param(0, 10, 0.0, 1.0, id="no warm-up"),
    pytest.param(0, 1, 1.0, 1.0, id="one step in all"),
    pytest.param(4, 10, 1.0, 0.5, id="rising all along"),
]

OTHER_SCHEDULES = [
    # Twelve steps, milestones after 2/3 and 8/9 of them: steps 8 and 11, as in Detectron's 12 epochs.
    pytest.param("steps", 1, 1.0, id="before the first milestone"),
    pytest.param("steps", 7, 1.0, id="the last step before it"),
    pytest.param("steps", 8, 0.1, id="at the first milestone"),
    pytest.param("steps", 11, 0.01, id="at the second"),
    pytest.param("constant", 1, 1.0, id="constant"),
    pytest.param("constant", 11, 1.0, id="constant to the end"),
    pytest.param("steps", 0, 1.0, id="risen in one step"),
]


@pytest.mark.parametrize(("schedule", "step", "expected"), OTHER_SCHEDULES)
def test_another_schedule_gives(schedule: Any, step: int, expected: float) -> None:
    rate = learning_rate(step, 12, OptimizationSettings(lr=0.3, warmup=0, schedule=schedule))
    assert rate == pytest.approx(0.3 * expected, rel=1e-12)


@pytest.mark.parametrize("schedule", ["cosine", "steps", "constant"])
def test_every_schedule_begins_with_the_same_rise(schedule: Any) -> None:
    settings = OptimizationSettings(lr=1, warmup=0.2, schedule=schedule, milestones=(0.1,))
    rates = [learning_rate(n, 20, settings) for n in range(4)]
    assert rates == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize(("step", "total", "warmup", "expected"), HAND_WORKED)
def test_the_learning_rate_is(step: int, total: int, warmup: float, expected: float) -> None:
    assert learning_rate(step, total, OptimizationSettings(lr=0.3, warmup=warmup)) == pytest.approx(
        0.3 * expected, abs=1e-15
    )


def _train(lab: Any, trainer: Trainer) -> list[Any]:
    return list(trainer.fit(lab.dataset, lab.buckets, lab.plans))


def _copy(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in state.items()}


def _assert_same_bits(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different


def test_the_loss_of_a_tiny_problem_falls(lab: Any) -> None:
    results = _train(lab, lab.trainer(epochs=5))
    assert results[-1].loss_class < 0.7 * results[0].loss_class
    assert results[-1].loss_box < results[0].loss_box


def test_results_count_epochs_steps_and_images(lab: Any) -> None:
    steps: list[StepResult] = []
    trainer = lab.trainer(epochs=2)
    results = list(trainer.fit(lab.dataset, lab.buckets, lab.plans, after_step=steps.append))
    assert [result.epoch for result in results] == [1, 2]
    assert [result.images for result in results] == [12, 24]
    assert [step.step for step in steps] == list(range(1, results[-1].step + 1))
    assert steps[-1].images == 24
    assert all(result.images_per_second > 0 for result in results)
    # The mean over an epoch weighs every image alike.
    sizes = np.diff([0, *(step.images for step in steps)])
    second = [step.step > results[0].step for step in steps]
    mean = np.average([step.loss_class for step in steps], weights=sizes * second)
    assert results[1].loss_class == pytest.approx(mean, rel=1e-12)


def test_the_same_seed_gives_the_same_weights_whatever_the_global_seeds_are(lab: Any) -> None:
    first = lab.trainer(epochs=1)
    _train(lab, first)
    torch.manual_seed(123)
    np.random.seed(123)  # noqa: NPY002
    random.seed(123)
    before = torch.get_rng_state(), np.random.get_state()[1], random.getstate()  # noqa: NPY002
    second = lab.trainer(epochs=1)
    _train(lab, second)
    _assert_same_bits(first.model.state_dict(), second.model.state_dict())
    after = torch.get_rng_state(), np.random.get_state()[1], random.getstate()  # noqa: NPY002
    assert torch.equal(before[0], after[0])
    assert np.array_equal(before[1], after[1])
    assert before[2] == after[2]


def test_another_seed_gives_other_weights(lab: Any) -> None:
    """Or the law above would hold for a training that does nothing."""
    weights = []
    for seed in (0, 1):
        trainer = lab.trainer(epochs=1)
        trainer.settings = type(trainer.settings)(**{**vars(trainer.settings), "seed": seed})
        _train(lab, trainer)
        weights.append(trainer.model.state_dict())
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_going_on_from_a_checkpoint_equals_an_uninterrupted_training(lab: Any, tmp_path: Any) -> None:
    whole = lab.trainer(epochs=2)
    whole_results = _train(lab, whole)

    broken = lab.trainer(epochs=2)
    next(iter(broken.fit(lab.dataset, lab.buckets, lab.plans)))
    broken.finish_epoch()
    checkpoint = Checkpoint(
        network=lab.network,
        state=broken.model.state_dict(),
        taxonomy=lab.index.taxonomy,
        bins=lab.bins,
        buckets=lab.buckets,
        parents="learn",
        settings={},
        data_digest="",
        epoch=broken.epoch,
        progress=broken.state(),
    )
    save_checkpoint(checkpoint, tmp_path / "last.pt")

    loaded = load_checkpoint(tmp_path / "last.pt")
    resumed = lab.trainer(epochs=2, seed=7)
    resumed.settings = whole.settings
    assert loaded.progress is not None
    resumed.load(loaded.state, loaded.progress)
    rest = _train(lab, resumed)

    assert [(r.epoch, r.step, r.loss_class, r.loss_box, r.lr, r.images) for r in rest] == [
        (r.epoch, r.step, r.loss_class, r.loss_box, r.lr, r.images) for r in whole_results[1:]
    ]
    _assert_same_bits(whole.model.state_dict(), resumed.model.state_dict())


class _Break(Exception):
    pass


def _stop_after(steps: int) -> Callable[[StepResult], None]:
    def stop(result: StepResult) -> None:
        if result.step == steps:
            raise _Break

    return stop


def _broken_after(lab: Any, steps: int, **settings: Any) -> Trainer:
    """A training that was stopped after some steps, resumed from its saved state by a new trainer."""
    first = lab.trainer(**settings)
    with pytest.raises(_Break):
        list(first.fit(lab.dataset, lab.buckets, lab.plans, after_step=_stop_after(steps)))
    kept = copy.deepcopy((first.evaluated_model.state_dict(), first.state()))
    second: Trainer = lab.trainer(**settings)
    with torch.no_grad():
        for parameter in second.model.parameters():
            parameter.zero_()
    second.load(*kept)
    return second


RECIPES = {
    "as it comes": {},
    "averaged, two batches a step": {"ema": 0.9, "accumulate": 2, "batch_size": 2},
    "equalized focal loss": {"equalized_scale": 8.0},
    "sgd": {"optimizer": "sgd", "schedule": "steps", "milestones": (0.5,)},
    "slower backbone": {"backbone_lr_factor": 0.1},
}


OTHER_OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "weight decay of adamw": ({}, {"weight_decay": 0.3}),
    "weight decay of sgd": ({"optimizer": "sgd", "weight_decay": 0.1}, {"weight_decay": 0.0}),
    "momentum": ({"optimizer": "sgd"}, {"momentum": 0.5}),
    "no momentum": ({"optimizer": "sgd"}, {"momentum": 0.0}),
    "a momentum": ({"optimizer": "sgd", "momentum": 0.0}, {"momentum": 0.5}),
    "backbone of its own rate": ({"backbone_lr_factor": 0.1}, {"weight_decay": 0.3}),
}


@pytest.mark.parametrize(("began", "given"), OTHER_OPTIONS.values(), ids=OTHER_OPTIONS)
def test_an_option_of_the_optimizer_that_is_given_on_resume_is_used(
    began: dict[str, Any], given: dict[str, Any], lab: Any
) -> None:
    first = lab.trainer(epochs=2, lr=0.01, **began)
    with pytest.raises(_Break):
        list(first.fit(lab.dataset, lab.buckets, lab.plans, after_step=_stop_after(2)))
    kept = copy.deepcopy((first.evaluated_model.state_dict(), first.state()))
    options = lab.trainer(epochs=2, lr=0.01, **{**began, **given}).state()["optimizer"]["param_groups"]
    weights = []
    for more in ({}, given):
        resumed = lab.trainer(epochs=2, lr=0.01, **{**began, **more})
        resumed.load(*copy.deepcopy(kept))
        with pytest.raises(_Break):
            list(resumed.fit(lab.dataset, lab.buckets, lab.plans, after_step=_stop_after(4)))
        weights.append(resumed.model.state_dict())
    found = resumed.state()["optimizer"]["param_groups"]
    assert [{**group, "lr": None} for group in found] == [{**group, "lr": None} for group in options]
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("began_deferred", [False, True])
def test_a_training_resumes_on_a_device_with_another_form_of_its_optimizer(
    optimizer: str, began_deferred: bool, lab: Any
) -> None:
    """As a GPU has: fused optimizers leave out a step that is not finite, and must be told on which device."""
    first = lab.trainer(epochs=1, optimizer=optimizer, deferred=began_deferred)
    list(first.fit(lab.dataset, lab.buckets, lab.plans))
    resumed = lab.trainer(epochs=2, optimizer=optimizer, deferred=not began_deferred)
    resumed.load(*copy.deepcopy((first.evaluated_model.state_dict(), first.state())))
    assert [result.epoch for result in _train(lab, resumed)] == [2]
    fused = {group["fused"] for group in resumed.state()["optimizer"]["param_groups"]}
    assert fused == {optimizer == "adamw" or not began_deferred}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("steps", [1, 4])
def test_going_on_in_mid_epoch_gives_the_same_bits(lab: Any, recipe: dict[str, Any], steps: int) -> None:
    whole = lab.trainer(epochs=2, **recipe)
    expected = _train(lab, whole)
    resumed = _broken_after(lab, steps, epochs=2, **recipe)
    found = _train(lab, resumed)
    figures = [(r.epoch, r.step, r.loss_class, r.loss_box, r.lr, r.images) for r in expected]
    assert [(r.epoch, r.step, r.loss_class, r.loss_box, r.lr, r.images) for r in found] == figures[-len(found) :]
    _assert_same_bits(whole.model.state_dict(), resumed.model.state_dict())
    _assert_same_bits(whole.evaluated_model.state_dict(), resumed.evaluated_model.state_dict())
    assert torch.equal(whole.state()["class_gradients"], resumed.state()["class_gradients"])


def test_an_epoch_that_was_trained_but_not_finished_gives_its_result_again(lab: Any) -> None:
    """As after a kill during its evaluation."""
    first = lab.trainer(epochs=1)
    result = next(iter(first.fit(lab.dataset, lab.buckets, lab.plans)))
    second = lab.trainer(epochs=1)
    second.load(first.evaluated_model.state_dict(), first.state())
    again = _train(lab, second)
    assert [(r.epoch, r.step, r.loss_class, r.images) for r in again] == [
        (result.epoch, result.step, result.loss_class, result.images)
    ]
    _assert_same_bits(first.model.state_dict(), second.model.state_dict())


def test_another_plan_is_refused_in_mid_epoch(lab: Any) -> None:
    resumed = _broken_after(lab, 1, epochs=2)
    with pytest.raises(ValueError, match="epoch 1 must be resumed with the plan that it began with"):
        list(resumed.fit(lab.dataset, lab.buckets, lambda epoch: lab.plans(epoch)[::-1]))


@pytest.mark.parametrize("scale", [None, 8.0], ids=["focal", "equalized"])
def test_a_step_of_two_batches_is_a_step_of_one_batch_as_large(scale: float | None, lab: Any) -> None:
    """With frozen statistics, which batches of two would estimate differently; SGD, which keeps rounding small."""
    results = []
    for settings in ({"batch_size": 4}, {"batch_size": 2, "accumulate": 2}):
        recipe = {"optimizer": "sgd", "momentum": 0.0, "schedule": "constant", **settings}
        trainer = lab.trainer(epochs=1, frozen=True, equalized_scale=scale, **recipe)
        # One shape for all, so that batches of two are halves of batches of four.
        buckets = AspectBuckets(((64, 64),))
        steps: list[StepResult] = []
        list(trainer.fit(lab.dataset, buckets, lab.plans, after_step=steps.append))
        results.append((steps, trainer.model.state_dict(), trainer.state()["class_gradients"]))
    (one, weights, sums), (two, others, other_sums) = results
    torch.testing.assert_close(other_sums, sums, rtol=1e-4, atol=1e-9)
    assert bool(sums.any()) is (scale is not None)
    assert [step.images for step in one] == [step.images for step in two] == [4, 8, 12]
    for name in ("loss_class", "loss_box", "gradient_norm"):
        np.testing.assert_allclose([getattr(s, name) for s in two], [getattr(s, name) for s in one], rtol=1e-4)
    for key, value in weights.items():
        torch.testing.assert_close(others[key], value, rtol=1e-4, atol=1e-6)


def test_a_finished_training_has_nothing_left_to_do(lab: Any) -> None:
    trainer = lab.trainer(epochs=1)
    _train(lab, trainer)
    weights = _copy(trainer.model.state_dict())
    assert _train(lab, trainer) == []
    _assert_same_bits(weights, trainer.model.state_dict())


def test_the_equalized_loss_is_the_focal_loss_in_the_first_step_only(lab: Any) -> None:
    losses = []
    for scale in (None, 8.0):
        steps: list[StepResult] = []
        trainer = lab.trainer(epochs=1, equalized_scale=scale)
        list(trainer.fit(lab.dataset, lab.buckets, lab.plans, after_step=steps.append))
        losses.append([step.loss_class for step in steps])
    (first, second, *_), (same, other, *_) = losses
    assert same == pytest.approx(first, rel=1e-5)
    assert other != pytest.approx(second, rel=1e-2)


def test_a_step_that_is_not_taken_adds_no_gradients_of_classes(lab: Any) -> None:
    trainer = lab.trainer(epochs=1, equalized_scale=8.0)
    hooked = trainer.model.backbone.fpn.layer_blocks[0][0].weight
    hooked.register_hook(lambda gradient: gradient * (float("nan") if trainer.step else 1.0))
    with pytest.raises(TrainingError):
        list(trainer.fit(lab.dataset, lab.buckets, lab.plans))
    alone = lab.trainer(epochs=1, equalized_scale=8.0)

    def stop(result: StepResult) -> None:
        if result.step == 1:
            raise _Break

    with pytest.raises(_Break):
        list(alone.fit(lab.dataset, lab.buckets, lab.plans, after_step=stop))
    assert torch.equal(trainer.state()["class_gradients"], alone.state()["class_gradients"])


def test_a_loss_that_is_not_finite_names_the_images_and_leaves_the_weights(lab: Any) -> None:
    trainer = lab.trainer(epochs=1)
    with torch.no_grad():
        next(iter(trainer.model.parameters())).fill_(float("nan"))
    weights = _copy(trainer.model.state_dict())
    seen: list[StepResult] = []
    with pytest.raises(TrainingError) as caught:
        list(trainer.fit(lab.dataset, lab.buckets, lab.plans, after_step=seen.append))
    named = str(caught.value).split("images ")[1].split(".")[0].split(", ")
    assert 1 <= len(named) <= 4
    assert set(named) <= {str(image_id) for image_id in lab.index.image_ids}
    assert "the loss must be finite, but got class nan" in str(caught.value)
    assert seen == []
    # The statistics of batch norms too, which the forward pass had moved to NaN.
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value.nan_to_num(), weights[name].nan_to_num()), name
    assert (trainer.step, trainer.state()["open"]["batches"]) == (0, 0)


def test_images_that_are_to_blame_leave_sound_weights_and_those_of_a_ruined_network_are_not(lab: Any) -> None:
    """The step before is computed again with the present weights."""
    for ruined in (False, True):
        trainer = lab.trainer(epochs=1)
        weights: dict[str, Tensor] = {}

        def after(step: StepResult, trainer: Trainer = trainer, weights: Any = weights, ruin: bool = ruined) -> None:
            if step.step == 2:
                parameter = trainer.model.backbone.fpn.layer_blocks[0][0].weight
                parameter.register_hook(lambda gradient: gradient * float("nan"))
                if ruin:
                    with torch.no_grad():
                        # Finite, and so large that the next loss is not.
                        parameter.fill_(1e30)
                weights |= _copy(trainer.model.state_dict())

        with pytest.raises(TrainingError, match=r"must be finite, but got .* at step 3, lr="):
            list(trainer.fit(lab.dataset, lab.buckets, lab.plans, after_step=after))
        assert trainer.is_sound is not ruined
        assert trainer.step == 2
        _assert_same_bits(weights, trainer.model.state_dict())


def test_checking_the_weights_changes_nothing_of_a_training(lab: Any) -> None:
    recipe = {"ema": 0.9, "equalized_scale": 8.0}
    checked, plain = lab.trainer(epochs=1, **recipe), lab.trainer(epochs=1, **recipe)
    list(checked.fit(lab.dataset, lab.buckets, lab.plans, after_step=lambda step: checked.check()))
    _train(lab, plain)
    _assert_same_bits(checked.model.state_dict(), plain.model.state_dict())
    _assert_same_bits(checked.evaluated_model.state_dict(), plain.evaluated_model.state_dict())
    assert torch.equal(checked.state()["class_gradients"], plain.state()["class_gradients"])


@pytest.mark.parametrize("where", ["backbone.body.bn1.running_var", "head.regression_head.bbox_reg.bias"])
def test_a_weight_or_statistic_that_is_not_finite_is_named(where: str, lab: Any) -> None:
    trainer = lab.trainer(epochs=1)
    trainer.model.state_dict()[where][0] = float("inf")
    with pytest.raises(TrainingError, match=f"weights must be finite, but {where} hold other values, after step 0"):
        trainer.check()
    assert not trainer.is_sound


@pytest.mark.parametrize(
    ("losses", "again", "diverges"),
    [
        pytest.param([1.0], 1.1, False, id="the first step"),
        pytest.param([1.0], 30.0, True, id="the first step was too large"),
        pytest.param([1.0, 1.0, 50.0], 49.0, True, id="larger at once"),
        pytest.param([9.0, 3.0, 1.0, 1.9], 1.8, False, id="ordinary"),
        pytest.param([9.0, 3.0, 1.0, 1.9], 4.0, True, id="worse than before the last step"),
        pytest.param([1.0], None, False, id="unknown"),
    ],
)
def test_losses_diverge(losses: list[float], again: float | None, diverges: bool) -> None:
    recent = RecentLosses()
    for loss in losses:
        recent.add(loss)
    assert recent.diverge(again) is diverges


def test_a_gradient_that_is_not_finite_names_its_parameter_and_does_not_blame_the_learning_rate(lab: Any) -> None:
    trainer = lab.trainer(epochs=1)
    trainer.model.backbone.fpn.layer_blocks[0][0].weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(TrainingError) as caught:
        list(trainer.fit(lab.dataset, lab.buckets, lab.plans))
    assert "the gradient of backbone.fpn.layer_blocks.0.0.weight must be finite" in str(caught.value)
    assert "lr=" in str(caught.value)
    assert "lower lr" not in str(caught.value)


@pytest.mark.parametrize(
    ("losses", "grown"),
    [
        pytest.param([1.0, 0.9, 1.1, 1.0, float("nan")], False, id="ordinary until the last"),
        pytest.param([1.0, 0.9, 1.5, 4.0, 20.0, float("inf")], True, id="ever larger"),
        pytest.param([float("nan")], False, id="the first step"),
        pytest.param([1.0, 50.0], False, id="one step is no trend"),
        pytest.param([1.0, 1.0, 50.0], True, id="larger at once"),
        pytest.param([9.0, 3.0, 2.0, 1.0, 1.9], False, id="falling, then an ordinary one"),
    ],
)
def test_only_a_loss_that_has_grown_speaks_for_a_lower_rate(losses: list[float], grown: bool) -> None:
    assert has_grown(losses) is grown


def test_after_step_may_stop_the_training(lab: Any) -> None:
    class Enough(Exception):
        pass

    def stop(result: StepResult) -> None:
        if result.step == 2:
            raise Enough

    trainer = lab.trainer(epochs=3)
    with pytest.raises(Enough):
        list(trainer.fit(lab.dataset, lab.buckets, lab.plans, after_step=stop))
    assert (trainer.step, trainer.epoch) == (2, 0)


def test_biases_and_norms_do_not_decay(lab: Any) -> None:
    trainer = lab.trainer(epochs=1)
    groups = trainer.state()["optimizer"]["param_groups"]
    counts = {group["weight_decay"]: len(group["params"]) for group in groups}
    shapes = [parameter.dim() for parameter in trainer.model.parameters() if parameter.requires_grad]
    assert counts == {0.01: sum(dim > 1 for dim in shapes), 0.0: sum(dim <= 1 for dim in shapes)}


def test_the_backbone_is_trained_by_a_fraction_of_the_learning_rate(lab: Any) -> None:
    """The first step of Adam moves each weight by its learning rate; that of SGD is in proportion to it."""
    for optimizer in ("adamw", "sgd"):
        moved = {}
        for factor in (1.0, 0.25):
            trainer = lab.trainer(
                epochs=1, optimizer=optimizer, backbone_lr_factor=factor, weight_decay=0.0, warmup=0.0, clip=0.0
            )
            before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
            with pytest.raises(_Break):
                list(trainer.fit(lab.dataset, lab.buckets, lab.plans, after_step=_stop_after(1)))
            moved[factor] = {name: value.detach() - before[name] for name, value in trainer.model.named_parameters()}
        expected = {
            name: change * (0.25 if name.startswith("backbone.body.") else 1) for name, change in moved[1.0].items()
        }
        assert any(change.any() for name, change in expected.items() if name.startswith("backbone.body."))
        for name, change in expected.items():
            torch.testing.assert_close(moved[0.25][name], change, atol=1e-6, rtol=1e-3)


def test_a_batch_that_cannot_be_shared_out_is_refused(lab: Any) -> None:
    with pytest.raises(ValueError, match=r"batch_size must be a multiple .* batch_size=4, nproc=3"):
        lab.trainer(epochs=1, world=World(0, 3, 0))


@pytest.mark.parametrize(("images", "batch_size"), [(3, 1), (1, 4)])
def test_a_batch_that_batch_norm_cannot_normalise_is_refused_with_its_settings(
    lab: Any, images: int, batch_size: int
) -> None:
    trainer = lab.trainer(epochs=1, batch_size=batch_size)
    with pytest.raises(SettingError, match=r"batch of one image of 32 x 32 pixels .* image_size or batch_size"):
        list(trainer.fit(lab.dataset, AspectBuckets(((32, 32),)), lambda epoch: np.arange(images)))


def test_an_odd_image_of_one_cell_is_trained_on(lab: Any) -> None:
    trainer = lab.trainer(epochs=1, batch_size=4)
    list(trainer.fit(lab.dataset, AspectBuckets(((32, 32),)), lambda epoch: np.arange(5)))
    assert trainer.step == 2
