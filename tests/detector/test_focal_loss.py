from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from retinaflow.detector import focal_loss as focal_loss_module
from retinaflow.detector.focal_loss import ClassTargets, Pairs, focal_loss
from retinaflow.detector.targets import IgnoreMasks

B, A, K = 2, 50, 7


def some_targets(generator: torch.Generator, *, positives: int = 12) -> tuple[ClassTargets, Tensor]:
    """Positives at distinct places, every negative counting; and the same as a one-hot ``[B, A, K]``."""
    row = torch.randperm(B * A, generator=generator)[:positives].sort().values
    label = torch.randint(0, K, (positives,), generator=generator)
    onehot = torch.zeros(B * A, K)
    onehot[row, label] = 1
    pairs = Pairs(row, label)
    everything = ClassTargets(pairs, pairs, torch.ones(B, A, dtype=torch.bool), torch.ones(B, K, dtype=torch.bool))
    return everything, onehot.view(B, A, K)


def logits_like(generator: torch.Generator, dtype: torch.dtype = torch.float32, spread: float = 4.0) -> Tensor:
    return (torch.randn(B, A, K, generator=generator, dtype=torch.float64) * spread).to(dtype).requires_grad_()


def loss_and_gradient(logits: Tensor, loss: Tensor) -> tuple[Tensor, Tensor]:
    (gradient,) = torch.autograd.grad(loss, logits)
    return loss.detach(), gradient


def weighted_reference(logits: Tensor, onehot: Tensor, alpha: Tensor, gamma: Tensor) -> Tensor:
    """Equation 5 written out, per element, for alpha and gamma that broadcast."""
    p = logits.sigmoid()
    p_t = torch.where(onehot > 0, p, 1 - p)
    alpha_t = torch.where(onehot > 0, alpha, 1 - alpha)
    entropy = F.binary_cross_entropy_with_logits(logits, onehot.to(logits.dtype), reduction="none")
    return alpha_t * (1 - p_t) ** gamma * entropy


@pytest.mark.parametrize("block", [1, 100, 400, 1 << 16], ids=["rows", "part of an image", "an image", "the batch"])
@pytest.mark.parametrize(
    ("alpha", "gamma"), [(0.25, 2.0), (None, 2.0), (0.25, 0.5), (0.75, 0.0), (0.0, 1.0), (1.0, 5.0)]
)
def test_value_and_gradient_are_torchvisions(
    alpha: float | None, gamma: float, block: int, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(focal_loss_module, "CPU_BLOCK_PER_THREAD", block)
    targets, onehot = some_targets(generator)
    logits = logits_like(generator)
    loss, gradient = loss_and_gradient(logits, focal_loss(logits, targets, alpha=alpha, gamma=gamma))
    # In float64, so that the reference's own rounding of 1 - p does not blur the comparison.
    exact = logits.detach().double().requires_grad_()
    reference = sigmoid_focal_loss(exact, onehot.double(), -1 if alpha is None else alpha, gamma, reduction="sum")
    expected, expected_gradient = loss_and_gradient(exact, reference)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 3.7])
def test_the_gradient_is_that_of_the_value(gamma: float, generator: torch.Generator) -> None:
    targets, _ = some_targets(generator, positives=3)
    small = replace(
        targets, anchors=targets.anchors[:, :4], positives=Pairs(torch.tensor([1, 6]), torch.tensor([0, 2]))
    )
    small = replace(small, silent=small.positives, classes=targets.classes[:, :3])
    logits = torch.randn(B, 4, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: focal_loss(x, small, alpha=0.3, gamma=gamma), (logits,))


def test_gamma_0_without_alpha_is_cross_entropy(generator: torch.Generator) -> None:
    targets, onehot = some_targets(generator)
    logits = logits_like(generator)
    loss, gradient = loss_and_gradient(logits, focal_loss(logits, targets, alpha=None, gamma=0.0))
    entropy = F.binary_cross_entropy_with_logits(logits, onehot, reduction="sum")
    torch.testing.assert_close(loss, entropy.detach())
    torch.testing.assert_close(gradient, (logits.sigmoid() - onehot).detach())


