"""Confidence intervals of a score: bootstrap over images, and paired differences of two runs on the same images.

Matching is done once. Each resample is a random half of the images, and its scores come from the matches as they are.
The intervals cover the choice of the validation images; the detector is fixed, so they do not cover a training with
another seed. A class without ground truth in a resample is left out of its mean.

The resamples give standard errors, the excess of AP on few images, and the fraction above 0. The ends of an interval
are not their percentiles, which miss the true AP far too often where classes have few ground-truth boxes;
:mod:`~.intervals` explains what is used instead. Where the true AP is known by simulation, 95% intervals of scores and
of paired differences cover it in 90% to 99% of the samples, for the mean, for bins by frequency, and on average over
classes with 10 ground-truth boxes and more (tests/statistics/test_interval_coverage.py; docs/decisions.md has the
table, also for classes of 3 to 9 ground-truth boxes). An interval always holds its estimate, but its centre may differ:
AP of few images is too high.

The same seed gives the same numbers, whatever the number of threads and the size of the blocks; no global state. Cost:
for 40,000 images, 500 classes, 2,000,000 entries and 1,000 resamples 14 s of CPU, divided among the threads, and 100 MB
(``benchmarks/bootstrap.py``).

Source: Saigo, Shao and Sitter, A repeated half-sample bootstrap (Survey Methodology 2001): half of the images, each
twice, varies as much as as many images sampled with replacement, and repeats no image by chance, which would distort
AP.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from retinaflow.metric.challenge import average_precision
from retinaflow.metric.matches import Matches
from retinaflow.statistics.intervals import EXCESS, Interval, difference_interval, disagreement_variance, score_interval
from retinaflow.statistics.resampling import resampled_ap

FloatArray = NDArray[np.float64]
Groups = Mapping[str, NDArray[np.bool_] | NDArray[np.integer]]
"""Name -> the classes of a group, as bool ``[K]`` or as their indices, which many small groups take less memory as."""
Result = TypeVar("Result")


@dataclass(frozen=True)
class Intervals:
    """Intervals for the mean over classes, each class (arrays ``[K]``) and each named group of classes."""

    mean: Interval
    ap: FloatArray
    ap_low: FloatArray
    ap_high: FloatArray
    groups: dict[str, Interval]
    resamples: int
    confidence: float


@dataclass(frozen=True)
class Difference(Interval):
    """Second run minus first run."""

    fraction_above_zero: float
    """Fraction of the resamples (those where the difference is defined) in which the second run is better."""


@dataclass(frozen=True)
class Differences:
    """Paired differences, second run minus first, for the mean, each class (arrays ``[K]``) and each named group."""

    mean: Difference
    ap: FloatArray
    ap_low: FloatArray
    ap_high: FloatArray
    ap_fraction_above_zero: FloatArray
    groups: dict[str, Difference]
    resamples: int
    confidence: float


def bootstrap_intervals(
    matches: Matches,
    *,
    groups: Groups | None = None,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    threads: int = 0,
) -> Intervals:
    """Intervals of one run. ``groups``: the bins, for example. ``threads`` 0: one per processor.

    Raises ValueError for settings out of range and groups that do not fit the classes.
    """
    groups = _checked(groups, len(matches.evaluated), resamples=resamples, confidence=confidence)
    here = average_precision(matches)
    num_truths = matches.num_truths
    (resampled,) = resampled_ap([matches], resamples=resamples, seed=seed, threads=threads)
    error = _deviations(resampled)
    excess = EXCESS * np.nan_to_num(_column_means(resampled) - here)

    def interval(members: NDArray[np.integer]) -> Interval:
        members = members[~np.isnan(here[members])]
        count = max(1, len(members))
        estimate = _row_means(here[None, members])
        low, high = score_interval(
            estimate,
            error=_deviations(_row_means(resampled[:, members])[:, None]),
            excess=np.array([excess[members].sum() / count]),
            num_truths=np.array([num_truths[members].sum()]),
            confidence=confidence,
        )
        return Interval(float(estimate[0]), float(low[0]), float(high[0]))

    low, high = score_interval(here, error=error, excess=excess, num_truths=num_truths, confidence=confidence)
    return Intervals(
        mean=interval(np.arange(len(here))),
        ap=here,
        ap_low=low,
        ap_high=high,
        groups=_of_each(groups, interval),
        resamples=resamples,
        confidence=confidence,
    )


def paired_differences(
    first: Matches,
    second: Matches,
    *,
    groups: Groups | None = None,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    threads: int = 0,
) -> Differences:
    """Second run minus first run; both get the same images in every resample, so what both have in common cancels out.

    Classes that only one run evaluated are left out; a class with the same entries in both differs by exactly 0.
    Raises ValueError when the two were not matched with the same images and ground truth, for settings out of range,
    and for groups that do not fit the classes.
    """
    groups = _checked(groups, len(first.evaluated), resamples=resamples, confidence=confidence)
    _check_same_ground_truth(first, second)
    before, after = resampled_ap([first, second], resamples=resamples, seed=seed, threads=threads)
    here = average_precision(second) - average_precision(first)
    resampled = after - before
    num_images = np.bincount(first.gt_class, minlength=len(here))
    unseen = np.where(_same_entries(first, second), 0.0, disagreement_variance(num_images))

    def difference(members: NDArray[np.integer]) -> Difference:
        # In a resample a class has ground truth for both runs or for neither, so the difference of the means over the
        # shared classes is the mean of the differences.
        members = members[~np.isnan(here[members])]
        means = _row_means(resampled[:, members])[:, None]
        estimate = _row_means(here[None, members])
        variance = _deviations(means) ** 2 + unseen[members].sum() / max(1, len(members)) ** 2
        low, high = difference_interval(estimate, error=np.sqrt(variance), confidence=confidence)
        return Difference(float(estimate[0]), float(low[0]), float(high[0]), float(_fraction_above_zero(means)[0]))

    low, high = difference_interval(here, error=np.sqrt(_deviations(resampled) ** 2 + unseen), confidence=confidence)
    return Differences(
        mean=difference(np.arange(len(here))),
        ap=here,
        ap_low=low,
        ap_high=high,
        ap_fraction_above_zero=_fraction_above_zero(resampled),
        groups=_of_each(groups, difference),
        resamples=resamples,
        confidence=confidence,
    )


def _same_entries(first: Matches, second: Matches) -> NDArray[np.bool_]:
    """``[K]`` whether both runs have the same entries of a class (and any, unless the runs are equal throughout)."""
    num_classes = len(first.evaluated)
    counts = [np.bincount(run.class_index, minlength=num_classes) for run in (first, second)]
    same = (counts[0] == counts[1]) & (counts[0] > 0)
    one, other = (np.flatnonzero(same[run.class_index]) for run in (first, second))
    columns = ("image_index", "kind", "weight", "score")
    differs = np.zeros(len(one), dtype=bool)
    for name in columns:
        differs |= getattr(first, name)[one] != getattr(second, name)[other]
    same[first.class_index[one[differs]]] = False
    equal_throughout = (same | (counts[0] + counts[1] == 0)).all()
    return np.asarray(same | equal_throughout, dtype=np.bool_)


def _row_means(values: FloatArray) -> FloatArray:
    """Mean of each row over what is not NaN; NaN for a row of NaN."""
    known = ~np.isnan(values)
    counts = known.sum(axis=1)
    result = np.full(len(values), np.nan)
    np.divide(np.where(known, values, 0.0).sum(axis=1), counts, out=result, where=counts > 0)
    return result


def _column_means(values: FloatArray) -> FloatArray:
    """Mean of each column over what is not NaN; NaN for a column of NaN."""
    return _row_means(values.T)


def _deviations(values: FloatArray) -> FloatArray:
    """Standard deviation of each column over what is not NaN; 0 for a column of NaN."""
    distance = values - _column_means(values)
    return np.sqrt(np.nan_to_num(_column_means(distance**2)))


def _fraction_above_zero(values: FloatArray) -> FloatArray:
    """Fraction of each column, among what is not NaN, that is above 0."""
    known = (~np.isnan(values)).sum(axis=0)
    result = np.full(values.shape[1], np.nan)
    np.divide((values > 0).sum(axis=0), known, out=result, where=known > 0)
    return result


def _of_each(
    groups: Mapping[str, NDArray[np.integer]], measure: Callable[[NDArray[np.integer]], Result]
) -> dict[str, Result]:
    return {name: measure(members) for name, members in groups.items()}


def _checked(
    groups: Groups | None, num_classes: int, *, resamples: int, confidence: float
) -> dict[str, NDArray[np.integer]]:
    """The indices of the classes of each group."""
    if resamples < 1:
        raise ValueError(f"`resamples >= 1` must hold, but got {resamples}")
    if not 0 < confidence < 1:
        raise ValueError(f"`0 < confidence < 1` must hold, but got {confidence}")
    indices: dict[str, NDArray[np.integer]] = {}
    for name, members in (groups or {}).items():
        try:
            indices[name] = np.arange(num_classes)[members]
        except IndexError as error:
            raise ValueError(f"group {name} must be bool [{num_classes}] or indices of classes: {error}") from None
    return indices


def _check_same_ground_truth(first: Matches, second: Matches) -> None:
    if not np.array_equal(first.image_ids, second.image_ids):
        raise ValueError(
            "paired differences need the same images in the same order, but the runs were evaluated on "
            f"{len(first.image_ids)} and {len(second.image_ids)} images that are not the same"
        )
    if len(first.evaluated) != len(second.evaluated):
        raise ValueError(
            f"the runs must share their classes, but got {len(first.evaluated)} and {len(second.evaluated)}"
        )
    shared = first.evaluated & second.evaluated
    ground_truths = []
    for run in (first, second):
        rows = shared[run.gt_class]
        ground_truths.append((run.gt_image[rows], run.gt_class[rows], run.gt_count[rows]))
    if not all(np.array_equal(one, other) for one, other in zip(*ground_truths, strict=True)):
        raise ValueError(
            "the runs were evaluated with different ground truth boxes (or group_of_weight) for the same images"
        )
