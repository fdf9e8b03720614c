"""Values by frequency bin become values by class, and the loss takes them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from retinaflow.data.frequency_bins import ClassBins
from retinaflow.detector.focal_loss import ClassTargets, Pairs, focal_loss
from retinaflow.training.build import by_class


@pytest.fixture
def bins() -> ClassBins:
    """Classes 1 and 3 are rare, 0 and 4 frequent, 2 has no image."""
    return ClassBins(
        images_per_class=np.array([90, 5, 0, 6, 80]),
        boxes_per_class=np.array([90, 5, 0, 6, 80]),
        edges=np.array([5.0, 20.0, 91.0]),
        bin_of_class=np.array([1, 0, -1, 0, 1], dtype=np.int32),
        strategy="log",
        asked=3,
    )


@pytest.mark.parametrize("value", [2.0, 0.0, None])
def test_one_value_stays_one_value(value: float | None, bins: ClassBins) -> None:
    assert by_class("focal_alpha", value, bins) == value


def test_a_value_for_each_bin_goes_to_its_classes_the_rarest_first(bins: ClassBins) -> None:
    found = by_class("focal_gamma", (0.5, 2.0), bins)
    # The class without an image is as rare as a class can be.
    torch.testing.assert_close(found, torch.tensor([2.0, 0.5, 0.5, 0.5, 2.0]))


def test_equal_values_for_all_bins_give_the_loss_of_the_one_value(bins: ClassBins) -> None:
    pair = Pairs(torch.tensor([1]), torch.tensor([3]))
    targets = ClassTargets(pair, pair, torch.ones(1, 6, dtype=torch.bool), torch.ones(1, 5, dtype=torch.bool))
    logits = torch.randn(1, 6, 5, generator=torch.Generator().manual_seed(0))
    alpha, gamma = by_class("focal_alpha", (0.25, 0.25), bins), by_class("focal_gamma", (2.0, 2.0), bins)
    torch.testing.assert_close(focal_loss(logits, targets, alpha=alpha, gamma=gamma), focal_loss(logits, targets))


@pytest.mark.parametrize("value", [(1.0,), (1.0, 2.0, 3.0)], ids=["too few", "too many"])
def test_another_number_of_values_than_bins_is_an_error(value: tuple[float, ...], bins: ClassBins) -> None:
    words = r"focal_gamma must be one number, or one for each of the 2 frequency bins of 3 asked for, rarest first, but"
    with pytest.raises(ValueError, match=words):
        by_class("focal_gamma", value, bins)