def test_one_undecided_pair_costs_what_the_equation_says() -> None:
    # x = 0: p = 1/2. Negative: 0.75 * 0.25 * log 2; positive: 0.25 * 0.25 * log 2. Together 0.25 * log 2.
    pair = Pairs(torch.tensor([0]), torch.tensor([1]))
    targets = ClassTargets(pair, pair, torch.ones(1, 1, dtype=torch.bool), torch.ones(1, 2, dtype=torch.bool))
    torch.testing.assert_close(focal_loss(torch.zeros(1, 1, 2), targets), torch.tensor(0.25 * 0.6931472))


def test_alpha_and_gamma_may_differ_by_class(generator: torch.Generator) -> None:
    targets, onehot = some_targets(generator)
    alpha = torch.tensor([0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0])
    gamma = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0])
    logits = logits_like(generator, torch.float64)
    loss, gradient = loss_and_gradient(logits, focal_loss(logits, targets, alpha=alpha.double(), gamma=gamma.double()))
    expected = weighted_reference(logits, onehot, alpha.double(), gamma.double()).sum()
    expected, expected_gradient = loss_and_gradient(logits, expected)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, expected_gradient)


def test_a_constant_per_class_is_the_number(generator: torch.Generator) -> None:
    targets, _ = some_targets(generator)
    logits = logits_like(generator)
    per_class = focal_loss(logits, targets, alpha=torch.full((K,), 0.25), gamma=torch.full((K,), 2.0))
    scalar_tensors = focal_loss(logits, targets, alpha=torch.tensor(0.25), gamma=torch.tensor(2.0))
    torch.testing.assert_close(per_class, focal_loss(logits, targets))
    torch.testing.assert_close(scalar_tensors, focal_loss(logits, targets))


def test_masked_anchors_classes_and_regions_give_no_negative_loss_and_zero_gradient(generator: torch.Generator) -> None:
    targets, onehot = some_targets(generator)
    masked = replace(
        targets,
        anchors=torch.rand(B, A, generator=generator) < 0.7,
        classes=torch.rand(B, K, generator=generator) < 0.7,
        regions=IgnoreMasks(
            torch.rand(B, 3, A, generator=generator) < 0.2, torch.rand(B, 3, K, generator=generator) < 0.3
        ),
    )
    assert masked.regions is not None
    inside = torch.einsum("bra,brk->bak", masked.regions.anchors.float(), masked.regions.classes.float()) > 0
    counts = (masked.anchors[..., None] & masked.classes[:, None] & ~inside) | (onehot > 0)
    logits = logits_like(generator)
    loss, gradient = loss_and_gradient(logits, focal_loss(logits, masked))
    expected = (sigmoid_focal_loss(logits, onehot) * counts).sum()
    expected, expected_gradient = loss_and_gradient(logits, expected)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-7)
    assert (gradient[~counts] == 0).all()
    assert (gradient[counts] != 0).all()


def test_silent_pairs_give_nothing_and_their_neighbours_all(generator: torch.Generator) -> None:
    targets, onehot = some_targets(generator)
    silenced = replace(targets, positives=Pairs(targets.positives.row[:0], targets.positives.label[:0]))
    logits = logits_like(generator)
    _, gradient = loss_and_gradient(logits, focal_loss(logits, silenced))
    assert torch.equal(gradient == 0, onehot > 0)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_logits_of_plus_and_minus_100_give_the_exact_loss_and_a_finite_gradient(
    dtype: torch.dtype, gamma: float
) -> None:
    pairs = Pairs(torch.tensor([0, 1]), torch.tensor([0, 0]))
    targets = ClassTargets(pairs, pairs, torch.ones(1, 4, dtype=torch.bool), torch.ones(1, 1, dtype=torch.bool))
    logits = torch.tensor([100.0, -100.0, 100.0, -100.0], dtype=dtype).view(1, 4, 1).requires_grad_()
    loss, gradient = loss_and_gradient(logits, focal_loss(logits, targets, gamma=gamma))
    # A missed positive costs 0.25 * 100, a false positive 0.75 * 100, the other two nothing.
    torch.testing.assert_close(loss, torch.tensor(100.0, dtype=loss.dtype))
    torch.testing.assert_close(gradient.flatten(), torch.tensor([0.0, -0.25, 0.75, 0.0], dtype=dtype))


