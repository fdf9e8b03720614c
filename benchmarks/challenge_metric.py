"""The Challenge metric beside COCO evaluators of the registry: seconds by phase and peak memory on one core.

    python benchmarks/challenge_metric.py                                                  # 1,000,000 detections
    python benchmarks/challenge_metric.py --images 125000 --classes 500 --detections 10000000 --peers ""

Makes a case by seed, as published files: images with boxes of a few classes (long-tailed, a hierarchy of three levels,
3% group-of), image-level labels, and detections near ground-truth boxes and elsewhere, 12% of them of classes that are
not verified. Every side runs in a process of its own on one core, in turn, ``--repeats`` times; printed are the least
CPU seconds of each phase (with one thread the wall clock of an idle machine, and hardly touched by others on a busy
one; files come from the page cache), the wall clock of the whole, and the peak resident memory of the process.

- ours: CSV or Parquet files -> AP per class, hierarchy expanded, by
  :func:`retinaflow.metric.evaluation.evaluate_detections`; "read" is everything up to arrays, "score" matching and AP.
- peers: pycocotools and faster-coco-eval at IoU 0.5 on the same boxes. They know neither expansion nor verified
  classes, so they are handed the expanded ground truth and the detections that are evaluated, as arrays, and their time
  has no reading of files in it: "load" makes their tables from arrays, "score" is evaluate() and accumulate().

COCO's rules differ (a second choice of ground truth, 101 recall points), so the means are near each other, not equal.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pa_parquet
from numpy.typing import NDArray

CORNERS = ("XMin", "YMin", "XMax", "YMax")
SCALE = 1000
"""Pixels a side of the peers' images; they take boxes in pixels."""


