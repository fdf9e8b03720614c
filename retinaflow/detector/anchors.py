"""Anchors of an image shape, and boxes written relative to anchors.

``anchor_grid`` yields the anchors of RetinaNet (Lin et al. 2017, section 4: levels P3..P7, three octave scales, three
aspect ratios, so 9 per cell) exactly as torchvision's ``AnchorGenerator`` makes them, rounding included. They depend on
the image shape alone, so they are made once per (shape, scale, device) and cached; the same tensor is handed out each
time and must not be written to. ``encode`` and ``decode`` are the box code of R-CNN (Girshick et al. 2014, appendix C)
with weights 1, 1, 1, 1. ``best_overlaps`` shows before any training how well the anchors fit given boxes: a box is
learned from every anchor that overlaps it with an IoU of 0.5 or more (:mod:`retinaflow.detector.targets`); one that no
anchor overlaps that much is learned from the one with the largest overlap, and small objects are then hardly learned.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LEVEL_STRIDES = (8, 16, 32, 64, 128)
ASPECT_RATIOS = (0.5, 1.0, 2.0)
ANCHORS_PER_CELL = 9
# exp() of a larger size change than this is an error of the network, not a box (Detectron, torchvision).
MAX_LOG_SCALE = math.log(1000.0 / 16)


@dataclass(frozen=True, eq=False)
class AnchorGrid:
    """All anchors of one image shape.

    boxes: ``[A, 4]`` float32, xyxy pixels, P3 first; inside a level by row, then column, then the 9 of a cell.
        They may reach outside of the image.
    image_size: (height, width) in pixels.
    level_counts: anchors per level P3..P7; their sum is A.
    """

    boxes: Tensor
    image_size: tuple[int, int]
    level_counts: tuple[int, ...]


def anchor_grid(
    image_size: tuple[int, int], *, anchor_scale: float = 4.0, device: torch.device | str = "cpu"
) -> AnchorGrid:
    """The anchors of an image of ``image_size`` (height, width) pixels, from the cache if made before.

    anchor_scale: base side of an anchor as a multiple of its level's stride; 4 is torchvision's 32 px on stride 8.

    Raises ValueError for a size below 1 pixel and for a scale so small that an anchor rounds to nothing.
    """
    height, width = (int(side) for side in image_size)
    if height < 1 or width < 1:
        raise ValueError(f"image_size (height, width) must be at least 1 pixel each, but got {(height, width)}.")
    return _cached_grid(height, width, float(anchor_scale), torch.device(device))


@lru_cache(maxsize=64)
def _cached_grid(height: int, width: int, anchor_scale: float, device: torch.device) -> AnchorGrid:
    # A tensor first made under inference_mode() could never be used in training later, and the cache outlives the mode.
    with torch.inference_mode(False), torch.no_grad():
        levels = [_level_anchors(height, width, stride, anchor_scale) for stride in LEVEL_STRIDES]
        boxes = torch.cat(levels).to(device)
    return AnchorGrid(boxes, (height, width), tuple(len(level) for level in levels))


def cell_anchors(stride: int, anchor_scale: float) -> Tensor:
    """The 9 anchors ``[9, 4]`` of a cell around the origin, rounded to whole pixels as torchvision rounds them."""
    base = anchor_scale * stride
    sides = torch.tensor([base, int(base * 2 ** (1 / 3)), int(base * 2 ** (2 / 3))], dtype=torch.float32, device="cpu")
    heights_per_side = torch.sqrt(torch.tensor(ASPECT_RATIOS, dtype=torch.float32, device="cpu"))
    widths = ((1 / heights_per_side)[:, None] * sides).flatten()
    heights = (heights_per_side[:, None] * sides).flatten()
    anchors = (torch.stack([-widths, -heights, widths, heights], dim=1) / 2).round()
    if bool((anchors[:, 2:] <= anchors[:, :2]).any()):
        raise ValueError(
            f"anchor_scale * stride must give anchors of at least 2 pixels, but got anchor_scale={anchor_scale} "
            f"on stride {stride}; use at least 0.5."
        )
    return anchors


def level_spacing(image_size: tuple[int, int], stride: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """(cells, pixels from one to the next) of a level, downwards and to the right; the first cell is at 0.

    Torchvision spaces cells by size // cells, not by the nominal stride; they differ where the size is no multiple.
    """
    height, width = image_size
    rows, columns = -(-height // stride), -(-width // stride)
    return (rows, height // rows), (columns, width // columns)


def _level_anchors(height: int, width: int, stride: int, anchor_scale: float) -> Tensor:
    (rows, down), (columns, right) = level_spacing((height, width), stride)
    ys = torch.arange(rows, dtype=torch.float32, device="cpu") * down
    xs = torch.arange(columns, dtype=torch.float32, device="cpu") * right
    grid_y, grid_x = torch.meshgrid(ys, xs, indexing="ij")
    centres = torch.stack([grid_x, grid_y, grid_x, grid_y], dim=-1).reshape(-1, 1, 4)
    return (centres + cell_anchors(stride, anchor_scale)).reshape(-1, 4)


def encode(boxes: Tensor, anchors: Tensor) -> Tensor:
    """Boxes as offsets from anchors, row by row: (dx / w, dy / h, log of width ratio, log of height ratio).

    boxes, anchors: ``[N, 4]`` float, xyxy, in one unit, with x1 < x2 and y1 < y2. Returns ``[N, 4]``.
    """
    sizes, centres = _sizes_and_centres(anchors)
    box_sizes, box_centres = _sizes_and_centres(boxes)
    return torch.cat([(box_centres - centres) / sizes, torch.log(box_sizes / sizes)], dim=-1)


def decode(deltas: Tensor, anchors: Tensor) -> Tensor:
    """The inverse of ``encode``: ``[N, 4]`` offsets and anchors -> xyxy boxes ``[N, 4]``, not clipped to the image.

    Log ratios are clamped at log(1000 / 16), as torchvision does.
    """
    sizes, centres = _sizes_and_centres(anchors.to(deltas.dtype))
    middles = deltas[..., :2] * sizes + centres
    halves = 0.5 * (torch.exp(deltas[..., 2:].clamp(max=MAX_LOG_SCALE)) * sizes)
    return torch.cat([middles - halves, middles + halves], dim=-1)


def _sizes_and_centres(boxes: Tensor) -> tuple[Tensor, Tensor]:
    sizes = boxes[..., 2:] - boxes[..., :2]
    return sizes, boxes[..., :2] + 0.5 * sizes


def best_overlaps(
    boxes: NDArray[np.floating], image_size: tuple[int, int], *, anchor_scale: float
) -> NDArray[np.float32]:
    """``[N]`` IoU of each box with the anchor that overlaps it most, of all anchors of the image.

    boxes: ``[N, 4]`` xyxy pixels of the resized image, with area. image_size: (height, width) in pixels.

    Of the anchors of one shape the one whose centre is nearest overlaps most, in x and in y independently. So 9 anchors
    of each level are compared and not all, in memory of N floats.
    """
    corners = np.asarray(boxes, dtype=np.float32)
    sizes, centres = corners[:, 2:] - corners[:, :2], (corners[:, 2:] + corners[:, :2]) * np.float32(0.5)
    best = np.zeros(len(corners), dtype=np.float32)
    for stride in LEVEL_STRIDES:
        cells = level_spacing(image_size, stride)
        distances = [_to_nearest(centres[:, axis], cells[1 - axis]) for axis in (0, 1)]
        for anchor in cell_anchors(stride, anchor_scale).numpy():
            width, height = anchor[2:] - anchor[:2]
            shared = _shared(sizes[:, 0], width, distances[0]) * _shared(sizes[:, 1], height, distances[1])
            np.maximum(best, shared / (sizes[:, 0] * sizes[:, 1] + width * height - shared), out=best)
    return best


def _to_nearest(centres: NDArray[np.floating], cells: tuple[int, int]) -> NDArray[np.floating]:
    """Distance to the nearest of ``count`` centres, ``step`` pixels apart from 0 on; ``cells`` is (count, step)."""
    count, step = cells
    nearest = np.clip(np.round(centres / step), 0, count - 1) * step
    return np.abs(centres - nearest)


def _shared(side: NDArray[np.floating], anchor_side: float, distance: NDArray[np.floating]) -> NDArray[np.floating]:
    """Length that a side of a box and of an anchor share, their centres being ``distance`` apart."""
    apart = (side + anchor_side) / 2 - distance
    return np.asarray(np.clip(np.minimum(apart, np.minimum(side, anchor_side)), 0, None))
