"""Scenes for the scoring tests: small annotations made from rows, and the published cases read from their CSV files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from simulated_runs import Annotated

from retinaflow.detections import Detections
from retinaflow.taxonomy import Hierarchy, Taxonomy

Box = tuple[float, float, float, float]

CASES = Path(__file__).resolve().parents[2] / "shared" / "metric_cases"
CASE_NAMES = (
    "class_no_detection",
    "class_no_truth",
    "equal_scores",
    "group_of_absorbs",
    "hierarchy_expansion",
    "image_no_verified_label",
    "iou_exactly_half",
    "one_detection_two_truths",
    "small1",
    "small2",
    "small3_nohier",
)
"""Hand-worked cases of the metric, with what is expected of them."""


@dataclass(frozen=True)
class Truth:
    """One box row as published."""

    image: str
    label: int
    box: Box
    group_of: bool = False
    not_exhaustive: bool = False


@dataclass(frozen=True)
class Label:
    """One image-level label as published."""

    image: str
    label: int
    present: bool


@dataclass(frozen=True)
class Found:
    """One detection."""

    image: str
    label: int
    score: float
    box: Box


@dataclass(frozen=True)
class Scene:
    """Rows of ground truth, labels and detections, and the class links (parent, child) by class index."""

    num_classes: int
    ground_truths: tuple[Truth, ...] = ()
    labels: tuple[Label, ...] = ()
    found: tuple[Found, ...] = ()
    links: tuple[tuple[int, int], ...] = ()

    @property
    def image_ids(self) -> list[str]:
        """Images with any annotation, in order of first appearance (so not sorted)."""
        return list(dict.fromkeys([row.image for row in self.ground_truths] + [row.image for row in self.labels]))

    def annotations(self) -> Annotated:
        ids = [f"/m/{k:02d}" for k in range(self.num_classes)]
        links = tuple((ids[parent], ids[child]) for parent, child in self.links)
        taxonomy = Taxonomy(tuple(ids), tuple(f"Class {k}" for k in range(self.num_classes)), Hierarchy(links))
        return annotations(self.ground_truths, self.labels, image_ids=self.image_ids, taxonomy=taxonomy)

    def detections(self) -> Detections:
        return detections(self.found, image_ids=self.image_ids)


def annotations(
    ground_truths: Sequence[Truth], labels: Sequence[Label], *, image_ids: Sequence[str], taxonomy: Taxonomy
) -> Annotated:
    place = {image: index for index, image in enumerate(image_ids)}
    ground_truths = sorted(ground_truths, key=lambda row: place[row.image])
    labels = sorted(labels, key=lambda row: place[row.image])
    ends = np.arange(len(image_ids) + 1)
    return Annotated(
        image_ids=np.array(image_ids, dtype=np.str_),
        box_start=np.searchsorted([place[row.image] for row in ground_truths], ends).astype(np.int64),
        boxes=np.array([row.box for row in ground_truths], dtype=np.float64).reshape(-1, 4),
        labels=np.array([row.label for row in ground_truths], dtype=np.int32),
        is_group_of=np.array([row.group_of for row in ground_truths], dtype=bool),
        is_not_exhaustive=np.array([row.not_exhaustive for row in ground_truths], dtype=bool),
        label_start=np.searchsorted([place[row.image] for row in labels], ends).astype(np.int64),
        verified_class=np.array([row.label for row in labels], dtype=np.int32),
        verified_present=np.array([row.present for row in labels], dtype=bool),
        taxonomy=taxonomy,
    )


def detections(found: Sequence[Found], *, image_ids: Sequence[str]) -> Detections:
    place = {image: index for index, image in enumerate(image_ids)}
    return Detections(
        np.array([place.get(row.image, -1) for row in found], dtype=np.int32),
        np.array([row.label for row in found], dtype=np.int32),
        np.array([row.score for row in found], dtype=np.float64),
        np.array([row.box for row in found], dtype=np.float64).reshape(-1, 4),
    )


def read_case(folder: Path) -> tuple[Annotated, Detections]:
    """One folder of ``metric_cases``."""
    classes = pd.read_csv(folder / "classes.csv", header=None, names=["id", "name"], dtype=str)
    tree = folder / "hierarchy.json"
    hierarchy = Hierarchy.from_tree(json.loads(tree.read_text())) if tree.exists() else Hierarchy()
    taxonomy = Taxonomy(tuple(classes["id"]), tuple(classes["name"]), hierarchy)
    text = {"ImageID": str, "LabelName": str}
    tables = [pd.read_csv(folder / f"{name}.csv", dtype=text) for name in ("boxes", "labels", "predictions")]
    index = taxonomy.index_of
    ground_truths, labels, found = (table.to_dict("records") for table in tables)
    truth_rows = [
        Truth(row["ImageID"], index[row["LabelName"]], _box(row), bool(row["IsGroupOf"])) for row in ground_truths
    ]
    label_rows = [Label(row["ImageID"], index[row["LabelName"]], row["Confidence"] == 1) for row in labels]
    found_rows = [Found(row["ImageID"], index[row["LabelName"]], row["Score"], _box(row)) for row in found]
    image_ids = list(dict.fromkeys(row.image for row in [*truth_rows, *label_rows]))
    evaluated = annotations(truth_rows, label_rows, image_ids=image_ids, taxonomy=taxonomy)
    return evaluated, detections(found_rows, image_ids=image_ids)


def _box(row: dict[str, float]) -> Box:
    return row["XMin"], row["YMin"], row["XMax"], row["YMax"]
