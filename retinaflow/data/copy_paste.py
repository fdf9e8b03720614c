"""Copy-paste by rarity: crops of rare classes are pasted into other training images (Ghiasi et al. 2021, from boxes).

A sampled image gets one crop with a given probability p. The class of the crop has probability q_c = rarity_c / sum of
rarities (:meth:`~retinaflow.data.frequency_bins.ClassBins.rarity`: 1 for the rarest bin, 0 for a bin that is sampled no
more often), then each image of the class is equally likely, then each box of the class on it. A crop always finds a
position, so the expected crops of class c in an epoch of L images are exactly L p q_c. Worked example: rarities 1, 0.5
and 0, p = 0.3, L = 1000: 200 crops of the first class, 100 of the second, none of the third.

Steps of one paste:

1. The crop is the box with ``CONTEXT`` of its sides around it. Other boxes with ``MIN_VISIBLE`` of their area in the
   crop come along, group-of boxes as far as they are in it. Group-of boxes and boxes seen from the inside are not
   cropped; truncated and occluded ones are, because a rare class has few others.
2. The crop is zoomed at random by up to ``MAX_ZOOM``, and so that no side exceeds ``MAX_SIDE`` of the image's: an
   object that fills its image leaves room around it. Half of the crops are flipped left to right.
3. Of ``TRIES`` positions that one is taken which drops the fewest boxes, and of these the one that covers least. A box
   of which more than ``MAX_COVERED`` is covered is dropped.
4. The crop is blended in with a soft edge along a superellipse, which lies in the context and rounds the corners.

The class of the crop becomes known on the image, unless it is not exhaustive there. Its ancestors and the boxes that
came along do not: objects of those may be there without a box. What the image then knows and the image of the crop does
not becomes an ignore region under it.

Randomness: one seed per call, no global state. Cost: some 0.3 ms and decoding one more image, at the size of the paste.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import cv2
import numpy as np
from numpy.typing import NDArray

from retinaflow.boxes import areas, ioa, paired_ioa
from retinaflow.data.augmentation import MIN_VISIBLE
from retinaflow.data.frequency_bins import ClassBins
from retinaflow.data.images import decode
from retinaflow.data.index import FLAGS, AnnotationIndex, rows_of
from retinaflow.data.known_classes import known_classes

CONTEXT = 0.1
"""What a crop shows on each side of its box, as a fraction of the side of the box."""
MAX_SIDE = 0.65
"""Largest side of a paste, as a fraction of the side of the image."""
MAX_ZOOM = 1.6
"""Largest enlargement of an object, compared with its own image at the same size."""
ZOOM_RANGE = 2.5
"""Largest over smallest zoom of a crop."""
MIN_PIXELS = 12
"""No crop is made smaller than this on its shorter side, pixels of the resized image."""
MIN_STORED_PIXELS = 8
"""Boxes with a shorter side in the stored image are not cropped."""
MAX_COVERED = 0.5
"""Fraction of a box's area that a paste may cover; beyond it the box is dropped."""
TRIES = 8
"""Positions that are compared."""
EDGE = 0.16
"""Width of the soft edge, as a fraction of half a side of the crop: about what ``CONTEXT`` is of it."""
_ROUNDNESS = 8
"""Exponent of the superellipse: 2 is an ellipse, infinity a rectangle."""
_INSIDE = np.uint8(1 << FLAGS.index("IsInside"))
_CHUNK = 100_000

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Paste:
    """One crop on one image, without pixels."""

    source: int
    """Image of the crop."""
    crop: FloatArray
    """``[4]`` the crop, normalised to its image."""
    region: NDArray[np.int64]
    """``[4]`` xyxy pixels of the resized image that the crop covers."""
    flip: bool
    rows: NDArray[np.int64]
    """``[Q]`` rows of the boxes in the crop in the index; the first is the box that was cropped."""
    boxes: FloatArray
    """``[Q, 4]`` these boxes, normalised to the image they are pasted into."""
    covered: NDArray[np.bool_]
    """``[P]`` True for each box of the image that is dropped."""


