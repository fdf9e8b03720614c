"""Detection sets -> the published layout, which ``train`` reads.

The verified labels of a set that is not exhaustive are written as they are. In an exhaustive set a class without a
label counts as absent (``exhaustive: true`` in ``retinaflow.yaml``, which every command reads). Its label file holds
the boxed classes, and one absent class for each image without boxes, so that the image is listed.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from retinaflow.data.formats import detection_set
from retinaflow.data.formats.detection_set import DetectionSet
from retinaflow.data.index import FLAGS
from retinaflow.taxonomy import Taxonomy

IMAGES_FILE = "images.csv"
"""Id, size and origin of each converted image; a table for ``size_table`` too."""
FOLDER_SETTINGS = "retinaflow.yaml"
_BLOCK = 1 << 17
"""Rows that are made at a time."""
_DIGITS = 9
"""Decimals of a coordinate: a box stays within a thousandth of a pixel, however large the image."""


def rounded(corners: NDArray[np.float64]) -> NDArray[np.float64]:
    """Coordinates in [0, 1] as they are written."""
    return np.round(corners, _DIGITS)


def write_published(found: DetectionSet, folder: Path) -> None:
    """Box and label files of each split, the class list, the table of images, and the folder's settings.

    The image files belong in ``images``, named by their ids.
    """
    write_classes(found.taxonomy, folder)
    ids = found.images["image_id"].to_numpy()
    mids = np.array(found.taxonomy.ids, dtype=object)
    boxes, labels = _with_not_exhaustive(found), _labels(found)
    for split in found.splits:
        of_split = found.images["split"].to_numpy() == split
        position = np.flatnonzero(of_split[boxes["image"].to_numpy(dtype=np.int64)])
        path = folder / f"{split}-annotations-bbox.csv"
        for start in range(0, max(len(position), 1), _BLOCK):
            _box_rows(boxes.iloc[position[start : start + _BLOCK]], ids, mids).to_csv(
                path, mode="a", header=start == 0, index=False, float_format=f"%.{_DIGITS}g"
            )
        rows = labels[of_split[labels["image"].to_numpy(dtype=np.int64)]]
        table = pd.DataFrame({"ImageID": ids[rows["image"]], "Source": "converted", "LabelName": mids[rows["class"]]})
        table["Confidence"] = rows["present"].to_numpy(dtype=np.int64)
        table.to_csv(folder / f"{split}-annotations-human-imagelabels.csv", index=False)
    table = found.images.rename(columns={"image_id": "ImageID", "width": "Width", "height": "Height"})
    table["Origin"] = [str(path) for path in table["file"]]
    table[["ImageID", "Width", "Height", "Origin"]].to_csv(folder / IMAGES_FILE, index=False)
    if found.exhaustive:
        text = "# Written by convert; these settings apply when data= names this folder.\nexhaustive: true\n"
        (folder / FOLDER_SETTINGS).write_text(text, encoding="utf-8")


def _with_not_exhaustive(found: DetectionSet) -> pd.DataFrame:
    """The boxes, with a column for the flag ``IsNotExhaustive``, which is not published, where the set needs it."""
    if not len(found.incomplete):
        return found.boxes
    box, incomplete = (
        frame["image"] * len(found.taxonomy) + frame["class"] for frame in (found.boxes, found.incomplete)
    )
    return found.boxes.assign(not_exhaustive=box.isin(incomplete))


def _box_rows(boxes: pd.DataFrame, ids: NDArray[np.object_], mids: NDArray[np.object_]) -> pd.DataFrame:
    """Some boxes in the published columns."""
    table = pd.DataFrame({"ImageID": ids[boxes["image"]], "Source": "converted", "LabelName": mids[boxes["class"]]})
    table["Confidence"] = 1
    for name, own in (("XMin", "x1"), ("XMax", "x2"), ("YMin", "y1"), ("YMax", "y2")):
        table[name] = rounded(boxes[own].to_numpy(dtype=np.float64))
    for name, own in zip(FLAGS, (*detection_set.FLAGS, "not_exhaustive"), strict=True):
        if own in boxes:
            table[name] = boxes[own].to_numpy(dtype=np.int64)
    return table


def write_classes(taxonomy: Taxonomy, folder: Path) -> None:
    """Write ``class-descriptions.csv``, also beside layouts that hold names only: it keeps the ids and their order."""
    with (folder / "class-descriptions.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(zip(taxonomy.ids, taxonomy.names, strict=True))


def _labels(found: DetectionSet) -> pd.DataFrame:
    """The labels to write, as the docstring of this file describes."""
    if not found.exhaustive:
        return found.labels
    present = found.boxes[["image", "class"]].drop_duplicates().assign(present=True)
    empty = np.setdiff1d(np.arange(len(found.images)), found.boxes["image"].to_numpy(dtype=np.int64))
    absent = pd.DataFrame({"image": empty, "class": 0, "present": False})
    return pd.concat([present, absent], ignore_index=True).sort_values(["image", "class"], ignore_index=True)
