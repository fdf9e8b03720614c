"""Run as a program in an empty folder: it writes a toy data set, runs retinaflow's commands on it one after another,
all tracked in an MLflow store in that folder, and writes ``record.json``: the parameters, tags and metrics of each run.

It knows the command line and MLflow only, so it outlives any change inside the package. ``test_outside.py`` reads what
it leaves.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from pathlib import Path
from typing import Any

import cv2
import mlflow
import numpy as np

from retinaflow.cli import main

CLASSES = {"/m/car": "Car", "/m/vehicle": "Vehicle", "/m/tree": "Tree", "/m/bus": "Bus"}
"""Vehicle is the parent of Car and Bus and has no boxes of its own. Bus is rare."""
COLOURS = {"/m/car": (40, 40, 220), "/m/tree": (40, 180, 40), "/m/bus": (220, 160, 30)}
SHAPES = ((64, 112), (112, 64), (88, 88))
"""(height, width) of the images, in turn."""
BOX_COLUMNS = (
    "ImageID", "Source", "LabelName", "Confidence", "XMin", "XMax", "YMin", "YMax",
    "IsOccluded", "IsTruncated", "IsGroupOf", "IsDepiction", "IsInside",
)  # fmt: skip
LABEL_COLUMNS = ("ImageID", "Source", "LabelName", "Confidence")

# An epoch of one batch is one step, and each epoch logs a point: so the curves have every step. The first half of the
# epochs is sampled uniformly, the second half by bins.
TRAINING = (
    "data=toy image_size=96 num_buckets=2 batch_size=4 epoch_length=4 fpn_channels=64 head_depth=1 lr=0.001 "
    "warmup=0.25 precision=float32 workers=0 balance_start=0.5 focal_gamma=1.5 augment=0.5 "
    "rare_augment=0.8 save_minutes=0 "
)
RUNS = {
    "binning": "data=toy",
    "train": TRAINING + "epochs=24 eval_every=12 register_as=toy",
    "evaluate": "from_run=RUN_OF_train bootstrap=20 iou_thresholds=0.5,0.75",
    "predict": "from_run=RUN_OF_train submission=submission.csv",
    "visualize": "from_run=RUN_OF_train samples=2",
    "explore": "data=toy samples=2",
    "compare": "runs=RUN_OF_train,RUN_OF_evaluate bootstrap=100 samples=1",
    "merge": "runs=RUN_OF_train,RUN_OF_evaluate min_ground_truth=1",
    "promote": "runs=RUN_OF_train bootstrap=100",
    "convert": "data=toy to=coco",
}
UNTRACKED = {
    "binning": "data=toy",
    "evaluate": "data=toy predictions=predict/predictions.csv bootstrap=0",
}
"""Run once more with ``track=false``."""


def write_toy_data(folder: Path, *, images: dict[str, int]) -> None:
    """A data set in the published layout; ``images``: how many of each split. Boxes are filled rectangles on noise."""
    (folder / "images").mkdir(parents=True)
    write_csv(folder / "class-descriptions.csv", [*CLASSES.items()])
    vehicles = [{"LabelName": name} for name in ("/m/car", "/m/bus")]
    nodes = [{"LabelName": "/m/vehicle", "Subcategory": vehicles}, {"LabelName": "/m/tree"}]
    tree = json.dumps({"LabelName": "/m/entity", "Subcategory": nodes})
    (folder / "bbox_labels_hierarchy.json").write_text(tree, encoding="utf-8")
    for number, (split, count) in enumerate(images.items()):
        rng = np.random.default_rng([7, number])
        boxes: list[Any] = [BOX_COLUMNS]
        labels: list[Any] = [LABEL_COLUMNS]
        for image in range(count):
            image_id, (height, width) = f"{split}{image:02d}", SHAPES[image % len(SHAPES)]
            pixels = rng.integers(90, 150, (height, width, 3), dtype=np.uint8)
            found = ["/m/car"] * (image % 4 != 3) + ["/m/tree"] * (image % 2) + ["/m/bus"] * (image % 6 == 4)
            for column, name in enumerate(found):
                x1 = width * column // len(found) + int(rng.integers(2, 8))
                x2 = width * (column + 1) // len(found) - int(rng.integers(2, 8))
                y1, y2 = int(rng.integers(2, height // 3)), int(rng.integers(height // 2, height - 2))
                cv2.rectangle(pixels, (x1, y1), (x2, y2), COLOURS[name], -1)
                sides = [f"{side:.6f}" for side in (x1 / width, x2 / width, y1 / height, y2 / height)]
                boxes.append([image_id, "xclick", name, 1, *sides, 0, 0, int(image == 0), 0, 0])
            absent = [name for name in COLOURS if name not in found and image % 3 == 0]
            labels += [[image_id, "verification", name, int(name in found)] for name in [*found, *absent]]
            cv2.imwrite(str(folder / "images" / f"{image_id}.jpg"), pixels)
        write_csv(folder / f"{split}-annotations-bbox.csv", boxes)
        write_csv(folder / f"{split}-annotations-human-imagelabels.csv", labels)


def write_csv(path: Path, rows: list[Any]) -> None:
    """A CSV file of these rows."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def run(command: str, settings: str) -> None:
    """Run a command; a failure ends the program with the command's exit code."""
    words = [word for setting in settings.split() for word in f"--{setting}".split("=", 1)]
    code = main([command, *words])
    if code != 0:
        sys.exit(code)


def run_of(command: str) -> Any:
    """The MLflow run of a command."""
    (found,) = mlflow.search_runs(
        experiment_names=["retinaflow"],
        filter_string=f"tags.`retinaflow.command` = '{command}'",
        output_format="list",
    )
    return found


def record(command: str) -> dict[str, Any]:
    """What MLflow has of a command's run."""
    run = run_of(command)
    client = mlflow.MlflowClient()
    points = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
    return {
        "run_id": run.info.run_id,
        "run_name": run.info.run_name,
        "artifacts": run.info.artifact_uri,
        "params": run.data.params,
        "tags": run.data.tags,
        "points": {name: [[point.step, point.value] for point in values] for name, values in points.items()},
    }


if __name__ == "__main__":
    write_toy_data(Path("toy"), images={"train": 24, "validation": 8})
    for command, settings in RUNS.items():
        known = re.sub(r"RUN_OF_(\w+)", lambda match: run_of(match[1]).info.run_id, settings)
        run(command, f"{known} output={command}")
    for command, settings in UNTRACKED.items():
        run(command, f"{settings} track=false output=untracked-{command}")
    tracked = {command: record(command) for command in RUNS}
    Path("record.json").write_text(json.dumps(tracked, indent=1), encoding="utf-8")
