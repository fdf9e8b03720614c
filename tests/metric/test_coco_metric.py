"""The COCO metric: cases by hand, and equality with pycocotools to 1e-9 on generated scenes and on real images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from coco_reference import coco_document, coco_results, reference
from numpy.typing import NDArray
from scoring_scenes import Found, Scene, Truth
from simulated_runs import Annotated

from retinaflow.data.index import AnnotationIndex
from retinaflow.data.training_data import read_split
from retinaflow.detections import Detections
from retinaflow.metric.coco import MAX_DETECTIONS, CocoScores, coco_scores
from retinaflow.settings.commands import EvaluateConfig
from retinaflow.settings.resolve import resolve

SHARED = Path(__file__).parents[2].parent / "shared"


def scene(
    seed: int, *, images: int = 40, classes: int = 5, boxes: int = 12, found: int = 60, whole_pixels: bool = False
) -> tuple[Annotated, Detections]:
    """Crowded images with overlapping boxes of all ranges of areas, crowds, and detections near boxes and elsewhere.

    ``whole_pixels``: coordinates and scores are rounded, so that IoU, areas and scores meet thresholds exactly and are
    often equal.
    """
    rng = np.random.default_rng(seed)
    sizes = np.stack([rng.integers(150, 700, images), rng.integers(150, 700, images)], axis=1)
    ground_truths, rows = [], []
    for i in range(images):
        name, (height, width) = f"{i:03d}", sizes[i]
        scale = np.array([width, height, width, height])

        def at(corners: NDArray[np.float64], scale: NDArray[np.int64] = scale) -> tuple[float, float, float, float]:
            pixels = np.round(corners / 4) * 4 if whole_pixels else np.round(corners, 2)
            x1, y1, x2, y2 = pixels / scale
            return float(x1), float(y1), float(x2), float(y2)

        centres = rng.random((boxes, 2)) * [width, height]
        sides = np.exp(rng.uniform(np.log(8), np.log(200), (boxes, 1))) * np.exp(rng.normal(0, 0.2, (boxes, 2)))
        if whole_pixels:
            sides = rng.choice([16, 32, 64, 96], (boxes, 2))
        # Every second box lies close to the one before it.
        centres[1::2], sides[1::2] = centres[::2] + rng.normal(0, 4, centres[::2].shape), sides[::2]
        corners = np.concatenate([centres - sides / 2, centres + sides / 2], axis=1)
        labels = np.repeat(rng.integers(0, classes - 1, (boxes + 1) // 2), 2)[:boxes]
        for n in range(boxes):
            ground_truths.append(Truth(name, int(labels[n]), at(corners[n]), group_of=bool(rng.random() < 0.1)))
        for _ in range(found):
            n = int(rng.integers(boxes))
            moved = corners[n] + rng.normal(0, 0.08, 4) * np.tile(sides[n], 2)
            label = int(labels[n]) if rng.random() < 0.85 else int(rng.integers(classes))
            box = at(np.concatenate([np.minimum(moved[:2], moved[2:]), np.maximum(moved[:2], moved[2:]) + 1]))
            rows.append(Found(name, label, float(np.round(rng.random(), 2 if whole_pixels else 9)), box))
    made = Scene(classes, tuple(ground_truths), (), tuple(rows))
    return replace(made.annotations(), sizes=sizes), made.detections()


def agrees(ours: CocoScores, ground_truth: Annotated | AnnotationIndex, detections: Detections) -> None:
    """All twelve numbers, and the AP of each class at each threshold and range, within 1e-9 of pycocotools."""
    stats, precision = reference(coco_document(ground_truth), coco_results(detections, ground_truth.sizes))
    metrics = ours.metrics(prefix="")
    for name, value in stats.items():
        if value == -1:
            assert f"coco_{name}" not in metrics
        else:
            assert metrics[f"coco_{name}"] == pytest.approx(value, abs=1e-9), name
    theirs = np.where(precision[..., -1] < 0, np.nan, precision[..., -1]).mean(axis=1)
    np.testing.assert_allclose(ours.ap, theirs.transpose(2, 0, 1), rtol=0, atol=1e-9)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("whole_pixels", [False, True], ids=["any values", "equal values and thresholds met exactly"])
def test_every_number_is_that_of_pycocotools(seed: int, whole_pixels: bool) -> None:
    ground_truth, detections = scene(seed, whole_pixels=whole_pixels)
    ours = coco_scores(detections, ground_truth)
    agrees(ours, ground_truth, detections)
    assert 0.02 < ours.mean_ap < 0.9


def test_no_more_than_100_detections_of_an_image_and_class_count() -> None:
    ground_truth, detections = scene(7, images=4, classes=2, found=250)
    assert np.bincount(detections.image_index[detections.class_index == 0]).max() > MAX_DETECTIONS[-1]
    agrees(coco_scores(detections, ground_truth), ground_truth, detections)


def made(ground_truths: list[Truth], found: list[Found], *, classes: int = 1) -> tuple[Annotated, Detections]:
    one = Scene(classes, tuple(ground_truths), (), tuple(found))
    return one.annotations(), one.detections()


def test_a_detection_has_a_second_choice() -> None:
    # Both detections overlap the first box most: IoU 1 and 0.9; the second one's IoU with the other box is 0.8 / 1.1.
    ground_truth, detections = made(
        [Truth("x", 0, (0.0, 0.0, 1.0, 0.5)), Truth("x", 0, (0.2, 0.0, 1.0, 0.5))],
        [Found("x", 0, 0.9, (0.0, 0.0, 1.0, 0.5)), Found("x", 0, 0.8, (0.1, 0.0, 1.0, 0.5))],
    )
    scores = coco_scores(detections, ground_truth)
    # IoU 0.8 / 0.9 = 0.889 with the second box: a true positive at 0.5 to 0.85, none at 0.9 and 0.95, where recall ends
    # at 0.5: 51 of 101 points have precision 1.
    np.testing.assert_allclose(scores.ap[0, :, 0], [1.0] * 8 + [51 / 101] * 2, atol=1e-12)
    np.testing.assert_allclose(scores.recall_of_first[0, :, 0], 0.5)


def test_precision_is_read_at_101_recalls() -> None:
    # A false positive first: precision 1/2 at recall 1/3 and 2/3 at 2/3; made non-increasing, 2/3 up to recall 2/3.
    box = (0.0, 0.0, 0.2, 0.2)
    ground_truth, detections = made(
        [Truth(name, 0, box) for name in "xyz"],
        [Found("x", 0, 0.9, (0.5, 0.5, 0.9, 0.9)), Found("x", 0, 0.8, box), Found("y", 0, 0.7, box)],
    )
    # Recalls 0, 0.01 to 0.66 are 67 points.
    assert coco_scores(detections, ground_truth).mean_ap == pytest.approx(2 / 3 * 67 / 101)


def test_a_crowd_takes_many_detections_and_none_counts() -> None:
    crowd, alone = (0.0, 0.0, 0.8, 0.8), (0.9, 0.9, 1.0, 1.0)
    inside = [Found("x", 0, 0.9 - n / 100, (n / 10, 0.0, n / 10 + 0.3, 0.3)) for n in range(5)]
    ground_truth, detections = made(
        [Truth("x", 0, crowd, group_of=True), Truth("x", 0, alone)], [*inside, Found("x", 0, 0.1, alone)]
    )
    assert coco_scores(detections, ground_truth).mean_ap == pytest.approx(1.0)


def test_a_class_without_a_box_has_no_ap_and_one_without_a_detection_has_0() -> None:
    box = (0.0, 0.0, 0.5, 0.5)
    ground_truth, detections = made(
        [Truth("x", 0, box), Truth("x", 1, box), Truth("x", 3, box, group_of=True)],
        [Found("x", 0, 0.9, box), Found("x", 2, 0.9, box), Found("unknown", 0, 0.99, box)],
        classes=4,
    )
    scores = coco_scores(detections, replace(ground_truth, sizes=np.array([[100, 100]])))
    np.testing.assert_allclose(scores.class_ap, [1.0, 0.0, np.nan, np.nan], atol=1e-12)
    assert scores.metrics()["val/coco_AP"] == pytest.approx(0.5)
    assert not any(name.endswith(("_small", "_large")) for name in scores.metrics())


@pytest.mark.parametrize("found", [[], [Found("x", 0, 0.5, (0.9, 0.9, 1.0, 1.0))]], ids=["no detection", "no match"])
def test_without_a_true_positive_every_number_is_0(found: list[Found]) -> None:
    ground_truth, detections = made([Truth("x", 0, (0.0, 0.0, 0.5, 0.5))], found)
    assert set(coco_scores(detections, ground_truth).metrics().values()) == {0.0}


def test_without_any_box_nothing_is_measured() -> None:
    ground_truth, _ = made([], [])
    assert coco_scores(Detections.empty(), ground_truth).metrics() == {}


def test_areas_need_the_sizes_of_all_images() -> None:
    ground_truth, detections = scene(3)
    of_all = coco_scores(detections, ground_truth)
    one_unknown = np.where(np.arange(len(ground_truth.sizes))[:, None] == 3, 0, ground_truth.sizes)
    without = coco_scores(detections, replace(ground_truth, sizes=one_unknown))
    assert without.areas == ("all",)
    # A detection around two boxes of one size overlaps both equally, but for the last digit.
    assert without.mean_ap == pytest.approx(of_all.mean_ap, abs=1e-3)
    assert coco_scores(detections, ground_truth, by_area=False).metrics() == {
        name: value for name, value in of_all.metrics().items() if not name.endswith(("small", "medium", "large"))
    }


@pytest.mark.parametrize("name", ["bccd", "oid_real27"])
def test_on_real_images_every_number_is_that_of_pycocotools(name: str) -> None:
    folder = SHARED / "data" / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    settings = resolve(EvaluateConfig, {"data": str(folder), "image_labels": "none", "track": "false"})
    index = read_split(settings, ["validation"], allow_repeats=True).index
    rng = np.random.default_rng(0)
    image = np.repeat(np.arange(len(index)), np.diff(index.box_start))
    rows = np.repeat(np.arange(len(image)), 3)
    sides = np.tile(index.boxes[rows, 2:] - index.boxes[rows, :2], 2)
    boxes = (index.boxes[rows] + rng.normal(0, 0.07, (len(rows), 4)) * sides).astype(np.float32)
    labels = np.where(rng.random(len(rows)) < 0.9, index.labels[rows], rng.integers(0, len(index.taxonomy), len(rows)))
    detections = Detections(
        image[rows].astype(np.int32), labels.astype(np.int32), rng.random(len(rows)).astype(np.float32), boxes
    )
    ours = coco_scores(detections, index)
    agrees(ours, index, detections)
    assert 0.05 < ours.mean_ap < 0.9
