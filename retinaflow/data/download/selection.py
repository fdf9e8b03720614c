"""Which images to fetch, so that every chosen class gets its number of them.

A greedy pass, rarest class first: what images chosen for rarer classes hold is counted, and the class is filled up with
images drawn at random from its others. So a frequent class, which comes along on images of the rare ones, needs few of
its own.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def choose_images(
    image: NDArray[np.int64], class_index: NDArray[np.int64], count: int, *, per_class: int, seed: int
) -> NDArray[np.int64]:
    """Chosen images, ascending: each class has ``per_class`` of them, or all there are.

    ``image [N]`` (0..count - 1) and ``class_index [N]`` are distinct pairs. A pure function of its arguments.
    """
    order = np.random.default_rng(seed).permutation(count)
    rank = np.empty(count, dtype=np.int64)
    rank[order] = np.arange(count)
    classes, of_pair, sizes = np.unique(class_index, return_inverse=True, return_counts=True)
    chosen = np.zeros(count, dtype=bool)
    for place in np.lexsort((classes, sizes)):
        own = image[of_pair == place]
        missing = per_class - int(chosen[own].sum())
        if missing > 0:
            free = own[~chosen[own]]
            chosen[free[np.argsort(rank[free])[:missing]]] = True
    return np.flatnonzero(chosen)
