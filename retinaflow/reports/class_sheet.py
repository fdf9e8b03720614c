"""A contact sheet with one image for each of some classes: the image with the largest box of the class."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from retinaflow.data.images import UnreadableImageError, decode
from retinaflow.data.index import AnnotationIndex
from retinaflow.progress import report
from retinaflow.reports.contact_sheet import Panel, contact_sheet

_SHEET_PIXELS = 360


def one_image_per_class(
    index: AnnotationIndex, classes: Sequence[int], images_per_class: NDArray[np.integer], *, most: int
) -> Figure:
    """A panel for each of the first ``most`` classes with a readable image; ``images_per_class [K]`` is for titles."""
    panels: list[Panel] = []
    for k in classes:
        if len(panels) < most and (panel := _panel(index, k, images=int(images_per_class[k]))):
            panels.append(panel)
    return contact_sheet(panels)


def _panel(index: AnnotationIndex, class_index: int, *, images: int) -> Panel | None:
    """The image with the largest box of the class; None when there is none, or when it cannot be read."""
    rows = np.flatnonzero(np.asarray(index.labels) == class_index)
    if len(rows) == 0:
        return None
    extent = np.asarray(index.boxes[rows, 2:] - index.boxes[rows, :2])
    image = int(index.box_image[rows[extent.prod(axis=1).argmax()]])
    height, width = (int(side) for side in index.sizes[image])
    scale = min(1.0, _SHEET_PIXELS / max(height, width))
    try:
        pixels = decode(
            index.file_of(image), (height, width), (max(round(height * scale), 1), max(round(width * scale), 1))
        )
    except UnreadableImageError as error:
        report(f"not on the sheet: {error}")
        return None
    own = rows[index.box_image[rows] == image]
    name = index.taxonomy.labels[class_index]
    return Panel(
        image=pixels,
        title=f"{name}: {images:,} image{'s' if images > 1 else ''}",
        gt_boxes=np.asarray(index.boxes[own]),
        gt_labels=[name] * len(own),
        gt_group_of=index.is_group_of[own],
    )
