"""The equalized focal loss against the equations of Li et al. 2022, pair by pair."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from retinaflow.detector import focal_loss as focal_loss_module
from retinaflow.detector.anchors import anchor_grid
from retinaflow.detector.detection_loss import LossConfig, detection_loss
from retinaflow.detector.focal_loss import ClassTargets, Pairs, equalized_focal_loss, focal_loss
from retinaflow.detector.gradient_ratio import equalized, gradient_ratio
from retinaflow.detector.network import RawOutput
from retinaflow.detector.targets import IgnoreMasks, Targets

B, A, K = 2, 40, 5
ANCHORS = anchor_grid((96, 160)).boxes


@pytest.fixture
def case(generator: torch.Generator) -> tuple[ClassTargets, Tensor, Tensor]:
    """Targets with every kind of mask, which pairs are positive, and which count, both ``[B, A, K]`` bool."""
    row = torch.randperm(B * A, generator=generator)[:12].sort().values
    # Class 4 has negatives only.
    label = torch.randint(0, K - 1, (12,), generator=generator)
    onehot = torch.zeros(B * A, K, dtype=torch.bool)
    onehot[row, label] = True
    onehot = onehot.view(B, A, K)
    anchors = torch.rand(B, A, generator=generator) < 0.8
    classes = torch.tensor([[True, True, False, True, True], [True, False, False, True, True]])
    regions = IgnoreMasks(
        torch.rand(B, 2, A, generator=generator) < 0.3, torch.rand(B, 2, K, generator=generator) < 0.3
    )
    inside = torch.einsum("bra,brk->bak", regions.anchors.float(), regions.classes.float()) > 0
    pairs = Pairs(row, label)
    counts = (anchors[..., None] & classes[:, None] & ~inside) | onehot
    return ClassTargets(pairs, pairs, anchors, classes, regions), onehot, counts


def written_out(
    logits: Tensor, onehot: Tensor, counts: Tensor, *, alpha: float | None, gamma: list[float], factor: list[float]
) -> tuple[float, list[list[float]]]:
    """Loss and ``[positives, negatives][class]`` of absolute gradients, by the equations in plain loops.

    FL = -w (1 - p_t)^gamma log p_t; its derivative by p_t, times dp_t / dx = +-p (1 - p).
    """
    loss, sums = 0.0, [[0.0] * K, [0.0] * K]
    for image in range(B):
        for anchor in range(A):
            for k in range(K):
                if not counts[image, anchor, k]:
                    continue
                positive = bool(onehot[image, anchor, k])
                p = 1 / (1 + math.exp(-float(logits[image, anchor, k])))
                p_t = p if positive else 1 - p
                weight = factor[k] * (1.0 if alpha is None else alpha if positive else 1 - alpha)
                g = gamma[k]
                loss -= weight * (1 - p_t) ** g * math.log(p_t)
                by_p_t = weight * (g * (1 - p_t) ** (g - 1) * math.log(p_t) - (1 - p_t) ** g / p_t)
                sums[0 if positive else 1][k] += abs(by_p_t * p * (1 - p))
    return loss, sums


@pytest.mark.parametrize("block", [1, 60, 1 << 16], ids=["rows", "part of an image", "the batch"])
@pytest.mark.parametrize("alpha", [0.25, None, 1.0])
def test_loss_and_gradient_sums_are_those_of_the_equations_in_plain_loops(
    alpha: float | None, block: int, case: tuple[ClassTargets, Tensor, Tensor], generator: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(focal_loss_module, "CPU_BLOCK_PER_THREAD", block)
    targets, onehot, counts = case
    logits = (torch.randn(B, A, K, generator=generator, dtype=torch.float64) * 3).requires_grad_()
    ratio = [0.0, 0.25, 0.5, 1.0, 0.0]
    # gamma_k = 2 + 8 (1 - g_k).
    gamma = [10.0, 8.0, 6.0, 2.0, 10.0]
    factor = [5.0, 4.0, 3.0, 1.0, 5.0]
    found = equalized(2.0, torch.tensor(ratio), scale=8.0)
    assert [values.tolist() for values in found] == [gamma, factor]
    loss, sums = equalized_focal_loss(logits, targets, alpha=alpha, gamma=found[0], factor=found[1])
    expected, expected_sums = written_out(logits.detach(), onehot, counts, alpha=alpha, gamma=gamma, factor=factor)
    torch.testing.assert_close(loss.detach(), torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(sums, torch.tensor(expected_sums, dtype=torch.float64))
    assert float(sums[0, 4]) == 0
    # The sums are those of the gradient that the network gets.
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close((gradient.abs() * onehot).sum((0, 1)), sums[0])
    torch.testing.assert_close((gradient.abs() * ~onehot).sum((0, 1)), sums[1])
    assert (gradient[~counts] == 0).all()


def test_the_gradient_is_that_of_the_value(generator: torch.Generator) -> None:
    pairs = Pairs(torch.tensor([1, 6]), torch.tensor([0, 2]))
    targets = ClassTargets(pairs, pairs, torch.ones(2, 4, dtype=torch.bool), torch.ones(2, 3, dtype=torch.bool))
    logits = torch.randn(2, 4, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    gamma, factor = torch.tensor([0.5, 2.0, 10.0]), torch.tensor([1.0, 0.0, 5.0])

    def loss(x: Tensor) -> Tensor:
        return equalized_focal_loss(x, targets, alpha=0.3, gamma=gamma, factor=factor)[0]

    assert torch.autograd.gradcheck(loss, (logits,))


@pytest.mark.parametrize(
    "alpha", [0.25, None, torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5])], ids=["one", "none", "by class"]
)
@pytest.mark.parametrize("gamma", [1.0, torch.tensor([0.5, 1.0, 2.0, 3.0, 4.0])], ids=["one gamma", "by class"])
def test_with_a_ratio_of_1_it_is_the_focal_loss(
    gamma: float | Tensor, alpha: float | Tensor | None, case: tuple[ClassTargets, Tensor, Tensor],
    generator: torch.Generator,
) -> None:  # fmt: skip
    logits = (torch.randn(B, A, K, generator=generator) * 4).requires_grad_()
    exponent, factor = equalized(gamma, torch.ones(K), scale=8.0)
    ours, _ = equalized_focal_loss(logits, case[0], alpha=alpha, gamma=exponent, factor=factor)
    plain = focal_loss(logits, case[0], alpha=alpha, gamma=gamma)
    torch.testing.assert_close(ours, plain)
    first, second = (torch.autograd.grad(loss, logits)[0] for loss in (ours, plain))
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-9)


def test_the_ratio_is_that_of_the_sums_between_0_and_1() -> None:
    # Fewer positives, more positives than negatives, negatives only, positives only, nothing at all.
    sums = torch.tensor([[3.0, 5.0, 0.0, 2.0, 0.0], [4.0, 4.0, 7.0, 0.0, 0.0]], dtype=torch.float64)
    assert gradient_ratio(sums).tolist() == [0.75, 1.0, 0.0, 1.0, 1.0]


def test_exponents_by_frequency_bin_are_raised_each_from_its_own() -> None:
    gamma, factor = equalized(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0.0, 0.5, 1.0]), scale=4.0)
    assert gamma.tolist() == [5.0, 4.0, 4.0]
    assert factor.tolist() == [5.0, 2.0, 1.0]


@pytest.mark.parametrize(("dtype", "unit"), [(torch.float32, 0.0), (torch.bfloat16, 2**-7), (torch.float16, 2**-10)])
def test_logits_of_plus_and_minus_100_give_the_exact_loss_and_a_finite_gradient(
    dtype: torch.dtype, unit: float
) -> None:
    pair = Pairs(torch.tensor([1, 2]), torch.tensor([0, 0]))
    targets = ClassTargets(pair, pair, torch.ones(1, 4, dtype=torch.bool), torch.ones(1, 1, dtype=torch.bool))
    logits = torch.tensor([[[-100.0], [100.0], [-100.0], [100.0]]], dtype=dtype, requires_grad=True)
    loss, sums = equalized_focal_loss(
        logits, targets, alpha=0.25, gamma=torch.tensor([10.0]), factor=torch.tensor([5.0])
    )
    # Negative low and positive high: nothing. Positive low: 5 * 0.25 * 100; negative high: 5 * 0.75 * 100.
    torch.testing.assert_close(loss.detach(), torch.tensor(500.0))
    torch.testing.assert_close(sums, torch.tensor([[1.25], [3.75]], dtype=torch.float64))
    (gradient,) = torch.autograd.grad(loss, logits)
    expected = torch.tensor([[[0.0], [0.0], [-1.25], [3.75]]])
    torch.testing.assert_close(gradient.float(), expected, rtol=unit, atol=1e-6)


@pytest.mark.parametrize(("dtype", "unit"), [(torch.bfloat16, 2**-7), (torch.float16, 2**-10)])
def test_half_precision_logits_are_computed_and_summed_in_float32(
    dtype: torch.dtype, unit: float, case: tuple[ClassTargets, Tensor, Tensor], generator: torch.Generator
) -> None:
    half = (torch.randn(B, A, K, generator=generator) * 3).to(dtype).requires_grad_()
    full = half.detach().float().requires_grad_()
    gamma, factor = equalized(2.0, torch.linspace(0, 1, K), scale=8.0)
    (loss, sums), (expected, expected_sums) = (
        equalized_focal_loss(x, case[0], alpha=0.25, gamma=gamma, factor=factor) for x in (half, full)
    )
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)
    assert torch.equal(sums, expected_sums)
    found, wanted = (torch.autograd.grad(value, x)[0] for value, x in ((loss, half), (expected, full)))
    torch.testing.assert_close(found.float(), wanted, rtol=unit, atol=1e-7)


def test_a_second_backward_gives_the_same_gradient_and_adds_nothing_to_the_sums(
    case: tuple[ClassTargets, Tensor, Tensor], generator: torch.Generator
) -> None:
    logits = torch.randn(B, A, K, generator=generator).requires_grad_()
    gamma, factor = equalized(2.0, torch.linspace(0, 1, K), scale=8.0)
    loss, sums = equalized_focal_loss(logits, case[0], alpha=0.25, gamma=gamma, factor=factor)
    before = sums.clone()
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    first = first.clone()
    (second,) = torch.autograd.grad(loss, logits)
    assert torch.equal(first, second)
    assert torch.equal(sums, before)


def test_without_gradient_the_value_is_the_same_and_nothing_is_summed(
    case: tuple[ClassTargets, Tensor, Tensor], generator: torch.Generator
) -> None:
    logits = torch.randn(B, A, K, generator=generator).requires_grad_()
    gamma, factor = equalized(2.0, torch.linspace(0, 1, K), scale=8.0)
    plain, sums = equalized_focal_loss(logits.detach(), case[0], alpha=0.25, gamma=gamma, factor=factor)
    loss, _ = equalized_focal_loss(logits, case[0], alpha=0.25, gamma=gamma, factor=factor)
    torch.testing.assert_close(plain, loss.detach())
    assert not sums.any()


def outputs(generator: torch.Generator) -> RawOutput:
    logits = torch.randn(3, len(ANCHORS), 6, generator=generator, dtype=torch.float64) - 2
    return RawOutput(logits.requires_grad_(), torch.zeros(3, len(ANCHORS), 4))


@pytest.mark.parametrize("learn", [True, False], ids=["ancestors learned", "ancestors silent"])
@pytest.mark.parametrize("normaliser", [None, 7.0])
def test_the_gradients_of_a_batch_are_those_of_its_class_loss(
    normaliser: float | None, learn: bool, targets: Targets, ancestors: Tensor, generator: torch.Generator
) -> None:
    config = LossConfig(equalized_scale=8.0, learn_ancestors=learn)
    output = outputs(generator)
    ratio = torch.linspace(0, 1, 6)
    losses = detection_loss(
        output, ANCHORS, targets, config=config, ancestors=ancestors, normaliser=normaliser, ratio=ratio
    )
    (gradient,) = torch.autograd.grad(losses.class_loss, output.class_logits)
    torch.testing.assert_close(losses.class_gradients[0], -gradient.clamp(max=0).sum((0, 1)))
    torch.testing.assert_close(losses.class_gradients[1], gradient.clamp(min=0).sum((0, 1)))


def test_a_class_that_is_unverified_on_every_image_and_has_no_box_keeps_a_ratio_of_1(
    targets: Targets, generator: torch.Generator
) -> None:
    labels = torch.where(targets.labels == 3, 2, targets.labels)
    negatives = targets.negatives.clone()
    negatives[:, 3] = False
    unverified = replace(targets, labels=labels, negatives=negatives)
    losses = detection_loss(outputs(generator), ANCHORS, unverified, config=LossConfig(equalized_scale=8.0))
    assert losses.class_gradients[:, 3].tolist() == [0.0, 0.0]
    ratio = gradient_ratio(losses.class_gradients)
    assert float(ratio[3]) == 1
    assert (ratio < 1).any()


def test_the_loss_starts_as_the_focal_loss_which_sums_no_gradients(
    targets: Targets, generator: torch.Generator
) -> None:
    output = outputs(generator)
    plain, start = (
        detection_loss(output, ANCHORS, targets, config=LossConfig(equalized_scale=scale)) for scale in (None, 8.0)
    )
    torch.testing.assert_close(start.class_loss, plain.class_loss)
    assert not plain.class_gradients.any()
    assert start.class_gradients[1].all()


@pytest.mark.parametrize("gamma", [0.0, torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0, 1.0])], ids=["number", "by class"])
def test_an_exponent_of_0_cannot_be_raised_by_a_factor(
    gamma: float | Tensor, targets: Targets, generator: torch.Generator
) -> None:
    with pytest.raises(ValueError, match="gamma > 0 must hold for the equalized focal loss"):
        detection_loss(outputs(generator), ANCHORS, targets, config=LossConfig(gamma=gamma, equalized_scale=8.0))
