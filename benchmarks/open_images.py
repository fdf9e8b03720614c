"""A stand-in for Open Images Challenge 2018 at any scale: the published files, without the photographs.

    python benchmarks/open_images.py --metadata METADATA --output DIR --scale 1.0

METADATA holds three published files: ``challenge-train-box-counts-500.csv`` (LabelName, DisplayName, TrainBoxes),
``challenge-2018-class-descriptions-500.csv`` and ``bbox_labels_600_hierarchy.json``. Written are the boxes (13
columns), the human-verified image-level labels, the list of validation ids, the class list, the hierarchy, and a table
of image sizes. At scale 1 these are 1.74 million images, 12.2 million boxes and 27 million labels, 2.4 GB.

Boxes per class are exactly the published counts times the scale (at least 1). An image has a scene, one of the top
nodes of the hierarchy (people and what they wear are one); three quarters of a class's images are of its own scene, so
that classes occur together as they do in photographs. A class stands with 1.2 to 4 boxes on an image, the more frequent
the more; 4 of 100 images have no box. Absent labels fall on classes of the scene first and never contradict a box.
Everything is drawn from ``--seed`` with numpy's Generator and written by pyarrow in two threads. It prints the counts
and the seconds taken.
"""

from __future__ import annotations

import argparse
import csv
import io
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
from numpy.typing import NDArray

from retinaflow.data.class_files import read_taxonomy
from retinaflow.data.index import row_starts
from retinaflow.taxonomy import Taxonomy

COUNTS = "challenge-train-box-counts-500.csv"
CLASSES = "challenge-2018-class-descriptions-500.csv"
HIERARCHY = "bbox_labels_600_hierarchy.json"
BOXES = "challenge-2018-train-annotations-bbox.csv"
LABELS = "challenge-2018-train-annotations-human-imagelabels.csv"
VALIDATION_IDS = "challenge-2018-image-ids-valset-od.csv"
SIZES = "image-sizes.csv"

IMAGES = 1_743_042
LABELS_PER_IMAGE = 15.5
VALIDATION_SHARE = 0.0574
"""100,000 of the images, as the Challenge recommends."""
WITHOUT_BOX = 0.04
OWN_SCENE = 0.75
FLAG_SHARES = {"IsOccluded": 0.66, "IsTruncated": 0.25, "IsGroupOf": 0.05, "IsDepiction": 0.055, "IsInside": 0.001}
PERSON, CLOTHING, BODY = "/m/01g317", "/m/09j2d", "/m/02p0tk3"
SHAPES = np.array([[768, 1024], [683, 1024], [1024, 768], [1024, 683], [1024, 1024], [576, 1024], [1024, 577]])
SHAPE_SHARES = (0.36, 0.32, 0.1, 0.09, 0.03, 0.08, 0.02)
ROWS_AT_ONCE = 500_000


@dataclass(frozen=True)
class Pairs:
    """P (image, class) pairs that have boxes, sorted by image, then class."""

    image: NDArray[np.int64]
    class_index: NDArray[np.int64]
    boxes: NDArray[np.int64]
    scene_of_image: NDArray[np.int64]


def main() -> None:
    arguments = parse()
    start = time.perf_counter()
    rng = np.random.default_rng(arguments.seed)
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    taxonomy = read_taxonomy(arguments.metadata / CLASSES, arguments.metadata / HIERARCHY)
    counts = scaled_counts(arguments.metadata / COUNTS, taxonomy, arguments.scale)
    count = max(round(IMAGES * arguments.scale), 20)
    pairs = draw_pairs(counts, scenes(taxonomy), count, rng)
    ids = draw_ids(count, rng)
    for name in (CLASSES, HIERARCHY):
        shutil.copyfile(arguments.metadata / name, output / name)
    boxes = write_boxes(output / BOXES, pairs, ids, taxonomy, rng)
    labels = write_labels(output / LABELS, pairs, ids, taxonomy, rng)
    write_image_tables(output, ids, rng)
    print(
        f"{count:,} images, {boxes:,} boxes of {np.count_nonzero(counts)} classes in {len(pairs.image):,} pairs of "
        f"image and class, {labels:,} labels; written in {time.perf_counter() - start:.0f} s"
    )


def scaled_counts(path: Path, taxonomy: Taxonomy, scale: float) -> NDArray[np.int64]:
    """``[K]`` boxes per class."""
    with path.open(newline="", encoding="utf-8") as file:
        published = {row["LabelName"]: int(row["TrainBoxes"]) for row in csv.DictReader(file)}
    return np.array([max(round(published[mid] * scale), 1) for mid in taxonomy.ids])


def scenes(taxonomy: Taxonomy) -> NDArray[np.int64]:
    """``[K]`` scene of each class: the first top node of the hierarchy that leads to it; Person, what is part of one
    and clothing are scene 0."""
    hierarchy = taxonomy.hierarchy
    children = {child for _, child in hierarchy.subcategories}
    tops = [PERSON, BODY, CLOTHING, *(node for node in hierarchy.nodes if node not in children)]
    scene_of: dict[str, int] = {}
    for number, top in enumerate(tops):
        for node in hierarchy.reachable(top, parts=True):
            scene_of.setdefault(node, max(number - 2, 0))
    found = np.array([scene_of[mid] for mid in taxonomy.ids])
    return np.unique(found, return_inverse=True)[1]


