"""AP over IoU thresholds beside pycocotools, where the rules of COCO and of the Challenge meet.

They meet when no two ground-truth boxes of a class overlap (COCO gives a detection a second choice), nothing is
group-of, everything is verified, and recall is looked at where it changes: with 64 ground-truth boxes of every class,
COCO's recall points set to k/64 lie exactly there, and the mean of its precision over k = 1..64 is the exact area.
"""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scoring_scenes import Found, Label, Scene, Truth

from retinaflow.metric.challenge import COCO_THRESHOLDS, Evaluator, ap_by_threshold

IMAGES, CLASSES, TRUTHS = 32, 3, 64


def scene(seed: int) -> Scene:
    """Two ground-truth boxes of each class on an image, in separate cells; detections near them and elsewhere."""
    rng = np.random.default_rng(seed)
    ground_truths, found = [], []
    for image in range(IMAGES):
        for c in range(CLASSES):
            for cell in rng.permutation(4)[:2]:
                low = np.array([cell % 2, cell // 2]) / 2 + 0.05 + 0.1 * rng.random(2)
                corners = np.concatenate([low, low + 0.15 + 0.15 * rng.random(2)])
                ground_truths.append(Truth(f"{image:03d}", c, tuple(corners)))
                for _ in range(rng.integers(0, 4)):
                    moved = corners + rng.normal(0, 0.015, 4)
                    found.append(Found(f"{image:03d}", c, float(rng.random()), tuple(moved)))
        for _ in range(6):
            low = rng.random(2) * 0.8
            box = tuple(np.concatenate([low, low + 0.1 + 0.1 * rng.random(2)]))
            found.append(Found(f"{image:03d}", int(rng.integers(CLASSES)), float(rng.random()), box))
    labels = [Label(f"{image:03d}", c, True) for image in range(IMAGES) for c in range(CLASSES)]
    return Scene(CLASSES, tuple(ground_truths), tuple(labels), tuple(found))


def coco_precision(made: Scene, recalls: NDArray[np.float64]) -> NDArray[np.float64]:
    """``[T, R, K]`` precision of pycocotools at COCO's IoU thresholds and the given recalls."""
    coco = pytest.importorskip("pycocotools.coco", reason="pycocotools is not installed")
    cocoeval = pytest.importorskip("pycocotools.cocoeval")
    place = {image: number for number, image in enumerate(made.image_ids)}

    def row(item: Truth | Found) -> dict[str, Any]:
        x, y, right, bottom = item.box
        return {
            "image_id": place[item.image] + 1,
            "category_id": item.label + 1,
            "bbox": [x, y, right - x, bottom - y],
            "area": (right - x) * (bottom - y),
            "iscrowd": 0,
        }

    with contextlib.redirect_stdout(io.StringIO()):
        ground_truth = coco.COCO()
        ground_truth.dataset = {
            "info": {},
            "images": [{"id": number + 1} for number in range(IMAGES)],
            "categories": [{"id": c + 1} for c in range(CLASSES)],
            "annotations": [row(item) | {"id": number} for number, item in enumerate(made.ground_truths, 1)],
        }
        ground_truth.createIndex()
        found = ground_truth.loadRes([row(item) | {"score": item.score} for item in made.found])
        evaluation = cocoeval.COCOeval(ground_truth, found, "bbox")
        evaluation.params.recThrs = recalls
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.params.maxDets = [1000]
        evaluation.evaluate()
        evaluation.accumulate()
    return np.asarray(evaluation.eval["precision"])[:, :, :, 0, 0]


def ours(made: Scene) -> NDArray[np.float64]:
    evaluator = Evaluator(made.annotations())
    evaluator.add(made.detections())
    return ap_by_threshold(evaluator, COCO_THRESHOLDS)


def test_where_the_rules_meet_every_threshold_gives_what_pycocotools_gives() -> None:
    made = scene(0)
    precision = coco_precision(made, np.arange(1, TRUTHS + 1) / TRUTHS)
    found = ours(made)
    np.testing.assert_allclose(found, precision.mean(axis=1), rtol=0, atol=1e-12)
    assert found[0].min() > 0.3
    assert found[-1].max() < 0.2


def test_with_its_own_101_recall_points_pycocotools_is_near() -> None:
    made = scene(1)
    precision = coco_precision(made, np.linspace(0, 1, 101))
    np.testing.assert_allclose(ours(made).mean(), precision.mean(), rtol=0, atol=0.01)