@dataclass(frozen=True)
class CopyPaste:
    """Which boxes are pasted and how often. ``rows [R]``: boxes of the index that may be; ``images [R]``: their image;
    ``chance [R]``: probability of each when a crop is pasted, with sum 1."""

    index: AnnotationIndex
    probability: float
    rows: NDArray[np.int64]
    images: NDArray[np.int32]
    chance: FloatArray

    @staticmethod
    def by_rarity(index: AnnotationIndex, bins: ClassBins, *, probability: float, balance: float) -> CopyPaste | None:
        """Crops of the classes whose bins are below the exposure target; None where nothing would be pasted."""
        rarity = bins.rarity(balance)
        if probability == 0 or not rarity.any():
            return None
        labels = np.asarray(index.labels)
        rows = np.flatnonzero((rarity[labels] > 0) & ~index.is_group_of & (index.flags & _INSIDE == 0))
        images = index.box_image[rows]
        boxes = np.clip(index.boxes[rows], 0, 1)
        stored = (boxes[:, 2:] - boxes[:, :2]) * np.asarray(index.sizes)[images][:, ::-1]
        large = (stored >= MIN_STORED_PIXELS).all(axis=1)
        rows, images = rows[large], images[large]
        if len(rows) == 0:
            return None
        pair, of_row, in_image = np.unique(
            images.astype(np.int64) * index.num_classes + labels[rows], return_inverse=True, return_counts=True
        )
        images_of_class = np.bincount(pair % index.num_classes, minlength=index.num_classes)
        weight = np.where(images_of_class > 0, rarity, 0.0)
        of_class = weight / weight.sum() / np.maximum(images_of_class, 1)
        return CopyPaste(index, probability, rows, images, of_class[labels[rows]] / in_image[of_row])

    @cached_property
    def _cumulative(self) -> FloatArray:
        return np.cumsum(self.chance)

    def choose(self, image: int, shape: tuple[int, int], *, seed: int) -> Paste | None:
        """The crop that an image of ``shape`` (height, width) gets with this seed, or None."""
        # The second number makes this independent of the augmentation.
        rng = np.random.default_rng([seed, 2])
        if rng.random() >= self.probability:
            return None
        number = int(np.searchsorted(self._cumulative, rng.random() * self._cumulative[-1], side="right"))
        number = min(number, len(self.rows) - 1)
        return self._placed(number, image, shape, rng)

    def _placed(self, number: int, image: int, shape: tuple[int, int], rng: np.random.Generator) -> Paste:
        index, source, size = self.index, int(self.images[number]), np.array(shape[::-1])
        rows = np.arange(index.box_start[source], index.box_start[source + 1])
        crop, along = _crops(index, self.rows[number : number + 1], rows)
        rows = np.concatenate([self.rows[number : number + 1], rows[along]])
        stored = np.asarray(index.sizes[source], dtype=np.float64)[::-1]
        sides = (crop[0, 2:] - crop[0, :2]) * stored * np.sqrt(size.prod() / stored.prod())
        largest = float(min(MAX_ZOOM, *(MAX_SIDE * size / sides)))
        smallest = min(largest, max(largest / ZOOM_RANGE, MIN_PIXELS / float(sides.min())))
        zoom = smallest * (largest / smallest) ** rng.random()
        sides = np.clip(np.rint(sides * zoom), 2, size).astype(np.int64)
        flip = bool(rng.random() < 0.5)

        theirs = slice(index.box_start[image], index.box_start[image + 1])
        corners = rng.integers(0, size - sides + 1, (TRIES, 2))
        regions = np.concatenate([corners, corners + sides], axis=1)
        cover = ioa(np.clip(index.boxes[theirs], 0, 1), regions / np.tile(size, 2))
        dropped = (cover > MAX_COVERED) & ~index.is_group_of[theirs, None]
        best = int(np.lexsort((cover.sum(axis=0), dropped.sum(axis=0)))[0])
        region = regions[best]

        within = _within(np.clip(index.boxes[rows], crop[0, [0, 1, 0, 1]], crop[0, [2, 3, 2, 3]]), crop[0])
        if flip:
            within = np.stack([1 - within[:, 2], within[:, 1], 1 - within[:, 0], within[:, 3]], axis=1)
        boxes = (within * np.tile(sides, 2) + np.tile(region[:2], 2)) / np.tile(size, 2)
        return Paste(source, crop[0], region, flip, rows, boxes, dropped[:, best])

    def draw(self, pixels: NDArray[np.uint8], paste: Paste) -> NDArray[np.uint8]:
        """``pixels [H, W, 3]`` with the crop on them. Raises UnreadableImageError for the image of the crop."""
        index, (x1, y1, x2, y2) = self.index, (int(side) for side in paste.region)
        height, width = (int(side) for side in index.sizes[paste.source])
        # As small as the paste, because JPEGs are decoded faster at reduced size; never larger than stored.
        scale = min(1.0, float((x2 - x1) / ((paste.crop[2] - paste.crop[0]) * width)))
        size = max(round(height * scale), 1), max(round(width * scale), 1)
        whole = decode(index.file_of(paste.source), (height, width), size)
        left, top, right, bottom = np.rint(paste.crop * np.tile(size[::-1], 2)).astype(int)
        left, top = min(left, size[1] - 1), min(top, size[0] - 1)
        crop = whole[top : max(bottom, top + 1), left : max(right, left + 1)]
        crop = np.asarray(cv2.resize(crop, (x2 - x1, y2 - y1), interpolation=cv2.INTER_LINEAR), dtype=np.float32)
        if paste.flip:
            crop = crop[:, ::-1]
        weight = soft_edge((y2 - y1, x2 - x1))[:, :, None]
        result = pixels.copy()
        below = result[y1:y2, x1:x2]
        result[y1:y2, x1:x2] = np.rint(weight * crop + (1 - weight) * below)
        return result

    def unknown(self, image: int, paste: Paste) -> NDArray[np.int32]:
        """Classes that are known on an image but not on the image of its crop: the crop may show them without a box."""
        if self.index.all_known:
            return np.zeros(0, dtype=np.int32)
        known = known_classes(self.index, image)
        known[self.index.labels[paste.rows[0]]] = True
        return np.flatnonzero(known & ~known_classes(self.index, paste.source)).astype(np.int32)

    def expected_boxes(self, length: int) -> FloatArray:
        """``[K]`` expected boxes of each class that are pasted in an epoch of ``length`` images, those that come along
        included; ancestors do not count."""
        index, result = self.index, np.zeros(self.index.num_classes)
        labels, chance = np.asarray(index.labels), length * self.probability * self.chance
        for first in range(0, len(self.rows), _CHUNK):
            part = slice(first, first + _CHUNK)
            others, start = rows_of(self.images[part], index.box_start)
            of = np.repeat(np.arange(len(start) - 1), np.diff(start))
            _, along = _crops(index, self.rows[part][of], others)
            result += np.bincount(labels[self.rows[part]], chance[part], len(result))
            result += np.bincount(labels[others[along]], chance[part][of[along]], len(result))
        return result


