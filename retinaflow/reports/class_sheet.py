"""Contact sheets of the images of a data set: one of each of some classes, the one with the largest box of the class,
and what ``copy_paste`` would make of training images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from retinaflow.boxes import normalised_from_pixels
from retinaflow.data.batching import AspectBuckets
from retinaflow.data.copy_paste import CopyPaste
from retinaflow.data.dataset import DetectionDataset, Request, Sample
from retinaflow.data.images import UnreadableImageError, decode_sized
from retinaflow.data.index import AnnotationIndex
from retinaflow.data.sampling import seed_of_position
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
    try:
        pixels = decode_sized(index, image, longest=_SHEET_PIXELS)
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


def pasted_images(copy_paste: CopyPaste, buckets: AspectBuckets, *, most: int) -> Figure:
    """``most`` random images with a crop on each, without other augmentation. ``copy_paste`` must have probability 1.

    The boxes are those that a training would learn.
    """
    index = copy_paste.index
    images = np.random.default_rng(0).integers(0, len(index), most)
    bucket = buckets.assign(np.asarray(index.sizes)[images])
    dataset = DetectionDataset(index, copy_paste=copy_paste)
    panels = []
    for position, image in enumerate(images):
        shape = buckets.shapes[bucket[position]]
        sample = dataset[Request(int(image), shape, seed_of_position((0, 0), position))]
        for bad in sample.instead_of if isinstance(sample, Sample) else sample.bad:
            report(f"not on the sheet: {bad.reason}")
        if isinstance(sample, Sample):
            panels.append(_pasted_panel(sample, index.taxonomy.labels, shape))
    return contact_sheet(panels)


def _pasted_panel(sample: Sample, names: tuple[str, ...], shape: tuple[int, int]) -> Panel:
    boxes: NDArray[np.floating] = normalised_from_pixels(sample.boxes, shape)
    labels = [names[label] for label in sample.labels]
    return Panel(image=sample.image, gt_boxes=boxes, gt_labels=labels, gt_group_of=sample.is_group_of)