def draw_pairs(
    counts: NDArray[np.int64], scene_of_class: NDArray[np.int64], images: int, rng: np.random.Generator
) -> Pairs:
    """Which classes stand on which image, and with how many boxes; boxes per class are exactly ``counts``."""
    per_image = 1.15 + 2.0 * (counts / counts.max()) ** 0.3
    tokens = np.repeat(np.arange(len(counts)), np.ceil(counts / per_image).astype(np.int64))
    # Tokens (a class, once) and slots (an image, once) are both put in order of scene and laid side by side.
    scene = scene_of_class[tokens]
    stray = rng.random(len(tokens)) > OWN_SCENE
    scene[stray] = rng.permutation(scene[stray])
    order = rng.permutation(len(tokens))
    order = order[np.argsort(scene[order].astype(np.int16), kind="stable")]
    boxed = max(round(images * (1 - WITHOUT_BOX)), 1)
    appetite = rng.gamma(1.2, size=boxed)
    slots = np.ones(boxed, dtype=np.int64) + shares(appetite, max(len(tokens) - boxed, 0))
    image = np.repeat(np.arange(boxed), slots)[: len(tokens)]
    scene_of_image = np.full(images, 0)
    scene_of_image[image] = scene[order]
    keys = np.unique(image * len(counts) + tokens[order])
    image, class_index = np.divmod(keys, len(counts))
    boxes = np.empty(len(keys), dtype=np.int64)
    by_class = np.argsort(class_index.astype(np.int16), kind="stable")
    present = np.bincount(class_index, minlength=len(counts))
    weight = rng.gamma(0.5, size=len(keys))
    total = np.bincount(class_index[by_class], weight, len(counts))
    weight *= ((counts - present) / np.maximum(total, 1e-12))[class_index[by_class]]
    boxes[by_class] = 1 + np.diff(np.floor(np.cumsum(weight) + 0.5), prepend=0).astype(np.int64)
    shuffled = rng.permutation(images)
    order = np.argsort(shuffled[image], kind="stable")
    scene_shuffled = np.empty_like(scene_of_image)
    scene_shuffled[shuffled] = scene_of_image
    return Pairs(shuffled[image][order], class_index[order], boxes[order], scene_shuffled)


def shares(weights: NDArray[np.float64], total: int) -> NDArray[np.int64]:
    """``total`` things shared in proportion to weights, each rounded up or down."""
    return np.diff(np.floor(np.cumsum(weights * (total / weights.sum())) + 0.5), prepend=0).astype(np.int64)


def draw_ids(count: int, rng: np.random.Generator) -> pa.StringArray:
    """Ascending ids of 16 hex digits."""
    numbers = np.unique(rng.integers(0, 2**64, size=count + 64, dtype=np.uint64))[:count]
    octets = numbers.astype(">u8").view(np.uint8).reshape(count, 8)
    digits = np.frombuffer(b"0123456789abcdef", dtype=np.uint8)
    text = np.stack([digits[octets >> 4], digits[octets & 15]], axis=2)
    offsets = np.arange(count + 1, dtype=np.int32) * 16
    return pa.StringArray.from_buffers(count, pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(text)))


def write_boxes(path: Path, pairs: Pairs, ids: pa.StringArray, taxonomy: Taxonomy, rng: np.random.Generator) -> int:
    image = np.repeat(pairs.image, pairs.boxes)
    mids = pa.array(taxonomy.ids)
    class_index = np.repeat(pairs.class_index, pairs.boxes)
    source = pa.array(["xclick", "activemil"])

    def rows(first: int, last: int, rng: np.random.Generator) -> Mapping[str, Any]:
        size = last - first
        sides = np.clip(rng.beta(0.9, 2.6, size=(2, size)), 0.004, 1)
        low = rng.random((2, size)) * (1 - sides)
        high = np.minimum(low + sides, 1)
        low, high = np.floor(low * 1e6) / 1e6, np.ceil(high * 1e6) / 1e6
        flags = {name: (rng.random(size) < share).astype(np.int8) for name, share in FLAG_SHARES.items()}
        return {
            "ImageID": ids.take(pa.array(image[first:last])),
            "Source": source.take(pa.array((rng.random(size) < 0.1).astype(np.int8))),
            "LabelName": mids.take(pa.array(class_index[first:last])),
            "Confidence": np.ones(size, dtype=np.int8),
            "XMin": low[0],
            "XMax": high[0],
            "YMin": low[1],
            "YMax": high[1],
            **flags,
        }

    write_table(path, len(image), rows, rng)
    return len(image)


