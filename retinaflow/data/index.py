"""AnnotationIndex: all annotations of a set of images as columns, memory-mapped when opened from disk.

Rows of one image are contiguous: boxes ``box_start[i]:box_start[i + 1]``, image-level labels
``label_start[i]:label_start[i + 1]``. Boxes and labels stand as published (not expanded along the hierarchy). A saved
index is a folder with one ``.npy`` file per column and ``index.json`` (the taxonomy, notes, a CRC-32 per column); it is
written beside its place and renamed, so a reader sees a whole index or none.

Cost: building is a few vectorised passes; opening maps the files and checks their CRCs; a pickled opened index is its path,
so a loader worker shares the pages of the file instead of a copy.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retinaflow.data.taxonomy import Taxonomy

FORMAT = 1
"""Version of the folder layout; a folder of another version is not opened."""

FLAGS = ("IsOccluded", "IsTruncated", "IsGroupOf", "IsDepiction", "IsInside")
"""Published flags of a box, in the order of their bits in ``flags``."""

_GROUP_OF = np.uint8(1 << FLAGS.index("IsGroupOf"))
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
    """``[I]`` path of the image file under the images folder; empty where no file is needed."""
    sizes: NDArray[np.int32]
    """``[I, 2]`` (height, width) in pixels; 0 where unknown."""
    box_start: NDArray[np.int64]
    """``[I + 1]`` first box row of each image."""
    boxes: NDArray[np.float64]
    """``[N, 4]`` xyxy, normalised to [0, 1] of the image, as published (not clipped)."""
    labels: NDArray[np.int32]
    """``[N]`` class index of each box."""
    flags: NDArray[np.uint8]
    """``[N]`` bit f is set when the published flag ``FLAGS[f]`` is 1."""
    label_start: NDArray[np.int64]
    """``[I + 1]`` first image-level label of each image."""
    verified_class: NDArray[np.int32]
    """``[M]`` class index of each human-verified image-level label."""
    verified_present: NDArray[np.bool_]
    """``[M]`` True: verified present (Confidence 1), False: verified absent."""
    images_folder: str = ""
    """Folder that ``files`` are relative to."""
    path: Path | None = field(default=None, compare=False)
    """Folder this index was opened from, or None."""

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def num_classes(self) -> int:
        return len(self.taxonomy)

    @cached_property
    def is_group_of(self) -> NDArray[np.bool_]:
        """``[N]`` True where one box covers a group of touching instances."""
        return (self.flags & _GROUP_OF) != 0

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
        """sha256 over classes, hierarchy and all annotation columns: equal digests mean equal data (files and sizes apart)."""
        hasher = hashlib.sha256(json.dumps(self.taxonomy.to_document(), sort_keys=True).encode())
        for name in _COLUMNS:
            if name not in ("files", "sizes"):
                column = np.ascontiguousarray(getattr(self, name))
                hasher.update(f"{name} {column.shape}".encode())
                hasher.update(column.astype("S").tobytes() if column.dtype.kind == "U" else column.tobytes())
        return hasher.hexdigest()

    def file_of(self, image: int) -> Path:
        """Path of an image's file."""
        return Path(self.images_folder) / str(self.files[image])

    def take(self, images: NDArray[np.integer]) -> AnnotationIndex:
        """The index of some images, ascending and each once."""
        images = np.unique(images)
        box_rows, box_start = _rows_of(images, self.box_start)
        label_rows, label_start = _rows_of(images, self.label_start)
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
        )

    def with_classes(self, classes: NDArray[np.integer]) -> AnnotationIndex:
        """The same images with the boxes and labels of some classes only; class ``classes[k]`` becomes class k."""
        renumber = np.full(self.num_classes, -1, dtype=np.int32)
        renumber[classes] = np.arange(len(classes), dtype=np.int32)
        box_kept = renumber[self.labels] >= 0
        label_kept = renumber[self.verified_class] >= 0
        return replace(
            self,
            taxonomy=self.taxonomy.subset(classes),
            box_start=row_starts(self.box_image[box_kept], len(self)),
            boxes=self.boxes[box_kept],
            labels=renumber[self.labels[box_kept]],
            flags=self.flags[box_kept],
            label_start=row_starts(self.label_image[label_kept], len(self)),
            verified_class=renumber[self.verified_class[label_kept]],
            verified_present=self.verified_present[label_kept],
            path=None,
        )

    def verified(self, image: int) -> NDArray[np.bool_]:
        """``[K]`` classes known on an image: labelled either way or boxed, expanded along the hierarchy.

        A present label or a box says so of all ancestors too, an absent label of all descendants (METRIC rule 1).
        """
        known = np.zeros(self.num_classes, dtype=bool)
        rows = slice(self.label_start[image], self.label_start[image + 1])
        classes, present = self.verified_class[rows], self.verified_present[rows]
        boxed = self.labels[self.box_start[image] : self.box_start[image + 1]]
        known[classes] = True
        known[boxed] = True
        upwards = np.concatenate([classes[present], boxed])
        closure = self.taxonomy.is_ancestor
        known |= closure[upwards].any(axis=0)
        known |= closure[:, classes[~present]].any(axis=1)
        return known

    def exhaustive(self) -> AnnotationIndex:
        """The index with every class that is not known on an image entered as verified absent there."""
        unknown = ~np.stack([self.verified(image) for image in range(len(self))])
        image, added = np.nonzero(unknown)
        images = np.concatenate([self.label_image, image])
        order = np.argsort(images, kind="stable")
        return replace(
            self,
            label_start=row_starts(images, len(self)),
            verified_class=np.concatenate([self.verified_class, added.astype(np.int32)])[order],
            verified_present=np.concatenate([self.verified_present, np.zeros(len(added), dtype=bool)])[order],
            path=None,
        )

    def save(self, folder: Path, *, notes: Mapping[str, Any] | None = None) -> None:
        """Write the index as ``folder``, atomically; an index that stands there already is replaced."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            checksums = {}
            for name in _COLUMNS:
                column = np.ascontiguousarray(getattr(self, name))
                np.save(partial / f"{name}.npy", column)
                checksums[name] = zlib.crc32((partial / f"{name}.npy").read_bytes())
            document = {
                "format": FORMAT,
                "images_folder": self.images_folder,
                "taxonomy": self.taxonomy.to_document(),
                "crc32": checksums,
                "notes": dict(notes or {}),
            }
            (partial / "index.json").write_text(json.dumps(document), encoding="utf-8")
            _put_in_place(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    @staticmethod
    def open(folder: Path) -> AnnotationIndex:
        """Map a saved index. Raises ValueError when it is missing, of another format, or damaged."""
        document = read_document(folder)
        columns: dict[str, Any] = {}
        for name in _COLUMNS:
            file = folder / f"{name}.npy"
            if not file.is_file() or zlib.crc32(np.memmap(file, mode="r")) != document["crc32"].get(name):
                raise ValueError(f"{file}: the column is missing or damaged; delete the folder {folder} to rebuild it")
            columns[name] = np.load(file, mmap_mode="r", allow_pickle=False)
        return AnnotationIndex(
            taxonomy=Taxonomy.from_document(document["taxonomy"]), images_folder=document["images_folder"], path=folder, **columns
        )

    def __reduce__(self) -> tuple[Any, ...]:
        if self.path is not None:
            return AnnotationIndex.open, (self.path,)
        return AnnotationIndex, tuple(getattr(self, item.name) for item in fields(self))


def read_document(folder: Path) -> dict[str, Any]:
    """``index.json`` of a saved index; its ``notes`` are what :meth:`AnnotationIndex.save` was given."""
    try:
        document: dict[str, Any] = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: not a saved index ({error})") from None
    if document.get("format") != FORMAT:
        raise ValueError(f"{folder}: index format {document.get('format')} is not the {FORMAT} this version reads")
    return document


def _put_in_place(partial: Path, folder: Path) -> None:
    old = None
    if folder.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent)) / "old"
        os.replace(folder, old)
    os.replace(partial, folder)
    if old is not None:
        shutil.rmtree(old.parent, ignore_errors=True)


def row_starts(owner: NDArray[np.integer], count: int) -> NDArray[np.int64]:
    """``[count + 1]`` first row of each owner, for rows sorted by ``owner``."""
    starts = np.zeros(count + 1, dtype=np.int64)
    np.cumsum(np.bincount(owner, minlength=count), out=starts[1:])
    return starts


def _rows_of(images: NDArray[np.integer], start: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows of the chosen images in order, and their new starts."""
    counts = start[images + 1] - start[images]
    new_start = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    rows = np.repeat(start[images] - new_start[:-1], counts) + np.arange(new_start[-1])
    return rows, new_start
