"""The rules of METRIC.md as plain loops over rows, in order: slow, and independent of ``retinaflow.scoring``.

Shares nothing with the code under test, not even box arithmetic or the closure of the hierarchy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from scoring_scenes import Box, Found, Scene, Truth


@dataclass(frozen=True)
class Entry:
    score: float
    image: str
    group_of: bool
    row: int
    right: bool
    weight: float


def slow_ap(scene: Scene, *, iou_threshold: float = 0.5, group_of_weight: float = 1.0) -> list[float]:
    """AP of every class, NaN without ground truth."""
    ground_truths = expanded_truths(scene)
    verified = verified_classes(scene, ground_truths)
    kept: dict[tuple[str, int], list[tuple[int, Found]]] = {}
    for row, found in enumerate(scene.found):
        if (found.image, found.label) in verified and is_valid(found.box):
            kept.setdefault((found.image, found.label), []).append((row, found))
    own: dict[tuple[str, int], list[Truth]] = {}
    for ground_truth in ground_truths:
        own.setdefault((ground_truth.image, ground_truth.label), []).append(ground_truth)
    entries: dict[int, list[Entry]] = {c: [] for c in range(scene.num_classes)}
    for (image, c), rows in kept.items():
        rows.sort(key=lambda pair: -pair[1].score)
        entries[c] += score_detections(
            rows[:10_000], own.get((image, c), []), iou_threshold=iou_threshold, group_of_weight=group_of_weight
        )
    counts = dict.fromkeys(range(scene.num_classes), 0.0)
    for ground_truth in ground_truths:
        counts[ground_truth.label] += group_of_weight if ground_truth.group_of else 1.0
    return [area(entries[c], counts[c]) for c in range(scene.num_classes)]


def expanded_truths(scene: Scene) -> list[Truth]:
    above = {c: sorted(ancestors(scene, c)) for c in range(scene.num_classes)}
    return [replace(row, label=c) for row in scene.ground_truths for c in [row.label, *above[row.label]]]


def ancestors(scene: Scene, label: int) -> set[int]:
    above = {parent for parent, child in scene.links if child == label}
    for parent in set(above):
        above |= ancestors(scene, parent)
    return above


def verified_classes(scene: Scene, ground_truths: list[Truth]) -> set[tuple[str, int]]:
    above = {c: ancestors(scene, c) for c in range(scene.num_classes)}
    verified = {(row.image, row.label) for row in ground_truths}
    for row in scene.labels:
        verified.add((row.image, row.label))
        for c in range(scene.num_classes):
            if (row.present and c in above[row.label]) or (not row.present and row.label in above[c]):
                verified.add((row.image, c))
    return verified


def score_detections(
    kept: list[tuple[int, Found]], ground_truths: list[Truth], *, iou_threshold: float, group_of_weight: float
) -> list[Entry]:
    ordinary = [ground_truth.box for ground_truth in ground_truths if not ground_truth.group_of]
    groups = [ground_truth.box for ground_truth in ground_truths if ground_truth.group_of]
    taken: set[int] = set()
    best_absorbed: dict[int, float] = {}
    entries = []
    for row, found in kept:
        best = first_largest([iou(found.box, box) for box in ordinary])
        if best is not None and iou(found.box, ordinary[best]) >= iou_threshold and best not in taken:
            taken.add(best)
            entries.append(Entry(found.score, found.image, False, row, True, 1.0))
            continue
        group = first_largest([overlap(found.box, box) / size(found.box) for box in groups])
        if group is not None and overlap(found.box, groups[group]) / size(found.box) >= iou_threshold:
            best_absorbed[group] = max(best_absorbed.get(group, 0.0), found.score)
        elif not any(ground_truth.not_exhaustive for ground_truth in ground_truths):
            entries.append(Entry(found.score, found.image, False, row, False, 1.0))
    if group_of_weight > 0:
        image = kept[0][1].image if kept else ""
        entries += [
            Entry(score, image, True, 0, True, group_of_weight) for score in best_absorbed.values() if score > 0
        ]
    return entries


def area(entries: list[Entry], count: float) -> float:
    if count == 0:
        return math.nan
    entries = sorted(entries, key=lambda entry: (-entry.score, entry.image, entry.group_of, entry.row))
    right = wrong = 0.0
    recalls, precisions = [0.0], [0.0]
    for entry in entries:
        right += entry.weight if entry.right else 0.0
        wrong += 0.0 if entry.right else 1.0
        recalls.append(right / count)
        precisions.append(right / (right + wrong))
    total = highest = 0.0
    for k in range(len(recalls) - 1, 0, -1):
        highest = max(highest, precisions[k])
        total += (recalls[k] - recalls[k - 1]) * highest
    return total


def mean(values: list[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def is_valid(box: Box) -> bool:
    return box[0] < box[2] and box[1] < box[3]


def first_largest(values: list[float]) -> int | None:
    return values.index(max(values)) if values else None


def size(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1]) if is_valid(box) else 0.0


def overlap(a: Box, b: Box) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return width * height if width > 0 and height > 0 else 0.0


def iou(a: Box, b: Box) -> float:
    return overlap(a, b) / (size(a) + size(b) - overlap(a, b))
