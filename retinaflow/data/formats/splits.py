"""A validation split taken from the training split, so that every class is in both.

The classes are visited rarest first (Sechidis, Tsoumakas and Vlahavas 2011, "On the stratification of multi-label
data"). Each class gets its fraction of validation images, at least one and never all, from those of its images that no
rarer class has assigned. The assignments of rarer classes can still leave a class in one split; then an image is moved
if no other class leaves a split by the move. A class with one image is trained on.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from retinaflow.data.formats.detection_set import DetectionSet
from retinaflow.progress import report


def with_validation_split(found: DetectionSet, *, fraction: float, seed: int) -> DetectionSet:
    """The set with a validation split, taken from the training split if there is none; as it is with ``fraction`` 0."""
    if "train" not in found.splits or "validation" in found.splits or fraction == 0:
        return found
    image, classes = (found.boxes[name].to_numpy(dtype=np.int64) for name in ("image", "class"))
    own = np.flatnonzero(found.images["split"].to_numpy() == "train")
    is_own = np.isin(image, own)
    position, classes = np.searchsorted(own, image[is_own]), classes[is_own]
    chosen = validation_images(position, classes, len(own), fraction=fraction, seed=seed)
    report(f"{int(chosen.sum()):,} of {len(own):,} images became the validation split (validation_fraction=0: none)")
    left = one_sided(position, classes, chosen)
    if left:
        names = ", ".join(found.taxonomy.labels[index] for index in left[:5])
        report(f"{len(left)} classes of several images could not be put into both splits: {names}")
    splits = found.images["split"].to_numpy(dtype=object)
    splits[own[chosen]] = "validation"
    return replace(found, images=found.images.assign(split=splits))


def validation_images(
    image: NDArray[np.int64], class_index: NDArray[np.int64], count: int, *, fraction: float, seed: int
) -> NDArray[np.bool_]:
    """``[count]`` which images go to validation, about ``fraction`` of them.

    ``image [N]``, ``class_index [N]``: image and class of each box. A pure function of its arguments.
    """
    rng = np.random.default_rng(seed)
    pairs = np.unique(class_index * count + image)
    of_class = pairs // max(count, 1)
    starts = np.flatnonzero(np.diff(of_class, prepend=-1))
    members = np.split(pairs % max(count, 1), starts[1:])
    chosen, assigned = np.zeros(count, dtype=bool), np.zeros(count, dtype=bool)
    for own in sorted(members, key=len):
        _assign(own, chosen, assigned, fraction, rng)
    _assign(np.flatnonzero(~assigned), chosen, assigned, fraction, rng)
    _move_into_both(members, chosen)
    return chosen


def _assign(
    own: NDArray[np.int64],
    chosen: NDArray[np.bool_],
    assigned: NDArray[np.bool_],
    fraction: float,
    rng: np.random.Generator,
) -> None:
    """Assign the images of a class that are not assigned yet."""
    free = own[~assigned[own]]
    wanted = 0 if len(own) < 2 else int(np.clip(round(fraction * len(own)), 1, len(own) - 1))
    missing = int(np.clip(wanted - chosen[own].sum(), 0, len(free)))
    chosen[rng.permutation(free)[:missing]] = True
    assigned[own] = True


def _move_into_both(members: list[NDArray[np.int64]], chosen: NDArray[np.bool_]) -> None:
    """Move images of classes that are in one split only, where no other class leaves a split by it."""
    classes_of: dict[int, list[int]] = {}
    for row, own in enumerate(members):
        for image in own.tolist():
            classes_of.setdefault(image, []).append(row)
    for own in (own for own in members if len(own) > 1):
        if 0 < chosen[own].sum() < len(own):
            continue
        side = bool(chosen[own[0]])
        for image in own.tolist():
            others = [members[row] for row in classes_of[image] if members[row] is not own]
            if all(len(other) < 2 or (chosen[other] == side).sum() > 1 for other in others):
                chosen[image] = not side
                break


def one_sided(image: NDArray[np.int64], class_index: NDArray[np.int64], chosen: NDArray[np.bool_]) -> list[int]:
    """Classes with two or more images that are all in one split."""
    found = []
    for index in np.unique(class_index):
        own = np.unique(image[class_index == index])
        if len(own) > 1 and chosen[own].sum() in (0, len(own)):
            found.append(int(index))
    return found
