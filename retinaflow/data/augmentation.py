"""Augmentation by rarity: images with rare classes are changed more, because they are repeated more often.

The strength s in [0, 1] of an image is base + (rare - base) * rarity, rarity being 1 when the rarest of its classes is
in the rarest bin and 0 when it is in a bin that is not sampled more often (``ClassBins.rarity``). s scales the
range of zoom, shift, rotation, brightness, contrast and hue, and the probability of blur, noise and dropout. s = 0
changes nothing but flips: half of the images left to right with ``horizontal_flip``, and upside down with
``vertical_flip``; s > 0 flips left to right anyway.

Boxes are transformed with the image; a box of which less than ``MIN_VISIBLE`` of the area stays visible is dropped.
The transforms are in :mod:`retinaflow.data.transforms`. Randomness: one seed per call, no global state.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from retinaflow.data.frequency_bins import ClassBins

MIN_VISIBLE = 0.35
"""Minimum fraction of a box's area that must stay in view for the box to stay."""


@dataclass(frozen=True)
class Augmentation:
    """How strongly each image is augmented. ``strength_of_class [K]``: s for an image whose rarest class this is."""

    strength_of_class: NDArray[np.float64]
    base: float
    horizontal_flip: bool = False
    vertical_flip: bool = False

    @staticmethod
    def by_rarity(
        bins: ClassBins,
        *,
        base: float,
        rare: float,
        balance: float,
        horizontal_flip: bool = False,
        vertical_flip: bool = False,
    ) -> Augmentation:
        """Strength by frequency bin: ``rare`` for the rarest, ``base`` for those at the exposure target or above."""
        return Augmentation(base + (rare - base) * bins.rarity(balance), base, horizontal_flip, vertical_flip)

    def strength(self, labels: NDArray[np.integer], *, by_class: bool = True) -> float:
        """s of an image with these classes: that of the class furthest from the base; the base for an image without
        boxes.

        ``by_class`` False: the base for every image.
        """
        if len(labels) == 0 or not by_class:
            return self.base
        strengths = self.strength_of_class[labels]
        return float(strengths[np.abs(strengths - self.base).argmax()])

    def apply(
        self,
        image: NDArray[np.uint8],
        boxes: NDArray[np.float64],
        *,
        labels: NDArray[np.integer],
        seed: int,
        by_class: bool = True,
    ) -> tuple[NDArray[np.uint8], NDArray[np.float64], NDArray[np.int64]]:
        """Augment ``image [H, W, 3]`` and ``boxes [P, 4]`` (normalised xyxy) by the strength of the classes ``labels``.

        Returns the image (same shape), the boxes still in view, clipped to it, and their row numbers in the input.
        """
        strength = self.strength(labels, by_class=by_class)
        if strength == 0:
            chance = np.random.default_rng([seed, 2])
            if self.horizontal_flip and chance.random() < 0.5:
                x1, y1, x2, y2 = boxes.T
                image, boxes = np.ascontiguousarray(image[:, ::-1]), np.stack([1 - x2, y1, 1 - x1, y2], axis=1)
            if self.vertical_flip and chance.random() < 0.5:
                x1, y1, x2, y2 = boxes.T
                image, boxes = np.ascontiguousarray(image[::-1]), np.stack([x1, 1 - y2, x2, 1 - y1], axis=1)
            return image, boxes, np.arange(len(boxes))
        from retinaflow.data.transforms import pipeline

        transforms = pipeline(round(strength, 2), self.vertical_flip, MIN_VISIBLE)
        transforms.set_random_seed(seed)
        result = transforms(image=image, bboxes=np.clip(boxes, 0, 1), rows=np.arange(len(boxes)))
        visible = np.asarray(result["bboxes"], dtype=np.float64).reshape(-1, 4)
        return result["image"], visible, np.asarray(result["rows"], dtype=np.int64)
