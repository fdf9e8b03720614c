"""This project's loader beside torchvision's reference pipeline: images per second of one core.

    python benchmarks/loader.py --images 32 --rounds 7

Both sides turn the same JPEGs of 1024 x 768 pixels (generated: a smooth scene with edges and fine texture, about 260 kB
each, near what published Open Images files of that size have) into batches of about 448 x 600 pixels with boxes, in one
process on one thread. The reference is that of torchvision's detection recipes: PIL, to tensor, and resize and pad
in the model (``GeneralizedRCNNTransform``). With augmentation it is given the same changes at the same strength and
probability, by ``torchvision.transforms.v2``. Ours is ``DetectionDataset`` and ``BatchLoader``. Mean and standard
deviation are taken off by neither: here that is the network's first step, on its device. A last comparison is of ours
without and with a pasted crop on every image, whose cost is mostly decoding the image of the crop.

The sides take turns, round by round; printed are CPU milliseconds per image (process time, which other work on the
machine moves little; median of the rounds) and the ratio of the two in the same rounds (median, least, greatest).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision import tv_tensors
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.transforms import v2

from retinaflow.data.augmentation import Augmentation
from retinaflow.data.batching import AspectBuckets, plan_batches
from retinaflow.data.copy_paste import CopyPaste
from retinaflow.data.dataset import BatchLoader, DetectionDataset
from retinaflow.data.images import attach_files
from retinaflow.data.index import AnnotationIndex, row_starts
from retinaflow.taxonomy import Taxonomy

HEIGHT, WIDTH, BATCH, BOXES, IMAGE_SIZE = 768, 1024, 8, 8, 512


def main() -> None:
    arguments = parse()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    with tempfile.TemporaryDirectory() as folder:
        index = write_photos(Path(folder), arguments.images)
        bytes_each = statistics.mean(path.stat().st_size for path in Path(folder).iterdir())
        print(f"{arguments.images} JPEGs of {WIDTH} x {HEIGHT}, {bytes_each / 1000:.0f} kB each; CPU ms per image")
        for strength in (0.0, arguments.strength):
            sides = {"torchvision": reference(index, strength), "retinaflow": ours(index, strength)}
            compare("no augmentation" if strength == 0 else f"augmentation, strength {strength:g}", sides, arguments)
        sides = {f"copy_paste={p:g}": ours(index, arguments.strength, copy_paste=p) for p in (1.0, 0.0)}
        compare("copy-paste, all images or none", sides, arguments)


def compare(title: str, sides: dict[str, Callable[[int], tuple[int, ...]]], arguments: argparse.Namespace) -> None:
    spent: dict[str, list[float]] = {side: [] for side in sides}
    shapes = {side: run(0) for side, run in sides.items()}
    for number in range(1, arguments.rounds + 1):
        for side, run in sides.items():
            start = time.process_time()
            run(number)
            spent[side].append((time.process_time() - start) / arguments.images * 1000)
    print(title)
    for side, times in spent.items():
        each = statistics.median(times)
        print(f"  {side:<14} {each:6.2f} ms  {1000 / each:6.1f} images per core and second, batches of {shapes[side]}")
    (slow, first), (fast, second) = spent.items()
    ratios = sorted(peer / own for peer, own in zip(first, second, strict=True))
    print(f"  {fast} is {statistics.median(ratios):.1f} times as fast as {slow} ({ratios[0]:.1f} to {ratios[-1]:.1f})")


def ours(index: AnnotationIndex, strength: float, *, copy_paste: float = 0.0) -> Callable[[int], tuple[int, ...]]:
    buckets = AspectBuckets.fit(index.sizes, image_size=IMAGE_SIZE, num_buckets=1)
    batches = plan_batches(np.arange(len(index)), buckets.assign(index.sizes), buckets, batch_size=BATCH)
    augmentation = Augmentation(np.full(index.num_classes, strength), base=strength)
    rows = np.arange(len(index.boxes))
    pastes = CopyPaste(index, copy_paste, rows, index.box_image, np.full(len(rows), 1 / len(rows)))
    loader = BatchLoader(DetectionDataset(index, augmentation, copy_paste=pastes))

    def run(number: int) -> tuple[int, ...]:
        for batch in loader.load(batches, seed=(0, number)):
            shape = tuple(batch.images.shape)
        return shape

    return run


class ResizeInModel(GeneralizedRCNNTransform):
    """Without its normalisation."""

    def normalize(self, image: torch.Tensor) -> torch.Tensor:
        return image


def reference(index: AnnotationIndex, strength: float) -> Callable[[int], tuple[int, ...]]:
    height, width = AspectBuckets.fit(index.sizes, image_size=IMAGE_SIZE, num_buckets=1).shapes[0]
    in_model = ResizeInModel(min(height, width), 4096, [], []).train()
    change = v2.Compose(changes(strength))

    def run(number: int) -> tuple[int, ...]:
        torch.manual_seed(number)
        for start in range(0, len(index), BATCH):
            images, targets = zip(*(change(*item) for item in items(index, start)), strict=True)
            batch, _ = in_model(list(images), [dict(target) for target in targets])
        return tuple(batch.tensors.shape)

    return run


def items(index: AnnotationIndex, start: int) -> Iterator[tuple[Any, dict[str, Any]]]:
    for image in range(start, min(start + BATCH, len(index))):
        rows = slice(index.box_start[image], index.box_start[image + 1])
        boxes = torch.from_numpy(index.boxes[rows] * [WIDTH, HEIGHT, WIDTH, HEIGHT]).float()
        pixels = Image.open(index.file_of(image)).convert("RGB")
        boxes = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(HEIGHT, WIDTH))  # type: ignore[assignment]
        yield pixels, {"boxes": boxes, "labels": torch.from_numpy(index.labels[rows].astype(np.int64))}


def changes(s: float) -> list[Any]:
    """What ``augmentation.py`` does at strength ``s`` but for its dropout; at 0 the conversion alone."""
    to_tensor = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]
    if s == 0:
        return [*to_tensor, v2.ToPureTensor()]
    affine = v2.RandomAffine(
        degrees=12 * s,
        translate=(0.2 * s, 0.2 * s),
        scale=(1 - 0.4 * s, 1 + 0.6 * s),
        shear=[-6 * s, 6 * s, -6 * s, 6 * s],
        interpolation=v2.InterpolationMode.BILINEAR,
    )
    return [
        v2.RandomHorizontalFlip(0.5),
        v2.RandomApply([affine], p=0.9),
        v2.RandomApply([v2.ColorJitter(0.4 * s, 0.4 * s, 0.5 * s, 0.04 * s)], p=0.8),
        v2.RandomApply([v2.GaussianBlur((5, 5))], p=0.15 * s),
        *to_tensor,
        v2.RandomApply([v2.GaussianNoise(sigma=0.03)], p=0.25 * s),
        v2.SanitizeBoundingBoxes(min_size=1),
        v2.ToPureTensor(),
    ]


def write_photos(folder: Path, count: int) -> AnnotationIndex:
    """JPEGs, and an index of them with some boxes on each."""
    rng = np.random.default_rng(0)
    for number in range(count):
        path = folder / f"photo{number:03d}.jpg"
        assert cv2.imwrite(str(path), photo(rng), [cv2.IMWRITE_JPEG_QUALITY, 90])
    corners = np.sort(rng.random((count * BOXES, 2, 2)), axis=1)
    ids = np.array([f"photo{number:03d}" for number in range(count)])
    owner = np.repeat(np.arange(count), BOXES)
    empty = AnnotationIndex(
        Taxonomy(("/m/0",), ("thing",)),
        ids,
        np.array([""] * count),
        np.zeros((count, 2), np.int32),
        row_starts(owner, count),
        np.clip(corners.reshape(-1, 4), 0, 1),
        np.zeros(len(owner), np.int32),
        np.zeros(len(owner), np.uint8),
        np.zeros(count + 1, np.int64),
        np.zeros(0, np.int32),
        np.zeros(0, bool),
    )
    return attach_files(empty, [folder])[0]


def photo(rng: np.random.Generator) -> NDArray[np.uint8]:
    """Octaves of smooth noise (the spectrum of photographs falls as 1 / f), objects with edges, and sensor noise."""
    scene = np.zeros((HEIGHT, WIDTH, 3), dtype=np.float32)
    for octave in range(8):
        grid = rng.normal(size=(HEIGHT * 2**octave // 256 + 2, WIDTH * 2**octave // 256 + 2, 3)).astype(np.float32)
        scene += cv2.resize(grid, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC) * 0.6**octave
    scene = (scene - scene.min()) / (scene.max() - scene.min()) * 255
    for _ in range(60):
        centre = (int(rng.integers(WIDTH)), int(rng.integers(HEIGHT)))
        axes = (int(rng.integers(8, 160)), int(rng.integers(8, 120)))
        colour = [float(value) for value in rng.integers(0, 256, 3)]
        layer = scene.copy()
        cv2.ellipse(layer, centre, axes, float(rng.integers(180)), 0, 360, colour, -1, cv2.LINE_AA)
        scene = 0.45 * scene + 0.55 * layer
    return np.clip(scene + rng.normal(0, 9, scene.shape), 0, 255).astype(np.uint8)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--strength", type=float, default=0.5, help="of the augmentation, 0 to 1 (default: augment's)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
