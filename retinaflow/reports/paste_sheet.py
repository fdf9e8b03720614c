"""A contact sheet of training images with pasted crops: what ``copy_paste`` would make of a data set."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from retinaflow.boxes import normalised_from_pixels
from retinaflow.data.batching import AspectBuckets
from retinaflow.data.copy_paste import CopyPaste
from retinaflow.data.dataset import DetectionDataset, Request, Sample
from retinaflow.data.sampling import seed_of_position
from retinaflow.progress import report
from retinaflow.reports.contact_sheet import Panel, contact_sheet


def pasted_images(copy_paste: CopyPaste, buckets: AspectBuckets, *, most: int, seed: int) -> Figure:
    """``most`` random images with a crop on each, without other augmentation. ``copy_paste`` must have probability 1.

    The boxes are those that a training would learn.
    """
    index = copy_paste.index
    images = np.random.default_rng(seed).integers(0, len(index), most)
    bucket = buckets.assign(np.asarray(index.sizes)[images])
    dataset = DetectionDataset(index, copy_paste=copy_paste)
    panels = []
    for position, image in enumerate(images):
        shape = buckets.shapes[bucket[position]]
        sample = dataset[Request(int(image), shape, seed_of_position((seed, 0), position))]
        for bad in sample.instead_of if isinstance(sample, Sample) else sample.bad:
            report(f"not on the sheet: {bad.reason}")
        if isinstance(sample, Sample):
            panels.append(_panel(sample, index.taxonomy.labels, shape))
    return contact_sheet(panels)


def _panel(sample: Sample, names: tuple[str, ...], shape: tuple[int, int]) -> Panel:
    boxes: NDArray[np.floating] = normalised_from_pixels(sample.boxes, shape)
    labels = [names[label] for label in sample.labels]
    return Panel(image=sample.image, gt_boxes=boxes, gt_labels=labels, gt_group_of=sample.is_group_of)
