"""Frequency bins: groups of classes of similar frequency, rarest bin first.

The frequency of a class is the number of training images that hold it. Bins cut the axis of log10(images) by one of

- ``log``: bins of equal width between the rarest and the most frequent class;
- ``quantile``: an equal number of classes in each bin;
- ``jenks``: least sum of squared deviations of log10(images) from the bin means (Jenks 1967; Fisher 1958), exact by
  dynamic programming over the sorted classes, O(K^2 B);
- explicit edges in images, ``edges[b] <= n < edges[b + 1]``.

A bin that would hold no class is merged into its neighbour, so there may be fewer bins than asked for: ``num_bins`` is
their number. Classes without a training image belong to no bin (-1).

Worked example: images (4, 9, 40, 100, 1000), ``log``, 2 bins: the cut is at 10^((log10 4 + log10 1000) / 2) = 63.2, so
(4, 9, 40) form bin 1 and (100, 1000) bin 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from retinaflow.errors import DataError, SettingError
from retinaflow.settings.data_settings import BinStrategy


class ClassCounts(Protocol):
    """Counts of K classes in the training set, which :class:`~retinaflow.data.image_class_pairs.ImageClassPairs`
    has."""

    @property
    def images_per_class(self) -> NDArray[np.int64]: ...

    @property
    def boxes_per_class(self) -> NDArray[np.int64]: ...


@dataclass(frozen=True)
class ClassBins:
    """K classes in B bins. ``bin_of_class [K]`` int32 counts from 0 = rarest, -1 = no training image."""

    images_per_class: NDArray[np.int64]
    boxes_per_class: NDArray[np.int64]
    edges: NDArray[np.float64]
    """``[B + 1]`` images; bin b holds the classes with ``edges[b] <= images < edges[b + 1]``."""
    bin_of_class: NDArray[np.int32]
    strategy: str
    asked: int
    """Number of bins asked for."""

    @staticmethod
    def unknown(num_classes: int) -> ClassBins:
        """No bins: nothing is known of a training, as of a file of predictions."""
        counts = np.zeros(num_classes, dtype=np.int64)
        return ClassBins(counts, counts, np.zeros(1), np.full(num_classes, -1, dtype=np.int32), "none", 0)

    def of_classes(self, classes: NDArray[np.integer]) -> ClassBins:
        """Those of some classes; the bins keep their numbers, and some may have no class."""
        chosen = {
            name: getattr(self, name)[classes] for name in ("images_per_class", "boxes_per_class", "bin_of_class")
        }
        return replace(self, **chosen)

    @property
    def num_bins(self) -> int:
        """B, the number of bins."""
        return len(self.edges) - 1

    @property
    def empty_classes(self) -> NDArray[np.int64]:
        """Classes without a training image."""
        return np.flatnonzero(self.bin_of_class < 0)

    @property
    def number_of_class(self) -> pd.Series:
        """``[K]`` Int64: the bin of each class as tables show it, 1 the rarest, missing for none."""
        numbers = pd.Series(self.bin_of_class + 1, dtype="Int64")
        return numbers.mask(numbers == 0)

    def medians(self) -> NDArray[np.float64]:
        """``[B]`` median images per class of each bin."""
        return np.array([np.median(self.images_per_class[self.bin_of_class == b]) for b in range(self.num_bins)])

    def exposure_target(self, balance: float) -> float:
        """T, the images per class up to which rarer bins are sampled: the ``balance`` quantile, in [0, 1], over
        classes."""
        return float(np.quantile(self.images_per_class[self.bin_of_class >= 0], balance))

    def rarity(self, balance: float) -> NDArray[np.float64]:
        """``[K]`` how far the bin of a class is below the exposure target: 1 for the rarest bin, 0 at and above the
        target.

        Between them log(T / n_b) / log(T / n_1), with n_b the bin's median images per class and T at most that of the
        most frequent bin; 0 with one bin and for a class without an image.
        """
        if self.num_bins < 2:
            return np.zeros(len(self.bin_of_class))
        medians = self.medians()
        target = min(self.exposure_target(balance), medians[-1])
        if target > medians[0]:
            of_bin = np.clip(np.log(target / medians) / np.log(target / medians[0]), 0.0, 1.0)
        else:
            of_bin = np.eye(self.num_bins)[0]
        return np.where(self.bin_of_class < 0, 0.0, of_bin[np.maximum(self.bin_of_class, 0)])

    def to_document(self, class_ids: Sequence[str]) -> dict[str, Any]:
        """JSON values: the content of ``bins.json``."""
        return {
            "strategy": self.strategy,
            "num_bins": self.num_bins,
            "num_bins_asked": self.asked,
            "edges": self.edges.tolist(),
            "classes": [
                {"class_id": mid, "bin": int(b) + 1 if b >= 0 else None, "train_images": int(n), "train_boxes": int(m)}
                for mid, b, n, m in zip(
                    class_ids, self.bin_of_class, self.images_per_class, self.boxes_per_class, strict=True
                )
            ],
        }

    @staticmethod
    def from_document(document: dict[str, Any]) -> ClassBins:
        """The bins of a document of :meth:`to_document`."""
        classes = document["classes"]
        return ClassBins(
            np.array([row["train_images"] for row in classes], dtype=np.int64),
            np.array([row["train_boxes"] for row in classes], dtype=np.int64),
            np.array(document["edges"], dtype=np.float64),
            np.array([-1 if row["bin"] is None else row["bin"] - 1 for row in classes], dtype=np.int32),
            document["strategy"],
            document["num_bins_asked"],
        )


def make_bins(
    pairs: ClassCounts, *, num_bins: int = 7, strategy: BinStrategy = "log", edges: Sequence[float] = ()
) -> ClassBins:
    """Bins of the classes by training images. Explicit ``edges`` (inner cuts, in images) override strategy and number.

    Raises DataError when no class has an image, and SettingError for num_bins < 1 or edges that do not ascend.
    """
    images = pairs.images_per_class
    counts = np.sort(images[images > 0])
    if len(counts) == 0:
        raise DataError("at least one class must have a training image, but none has any")
    if num_bins < 1:
        raise SettingError(f"num_bins >= 1 must hold, but got num_bins={num_bins}")
    if list(edges) != sorted(set(edges)):
        raise SettingError(f"bin edges must ascend, but got {', '.join(map(str, edges))}")
    cuts = np.asarray(edges, dtype=np.float64) if len(edges) else _CUTS[strategy](counts, min(num_bins, len(counts)))
    # A cut at or below the rarest class, or with no class up to the next cut, would leave a bin empty.
    bin_of_count = np.unique(np.searchsorted(cuts, counts, side="right"))
    inner = cuts[bin_of_count[1:] - 1]
    bounds = np.concatenate([[float(counts[0])], inner, [float(counts[-1]) + 1]])
    bin_of_class = np.searchsorted(inner, images, side="right").astype(np.int32)
    bin_of_class[images == 0] = -1
    return ClassBins(
        images,
        pairs.boxes_per_class,
        bounds,
        bin_of_class,
        "edges" if len(edges) else strategy,
        len(edges) + 1 if len(edges) else num_bins,
    )


def _log_cuts(counts: NDArray[np.int64], num_bins: int) -> NDArray[np.float64]:
    low, high = np.log10(counts[0]), np.log10(counts[-1])
    return np.asarray(10 ** np.linspace(low, high, num_bins + 1)[1:-1])


def _quantile_cuts(counts: NDArray[np.int64], num_bins: int) -> NDArray[np.float64]:
    firsts = [part[0] for part in np.array_split(counts, num_bins)[1:]]
    return np.unique(np.asarray(firsts, dtype=np.float64))


def _jenks_cuts(counts: NDArray[np.int64], num_bins: int) -> NDArray[np.float64]:
    """Least within-bin variance: cost[b][j] = min over i of cost[b-1][i] + SSE(i..j), vectorised over i."""
    x = np.log10(counts.astype(np.float64))
    n = len(x)
    sums, squares = np.concatenate([[0.0], np.cumsum(x)]), np.concatenate([[0.0], np.cumsum(x * x)])
    start = np.arange(n)

    def sse(stop: int) -> NDArray[np.float64]:
        """Squared deviations of x[i:stop] from their mean, for every i < stop."""
        i = start[:stop]
        return np.asarray(squares[stop] - squares[i] - (sums[stop] - sums[i]) ** 2 / (stop - i))

    cost = np.array([sse(stop)[0] for stop in range(1, n + 1)])
    first = np.zeros((num_bins, n + 1), dtype=np.int64)
    for b in range(1, num_bins):
        new = np.full(n, np.inf)
        for stop in range(b + 1, n + 1):
            total = cost[b - 1 : stop - 1] + sse(stop)[b:]
            best = int(np.argmin(total))
            new[stop - 1], first[b, stop] = total[best], best + b
        cost = new
    cuts, stop = [], n
    for b in range(num_bins - 1, 0, -1):
        stop = int(first[b, stop])
        cuts.append(float(counts[stop]))
    return np.unique(cuts)


_CUTS = {"log": _log_cuts, "quantile": _quantile_cuts, "jenks": _jenks_cuts}
