"""95% intervals cover the true AP where it is known: 90% to 99% of the samples, drawn from a simulated population."""

from __future__ import annotations

import numpy as np
import pytest
from simulated_population import IMAGES, IMAGES_WITH_CLASS, QUALITIES, draw_runs, true_ap

from retinaflow.statistics.bootstrap import bootstrap_intervals, paired_differences

pytestmark = pytest.mark.slow
SAMPLES, RESAMPLES = 200, 100
SIZES = len(IMAGES_WITH_CLASS)
SIZE = np.arange(SIZES * len(QUALITIES)) // len(QUALITIES)
GROUPS = {str(count): k == SIZE for k, count in enumerate(IMAGES_WITH_CLASS)} | {"mean": np.ones(len(SIZE), dtype=bool)}


def _covered(low: np.ndarray, high: np.ndarray, ground_truth: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(ground_truth) | np.isnan(low), np.nan, (low <= ground_truth) & (ground_truth <= high))


@pytest.fixture(scope="module")
def coverage() -> dict[str, np.ndarray]:
    """Share of samples covered: of scores and differences, by class ``[24]`` and by group (bins, mean) ``[7]``."""
    first, second = (np.tile(ap, SIZES) for ap in true_ap())
    seen: dict[str, list[np.ndarray]] = {}
    for sample in range(SAMPLES):
        runs = draw_runs(np.random.default_rng([0, sample]), IMAGES)
        present = runs[0].num_truths > 0
        scores = bootstrap_intervals(runs[0], groups=GROUPS, resamples=RESAMPLES, seed=sample, threads=1)
        differences = paired_differences(*runs, groups=GROUPS, resamples=RESAMPLES, seed=sample, threads=1)
        for name, found, values in (("scores", scores, first), ("differences", differences, second - first)):
            ground_truth = np.where(present, values, np.nan)
            seen.setdefault(name, []).append(_covered(found.ap_low, found.ap_high, ground_truth))
            means = np.array([ground_truth[members & present].mean() for members in GROUPS.values()])
            ends = np.array([(group.low, group.high) for group in found.groups.values()])
            seen.setdefault(f"groups of {name}", []).append(_covered(ends[:, 0], ends[:, 1], means))
    return {name: np.nanmean(np.stack(values), axis=0) for name, values in seen.items()}


@pytest.mark.parametrize("name", ["scores", "differences"])
def test_intervals_of_classes_with_ten_truths_and_more_cover(coverage: dict[str, np.ndarray], name: str) -> None:
    by_size = coverage[name].reshape(SIZES, -1).mean(axis=1)
    for count, share in zip(IMAGES_WITH_CLASS, by_size, strict=True):
        assert 0.90 <= share <= (0.99 if count >= 10 else 1.0), (count, by_size)


def test_no_kind_of_class_is_left_uncovered(coverage: dict[str, np.ndarray]) -> None:
    # With percentiles it is 8% to 16% for classes of 3 images that are nearly always found.
    assert coverage["scores"].min() >= 0.86
    assert coverage["differences"].min() >= 0.86


@pytest.mark.parametrize("name", ["scores", "differences"])
def test_intervals_of_bins_and_of_the_mean_cover(coverage: dict[str, np.ndarray], name: str) -> None:
    shares = dict(zip(GROUPS, coverage[f"groups of {name}"], strict=True))
    assert 0.90 <= shares["mean"] <= 0.99, shares
    bins = [shares[str(count)] for count in IMAGES_WITH_CLASS]
    assert min(bins) >= 0.90, shares
    # One by one a bin may reach 100% of so few samples by chance.
    assert np.mean(bins[2:]) <= 0.99, shares
