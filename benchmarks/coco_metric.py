"""The COCO metric beside pycocotools and faster-coco-eval: CPU seconds, peak memory, and the largest difference.

    python benchmarks/coco_metric.py                                          # 1,000,000 detections, 80 classes
    python benchmarks/coco_metric.py --images 36500 --classes 601 --detections 5000000 --peers pycocotools

The case is that of ``challenge_metric.py`` (images with boxes of a few classes, long-tailed, 3% crowds; detections near
boxes and elsewhere). Every side computes all twelve numbers of COCO on one core in a process of its own, in turn,
``--repeats`` times; printed are the least CPU seconds, from arrays. "load" makes the peers' tables, which ours does not
need; "score" is evaluate() and accumulate(). The last line is the ratio of "score" and the largest difference of the
twelve numbers from ours.
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
from challenge_metric import SCALE, coco_document, random_boxes
from numpy.typing import NDArray

ORDER = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR_1", "AR_10", "AR_100")
ORDER = (*ORDER, "AR_small", "AR_medium", "AR_large")


def main() -> None:
    arguments = parse()
    if arguments.side:
        print(json.dumps(measure(arguments.side, Path(arguments.folder) / "case.npz")))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        np.savez(Path(folder) / "case.npz", **make_case(arguments))
        sides = ["ours", *filter(None, arguments.peers.split(","))]
        runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
        for _ in range(arguments.repeats):
            for side in sides:
                runs[side].append(run_side(side, folder))
    for side, results in runs.items():
        phases = {name: min(result["phases"][name] for result in results) for name in results[0]["phases"]}
        peak = max(result["peak_mib"] for result in results)
        parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in phases.items())
        print(f"{side:<17} CPU s: {parts}; peak {peak:6.0f} MiB; AP {results[0]['numbers'][0]:.6f}")
    mine = runs["ours"][0]
    for side in sides[1:]:
        least = [min(result["phases"]["score"] for result in runs[name]) for name in (side, "ours")]
        worst = np.abs(np.array(runs[side][0]["numbers"]) - np.array(mine["numbers"])).max()
        print(f"{side}: {least[0] / least[1]:.1f} times our CPU time for the score; largest difference {worst:.1e}")


def run_side(side: str, folder: str) -> dict[str, Any]:
    """Measure one side in a process of its own, bound to one core."""
    done = subprocess.run(
        [sys.executable, __file__, "--side", side, "--folder", folder],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")},
        preexec_fn=lambda: os.sched_setaffinity(0, {max(os.sched_getaffinity(0))}),
    )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure(side: str, path: Path) -> dict[str, Any]:
    """Phases in CPU seconds, peak memory and the twelve numbers of one side, in this process."""
    case = dict(np.load(path))
    found = ours(case) if side == "ours" else peer(side, case)
    return {**found, "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def ours(case: dict[str, NDArray[Any]]) -> dict[str, Any]:
    from retinaflow.detections import Detections
    from retinaflow.metric.coco import coco_scores

    detections = Detections(
        case["found"][:, 0].astype(np.int32), case["found"][:, 1].astype(np.int32), case["score"], case["boxes_found"]
    )
    annotations = _Annotations(case)
    start = time.process_time()
    scores = coco_scores(detections, annotations)
    done = time.process_time()
    metrics = scores.metrics(prefix="")
    return {
        "phases": {"score": done - start},
        "numbers": [metrics.get(f"coco_{name}", -1.0) for name in ORDER],
    }


class _Annotations:
    """The columns that the metric reads."""

    def __init__(self, case: dict[str, NDArray[Any]]) -> None:
        from retinaflow.taxonomy import Taxonomy

        images, classes = int(case["images"]), int(case["classes"])
        self.image_ids = np.array([f"{number:08d}" for number in range(images)])
        self.box_start = np.searchsorted(case["owner"], np.arange(images + 1))
        self.boxes, self.labels = case["boxes"], case["label"].astype(np.int32)
        self.is_group_of = case["group_of"]
        self.is_not_exhaustive = np.zeros(len(self.labels), dtype=bool)
        self.label_start = np.zeros(images + 1, dtype=np.int64)
        self.verified_class, self.verified_present = np.zeros(0, dtype=np.int32), np.zeros(0, dtype=bool)
        ids = tuple(f"/m/{number:05d}" for number in range(classes))
        self.taxonomy = Taxonomy(ids, ids)
        self.sizes = np.full((images, 2), SCALE)


def peer(side: str, case: dict[str, NDArray[Any]]) -> dict[str, Any]:
    if side == "pycocotools":
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval as Evaluator
    else:
        from faster_coco_eval import COCO
        from faster_coco_eval import COCOeval_faster as Evaluator

    truth = np.column_stack([case["owner"], case["label"], xywh(case["boxes"])])
    document = coco_document(truth, case["group_of"], int(case["images"]), int(case["classes"]))
    rows = np.column_stack([case["found"][:, 0] + 1, xywh(case["boxes_found"]), case["score"], case["found"][:, 1] + 1])
    with contextlib.redirect_stdout(io.StringIO()):
        start = time.process_time()
        ground_truth = COCO()
        ground_truth.dataset = document
        ground_truth.createIndex()
        found = ground_truth.loadRes(rows)
        loaded = time.process_time()
        evaluator = Evaluator(ground_truth, found, "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        done = time.process_time()
        evaluator.summarize()
    return {
        "phases": {"load": loaded - start, "score": done - loaded},
        "numbers": [float(value) for value in evaluator.stats[: len(ORDER)]],
    }


def xywh(boxes: NDArray[np.floating]) -> NDArray[np.float64]:
    """Normalised xyxy -> x, y, width, height in pixels."""
    pixels = boxes.astype(np.float64) * SCALE
    return np.concatenate([pixels[:, :2], pixels[:, 2:] - pixels[:, :2]], axis=1)


def make_case(arguments: argparse.Namespace) -> dict[str, NDArray[Any]]:
    """Boxes by image, and detections: half of them near boxes of their class, the others elsewhere."""
    rng = np.random.default_rng(arguments.seed)
    images, classes = arguments.images, arguments.classes
    owner = np.sort(rng.integers(images, size=arguments.ground_truths))
    fraction = 1 / np.arange(1, classes + 1) ** 0.9
    palette = rng.permutation(classes)[rng.choice(classes, p=fraction / fraction.sum(), size=(images, 4))]
    label = palette[owner, rng.integers(0, 4, len(owner)) * (rng.random(len(owner)) < 0.6)]
    boxes = random_boxes(rng, len(owner))
    near = rng.integers(len(owner), size=arguments.detections // 2)
    moved = boxes[near] + rng.normal(0, 0.04, (len(near), 4)) * np.tile(boxes[near, 2:] - boxes[near, :2], 2)
    elsewhere = arguments.detections - len(near)
    image = np.concatenate([owner[near], rng.integers(images, size=elsewhere)])
    other = palette[image[len(near) :], rng.integers(0, 4, elsewhere)]
    other = np.where(rng.random(elsewhere) < 0.5, other, rng.integers(0, classes, elsewhere))
    order = np.argsort(image, kind="stable")
    found = np.column_stack([image, np.concatenate([label[near], other])])[order]
    boxes_found = np.concatenate([np.clip(moved, 0, 1), random_boxes(rng, elsewhere)])[order]
    score = np.concatenate([rng.beta(3, 3, len(near)), rng.beta(1, 5, elsewhere)])[order]
    return {
        "images": np.array(images),
        "classes": np.array(classes),
        "owner": owner,
        "label": label,
        "boxes": boxes,
        "group_of": rng.random(len(owner)) < 0.03,
        "found": found,
        "boxes_found": boxes_found.astype(np.float32),
        "score": score,
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, default in (("images", 20_000), ("classes", 80), ("detections", 1_000_000), ("ground_truths", 150_000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--peers", default="pycocotools", help="also: pycocotools,faster-coco-eval, if installed")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="scratch folder")
    parser.add_argument("--side", default="", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
