"""Detection sets -> YOLO: ``data.yaml``, and a text file of labels for each image, as fractions of the image as EXIF
rotates it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import yaml
from numpy.typing import NDArray

from retinaflow.data.formats.detection_set import DetectionSet
from retinaflow.data.formats.folders import short_name
from retinaflow.data.formats.orientation import to_rotated

_DIGITS = 8


def row_values(corners: NDArray[np.float64], orientation: NDArray[np.int64]) -> NDArray[np.float64]:
    """``[N, 4]`` centre and size as they are written, of xyxy in [0, 1] of the stored image; ``orientation [N]``."""
    corners = corners.copy()
    for kind in np.unique(orientation[orientation > 1]):
        corners[orientation == kind] = to_rotated(corners[orientation == kind], int(kind))
    centre, size = (corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]
    return np.round(np.concatenate([centre, size], axis=1), _DIGITS)


def write_yolo(found: DetectionSet, folder: Path) -> None:
    """``labels/{split}/{image_id}.txt`` and ``data.yaml``; the images belong in ``images/{split}``."""
    image = found.boxes["image"].to_numpy(dtype=np.int64)
    start = np.searchsorted(image, np.arange(len(found.images) + 1))
    orientation = found.images["orientation"].to_numpy(dtype=np.int64)
    values = row_values(found.corners, orientation[image])
    classes = found.boxes["class"].to_numpy(dtype=np.int64)
    for split in found.splits:
        (folder / "labels" / short_name(split)).mkdir(parents=True)
    for row, (image_id, split) in enumerate(zip(found.images["image_id"], found.images["split"], strict=True)):
        lines = [
            f"{classes[box]} {' '.join(f'{value:.{_DIGITS}f}' for value in values[box])}\n"
            for box in range(int(start[row]), int(start[row + 1]))
        ]
        path = folder / "labels" / short_name(split) / f"{image_id}.txt"
        path.write_text("".join(lines), encoding="utf-8")
    document = {short_name(split): f"images/{short_name(split)}" for split in found.splits}
    names = dict(enumerate(found.taxonomy.labels))
    text = yaml.safe_dump({**document, "names": names}, allow_unicode=True, sort_keys=False)
    (folder / "data.yaml").write_text(text, encoding="utf-8")
