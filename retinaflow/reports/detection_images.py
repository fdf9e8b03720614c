"""Images with detections, and ground truth on the left where it is known: what ``visualize`` writes."""

from __future__ import annotations

import numpy as np

from retinaflow.boxes import iou
from retinaflow.data.images import decode_sized
from retinaflow.data.index import AnnotationIndex
from retinaflow.detections import Detections
from retinaflow.reports.box_images import DrawnBox, Pixels, drawn, side_by_side
from retinaflow.taxonomy import Taxonomy

SAME_OBJECT_IOU = 0.6
"""IoU from which a parent's box is taken for a second name of its child's box."""


def without_parents(found: Detections, taxonomy: Taxonomy) -> Detections:
    """The detections without those of a parent class that only name the object of a child's detection again."""
    keep = np.ones(len(found), dtype=bool)
    for row in range(len(found)):
        others = np.flatnonzero(
            (found.image_index == found.image_index[row])
            & taxonomy.is_ancestor[found.class_index, found.class_index[row]]
        )
        keep[row] = not (iou(found.boxes[[row]], found.boxes[others]) >= SAME_OBJECT_IOU).any()
    return found.take(keep)


def detection_image(
    index: AnnotationIndex,
    image: int,
    found: Detections,
    ground_truth: AnnotationIndex | None,
    *,
    title: str,
    longest_side: int,
) -> Pixels:
    """An image of the index with its detections in ``found``, and its ground truth on the left, if there is any.

    At most ``longest_side`` pixels wide or high; small images are enlarged, at most to half of it. Raises
    UnreadableImageError.
    """
    longest = min(longest_side, max(int(index.sizes[image].max()), longest_side / 2))
    pixels = decode_sized(index, image, longest=longest, enlarge=True)
    own = found.take(found.image_index == image)
    ids, names = index.taxonomy.ids, index.taxonomy.labels
    boxes = [
        DrawnBox(tuple(box), ids[label], names[label], float(score))
        for box, label, score in zip(own.boxes.tolist(), own.class_index.tolist(), own.score.tolist(), strict=True)
    ]
    image_id = str(index.image_ids[image])
    detections = drawn(pixels, boxes, title=f"{title}: {image_id}")
    if ground_truth is None or image_id not in ground_truth.image_ids:
        return detections
    boxes = _gt_boxes(ground_truth, int(np.flatnonzero(ground_truth.image_ids == image_id)[0]))
    return side_by_side([drawn(pixels, boxes, title=f"ground truth: {image_id}"), detections])


def _gt_boxes(ground_truth: AnnotationIndex, image: int) -> list[DrawnBox]:
    rows = range(int(ground_truth.box_start[image]), int(ground_truth.box_start[image + 1]))
    boxes = []
    for row in rows:
        label = ground_truth.labels[row]
        name = ground_truth.taxonomy.labels[label]
        text = f"group of {name}" if ground_truth.is_group_of[row] else name
        boxes.append(DrawnBox(tuple(ground_truth.boxes[row].tolist()), ground_truth.taxonomy.ids[label], text))
    return boxes
