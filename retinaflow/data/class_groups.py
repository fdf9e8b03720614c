"""Class groups: named or listed sets of classes to train and evaluate (the subproblems of a split label space).

A group is written as one string:

- ``all``: every class;
- ``people-clothing``: Person with everything below it by Subcategory and Part links, and Clothing with everything
  below it by Subcategory links; 65 of the 500 Open Images Challenge 2018 classes;
- ``rest``: all but ``people-clothing``;
- ``bin:K``: the classes of frequency bin K, 1 = rarest;
- a comma list of ids or display names; or the path of a file with one id or name per line.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from retinaflow.data.index import AnnotationIndex
from retinaflow.data.text_lines import read_lines
from retinaflow.errors import SettingError, shown
from retinaflow.taxonomy import Taxonomy

PERSON = "/m/01g317"
CLOTHING = "/m/09j2d"


class BinOfClass(Protocol):
    """The attributes that ``bin:K`` needs, of :class:`retinaflow.data.frequency_bins.ClassBins` for example."""

    @property
    def bin_of_class(self) -> NDArray[np.int32]: ...

    @property
    def num_bins(self) -> int: ...


def select_classes(group: str, taxonomy: Taxonomy, bins: BinOfClass | None = None) -> NDArray[np.int64]:
    """Class indices of a group, ascending. ``bins`` is needed for ``bin:K`` only.

    Raises SettingError when the group names an unknown or ambiguous class, a bin that does not exist, or no class at
    all.
    """
    chosen = np.array(sorted(set(_members(group.strip(), taxonomy, bins))), dtype=np.int64)
    if len(chosen) == 0:
        raise SettingError(f"class_group={group}: the group must hold at least one of the {len(taxonomy)} classes")
    return chosen


def _members(group: str, taxonomy: Taxonomy, bins: BinOfClass | None) -> list[int]:
    if group == "all":
        return list(range(len(taxonomy)))
    if group in ("people-clothing", "rest"):
        people = _people_and_clothing(taxonomy)
        if not people:
            raise SettingError(
                f"class_group={group}: the classes must hold Person ({PERSON}) or Clothing ({CLOTHING}), but hold "
                "neither; give class_group=all, or name the classes"
            )
        return [index for index in range(len(taxonomy)) if (index in people) == (group == "people-clothing")]
    if group.startswith("bin:"):
        return _bin_members(group, bins)
    listed = keys_of_file(group)
    if listed is not None:
        return [_find(key, taxonomy, where=f"{group} line {n}") for n, key in listed.items()]
    where = f"class_group={shown(group, quotes=False)}"
    return [_find(key.strip(), taxonomy, where=where) for key in group.split(",") if key.strip()]


def keys_of_file(group: str) -> dict[int, str] | None:
    """Line number -> id or name, without empty lines, of a group that is the path of a file; None for another group."""
    group = group.strip()
    # os.path, because Path.is_file fails on a comma list that is too long for a file name.
    if group in ("all", "people-clothing", "rest") or group.startswith("bin:") or not os.path.isfile(group):  # noqa: PTH113
        return None
    lines = enumerate(read_lines(Path(group)), 1)
    return {number: line.strip() for number, line in lines if line.strip()}


def _people_and_clothing(taxonomy: Taxonomy) -> set[int]:
    members = taxonomy.hierarchy.reachable(PERSON, parts=True) | taxonomy.hierarchy.reachable(CLOTHING)
    return {taxonomy.index_of[mid] for mid in members if mid in taxonomy.index_of}


def _bin_members(group: str, bins: BinOfClass | None) -> list[int]:
    number = group.removeprefix("bin:")
    if bins is None or number not in map(str, range(1, bins.num_bins + 1)):
        known = f"1..{bins.num_bins}" if bins is not None else "none here"
        given = shown(group, quotes=False)
        raise SettingError(f"class_group={given}: bin:K must name a bin, 1 = rarest; the bins are {known}")
    return [int(index) for index in np.flatnonzero(bins.bin_of_class == int(number) - 1)]


def _find(key: str, taxonomy: Taxonomy, *, where: str) -> int:
    try:
        return taxonomy.find(key)
    except SettingError as error:
        raise SettingError(f"{where}: {error}") from None


@dataclass(frozen=True)
class SeenImages:
    """The images that a sub-model trains on, and how many were available."""

    boxed: int
    """Images with a box of the group; all are used."""
    verified_absent: int
    """Images without such a box on which a class of the group is verified absent, as used."""
    verified_absent_in_all: int
    """... and as available."""
    others: int
    """Other images: without a label of the group, or with present labels only, as used."""
    others_in_all: int
    """... and as available."""

    @property
    def background_ratio(self) -> float:
        """Used images without a box of the group per image with one; 0 when there is none."""
        return (self.verified_absent + self.others) / self.boxed if self.boxed else 0.0

    def __str__(self) -> str:
        return (
            f"{self.boxed:,} images with boxes of the group; background {self.verified_absent:,} of "
            f"{self.verified_absent_in_all:,} verified absent and {self.others:,} of {self.others_in_all:,} others, "
            f"{self.background_ratio:.2f} per image with boxes"
        )


def limit_background(
    index: AnnotationIndex, *, ratio: float, seed: int
) -> tuple[AnnotationIndex, NDArray[np.int64], SeenImages]:
    """The images that a sub-model trains on: all with boxes, and up to ``ratio`` times as many without.

    Images on which a class of the group is verified absent come first: only they give negatives of these classes.
    Returns the smaller index, its images as indices in ``index``, ascending, and the counts of each kind. The choice
    among equals is random by ``seed``.
    """
    boxed = np.diff(index.box_start) > 0
    labelled = np.bincount(index.label_image[~index.verified_present], minlength=len(index)) > 0
    absent = labelled | index.all_known
    background = np.flatnonzero(~boxed)
    order = np.random.default_rng(seed).permutation(len(background))
    order = order[np.argsort(~absent[background[order]], kind="stable")]
    wanted = min(len(background), round(ratio * int(boxed.sum())))
    chosen = background[order[:wanted]]
    images = np.sort(np.concatenate([np.flatnonzero(boxed), chosen]))
    negatives, in_all = int(absent[chosen].sum()), int(absent[background].sum())
    seen = SeenImages(int(boxed.sum()), negatives, in_all, wanted - negatives, len(background) - in_all)
    return index.take(images), images, seen