def _crops(
    index: AnnotationIndex, rows: NDArray[np.int64], others: NDArray[np.int64]
) -> tuple[FloatArray, NDArray[np.bool_]]:
    """The crops ``[R, 4]`` of some boxes, and whether each other box ``[Q]`` (Q = R, or R = 1) of the same image comes
    along."""
    own, boxes = np.clip(index.boxes[rows], 0, 1), np.clip(index.boxes[others], 0, 1)
    margin = CONTEXT * (own[:, 2:] - own[:, :2])
    crops = np.clip(np.concatenate([own[:, :2] - margin, own[:, 2:] + margin], axis=1), 0, 1)
    inside = paired_ioa(boxes, np.broadcast_to(crops, boxes.shape))
    group_of = (index.is_group_of[others]) & (inside * areas(boxes) > 0)
    return crops, np.asarray(((inside >= MIN_VISIBLE) | group_of) & (others != rows))


def _within(boxes: FloatArray, frame: FloatArray) -> FloatArray:
    """``boxes [N, 4]`` in [0, 1] of a frame ``[4]``."""
    return np.asarray((boxes - np.tile(frame[:2], 2)) / np.tile(frame[2:] - frame[:2], 2))


def soft_edge(shape: tuple[int, int]) -> NDArray[np.float32]:
    """Weight of a crop ``[H, W]`` in [0, 1]: 1 inside, falling smoothly to 0 along a superellipse that touches its
    sides."""
    y, x = (np.abs((np.arange(side, dtype=np.float32) + 0.5) / side * 2 - 1) ** _ROUNDNESS for side in shape)
    radius = (y[:, None] + x[None]) ** np.float32(1 / _ROUNDNESS)
    inwards = np.clip((1 - radius) / np.float32(EDGE), 0, 1)
    return np.asarray(inwards * inwards * (3 - 2 * inwards), dtype=np.float32)
