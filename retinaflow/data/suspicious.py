"""Rows of an index that keep every rule and still look wrong: found without opening an image, listed for a person.

Nothing is changed or left out: some of them are right (a picture may be filled by one object). Every rule is a few
vectorised passes over the columns, the dearest two sorts of N keys.
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
"""The same as a share of the image's side, where image sizes are not known."""
WHOLE = 0.98
"""Share of the image's area from which on a box covers the whole image."""
SAME = 1000
"""Boxes are the same when all corners agree after rounding to this part of the image's side."""

Rows = NDArray[np.int64]


class Suspicion(NamedTuple):
    """Rows that one rule finds: ``rows`` of boxes, or of image-level labels when ``of_labels``."""

    rule: str
    meaning: str
    rows: Rows
    of_labels: bool = False


def suspicions(index: AnnotationIndex) -> Iterator[Suspicion]:
    """Every rule with what it finds, also when that is nothing."""
    yield Suspicion("tiny box", _tiny_rule(index), _tiny(index))
    repeated, nested = _repeated(index)
    yield Suspicion("repeated box", "the same class at the same place (to a thousandth) once more", repeated)
    yield Suspicion("child and parent", "the same place boxed as a class and as one of its ancestors", nested)
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
    return table.assign(**{name: corners[:, place] for place, name in enumerate(("x1", "y1", "x2", "y2"))})


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


def _places(index: AnnotationIndex) -> NDArray[np.int64]:
    """``[N]`` equal for boxes at the same place of the same image."""
    width = SAME + 1
    corners = np.clip(np.rint(np.asarray(index.boxes) * SAME), 0, SAME).astype(np.int64)
    key = corners[:, 0]
    for column in range(1, 4):
        key = key * width + corners[:, column]
    # The key of the corners needs 40 bits; 23 are left for the image.
    return np.asarray(np.unique(key, return_inverse=True)[1]) * np.int64(max(len(index), 1)) + index.box_image


def _repeated(index: AnnotationIndex) -> tuple[Rows, Rows]:
    """Rows that repeat an earlier one of their class, and rows with an ancestor of their class at the same place."""
    place = _places(index)
    order = np.argsort(place, kind="stable")
    starts = np.flatnonzero(np.diff(place[order], prepend=-1) != 0)
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
    # Few images remain, and only for them every class is looked at.
    rows = np.flatnonzero(np.isin(index.box_image, images))
    is_absent = np.zeros((len(images), index.num_classes), dtype=bool)
    is_absent.reshape(-1)[_positions(keys, images, index.num_classes)] = True
    above = index.taxonomy.is_ancestor | np.eye(index.num_classes, dtype=bool)
    place = np.searchsorted(images, index.box_image[rows])
    hit = [bool((is_absent[at] & above[label]).any()) for at, label in zip(place, index.labels[rows], strict=True)]
    return np.asarray(rows[np.array(hit, dtype=bool)])


def _pairs(index: AnnotationIndex, images: NDArray[np.integer], classes: NDArray[np.integer]) -> NDArray[np.int64]:
    """One number for each (image, class)."""
    return images.astype(np.int64) * index.num_classes + classes


def _positions(keys: NDArray[np.int64], images: NDArray[np.integer], width: int) -> NDArray[np.int64]:
    """Where the pairs of ``images`` stand in a table of these images."""
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
