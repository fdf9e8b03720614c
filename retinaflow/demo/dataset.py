"""The demo set: generated images in the layout of Open Images, for a first training.

Images of people and what they wear, vehicles, flowers and trees, about 256 pixels on their longer side. Twenty
classes (14 with boxes of their own, the others parents) in a hierarchy of three levels, named as in Open Images.
Training is long-tailed, from 642 boxes down to 6; validation is deliberately much flatter, with at least 30 boxes of
every drawn class, so that rare classes can be measured; :mod:`retinaflow.demo.plan` has the numbers. Rare classes
differ from a frequent one by shape or pattern (taxi and car, ambulance and bus, fedora and sun hat, rose and sunflower,
palm tree and tree), so a detector must distinguish them. Boxes are given for the most specific class only.

Layout under the folder: ``images/{ImageID}.jpg``, ``{train,validation}-annotations-bbox.csv``,
``{train,validation}-annotations-human-imagelabels.csv``, ``class-descriptions.csv`` (no header),
``bbox_labels_hierarchy.json``, and ``demo.json``, the stamp of version, seed and sizes.

Guarantees: the same arguments write the same bytes (on one version of NumPy and OpenCV), no global random state is read
or changed, and the folder is written atomically. Cost: about 20 s on one core and 17 MB at the default sizes.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

from retinaflow.demo.plan import CLASSES, TRAIN_IMAGES, VALIDATION_IMAGES, DemoClass, ScenePlan, plan_split
from retinaflow.demo.scene import DrawnBox, draw_scene
from retinaflow.errors import DataError
from retinaflow.files import atomic_folder

__all__ = ["CLASSES", "TRAIN_IMAGES", "VALIDATION_IMAGES", "DemoClass", "demo_is_current", "plan_split", "write_demo"]

FORMAT_VERSION = 1
ROOT = "/m/0bl9f"
JPEG_QUALITY = 90
BOX_COLUMNS = (
    "ImageID", "Source", "LabelName", "Confidence", "XMin", "XMax", "YMin", "YMax",
    "IsOccluded", "IsTruncated", "IsGroupOf", "IsDepiction", "IsInside",
)  # fmt: skip
LABEL_COLUMNS = ("ImageID", "Source", "LabelName", "Confidence")
MIDS = {spec.name: spec.mid for spec in CLASSES}


def write_demo(
    folder: Path,
    *,
    seed: int = 0,
    train_images: int = TRAIN_IMAGES,
    validation_images: int = VALIDATION_IMAGES,
) -> None:
    """Write the demo set to ``folder``; an older demo set there is replaced.

    Raises ValueError for sizes below 1 or a negative seed, and DataError when ``folder`` holds something other than a
    demo set.
    """
    stamp = _stamp(seed=seed, train_images=train_images, validation_images=validation_images)
    folder = Path(folder)
    if folder.exists() and not (folder / "demo.json").is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder}: the folder must be new, empty or hold a demo set, but holds something else")
    with atomic_folder(folder, replace=True) as fresh:
        (fresh / "images").mkdir()
        _write_classes(fresh)
        for number, (split, images) in enumerate((("train", train_images), ("validation", validation_images))):
            plans = plan_split(split, images=images, seed=seed)
            shown = tqdm(plans, desc=f"demo set, {split}", unit="image", disable=None, leave=False)
            _write_split(fresh, split, plans=shown, key=(seed, number))
        (fresh / "demo.json").write_text(json.dumps(stamp, indent=1) + "\n", encoding="utf-8")


def demo_is_current(
    folder: Path,
    *,
    seed: int = 0,
    train_images: int = TRAIN_IMAGES,
    validation_images: int = VALIDATION_IMAGES,
) -> bool:
    """Whether ``folder`` holds the complete demo set that :func:`write_demo` would write for these arguments."""
    try:
        found = json.loads((Path(folder) / "demo.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    wanted = _stamp(seed=seed, train_images=train_images, validation_images=validation_images)
    return bool(found == wanted)


def hierarchy() -> dict[str, Any]:
    """The classes as a tree in the published form."""

    def node(spec: DemoClass) -> dict[str, Any]:
        below = [node(child) for child in CLASSES if child.parent == spec.name]
        return {"LabelName": spec.mid, **({"Subcategory": below} if below else {})}

    return {"LabelName": ROOT, "Subcategory": [node(spec) for spec in CLASSES if spec.parent is None]}


def _stamp(*, seed: int, train_images: int, validation_images: int) -> dict[str, float]:
    for name, value, least in (
        ("seed", seed, 0),
        ("train_images", train_images, 1),
        ("validation_images", validation_images, 1),
    ):
        if value < least:
            raise ValueError(f"`{name} >= {least}` must hold, but got {name}={value}")
    return {
        "format": FORMAT_VERSION,
        "seed": seed,
        "train_images": train_images,
        "validation_images": validation_images,
    }


def _write_classes(folder: Path) -> None:
    _write_csv(folder / "class-descriptions.csv", ((spec.mid, spec.name) for spec in CLASSES))
    (folder / "bbox_labels_hierarchy.json").write_text(json.dumps(hierarchy(), indent=1) + "\n", encoding="utf-8")


def _write_split(folder: Path, split: str, *, plans: Iterable[ScenePlan], key: Sequence[int]) -> None:
    """Draw the images of a split and write its two tables. Every image has a generator of its own."""
    boxes: list[tuple[object, ...]] = [BOX_COLUMNS]
    labels: list[tuple[object, ...]] = [LABEL_COLUMNS]
    for number, plan in enumerate(plans):
        pixels, drawn = draw_scene(plan, np.random.default_rng([*key, 3, number]))
        done, data = cv2.imencode(".jpg", pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
        if not done:
            raise RuntimeError(f"OpenCV could not encode {plan.image_id} as JPEG")
        (folder / "images" / f"{plan.image_id}.jpg").write_bytes(data.tobytes())
        boxes += [_box_row(plan.image_id, box) for box in drawn if box.name not in plan.hidden]
        labels += [(plan.image_id, "verification", mid, sign) for mid, sign in _verified(plan)]
    _write_csv(folder / f"{split}-annotations-bbox.csv", boxes)
    _write_csv(folder / f"{split}-annotations-human-imagelabels.csv", labels)


def _box_row(image_id: str, box: DrawnBox) -> tuple[object, ...]:
    sides = (f"{side:.6f}" for side in (box.x1, box.x2, box.y1, box.y2))
    return image_id, "xclick", MIDS[box.name], 1, *sides, int(box.occluded), int(box.truncated), int(box.group_of), 0, 0


def _verified(plan: ScenePlan) -> list[tuple[str, int]]:
    """(MID, 1 present or 0 absent) in the order of the ids."""
    return sorted([(MIDS[name], 1) for name in plan.present] + [(MIDS[name], 0) for name in plan.absent])


def _write_csv(path: Path, rows: Iterable[Sequence[object]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
