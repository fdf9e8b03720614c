"""Average precision of many resamples of the images at once, from matches that were made once.

A resample says how many times each image counts, so AP of a resample is AP with each entry repeated as often as its
image. The curve can only rise at a right entry, hence its non-increasing hull has its corners there, and the wrong
entries between two right ones matter by their sum alone. That sum is a sparse matrix (right entries x images) times the
weights, which costs one addition per wrong entry and resample; everything else is done at the right entries only.

The value is that of :func:`retinaflow.metric.challenge.average_precision` (to rounding), for an eighth of the CPU
time. Resamples are worked on in blocks by threads. Each resample has a random generator of its own, so neither the
number of threads nor the size of the blocks changes a number. Memory: about ``BYTES_AT_ONCE`` per thread, besides the
result.
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
RIGHT_AT_ONCE = 10_000
"""Right entries that are worked on together (a class is never split), so that temporary arrays stay in the cache."""
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
    draw: Callable[..., FloatArray] = half_of_images,
) -> list[FloatArray]:
    """AP ``[R, K]`` of every run, all runs under the same draws of images; NaN where a class has no ground truth.

    The runs share their images. ``threads`` 0: one per processor that this process may use. ``draw(I, r, seed=seed)``
    gives ``[I]``, how many times each image is in resample r.
    """
    num_images = len(runs[0].image_ids)
    curves = [Curves.of(run) for run in runs]
    results = [np.full((resamples, len(run.evaluated)), np.nan) for run in runs]
    if num_images == 0:
        return results
    widest = max([num_images, *(curve.longest for curve in curves)])
    size = max(1, min(RESAMPLES_AT_ONCE, BYTES_AT_ONCE // (ARRAYS_AT_ONCE * 8 * widest)))

    def work(start: int) -> None:
        block = range(start, min(start + size, resamples))
        weights = np.stack([draw(num_images, resample, seed=seed) for resample in block], axis=1)
        for curve, result in zip(curves, results, strict=True):
            result[block.start : block.stop] = curve.average_precision(weights)

    with ThreadPoolExecutor(threads or len(os.sched_getaffinity(0))) as pool:
        # Asking for the results raises what went wrong in a thread.
        list(pool.map(work, range(0, resamples, size)))
    return results


@dataclass(frozen=True)
class _Piece:
    """The right entries ``[T]`` of some classes in a row, their classes' bounds, and the wrong entries before each."""

    classes: IntArray
    bounds: IntArray
    """``[C + 1]`` rows of each class among those of the piece."""
    image: IntArray
    weight: FloatArray
    wrong: csr_array
    """``[T, I]`` wrong entries of each image since the right entry before, or the start of the class."""


@dataclass(frozen=True)
class Curves:
    """The precision-recall curves of all classes, with what each image adds to them."""

    pieces: tuple[_Piece, ...]
    ground_truths: csr_array
    """``[K, I]`` ground truth count."""
    longest: int
    """Right entries in the largest piece."""

    @staticmethod
    def of(matches: Matches) -> Curves:
        """The entries of ``matches``, sorted into right ones and sums of wrong ones."""
        num_images, num_classes = len(matches.image_ids), len(matches.evaluated)
        ground_truths = csr_array(
            (matches.gt_count, (matches.gt_class, matches.gt_image)), shape=(num_classes, num_images)
        )
        is_right = matches.kind != Kind.FALSE_POSITIVE
        right = np.flatnonzero(is_right)
        right_class = matches.class_index[right]
        wrong = np.flatnonzero(~is_right)
        row = np.cumsum(is_right)[wrong]
        # Wrong entries after the last right one of their class change nothing.
        matter = row < len(right)
        matter[matter] = right_class[row[matter]] == matches.class_index[wrong[matter]]
        wrong, row = wrong[matter], row[matter]
        between = csr_array((np.ones(len(wrong)), (row, matches.image_index[wrong])), shape=(len(right), num_images))
        pieces = []
        for classes, bounds in _pieces(right_class):
            rows = slice(bounds[0], bounds[-1])
            pieces.append(
                _Piece(
                    classes,
                    bounds - bounds[0],
                    matches.image_index[right[rows]],
                    matches.weight[right[rows]],
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
    evaluated = piece.wrong @ weights
    evaluated += gained
    result = np.empty((len(piece.classes), weights.shape[1]))
    for number, (start, stop) in enumerate(zip(piece.bounds[:-1], piece.bounds[1:], strict=True)):
        own, seen = gained[start:stop], evaluated[start:stop]
        precision = np.cumsum(own, axis=0)
        np.cumsum(seen, axis=0, out=seen)
        np.divide(precision, seen, out=precision, where=seen > 0)
        hull = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
        np.einsum("tr,tr->r", own, hull, out=result[number])
    return result


def _pieces(right_class: IntArray) -> Iterator[tuple[IntArray, IntArray]]:
    """(classes, bounds of their rows) of runs of whole classes with about ``RIGHT_AT_ONCE`` right entries."""
    classes, start = np.unique(right_class, return_index=True)
    bounds = np.append(start, len(right_class))
    first = 0
    while first < len(classes):
        last = max(first + 1, int(np.searchsorted(bounds, bounds[first] + RIGHT_AT_ONCE, side="right")) - 1)
        yield classes[first:last], bounds[first : last + 1]
        first = last
