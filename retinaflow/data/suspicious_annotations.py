"""Annotations that break no rule and still look like errors, for a person to review. No image is opened.

Nothing is changed or left out: some of these annotations are correct (one object may fill its image). Each criterion
takes a few vectorised passes over the columns, the most expensive one two sorts of N keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from retinaflow.data.image_class_pairs import image_class_pairs
from retinaflow.data.index import FLAGS, AnnotationIndex

TINY_PIXELS = 4
"""A box with a side shorter than this, in pixels of the stored image, is tiny."""
TINY_SHARE = 0.004
"""The same as a fraction of the side of the image, where image sizes are unknown."""
WHOLE = 0.98
"""Fraction of the image's area from which a box counts as covering the whole image."""
SAME = 1000
"""Boxes are equal if all corners agree after rounding to one part in this many of the image's side."""

Rows = NDArray[np.int64]


class Suspicion(NamedTuple):
    """The rows of one criterion: ``rows`` of boxes, or of image-level labels with ``of_labels``."""

    rule: str
    meaning: str
    rows: Rows
    of_labels: bool = False


def suspicions(index: AnnotationIndex) -> Iterator[Suspicion]:
    """Every criterion with its rows, also if there are none."""
    yield Suspicion("tiny box", _tiny_rule(index), _tiny(index))
    repeated, nested = _repeated(index)
    yield Suspicion("repeated box", "another box of the same class has the same corners (to a thousandth)", repeated)
    yield Suspicion("child and parent", "a box of an ancestor of its class has the same corners", nested)
    yield Suspicion(
        "whole image", f"covers {WHOLE:.0%} of the image or more, but is neither group-of nor inside", _whole(index)
    )
    yield Suspicion("class verified absent", "boxed where the class or an ancestor is verified absent", _absent(index))
    yield Suspicion(
        "both present and absent", "an image-level label that another one contradicts", _contradicted(index), True
    )
    yield Suspicion(
        "present without a box", "verified present, but neither it nor a descendant is boxed", _unboxed(index), True
    )


def suspicious_table(index: AnnotationIndex, found: Suspicion, *, most: int) -> pd.DataFrame:
    """The first ``most`` rows of a rule: rule, image, class, class_id, x1, y1, x2, y2 (no corners for a label)."""
    rows = found.rows[:most]
    images, classes = (
        (index.label_image[rows], index.verified_class[rows])
        if found.of_labels
        else (index.box_image[rows], index.labels[rows])
    )
    corners = np.full((len(rows), 4), np.nan) if found.of_labels else np.asarray(index.boxes[rows])
    names, ids = np.asarray(index.taxonomy.labels, dtype=object), np.asarray(index.taxonomy.ids, dtype=object)
    table = pd.DataFrame({"rule": found.rule, "image": np.asarray(index.image_ids)[images], "class": names[classes]})
    table["class_id"] = ids[classes]
    return table.assign(**{name: corners[:, column] for column, name in enumerate(("x1", "y1", "x2", "y2"))})


def _tiny_rule(index: AnnotationIndex) -> str:
    if (np.asarray(index.sizes) > 0).all():
        return f"a side is shorter than {TINY_PIXELS} pixels"
    return f"a side is shorter than {TINY_SHARE:g} of the image's"


def _tiny(index: AnnotationIndex) -> Rows:
    sides = np.asarray(index.boxes[:, 2:] - index.boxes[:, :2])
    if (np.asarray(index.sizes) > 0).all():
        sides = sides * np.asarray(index.sizes)[index.box_image][:, ::-1] / TINY_PIXELS
        return np.flatnonzero(sides.min(axis=1, initial=np.inf) < 1)
    return np.flatnonzero(sides.min(axis=1, initial=np.inf) < TINY_SHARE)


