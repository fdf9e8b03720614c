"""Detection sets -> COCO JSON, with what it has no field for in the fields that tools use.

``label_name`` of a category is its class id, ``iscrowd`` is group-of, other flags are ``attributes`` of an annotation.
A set that is not exhaustive gets LVIS's ``neg_category_ids`` and ``not_exhaustive_category_ids``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from retinaflow.data.formats.coco_files import OWN_INFO
from retinaflow.data.formats.detection_set import FLAGS, DetectionSet
from retinaflow.data.formats.folders import short_name

_DIGITS = 6


def bbox_of(corners: NDArray[np.float64], sizes: NDArray[np.float64]) -> NDArray[np.float64]:
    """``[N, 4]`` x, y, width, height in pixels as they are written, of xyxy in [0, 1]; ``sizes [N, 2]``: width,
    height."""
    pixels = corners * np.concatenate([sizes, sizes], axis=1)
    return np.round(np.concatenate([pixels[:, :2], pixels[:, 2:] - pixels[:, :2]], axis=1), _DIGITS)


def write_coco(found: DetectionSet, folder: Path, files: Sequence[str]) -> None:
    """``annotations/instances_{split}.json``; ``files``: name of each image's file in its split's folder."""
    (folder / "annotations").mkdir()
    categories = [
        {"id": number, "name": name, "label_name": mid}
        for number, (mid, name) in enumerate(zip(found.taxonomy.ids, found.taxonomy.names, strict=True), 1)
    ]
    negatives = _by_image(found.labels[~found.labels["present"].astype(bool)])
    incomplete = _by_image(found.incomplete)
    for split in found.splits:
        rows = np.flatnonzero(found.images["split"].to_numpy() == split)
        images = []
        for row in rows.tolist():
            size = {"height": int(found.images["height"][row]), "width": int(found.images["width"][row])}
            image: dict[str, Any] = {"id": row + 1, "file_name": files[row], **size}
            if not found.exhaustive:
                image["neg_category_ids"] = negatives.get(row, [])
                image["not_exhaustive_category_ids"] = incomplete.get(row, [])
            images.append(image)
        path = folder / "annotations" / f"instances_{short_name(split)}.json"
        with path.open("w", encoding="utf-8") as file:
            head = {"info": OWN_INFO, "licenses": [], "images": images}
            file.write(json.dumps(head, ensure_ascii=False)[:-1] + ', "annotations": [')
            for number, annotation in enumerate(_annotations(found, rows)):
                file.write((", " if number else "") + json.dumps(annotation, ensure_ascii=False))
            file.write('], "categories": ' + json.dumps(categories, ensure_ascii=False) + "}")


def _by_image(pairs: pd.DataFrame) -> dict[int, list[int]]:
    """Row of an image -> category ids."""
    found: dict[int, list[int]] = {}
    for row, index in pairs[["image", "class"]].to_numpy(dtype=np.int64).tolist():
        found.setdefault(row, []).append(index + 1)
    return found


def _annotations(found: DetectionSet, rows: NDArray[np.int64]) -> Iterator[dict[str, Any]]:
    image = found.boxes["image"].to_numpy(dtype=np.int64)
    bbox = bbox_of(found.corners, found.images[["width", "height"]].to_numpy(dtype=np.float64)[image])
    flags = found.boxes[list(FLAGS)].to_numpy(dtype=bool)
    classes = found.boxes["class"].to_numpy(dtype=np.int64)
    for box in np.flatnonzero(np.isin(image, rows)).tolist():
        flags_of_box = {
            name: True for name, is_set in zip(FLAGS, flags[box], strict=True) if is_set and name != "group_of"
        }
        yield {
            "id": box + 1,
            "image_id": int(image[box]) + 1,
            "category_id": int(classes[box]) + 1,
            "bbox": bbox[box].tolist(),
            "area": round(float(bbox[box, 2] * bbox[box, 3]), _DIGITS),
            "iscrowd": int(flags[box][FLAGS.index("group_of")]),
            "segmentation": [],
            **({"attributes": flags_of_box} if flags_of_box else {}),
        }
