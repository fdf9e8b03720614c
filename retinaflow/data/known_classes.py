"""Which classes are known on an image, and which are absent there: what image-level labels and boxes imply.

A present label or a box implies all ancestors of its class, an absent label all descendants (METRIC rule 1). A box
with the flag ``IsNotExhaustive`` means that its class, and so its ancestors, may have objects without a box there.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from retinaflow.data.index import NOT_EXHAUSTIVE, AnnotationIndex, row_starts


def known_classes(index: AnnotationIndex, image: int) -> NDArray[np.bool_]:
    """``[K]`` classes of which no object is on the image without a box, so that all else is background for them.

    They are labelled present or absent, or boxed, expanded along the hierarchy, and are not :func:`not_exhaustive`.
    """
    if index.all_known:
        return np.ones(index.num_classes, dtype=bool)
    known = np.zeros(index.num_classes, dtype=bool)
    rows = slice(index.label_start[image], index.label_start[image + 1])
    classes, present = index.verified_class[rows], index.verified_present[rows]
    boxed = index.labels[index.box_start[image] : index.box_start[image + 1]]
    known[classes] = True
    known[boxed] = True
    upwards = np.concatenate([classes[present], boxed])
    closure = index.taxonomy.is_ancestor
    known |= closure[upwards].any(axis=0)
    known |= closure[:, classes[~present]].any(axis=1)
    return known & ~not_exhaustive(index, image)


def not_exhaustive(index: AnnotationIndex, image: int) -> NDArray[np.bool_]:
    """``[K]`` classes with a box of the flag ``IsNotExhaustive`` on an image, and their ancestors."""
    found = np.zeros(index.num_classes, dtype=bool)
    if not index.all_known:
        rows = slice(index.box_start[image], index.box_start[image + 1])
        classes = index.labels[rows][(index.flags[rows] & NOT_EXHAUSTIVE) != 0]
        found[classes] = True
        found |= index.taxonomy.is_ancestor[classes].any(axis=0)
    return found


def with_absent_labels(index: AnnotationIndex) -> AnnotationIndex:
    """The index with a verified absent label for every class that is neither labelled nor boxed on an image.

    Every object has a box then, so no class stays :func:`not_exhaustive`. For code that reads labels only, such as the
    metric. It has up to images times classes labels.
    """
    given = replace(index, all_known=False, flags=np.asarray(index.flags) & ~NOT_EXHAUSTIVE, path=None, saved_digest="")
    known = np.zeros((len(index), index.num_classes), dtype=bool)
    for image in range(len(index)):
        known[image] = known_classes(given, image)
    image_of_added, added = np.nonzero(~known)
    images = np.concatenate([index.label_image, image_of_added])
    order = np.argsort(images, kind="stable")
    return replace(
        given,
        label_start=row_starts(images, len(index)),
        verified_class=np.concatenate([index.verified_class, added.astype(np.int32)])[order],
        verified_present=np.concatenate([index.verified_present, np.zeros(len(added), dtype=bool)])[order],
    )