def _same_corners(index: AnnotationIndex) -> NDArray[np.int64]:
    """``[N]`` keys, equal for boxes with the same corners on the same image."""
    width = SAME + 1
    corners = np.clip(np.rint(np.asarray(index.boxes) * SAME), 0, SAME).astype(np.int64)
    key = corners[:, 0]
    for column in range(1, 4):
        key = key * width + corners[:, column]
    # Numbers of distinct corners, not their 40-bit keys, so that 63 bits hold them for every image.
    return np.asarray(np.unique(key, return_inverse=True)[1]) * np.int64(max(len(index), 1)) + index.box_image


def _repeated(index: AnnotationIndex) -> tuple[Rows, Rows]:
    """Rows that repeat an earlier one of their class, and rows with a box of an ancestor of their class at the same
    corners."""
    keys = _same_corners(index)
    order = np.argsort(keys, kind="stable")
    starts = np.flatnonzero(np.diff(keys[order], prepend=-1) != 0)
    ends = np.append(starts[1:], len(order))
    shared = np.flatnonzero(ends - starts > 1)
    closure, labels = index.taxonomy.is_ancestor, np.asarray(index.labels)
    repeated, nested = [], []
    for group in shared:
        rows = order[starts[group] : ends[group]]
        own = labels[rows]
        first = np.unique(own, return_index=True)[1]
        repeated += np.delete(rows, first).tolist()
        nested += rows[closure[own][:, own].any(axis=1)].tolist()
    return np.array(sorted(repeated), dtype=np.int64), np.array(sorted(nested), dtype=np.int64)


def _whole(index: AnnotationIndex) -> Rows:
    boxes = np.clip(np.asarray(index.boxes), 0, 1)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    excused = sum(1 << FLAGS.index(name) for name in FLAGS if name.endswith(("GroupOf", "Inside")))
    return np.flatnonzero((area >= WHOLE) & ((np.asarray(index.flags) & excused) == 0))


def _absent(index: AnnotationIndex) -> Rows:
    """A class is absent where its own or an ancestor's absence is verified."""
    absent = ~np.asarray(index.verified_present)
    keys = np.unique(_pairs(index, index.label_image[absent], index.verified_class[absent]))
    implied = image_class_pairs(index, expand=True)
    wrong = np.isin(_pairs(index, implied.image, implied.class_index), keys)
    images = np.unique(implied.image[wrong])
    # Few images remain; all classes are compared only on them.
    rows = np.flatnonzero(np.isin(index.box_image, images))
    is_absent = np.zeros((len(images), index.num_classes), dtype=bool)
    is_absent.reshape(-1)[_positions(keys, images, index.num_classes)] = True
    above = index.taxonomy.is_ancestor | np.eye(index.num_classes, dtype=bool)
    row_of_image = np.searchsorted(images, index.box_image[rows])
    hit = [
        bool((is_absent[at] & above[label]).any()) for at, label in zip(row_of_image, index.labels[rows], strict=True)
    ]
    return np.asarray(rows[np.array(hit, dtype=bool)])


def _pairs(index: AnnotationIndex, images: NDArray[np.integer], classes: NDArray[np.integer]) -> NDArray[np.int64]:
    """One number for each (image, class)."""
    return images.astype(np.int64) * index.num_classes + classes


def _positions(keys: NDArray[np.int64], images: NDArray[np.integer], width: int) -> NDArray[np.int64]:
    """Positions of the pairs of ``images`` in a flat table of these images and all classes."""
    own = keys[np.isin(keys // width, images)]
    return np.asarray(np.searchsorted(images, own // width) * width + own % width)


def _contradicted(index: AnnotationIndex) -> Rows:
    keys = _pairs(index, index.label_image, index.verified_class)
    present = np.asarray(index.verified_present)
    return np.flatnonzero(~present & np.isin(keys, keys[present]))


def _unboxed(index: AnnotationIndex) -> Rows:
    """Present labels without a box of the class or of a class below it."""
    boxed = image_class_pairs(index, expand=True)
    keys = _pairs(index, index.label_image, index.verified_class)
    return np.flatnonzero(
        np.asarray(index.verified_present) & ~np.isin(keys, _pairs(index, boxed.image, boxed.class_index))
    )
