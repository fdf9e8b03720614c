"""Small indexes made in memory, and slow references to evaluate the fast code by."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from retinaflow.data.image_class_pairs import ImageClassPairs
from retinaflow.data.index import AnnotationIndex, row_starts
from retinaflow.taxonomy import Hierarchy, Taxonomy

SHARED = Path(__file__).resolve().parents[1].parent / "shared" / "data"
Link = tuple[int, int]


class TinyDataset(Protocol):
    """The fixture ``tiny_dataset`` of tests/conftest.py."""

    def __call__(self, name: str = "tiny", *, train: int = 12, validation: int = 6, seed: int = 0) -> Path: ...


def make_taxonomy(classes: int, links: Iterable[Link] = ()) -> Taxonomy:
    """Classes c0, c1, ... with (parent, child) links between their indices."""
    ids = tuple(f"/m/{number}" for number in range(classes))
    pairs = tuple((ids[parent], ids[child]) for parent, child in links)
    return Taxonomy(ids, tuple(f"c{number}" for number in range(classes)), Hierarchy(pairs, (), ids))


def make_index(
    boxed: Sequence[Sequence[int]],
    *,
    classes: int,
    links: Iterable[Link] = (),
    labelled: Sequence[Sequence[tuple[int, bool]]] | None = None,
    sizes: Sequence[tuple[int, int]] | None = None,
    group_of: Iterable[int] = (),
) -> AnnotationIndex:
    """Images with a box for each class in ``boxed[i]`` and a label for each (class, present) in ``labelled[i]``.

    Box rows differ from each other, so that mixing them up shows: row n is (n / 2N, 0, n / 2N + 0.25, 0.5).
    """
    labelled = labelled if labelled is not None else [[] for _ in boxed]
    count = len(boxed)
    box_image = np.repeat(np.arange(count), [len(row) for row in boxed]).astype(np.int64)
    label_image = np.repeat(np.arange(count), [len(row) for row in labelled]).astype(np.int64)
    left = np.arange(len(box_image)) / max(2 * len(box_image), 1)
    flags = np.zeros(len(box_image), dtype=np.uint8)
    flags[list(group_of)] = 1 << 2
    return AnnotationIndex(
        taxonomy=make_taxonomy(classes, links),
        image_ids=np.array([f"i{number:04d}" for number in range(count)], dtype=np.str_),
        files=np.zeros(count, dtype="<U1"),
        sizes=np.array(sizes if sizes is not None else np.zeros((count, 2)), dtype=np.int32).reshape(count, 2),
        box_start=row_starts(box_image, count),
        boxes=np.stack([left, np.zeros_like(left), left + 0.25, np.full_like(left, 0.5)], axis=1),
        labels=np.array([label for row in boxed for label in row], dtype=np.int32),
        flags=flags,
        label_start=row_starts(label_image, count),
        verified_class=np.array([label for row in labelled for label, _ in row], dtype=np.int32),
        verified_present=np.array([present for row in labelled for _, present in row], dtype=bool),
    )


def random_index(seed: int, *, images: int = 30, classes: int = 8) -> AnnotationIndex:
    """Random boxes and labels over a random hierarchy in which classes may have several parents."""
    rng = np.random.default_rng(seed)
    # Links from a lower to a higher index cannot make a cycle.
    pairs = [(parent, child) for parent in range(classes) for child in range(parent + 1, classes)]
    links = [pair for pair in pairs if rng.random() < 0.25]
    boxed = [rng.integers(0, classes, rng.integers(0, 5)).tolist() for _ in range(images)]
    labelled = [
        [(int(label), bool(rng.random() < 0.5)) for label in rng.integers(0, classes, rng.integers(0, 4))]
        for _ in range(images)
    ]
    rows = sum(map(len, boxed))
    group_of = np.flatnonzero(rng.random(rows) < 0.2).tolist()
    return make_index(boxed, classes=classes, links=links, labelled=labelled, group_of=group_of)


def presence_of(counts: Sequence[int]) -> ImageClassPairs:
    """Class k is on the first ``counts[k]`` images, twice on each."""
    image = np.concatenate([np.arange(count) for count in counts]).astype(np.int32)
    class_index = np.repeat(np.arange(len(counts)), counts).astype(np.int32)
    return ImageClassPairs(image, class_index, np.full(len(image), 2, np.int64), max(counts), len(counts))


def parents_of(taxonomy: Taxonomy) -> dict[int, set[int]]:
    """All strict ancestors of each class, by walking up link by link."""
    direct: dict[int, set[int]] = {index: set() for index in range(len(taxonomy))}
    for parent, child in taxonomy.hierarchy.subcategories:
        direct[taxonomy.index_of[child]].add(taxonomy.index_of[parent])

    def above(index: int) -> set[int]:
        return direct[index] | {far for near in direct[index] for far in above(near)}

    return {index: above(index) for index in direct}


def boxes_of(index: AnnotationIndex) -> dict[str, list[tuple[object, ...]]]:
    """Image id -> (class id, corners, flags) of each box, in order."""
    return {
        str(image_id): [
            (index.taxonomy.ids[index.labels[row]], *index.boxes[row].tolist(), int(index.flags[row]))
            for row in range(index.box_start[image], index.box_start[image + 1])
        ]
        for image, image_id in enumerate(index.image_ids)
    }


def labels_of(index: AnnotationIndex) -> dict[str, list[tuple[str, bool]]]:
    """Image id -> (class id, present) of each image-level label, in order."""
    return {
        str(image_id): [
            (index.taxonomy.ids[index.verified_class[row]], bool(index.verified_present[row]))
            for row in range(index.label_start[image], index.label_start[image + 1])
        ]
        for image, image_id in enumerate(index.image_ids)
    }
