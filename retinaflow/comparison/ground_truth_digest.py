"""What a run was evaluated on, as short digests: two runs with equal digests can be compared.

The digests cover the images in their order and, for every class, its expanded ground-truth boxes, the images on which
it is verified, and those on which it is not exhaustive. They are per class, so runs with different class lists can be
compared on the classes they share.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from retinaflow.metric.ground_truth import Annotations, expand_boxes, verified_pairs

DIGITS = 16


@dataclass(frozen=True)
class GroundTruthDigest:
    """What a run was evaluated on: ``images`` (ids in order) and ``classes [K]``, 16 hex digits of sha256 each."""

    images: str
    classes: tuple[str, ...]

    @property
    def of_all(self) -> str:
        """One digest of the images and the ground truth of all classes."""
        return _hex("".join([self.images, *self.classes]).encode())


def ground_truth_digest(ground_truth: Annotations) -> GroundTruthDigest:
    """Digests of the images and of each class's expanded ground truth, whatever the order of the boxes of an image."""
    num_classes = len(ground_truth.taxonomy)
    expanded = expand_boxes(ground_truth)
    image, class_index = np.divmod(expanded.pair, num_classes)
    order = np.lexsort((expanded.is_group_of, *expanded.boxes.T[::-1], image, class_index))
    box_start = np.searchsorted(class_index[order], np.arange(num_classes + 1))
    verified_image, verified_class = np.divmod(verified_pairs(ground_truth, expanded), num_classes)
    by_class = np.argsort(verified_class, kind="stable")
    verified_start = np.searchsorted(verified_class[by_class], np.arange(num_classes + 1))
    digests = []
    for k in range(num_classes):
        rows = order[box_start[k] : box_start[k + 1]]
        verified = verified_image[by_class[verified_start[k] : verified_start[k + 1]]]
        not_exhaustive = np.unique(image[rows][expanded.is_not_exhaustive[rows]])
        parts = (image[rows], expanded.boxes[rows], expanded.is_group_of[rows], verified, not_exhaustive)
        digests.append(_hex(b"".join(np.ascontiguousarray(part).tobytes() for part in parts)))
    return GroundTruthDigest(_hex("\n".join(map(str, ground_truth.image_ids)).encode()), tuple(digests))


def _hex(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:DIGITS]
