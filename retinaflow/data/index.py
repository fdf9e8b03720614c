"""AnnotationIndex: all annotations of a set of images as columns, memory-mapped when opened from disk.

Rows of one image are contiguous: boxes ``box_start[i]:box_start[i + 1]``, image-level labels
``label_start[i]:label_start[i + 1]``. Boxes and labels are as published (not expanded along the hierarchy). A saved
index is a folder of columns and a document (the taxonomy and notes), see :mod:`retinaflow.data.column_store`.

Cost: building is a few vectorised passes; opening maps the files and checks them (Open Images whole, 0.9 GB: under
0.5 s); a pickled opened index is its path, so a loader worker shares the pages of the file instead of a copy and checks
nothing. :func:`retinaflow.data.cache.share_index` makes such an index of one that was computed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retinaflow.data.column_store import open_columns, save_columns
from retinaflow.taxonomy import Taxonomy

FLAGS = ("IsOccluded", "IsTruncated", "IsGroupOf", "IsDepiction", "IsInside", "IsNotExhaustive")
"""Flags of a box, in the order of their bits in ``flags``. All but the last are published: ``IsNotExhaustive`` means
that other objects of its class may be on its image without a box (``not_exhaustive_category_ids`` of LVIS)."""

_GROUP_OF = np.uint8(1 << FLAGS.index("IsGroupOf"))
NOT_EXHAUSTIVE = np.uint8(1 << FLAGS.index("IsNotExhaustive"))
_COLUMNS = (
    "image_ids",
    "files",
    "sizes",
    "box_start",
    "boxes",
    "labels",
    "flags",
    "label_start",
    "verified_class",
    "verified_present",
)


@dataclass(frozen=True)
class AnnotationIndex:
    """Annotations of I images, N boxes, M image-level labels and K classes."""

    taxonomy: Taxonomy
    image_ids: NDArray[np.str_]
    """``[I]`` unique ids, ascending as strings."""
    files: NDArray[np.str_]
    """``[I]`` path of the image file under the images folder; empty if there is none."""
    sizes: NDArray[np.int32]
    """``[I, 2]`` (height, width) in pixels; 0 where unknown."""
    box_start: NDArray[np.int64]
    """``[I + 1]`` first box row of each image."""
    boxes: NDArray[np.float64]
    """``[N, 4]`` xyxy, normalised to [0, 1] of the image, as published (not clipped)."""
    labels: NDArray[np.int32]
    """``[N]`` class index of each box."""
    flags: NDArray[np.uint8]
    """``[N]`` bit f is set when the flag ``FLAGS[f]`` is 1."""
    label_start: NDArray[np.int64]
    """``[I + 1]`` first image-level label of each image."""
    verified_class: NDArray[np.int32]
    """``[M]`` class index of each human-verified image-level label."""
    verified_present: NDArray[np.bool_]
    """``[M]`` True: verified present (Confidence 1), False: verified absent."""
    images_folder: str = ""
    """Folder that ``files`` are relative to."""
    all_known: bool = False
    """True: every class is known on every image, without a label for it."""
    path: Path | None = field(default=None, compare=False)
    """Folder this index was opened from, or None."""
    notes: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """The notes that were given to :meth:`save`, for an index that was opened."""
    saved_digest: str = field(default="", compare=False)
    """The digest that was written with the columns, for an index that was opened."""

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def num_classes(self) -> int:
        return len(self.taxonomy)

    @cached_property
    def is_group_of(self) -> NDArray[np.bool_]:
        """``[N]`` True where one box covers a group of touching instances."""
        return np.asarray((self.flags & _GROUP_OF) != 0)

    @cached_property
    def is_not_exhaustive(self) -> NDArray[np.bool_]:
        """``[N]`` True where objects of the class may be on the image without a box; never with ``all_known``."""
        if self.all_known:
            return np.zeros(len(self.flags), dtype=bool)
        return np.asarray((self.flags & NOT_EXHAUSTIVE) != 0)

    @cached_property
    def box_image(self) -> NDArray[np.int32]:
        """``[N]`` image of each box row."""
        return np.repeat(np.arange(len(self), dtype=np.int32), np.diff(self.box_start))

    @cached_property
    def label_image(self) -> NDArray[np.int32]:
        """``[M]`` image of each image-level label."""
        return np.repeat(np.arange(len(self), dtype=np.int32), np.diff(self.label_start))

    @cached_property
    def digest(self) -> str:
        """sha256 of classes, hierarchy and annotation columns, without files and sizes: equal means equal data."""
        if self.all_known:
            return hashlib.sha256(f"{self._digest_of_columns} all known".encode()).hexdigest()
        return self._digest_of_columns

    @cached_property
    def _digest_of_columns(self) -> str:
        return self.saved_digest or _digest(self)

    def file_of(self, image: int) -> Path:
        """Path of an image's file."""
        return Path(self.images_folder) / str(self.files[image])

    def take(self, images: NDArray[np.integer]) -> AnnotationIndex:
        """The index of some images, in ascending order, each once."""
        images = np.unique(images)
        box_rows, box_start = rows_of(images, self.box_start)
        label_rows, label_start = rows_of(images, self.label_start)
        return replace(
            self,
            image_ids=self.image_ids[images],
            files=self.files[images],
            sizes=self.sizes[images],
            box_start=box_start,
            boxes=self.boxes[box_rows],
            labels=self.labels[box_rows],
            flags=self.flags[box_rows],
            label_start=label_start,
            verified_class=self.verified_class[label_rows],
            verified_present=self.verified_present[label_rows],
            path=None,
            saved_digest="",
        )

    def with_classes(self, classes: NDArray[np.integer]) -> AnnotationIndex:
        """The same images with some classes only; class ``classes[k]`` becomes class k.

        Annotations of other classes that imply something about these are kept: a box or present label of a child is
        assigned to its nearest chosen ancestors, an absent label of a parent to its nearest chosen descendants. So the
        result, expanded along the hierarchy, equals the expanded whole index for the chosen classes. (A class with two
        nearest chosen ancestors is entered under both, which gives a common ancestor of these two copies.)
        """
        up = self.taxonomy.nearest_chosen(classes, upwards=True)
        down = self.taxonomy.nearest_chosen(classes, upwards=False)
        box_rows, labels = _assigned(self.labels, up)
        rows, verified = _assigned_labels(self, up, down)
        return replace(
            self,
            taxonomy=self.taxonomy.subset(classes),
            box_start=row_starts(self.box_image[box_rows], len(self)),
            boxes=self.boxes[box_rows],
            labels=labels,
            flags=self.flags[box_rows],
            label_start=row_starts(self.label_image[rows], len(self)),
            verified_class=verified,
            verified_present=self.verified_present[rows],
            path=None,
            saved_digest="",
        )

    def save(self, folder: Path, *, notes: Mapping[str, Any] | None = None) -> None:
        """Write the index as ``folder``, atomically; an index that is there is replaced."""
        document = {
            "images_folder": self.images_folder,
            "taxonomy": self.taxonomy.to_document(),
            "digest": self._digest_of_columns,
            "all_known": self.all_known,
            "notes": dict(notes or {}),
        }
        save_columns(folder, {name: getattr(self, name) for name in _COLUMNS}, document)

    @staticmethod
    def open(folder: Path, *, verify: bool = True) -> AnnotationIndex:
        """Map a saved index. Raises DataError when it is missing, of another format, or damaged."""
        columns, document = open_columns(folder, verify=verify)
        return AnnotationIndex(
            taxonomy=Taxonomy.from_document(document["taxonomy"]),
            images_folder=document["images_folder"],
            notes=document["notes"],
            path=folder,
            saved_digest=document["digest"],
            all_known=document["all_known"],
            **columns,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        if self.path is not None:
            return _open_shared, (self.path, self.all_known)
        return AnnotationIndex, tuple(getattr(self, item.name) for item in fields(self))


def _digest(index: AnnotationIndex) -> str:
    hasher = hashlib.sha256(json.dumps(index.taxonomy.to_document(), sort_keys=True).encode())
    for name in _COLUMNS:
        if name not in ("files", "sizes"):
            column = np.ascontiguousarray(getattr(index, name))
            hasher.update(f"{name} {column.shape}".encode())
            hasher.update((np.strings.encode(column, "utf-8") if column.dtype.kind == "U" else column).tobytes())
    return hasher.hexdigest()


def _open_shared(folder: Path, all_known: bool) -> AnnotationIndex:
    """Open, in a loader worker, an index that the main process has opened and verified."""
    return replace(AnnotationIndex.open(folder, verify=False), all_known=all_known)


def _assigned_labels(
    index: AnnotationIndex, up: NDArray[np.bool_], down: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Rows of image-level labels that are assigned to chosen classes, ascending, and the class of each."""
    present_rows, present = _assigned(index.verified_class, up)
    absent_rows, absent = _assigned(index.verified_class, down)
    is_present = index.verified_present[present_rows]
    is_absent = ~index.verified_present[absent_rows]
    rows = np.concatenate([present_rows[is_present], absent_rows[is_absent]])
    classes = np.concatenate([present[is_present], absent[is_absent]])
    order = np.argsort(rows, kind="stable")
    return rows[order], classes[order]


def _assigned(labels: NDArray[np.int32], nearest: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Rows of ``labels [N]`` that are assigned to chosen classes, once for each such class, and that class."""
    counts = nearest.sum(axis=1)
    _, heirs = np.nonzero(nearest)
    first = np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.int64)
    of_row = counts[labels]
    rows = np.repeat(np.arange(len(labels)), of_row)
    within = np.arange(len(rows)) - np.repeat(np.cumsum(of_row) - of_row, of_row)
    return rows, heirs[first[labels[rows]] + within].astype(np.int32)


def row_starts(owner: NDArray[np.integer], count: int) -> NDArray[np.int64]:
    """``[count + 1]`` first row of each owner, for rows sorted by ``owner``."""
    starts = np.zeros(count + 1, dtype=np.int64)
    np.cumsum(np.bincount(owner, minlength=count), out=starts[1:])
    return starts


def rows_of(images: NDArray[np.integer], start: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows of the chosen images in order, and their new starts."""
    counts = start[images + 1] - start[images]
    new_start = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    rows = np.repeat(start[images] - new_start[:-1], counts) + np.arange(new_start[-1])
    return rows, new_start
