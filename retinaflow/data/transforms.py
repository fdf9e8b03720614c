"""The transforms of an augmented image at a strength, after :mod:`retinaflow.data.augmentation`.

The only file that imports albumentations; it is loaded when an image is augmented, so that a training without
augmentation, or with flips alone, does without that library.
"""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Otherwise the library looks for a newer version on its server at import; a training must not need a network.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import albumentations as A
import cv2

_MEAN_COLOUR = (124, 116, 104)
_LUMA = np.tile([0.299, 0.587, 0.114], (3, 1))
"""RGB to grey (ITU-R BT.601), as a matrix with three equal rows."""
_TILE = 128
"""Side of the noise tile, pixels."""


@lru_cache(maxsize=128)
def pipeline(s: float, vertical_flip: bool, min_visible: float) -> Any:
    """The transforms at strength s; geometry first, so that colour and noise apply to the final pixels."""
    steps = [
        A.HorizontalFlip(p=0.5),
        A.VerticalFlip(p=0.5 if vertical_flip else 0.0),
        A.Affine(
            scale=(1 - 0.4 * s, 1 + 0.6 * s),
            translate_percent={"x": (-0.2 * s, 0.2 * s), "y": (-0.2 * s, 0.2 * s)},
            rotate=(-12 * s, 12 * s),
            shear=(-6 * s, 6 * s),
            fill=_MEAN_COLOUR,
            interpolation=cv2.INTER_LINEAR,
            p=0.9,
        ),
        _ColourMatrix(brightness=0.4 * s, contrast=0.4 * s, saturation=0.5 * s, hue=0.04 * s, p=0.8),
        A.GaussianBlur(blur_limit=(3, 5), p=0.15 * s),
        _TiledNoise(std=(0.01, 0.02 + 0.06 * s), p=0.25 * s),
        _Holes(
            num_holes_range=(1, 4), hole_height_range=(0.05, 0.15), hole_width_range=(0.05, 0.15), fill=0, p=0.3 * s
        ),
    ]
    boxes = A.BboxParams(format="albumentations", label_fields=["rows"], min_visibility=min_visible, clip=True)
    return A.Compose(steps, bbox_params=boxes)


class _Holes(A.CoarseDropout):  # type: ignore[misc]
    """Rectangles of one colour. The library cuts every box of the image to the part that stays visible, in whole
    pixels, so that it also moves boxes that no hole touches; here a box stays as it is, or is dropped when less than
    ``min_visibility`` of it can be seen."""

    def apply_to_bboxes(
        self, bboxes: NDArray[np.floating], holes: NDArray[np.integer], **params: Any
    ) -> NDArray[np.floating]:
        height, width = params["shape"][:2]
        visible = np.ones((height, width), dtype=bool)
        for x1, y1, x2, y2 in holes:
            visible[y1:y2, x1:x2] = False
        corners = bboxes[:, :4] * np.array([width, height, width, height])
        low, high = np.floor(corners[:, :2]).astype(int), np.ceil(corners[:, 2:]).astype(int)
        least = self.get_processor("bboxes").params.min_visibility
        kept = [
            np.mean(visible[y1:y2, x1:x2]) >= least
            for (x1, y1), (x2, y2) in zip(low, np.maximum(high, low + 1), strict=True)
        ]
        return np.asarray(bboxes[np.array(kept, dtype=bool)])


class _ColourMatrix(A.ImageOnlyTransform):  # type: ignore[misc]
    """Brightness, contrast, saturation and hue in one pass over the pixels: all four are affine in RGB.

    The ranges are those of ``A.ColorJitter``, which takes four passes and a way through HSV: 2.7 ms against 0.3 ms for
    576 x 448 pixels (``benchmarks/loader.py``). Each of ``brightness``, ``contrast``, ``saturation`` is the largest
    deviation of its factor from 1, ``hue`` the largest turn about the grey axis, as a fraction of the full circle.
    """

    def __init__(self, *, brightness: float, contrast: float, saturation: float, hue: float, p: float) -> None:
        super().__init__(p=p)
        self.brightness, self.contrast, self.saturation, self.hue = brightness, contrast, saturation, hue

    def get_params(self) -> dict[str, Any]:
        def factor(range_: float) -> float:
            return float(self.py_random.uniform(1 - range_, 1 + range_))

        turn = 2 * np.pi * self.py_random.uniform(-self.hue, self.hue)
        # Rodrigues' formula for a turn about the unit vector (1, 1, 1) / sqrt(3).
        cross = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3)
        rotation = np.cos(turn) * np.eye(3) + np.sin(turn) * cross + (1 - np.cos(turn)) / 3
        saturation = factor(self.saturation)
        matrix = (saturation * np.eye(3) + (1 - saturation) * _LUMA) @ rotation
        return {"matrix": factor(self.brightness) * matrix, "contrast": factor(self.contrast)}

    def apply(
        self, img: NDArray[np.uint8], matrix: NDArray[np.float64], contrast: float, **params: Any
    ) -> NDArray[np.uint8]:
        del params
        # Contrast is a blend with the mean grey of the changed image.
        grey = float(_LUMA[0] @ matrix @ np.array(cv2.mean(img)[:3]))
        full = np.column_stack([contrast * matrix, np.full(3, (1 - contrast) * grey)])
        return np.asarray(cv2.transform(img, full), dtype=np.uint8)


class _TiledNoise(A.ImageOnlyTransform):  # type: ignore[misc]
    """Gaussian noise of a standard deviation drawn from ``std`` (fraction of the full range), from one repeated tile.

    ``A.GaussNoise`` samples every value: 5.6 ms against 0.8 ms for 576 x 448 pixels. In noise the repetition of a
    tile of ``_TILE`` pixels is not visible.
    """

    def __init__(self, *, std: tuple[float, float], p: float) -> None:
        super().__init__(p=p)
        self.std = std

    def get_params(self) -> dict[str, Any]:
        std = 255 * self.py_random.uniform(*self.std)
        tile = self.random_generator.standard_normal((_TILE, _TILE, 3), dtype=np.float32)
        return {"tile": np.rint(std * tile).astype(np.int16)}

    def apply(self, img: NDArray[np.uint8], tile: NDArray[np.int16], **params: Any) -> NDArray[np.uint8]:
        del params
        below, right = max(img.shape[0] - _TILE, 0), max(img.shape[1] - _TILE, 0)
        noise = cv2.copyMakeBorder(tile, 0, below, 0, right, cv2.BORDER_WRAP)[: img.shape[0], : img.shape[1]]
        return np.asarray(cv2.add(img, noise, dtype=cv2.CV_8U), dtype=np.uint8)
