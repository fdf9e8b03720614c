"""pycocotools on annotations and detections held as arrays: the reference of the COCO metric."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from retinaflow.detections import Detections
from retinaflow.metric.ground_truth import Annotations

STATS = (
    *("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"),
    *("AR_1", "AR_10", "AR_100", "AR_small", "AR_medium", "AR_large"),
)
"""The order of ``COCOeval.stats``."""


def coco_document(ground_truth: Annotations) -> dict[str, Any]:
    """Annotations as a COCO file; image i is number i + 1, class c category c + 1."""
    sizes = ground_truth.sizes
    image = np.repeat(np.arange(len(ground_truth.image_ids)), np.diff(ground_truth.box_start))
    annotations = []
    for n, (i, c, box) in enumerate(zip(image, ground_truth.labels, ground_truth.boxes, strict=True)):
        bbox = np.round(_xywh(box, sizes[i]), 6).tolist()
        annotations.append(
            {
                "id": n + 1,
                "image_id": int(i) + 1,
                "category_id": int(c) + 1,
                "bbox": bbox,
                "area": bbox[2] * bbox[3],
                "iscrowd": int(ground_truth.is_group_of[n]),
            }
        )
    return {
        "info": {},
        "images": [
            {"id": i + 1, "height": int(height), "width": int(width)} for i, (height, width) in enumerate(sizes)
        ],
        "categories": [{"id": c + 1} for c in range(len(ground_truth.taxonomy))],
        "annotations": annotations,
    }


def coco_results(detections: Detections, sizes: NDArray[np.integer]) -> list[dict[str, Any]]:
    """Detections as COCO results with the numbers of :func:`coco_document`."""
    return [
        {
            "image_id": int(i) + 1,
            "category_id": int(c) + 1,
            "bbox": np.round(_xywh(box, sizes[i]), 6).tolist(),
            "score": float(score),
        }
        for i, c, score, box in zip(
            detections.image_index, detections.class_index, detections.score, detections.boxes, strict=True
        )
    ]


def reference(document: dict[str, Any], results: list[dict[str, Any]]) -> tuple[dict[str, float], NDArray[np.float64]]:
    """The twelve numbers by name, and ``[T, R, K, A, M]`` precision."""
    coco = pytest.importorskip("pycocotools.coco", reason="pycocotools is not installed")
    cocoeval = pytest.importorskip("pycocotools.cocoeval")
    with contextlib.redirect_stdout(io.StringIO()):
        ground_truth = coco.COCO()
        ground_truth.dataset = document
        ground_truth.createIndex()
        evaluation = cocoeval.COCOeval(ground_truth, ground_truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(STATS, evaluation.stats.tolist(), strict=True)), np.asarray(evaluation.eval["precision"])


def _xywh(box: NDArray[np.floating], size: NDArray[np.integer]) -> NDArray[np.float64]:
    height, width = size
    x1, y1, x2, y2 = box.astype(np.float64)
    return np.array([x1 * width, y1 * height, (x2 - x1) * width, (y2 - y1) * height])