@pytest.mark.parametrize(("dtype", "unit"), [(torch.bfloat16, 2**-7), (torch.float16, 2**-10)])
def test_half_precision_logits_are_computed_in_float32(
    dtype: torch.dtype, unit: float, generator: torch.Generator
) -> None:
    targets, _ = some_targets(generator)
    half = logits_like(generator, dtype)
    full = half.detach().float().requires_grad_()
    loss, gradient = loss_and_gradient(half, focal_loss(half, targets))
    expected, expected_gradient = loss_and_gradient(full, focal_loss(full, targets))
    assert loss.dtype == torch.float32
    assert gradient.dtype == dtype
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient.float(), expected_gradient, rtol=unit, atol=1e-7)


def test_small_gradients_in_float16_survive_until_a_loss_scaler_has_raised_them(generator: torch.Generator) -> None:
    targets, _ = some_targets(generator, positives=0)
    logits = torch.full((B, A, K), -7.0, dtype=torch.float16, requires_grad=True)
    (gradient,) = torch.autograd.grad(focal_loss(logits, targets) * 2.0**16, logits)
    assert float(gradient.min()) > 0


@pytest.mark.parametrize("kind", ["no positives", "one class", "no images", "no anchors"])
def test_the_empty_and_smallest_cases_give_a_loss_and_a_gradient(kind: str) -> None:
    shape = {"no positives": (2, 5, 3), "one class": (2, 5, 1), "no images": (0, 5, 3), "no anchors": (2, 0, 3)}[kind]
    pairs = Pairs(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))
    anchors, classes = torch.ones(shape[:2], dtype=torch.bool), torch.ones(shape[0], shape[2], dtype=torch.bool)
    logits = torch.zeros(shape, requires_grad=True)
    loss, gradient = loss_and_gradient(logits, focal_loss(logits, ClassTargets(pairs, pairs, anchors, classes)))
    # Undecided negatives: 0.75 * 0.25 * log 2 each.
    torch.testing.assert_close(loss, torch.tensor(logits.numel() * 0.75 * 0.25 * 0.6931472))
    assert gradient.shape == shape


def test_a_second_backward_and_a_scaled_loss_give_the_same_gradient_scaled(generator: torch.Generator) -> None:
    targets, _ = some_targets(generator)
    logits = logits_like(generator)
    loss = focal_loss(logits, targets)
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(loss * 3, logits)
    assert torch.equal(first, kept)
    torch.testing.assert_close(second, 3 * first)


def test_without_gradient_the_value_is_the_same(generator: torch.Generator) -> None:
    targets, _ = some_targets(generator)
    logits = logits_like(generator)
    with torch.no_grad():
        plain = focal_loss(logits, targets)
    assert torch.equal(plain, focal_loss(logits, targets).detach())


def test_logits_that_are_a_view_in_another_order_give_the_same(generator: torch.Generator) -> None:
    targets, _ = some_targets(generator)
    base = logits_like(generator).detach()
    turned = base.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    loss, gradient = loss_and_gradient(turned, focal_loss(turned, targets))
    base.requires_grad_()
    expected, expected_gradient = loss_and_gradient(base, focal_loss(base, targets))
    assert torch.equal(loss, expected)
    assert torch.equal(gradient, expected_gradient)
