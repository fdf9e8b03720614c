"""DetectionSet: images, boxes and image-level labels of some splits, independent of a layout on disk."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from retinaflow.taxonomy import Taxonomy

CORNERS = ("x1", "y1", "x2", "y2")
FLAGS = ("occluded", "truncated", "group_of", "depiction", "inside")
"""Flags of a box, in the order of :data:`retinaflow.data.index.FLAGS`."""
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class DetectionSet:
    """I images, N boxes and M image-level labels of K classes.

    ``images``: columns ``image_id`` (unique), ``split``, ``file`` (a Path), ``height``, ``width`` (pixels as stored),
    ``orientation`` (EXIF, 1: as stored). ``boxes``, in the order of their images: ``image`` (row of ``images``),
    ``class`` (index), ``x1, y1, x2, y2`` in [0, 1] of the stored image, and :data:`FLAGS` (bool). ``labels``:
    ``image``, ``class``, ``present`` (bool). ``incomplete``: ``image``, ``class`` of which some objects have no box.
    """

    taxonomy: Taxonomy
    images: pd.DataFrame
    boxes: pd.DataFrame
    labels: pd.DataFrame
    exhaustive: bool
    """Every object of every class is boxed; else classes without a label are unknown."""
    incomplete: pd.DataFrame = field(default_factory=lambda: pd.DataFrame({"image": [], "class": []}, dtype=np.int64))

    @property
    def splits(self) -> list[str]:
        """The splits that have images, those of :data:`SPLITS` first."""
        found = set(self.images["split"])
        return [name for name in SPLITS if name in found] + sorted(found - set(SPLITS))

    @property
    def corners(self) -> NDArray[np.float64]:
        """``[N, 4]`` xyxy in [0, 1] of the stored image."""
        return self.boxes[list(CORNERS)].to_numpy(dtype=np.float64)

    @property
    def files(self) -> list[Path]:
        """The image files."""
        return [Path(str(file)) for file in self.images["file"]]

    @property
    def file_names(self) -> list[str]:
        """A name for each image file, made of its id and its suffix."""
        ids = self.images["image_id"].tolist()
        return [f"{image_id}{file.suffix.lower()}" for image_id, file in zip(ids, self.files, strict=True)]

    def take(self, chosen: NDArray[np.bool_]) -> DetectionSet:
        """The set of some images ``[I]``, with their boxes and labels."""
        position = np.cumsum(chosen) - 1
        parts = {}
        for name in ("boxes", "labels", "incomplete"):
            frame = getattr(self, name)
            rows = frame[chosen[frame["image"].to_numpy(dtype=np.int64)]].reset_index(drop=True)
            parts[name] = rows.assign(image=position[rows["image"].to_numpy(dtype=np.int64)])
        return replace(self, images=self.images[chosen].reset_index(drop=True), **parts)

    def summary(self) -> pd.DataFrame:
        """Rows split, images, without_boxes, boxes, classes."""
        image = self.boxes["image"].to_numpy(dtype=np.int64)
        split_of_box = self.images["split"].to_numpy()[image]
        boxed = np.bincount(image, minlength=len(self.images)) > 0
        rows = []
        for split in self.splits:
            of_split, in_split = self.images["split"].to_numpy() == split, split_of_box == split
            classes = self.boxes["class"][in_split].nunique()
            rows.append((split, int(of_split.sum()), int((of_split & ~boxed).sum()), int(in_split.sum()), classes))
        return pd.DataFrame(rows, columns=["split", "images", "without_boxes", "boxes", "classes"])