def main() -> None:
    arguments = parse()
    if arguments.side:
        print(json.dumps(measure(arguments.side, arguments.folder)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        folder = Path(scratch)
        make_case(folder, arguments)
        sides = ["ours-csv", "ours-parquet", *filter(None, arguments.peers.split(","))]
        runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
        for _ in range(arguments.repeats):
            for side in sides:
                runs[side].append(run_side(side, folder))
    for side, results in runs.items():
        show(side, results)


def show(side: str, results: list[dict[str, Any]]) -> None:
    """One line per side: least seconds of the whole and of each phase, peak memory, mean AP."""
    phases = {name: min(result["phases"][name] for result in results) for name in results[0]["phases"]}
    whole = min(sum(result["phases"].values()) for result in results)
    wall = min(result["wall"] for result in results)
    peak = max(result["peak_mib"] for result in results)
    parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in phases.items()) + f"; wall {wall:.2f}"
    mean = results[0]["mean_ap"]
    print(f"{side:<17} {whole:7.2f} CPU s ({parts}), peak {peak:6.0f} MiB, mAP {mean:.6f}")


def run_side(side: str, folder: Path) -> dict[str, Any]:
    """Measure one side in a process of its own, bound to one core."""
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    done = subprocess.run(
        [sys.executable, __file__, "--side", side, "--folder", str(folder)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **one_thread, "RETINAFLOW_CACHE": str(folder / "cache")},
        preexec_fn=lambda: os.sched_setaffinity(0, {max(os.sched_getaffinity(0))}),
    )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure(side: str, folder: Path) -> dict[str, Any]:
    """Phases in seconds, peak memory and mean AP of one side, in this process."""
    pa.set_cpu_count(1)
    start = time.perf_counter()
    found = ours(folder, side.removeprefix("ours-")) if side.startswith("ours-") else peer(side, folder)
    wall = time.perf_counter() - start
    return {**found, "wall": wall, "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def ours(folder: Path, kind: str) -> dict[str, Any]:
    from retinaflow.metric.evaluation import evaluate_detections, read_detections, read_ground_truth

    start = time.process_time()
    ground_truth = read_ground_truth(
        folder / f"boxes.{kind}",
        image_labels=folder / f"labels.{kind}",
        classes=folder / "classes.csv",
        hierarchy=folder / "hierarchy.json",
    )
    read = time.process_time()
    detections = read_detections(folder / f"predictions.{kind}", ground_truth)
    ready = time.process_time()
    scores = evaluate_detections(detections, ground_truth)
    done = time.process_time()
    phases = {"read ground truth": read - start, "read predictions": ready - read, "score": done - ready}
    return {"phases": phases, "mean_ap": scores.mean_ap}


def peer(side: str, folder: Path) -> dict[str, Any]:
    if side == "pycocotools":
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval as Evaluator
    else:
        from faster_coco_eval import COCO
        from faster_coco_eval import COCOeval_faster as Evaluator

    case = np.load(folder / "peer.npz")
    images, classes = int(case["images"]), int(case["classes"])
    document = coco_document(case["truth"], case["group_of"], images, classes)
    with contextlib.redirect_stdout(io.StringIO()):
        start = time.process_time()
        ground_truth = COCO()
        ground_truth.dataset = document
        ground_truth.createIndex()
        found = ground_truth.loadRes(case["found"])
        loaded = time.process_time()
        evaluator = Evaluator(ground_truth, found, "bbox")
        evaluator.params.iouThrs = np.array([0.5])
        evaluator.params.areaRng, evaluator.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluator.params.maxDets = [10_000]
        evaluator.evaluate()
        evaluator.accumulate()
        done = time.process_time()
    precision = np.asarray(evaluator.eval["precision"])
    per_class = precision[0, :, :, 0, -1].mean(axis=0)
    return {
        "phases": {"load": loaded - start, "score": done - loaded},
        "mean_ap": float(per_class[precision[0, 0, :, 0, -1] > -1].mean()),
    }


def coco_document(
    ground_truth: NDArray[np.float64], group_of: NDArray[np.bool_], images: int, classes: int
) -> dict[str, Any]:
    """``ground_truth [T, 6]``: image, class, x, y, width, height in pixels -> the dictionary that the peers read."""
    return {
        "info": {},
        "images": [{"id": number + 1, "width": SCALE, "height": SCALE} for number in range(images)],
        "categories": [{"id": number + 1, "name": str(number)} for number in range(classes)],
        "annotations": [
            {
                "id": number,
                "image_id": int(row[0]) + 1,
                "category_id": int(row[1]) + 1,
                "bbox": row[2:].tolist(),
                "area": float(row[4] * row[5]),
                "iscrowd": int(crowd),
            }
            for number, (row, crowd) in enumerate(zip(ground_truth, group_of, strict=True), 1)
        ],
    }


def make_case(folder: Path, arguments: argparse.Namespace) -> None:
    """Write the published files (CSV and Parquet) and, for the peers, ``peer.npz``."""
    rng = np.random.default_rng(arguments.seed)
    images, classes = arguments.images, arguments.classes
    parent = np.where(np.arange(classes) < classes // 30, -1, np.arange(classes) // 6 - 1)
    parent[np.arange(classes) >= classes // 30] = rng.integers(0, classes // 6, classes - classes // 30)
    parent = np.where(parent < np.arange(classes), parent, -1)
    ids = np.array([f"/m/{number:05d}" for number in range(classes)])
    image_ids = np.array([f"{number:016x}" for number in np.sort(rng.choice(2**48, images, replace=False))])

    owner = np.sort(rng.integers(images, size=arguments.ground_truths))
    # Each image holds boxes of one to four classes; classes are long-tailed.
    share = 1 / np.arange(1, classes + 1) ** 0.9
    palette = rng.permutation(classes)[rng.choice(classes, p=share / share.sum(), size=(images, 4))]
    label = palette[owner, rng.integers(0, 4, len(owner)) * (rng.random(len(owner)) < 0.6)]
    box = random_boxes(rng, len(owner))
    group_of = rng.random(len(owner)) < 0.03

    absent = rng.integers(0, classes, (images, 6))
    near = rng.integers(len(owner), size=int(arguments.detections * 0.5))
    jitter = box[near] + rng.normal(0, 0.04, (len(near), 4)) * np.tile(box[near, 2:] - box[near, :2], 2)
    other = arguments.detections - len(near)
    other_image = rng.integers(images, size=other)
    kind = rng.random(other)
    other_label = np.where(
        kind < 0.5, palette[other_image, rng.integers(0, 4, other)], absent[other_image, kind.argsort() % 6]
    )
    other_label = np.where(kind < 0.24, rng.integers(0, classes, other), other_label)
    image = np.concatenate([owner[near], other_image])
    guess = np.concatenate([label[near], other_label])
    found = np.concatenate([np.clip(jitter, 0, 1), random_boxes(rng, other)])
    score = np.concatenate([rng.beta(3, 3, len(near)), rng.beta(1, 5, other)]).astype(np.float32)
    order = np.lexsort((-score, image))
    image, guess, found, score = image[order], guess[order], found[order].astype(np.float32), score[order]

    write(folder / "boxes", image_ids[owner], ids[label], box.round(6), IsGroupOf=group_of.astype(np.int8))
    write(folder / "predictions", image_ids[image], ids[guess], found, Score=score)
    present = np.unique(owner * classes + label)
    row = np.concatenate([present // classes, np.repeat(np.arange(images), absent.shape[1])])
    labelled = np.concatenate([present % classes, absent.ravel()])
    confidence = np.concatenate([np.ones(len(present)), np.zeros(absent.size)]).astype(np.int8)
    order = np.argsort(row, kind="stable")
    write(folder / "labels", image_ids[row[order]], ids[labelled[order]], None, Confidence=confidence[order])
    (folder / "classes.csv").write_text("".join(f"{mid},Class {number}\n" for number, mid in enumerate(ids)))
    (folder / "hierarchy.json").write_text(json.dumps(tree(parent, ids)))
    if arguments.peers:
        write_peer_case(folder, image_ids)


def random_boxes(rng: np.random.Generator, count: int) -> NDArray[np.float64]:
    """``[count, 4]`` xyxy inside [0, 1], sides log-uniform between 0.03 and 0.6."""
    sides = np.exp(rng.uniform(np.log(0.03), np.log(0.6), (count, 2)))
    low = rng.random((count, 2)) * (1 - sides)
    return np.concatenate([low, low + sides], axis=1)


def tree(parent: NDArray[np.int64], ids: NDArray[np.str_]) -> dict[str, Any]:
    """The published nested form of the links class -> ``parent`` (-1: under the root)."""
    nodes: list[dict[str, Any]] = [{"LabelName": str(mid)} for mid in ids]
    root: dict[str, Any] = {"LabelName": "/m/root", "Subcategory": []}
    for number, above in enumerate(parent):
        (root if above < 0 else nodes[above]).setdefault("Subcategory", []).append(nodes[number])
    return root


def write(path: Path, image: NDArray[np.str_], label: NDArray[np.str_], box: Any, **more: Any) -> None:
    """One table as ``path.csv`` and ``path.parquet``."""
    corners = {} if box is None else {name: box[:, place] for place, name in enumerate(CORNERS)}
    table = pa.table({"ImageID": image, "LabelName": label, **more, **corners})
    pa_csv.write_csv(table, path.with_suffix(".csv"), pa_csv.WriteOptions(quoting_style="none"))
    pa_parquet.write_table(table, path.with_suffix(".parquet"))


def write_peer_case(folder: Path, image_ids: NDArray[np.str_]) -> None:
    """Expanded ground truth and evaluated detections as arrays, made by our own reading."""
    from retinaflow.metric.evaluation import evaluate_detections, read_detections, read_ground_truth
    from retinaflow.metric.ground_truth import expand_boxes

    ground_truth = read_ground_truth(
        folder / "boxes.parquet",
        image_labels=folder / "labels.parquet",
        classes=folder / "classes.csv",
        hierarchy=folder / "hierarchy.json",
    )
    detections = read_detections(folder / "predictions.parquet", ground_truth)
    # With weight 0 and no group-of box nothing is absorbed, so every evaluated detection is an entry.
    scores = evaluate_detections(detections, ground_truth, group_of_weight=0.0)
    expanded = expand_boxes(ground_truth)
    count = len(ground_truth.taxonomy)
    evaluated = np.sort(scores.scores.matches.detection_row)
    found = detections.take(evaluated)
    np.savez(
        folder / "peer.npz",
        images=len(image_ids),
        classes=count,
        ground_truth=np.column_stack([expanded.pair // count, expanded.pair % count, pixels(expanded.boxes)]),
        group_of=expanded.is_group_of,
        found=np.column_stack([found.image_index + 1, pixels(found.boxes), found.score, found.class_index + 1]),
    )


def pixels(boxes: NDArray[Any]) -> NDArray[np.float64]:
    """Normalised xyxy -> pixels x, y, width, height."""
    scaled = np.asarray(boxes, dtype=np.float64) * SCALE
    return np.concatenate([scaled[:, :2], scaled[:, 2:] - scaled[:, :2]], axis=1)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--classes", type=int, default=300)
    parser.add_argument("--truths", type=int, default=0, help="0: 7.15 per image")
    parser.add_argument("--detections", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peers", default="faster-coco-eval,pycocotools", help="comma list; empty: none")
    parser.add_argument(
        "--folder", type=Path, default=None, help="where the files are made, and removed (default: tmp)"
    )
    parser.add_argument("--side", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.ground_truths = arguments.ground_truths or round(arguments.images * 7.15)
    return arguments


if __name__ == "__main__":
    main()
