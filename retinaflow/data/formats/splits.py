"""Some images of a set that has one split become its validation split, so that every class is on both sides.

Classes are gone through rarest first (Sechidis, Tsoumakas and Vlahavas 2011, "On the stratification of multi-label
data"): each gets its share of validation images out of those of its images that no rarer class has placed, at least
one and never all. What rarer classes have placed can leave a class on one side all the same; then images are moved
where no other class loses a side by it. A class on one image is trained on.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def validation_images(
    image: NDArray[np.int64], class_index: NDArray[np.int64], count: int, *, share: float, seed: int
) -> NDArray[np.bool_]:
    """``[count]`` which images go to validation, about ``share`` of them.

    ``image [N]``, ``class_index [N]``: image and class of each box. A pure function of its arguments.
    """
    rng = np.random.default_rng(seed)
    pairs = np.unique(np.stack([image, class_index], axis=1), axis=0) if len(image) else np.zeros((0, 2), dtype=int)
    classes, of_pair = np.unique(pairs[:, 1], return_inverse=True)
    members = [pairs[of_pair == place, 0] for place in range(len(classes))]
    chosen, placed = np.zeros(count, dtype=bool), np.zeros(count, dtype=bool)
    for place in sorted(range(len(members)), key=lambda place: (len(members[place]), place)):
        _place(members[place], chosen, placed, share, rng)
    _place(np.flatnonzero(~placed), chosen, placed, share, rng)
    _mend(members, chosen)
    return chosen


def _place(
    own: NDArray[np.int64], chosen: NDArray[np.bool_], placed: NDArray[np.bool_], share: float, rng: np.random.Generator
) -> None:
    """Place the images of a class that are not placed yet."""
    free = own[~placed[own]]
    wanted = 0 if len(own) < 2 else int(np.clip(round(share * len(own)), 1, len(own) - 1))
    missing = int(np.clip(wanted - chosen[own].sum(), 0, len(free)))
    chosen[rng.permutation(free)[:missing]] = True
    placed[own] = True


def _mend(members: list[NDArray[np.int64]], chosen: NDArray[np.bool_]) -> None:
    """Move images of classes that are on one side only, where no other class comes to be on one side."""
    classes_of: dict[int, list[int]] = {}
    for place, own in enumerate(members):
        for image in own.tolist():
            classes_of.setdefault(image, []).append(place)
    for own in (own for own in members if len(own) > 1):
        if 0 < chosen[own].sum() < len(own):
            continue
        side = bool(chosen[own[0]])
        for image in own.tolist():
            others = [members[place] for place in classes_of[image] if members[place] is not own]
            if all(len(other) < 2 or (chosen[other] == side).sum() > 1 for other in others):
                chosen[image] = not side
                break


def one_sided(image: NDArray[np.int64], class_index: NDArray[np.int64], chosen: NDArray[np.bool_]) -> list[int]:
    """Classes with two or more images that are all on one side."""
    found = []
    for index in np.unique(class_index):
        own = np.unique(image[class_index == index])
        if len(own) > 1 and chosen[own].sum() in (0, len(own)):
            found.append(int(index))
    return found