def write_labels(path: Path, pairs: Pairs, ids: pa.StringArray, taxonomy: Taxonomy, rng: np.random.Generator) -> int:
    """Present for every boxed class, absent for classes that neither the boxes nor their ancestors name."""
    width = len(taxonomy)
    present = pairs.image * width + pairs.class_index
    child, ancestor = np.nonzero(taxonomy.is_ancestor)
    start = row_starts(child, width)
    counts = np.diff(start)[pairs.class_index]
    place = np.repeat(start[pairs.class_index] - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
    implied = np.repeat(pairs.image, counts) * width + ancestor[place]
    absent = draw_absent(pairs, width, round(len(ids) * LABELS_PER_IMAGE) - len(present), rng)
    absent = absent[~np.isin(absent, np.unique(np.concatenate([present, implied])))]
    # The lowest bit says present, so that one sort orders all by image and class.
    keys = np.sort(np.concatenate([present * 2 + 1, absent * 2]))
    source = pa.array(["verification", "crowdsource-verification"])
    mids = pa.array(taxonomy.ids)

    def rows(first: int, last: int, rng: np.random.Generator) -> Mapping[str, Any]:
        image, class_index = np.divmod(keys[first:last] >> 1, width)
        return {
            "ImageID": ids.take(pa.array(image)),
            "Source": source.take(pa.array((rng.random(last - first) < 0.4).astype(np.int8))),
            "LabelName": mids.take(pa.array(class_index)),
            "Confidence": (keys[first:last] & 1).astype(np.int8),
        }

    write_table(path, len(keys), rows, rng)
    return len(keys)


def draw_absent(pairs: Pairs, width: int, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Keys (image x K + class), each once: classes of the image's scene first, frequent ones more often."""
    frequency = np.sqrt(np.bincount(pairs.class_index, minlength=width))
    number = int(pairs.scene_of_image.max()) + 1
    in_scene = np.zeros((number, width))
    np.add.at(in_scene, (pairs.scene_of_image[pairs.image], pairs.class_index), 1.0)
    mixed = 0.7 * _rows_to_one(np.sqrt(in_scene)) + 0.3 * frequency / frequency.sum()
    cumulative = np.cumsum(_rows_to_one(mixed), axis=1)
    cumulative[:, -1] = 1.0
    # Drawn twice is drawn once, so a tenth more are drawn.
    image = np.sort(rng.integers(0, len(pairs.scene_of_image), size=round(count * 1.12), dtype=np.int64))
    scene = pairs.scene_of_image[image]
    found = np.searchsorted((cumulative + np.arange(number)[:, None]).ravel(), scene + rng.random(len(image)))
    return np.unique(image * width + np.minimum(found - scene * width, width - 1))


def _rows_to_one(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return values / np.maximum(values.sum(axis=1, keepdims=True), 1e-12)


def write_image_tables(output: Path, ids: pa.StringArray, rng: np.random.Generator) -> None:
    """The ids to evaluate on, and (ImageID, Width, Height) of every image."""
    chosen = np.sort(rng.permutation(len(ids))[: max(round(len(ids) * VALIDATION_SHARE), 1)])
    write_table(output / VALIDATION_IDS, len(chosen), lambda a, b, _: {"ImageID": ids.take(pa.array(chosen[a:b]))}, rng)
    shape = rng.choice(len(SHAPES), size=len(ids), p=SHAPE_SHARES)

    def rows(first: int, last: int, rng: np.random.Generator) -> Mapping[str, Any]:
        del rng
        height, width = SHAPES[shape[first:last]].T
        return {"ImageID": ids.slice(first, last - first), "Width": width, "Height": height}

    write_table(output / SIZES, len(ids), rows, rng)


def write_table(
    path: Path, count: int, rows: Callable[[int, int, np.random.Generator], Mapping[str, Any]], rng: np.random.Generator
) -> None:
    """A CSV file as it is published, without quotes; parts are made by two threads and written in order."""
    parts = [(first, min(first + ROWS_AT_ONCE, count)) for first in range(0, count, ROWS_AT_ONCE)]
    generators = rng.spawn(len(parts))

    def text(number: int) -> tuple[str, bytes]:
        table = pa.table(dict(rows(*parts[number], generators[number])))
        buffer = io.BytesIO()
        pa_csv.write_csv(table, buffer, pa_csv.WriteOptions(include_header=False, quoting_style="none"))
        return ",".join(table.column_names), buffer.getvalue()

    with path.open("wb") as file, ThreadPoolExecutor(2) as threads:
        for number, (header, body) in enumerate(few_ahead(threads, text, len(parts))):
            if number == 0:
                file.write(f"{header}\n".encode())
            file.write(body)


def few_ahead(threads: ThreadPoolExecutor, work: Callable[[int], Any], count: int) -> Iterator[Any]:
    """Results in order, with at most four pieces of work begun and not yet taken."""
    pending = [threads.submit(work, number) for number in range(min(4, count))]
    for number in range(count):
        yield pending.pop(0).result()
        if number + 4 < count:
            pending.append(threads.submit(work, number + 4))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--metadata", type=Path, required=True, help="folder of the three published files")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the images and boxes; 1 is full size")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
