"""Average precision of many resamples of the images at once, from matches that were made once.

A resample is how many times each image counts, so AP of a resample is AP with each entry repeated as often as its
image. The curve can rise only at a true positive, hence its non-increasing hull has its corners there, and of the false
positives between two true positives only the sum matters. That sum is a sparse matrix (true positives x images) times
the weights, which costs one addition per false positive and resample; all else is computed at the true positives only.
(Found group-of boxes are true positives here, with their weight.)

The value is that of :func:`retinaflow.metric.challenge.average_precision` (to rounding), for an eighth of the CPU
time. Threads compute blocks of resamples. Each resample has a random generator of its own, so neither the number of
threads nor the size of the blocks changes a number. Memory: about ``BYTES_AT_ONCE`` per thread, besides the result.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from retinaflow.metric.matches import Kind, Matches

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

RESAMPLES_AT_ONCE = 32
TRUE_POSITIVES_AT_ONCE = 10_000
"""True positives of one piece (a class is never split), so that temporary arrays stay in the cache."""
BYTES_AT_ONCE = 128 * 2**20
"""About the size of the temporary arrays of one thread."""
ARRAYS_AT_ONCE = 5


def half_of_images(num_images: int, resample: int, *, seed: int) -> FloatArray:
    """``[I]`` 1 for the images of a random half, 0 for the others; resamples 2k and 2k + 1 complement each other.

    With an odd number of images the first of the two has one image less.
    """
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(resample // 2,)))
    chosen = np.zeros(num_images)
    chosen[rng.permutation(num_images)[: num_images // 2]] = 1
    return chosen if resample % 2 == 0 else 1 - chosen


def resampled_ap(
    runs: Sequence[Matches],
    *,
    resamples: int,
    seed: int,
    threads: int = 0,
    sample: Callable[..., FloatArray] = half_of_images,
) -> list[FloatArray]:
    """AP ``[R, K]`` of every run, the same resamples of images for all runs; NaN where a class has no ground truth.

    The runs share their images. ``threads`` 0: one per processor that this process may use. ``sample(I, r, seed=seed)``
    returns ``[I]``, how many times each image is in resample r.
    """
    num_images = len(runs[0].image_ids)
    curves = [Curves.of(run) for run in runs]
    results = [np.full((resamples, len(run.evaluated)), np.nan) for run in runs]
    if num_images == 0:
        return results
    widest = max([num_images, *(curve.longest for curve in curves)])
    size = max(1, min(RESAMPLES_AT_ONCE, BYTES_AT_ONCE // (ARRAYS_AT_ONCE * 8 * widest)))

    def compute(start: int) -> None:
        block = range(start, min(start + size, resamples))
        weights = np.stack([sample(num_images, resample, seed=seed) for resample in block], axis=1)
        for curve, result in zip(curves, results, strict=True):
            result[block.start : block.stop] = curve.average_precision(weights)

    with ThreadPoolExecutor(threads or _usable_cores()) as pool:
        # Reading the results raises the errors of the threads.
        list(pool.map(compute, range(0, resamples, size)))
    return results


def _usable_cores() -> int:
    # macOS and Windows bind no process to cores.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class _Piece:
    """The true positives ``[T]`` of adjacent classes, and the false positives before each of them."""

    classes: IntArray
    bounds: IntArray
    """``[C + 1]`` rows of each class among those of the piece."""
    image: IntArray
    weight: FloatArray
    false_positives: csr_array
    """``[T, I]`` false positives of each image since the true positive before, or the start of the class."""


@dataclass(frozen=True)
class Curves:
    """The precision-recall curves of all classes, with the contribution of each image."""

    pieces: tuple[_Piece, ...]
    ground_truths: csr_array
    """``[K, I]`` ground truth count."""
    longest: int
    """True positives in the largest piece."""

    @staticmethod
    def of(matches: Matches) -> Curves:
        """The curves of ``matches``: true positives, and sums of the false positives between them."""
        num_images, num_classes = len(matches.image_ids), len(matches.evaluated)
        ground_truths = csr_array(
            (matches.gt_count, (matches.gt_class, matches.gt_image)), shape=(num_classes, num_images)
        )
        is_true = matches.kind != Kind.FALSE_POSITIVE
        tp = np.flatnonzero(is_true)
        class_of_true = matches.class_index[tp]
        fp = np.flatnonzero(~is_true)
        row = np.cumsum(is_true)[fp]
        # False positives after the last true positive of their class change nothing.
        matter = row < len(tp)
        matter[matter] = class_of_true[row[matter]] == matches.class_index[fp[matter]]
        fp, row = fp[matter], row[matter]
        between = csr_array((np.ones(len(fp)), (row, matches.image_index[fp])), shape=(len(tp), num_images))
        pieces = []
        for classes, bounds in _pieces(class_of_true):
            rows = slice(bounds[0], bounds[-1])
            pieces.append(
                _Piece(
                    classes,
                    bounds - bounds[0],
                    matches.image_index[tp[rows]],
                    matches.weight[tp[rows]],
                    between[rows],
                )
            )
        longest = max((len(piece.image) for piece in pieces), default=0)
        return Curves(tuple(pieces), ground_truths, longest)

    def average_precision(self, weights: FloatArray) -> FloatArray:
        """``[R, K]`` for ``weights [I, R]``, how much each image counts; NaN where a class has no ground truth."""
        num_truths = self.ground_truths @ weights
        area = np.zeros_like(num_truths)
        for piece in self.pieces:
            area[piece.classes] = _areas(piece, weights)
        result: FloatArray = np.full_like(area, np.nan)
        np.divide(area, num_truths, out=result, where=num_truths > 0)
        return result.T


def _areas(piece: _Piece, weights: FloatArray) -> FloatArray:
    """``[C, R]`` area under each curve of a piece, times the number of ground-truth boxes."""
    gained = weights[piece.image]
    gained *= piece.weight[:, None]
    counted = piece.false_positives @ weights
    counted += gained
    result = np.empty((len(piece.classes), weights.shape[1]))
    for number, (start, stop) in enumerate(zip(piece.bounds[:-1], piece.bounds[1:], strict=True)):
        own, seen = gained[start:stop], counted[start:stop]
        precision = np.cumsum(own, axis=0)
        np.cumsum(seen, axis=0, out=seen)
        np.divide(precision, seen, out=precision, where=seen > 0)
        hull = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
        np.einsum("tr,tr->r", own, hull, out=result[number])
    return result


def _pieces(class_of_true: IntArray) -> Iterator[tuple[IntArray, IntArray]]:
    """(classes, bounds of their rows) of pieces of whole classes, about ``TRUE_POSITIVES_AT_ONCE`` rows each."""
    classes, start = np.unique(class_of_true, return_index=True)
    bounds = np.append(start, len(class_of_true))
    first = 0
    while first < len(classes):
        last = max(first + 1, int(np.searchsorted(bounds, bounds[first] + TRUE_POSITIVES_AT_ONCE, side="right")) - 1)
        yield classes[first:last], bounds[first : last + 1]
        first = last
