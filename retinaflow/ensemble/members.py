"""Runs -> the detections of their models on one set of images, with the ground truth of all their classes.

Detections are those that a run has logged (``predictions.parquet`` or ``predictions.csv``), or that it evaluated from a
file, where they are complete: where matching them again gives the run's own entries. Else its model detects anew, by
the settings of its training.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retinaflow.commands.evaluate import detect_as_trained
from retinaflow.comparison.chosen_runs import ChosenRun, chosen_run
from retinaflow.comparison.evaluated_images import evaluated_images_of_all_classes
from retinaflow.comparison.ground_truth_digest import ground_truth_digest
from retinaflow.data.bins import ClassBins, make_bins
from retinaflow.data.index import AnnotationIndex
from retinaflow.data.predictions import read_predictions
from retinaflow.data.tables import RowErrors
from retinaflow.detections import Detections
from retinaflow.interrupts import StopRequest
from retinaflow.metric.challenge import match
from retinaflow.metric.matches import Matches
from retinaflow.progress import report
from retinaflow.runs import store
from retinaflow.settings.commands import EvaluateConfig, TrainConfig
from retinaflow.settings.resolve import resolve

PREDICTIONS = "predictions.parquet"
"""What ``merge`` writes its detections to; ``evaluate`` writes ``predictions.csv``."""


@dataclass(frozen=True)
class Part:
    """One model: its run, its detections in its own classes, and how they match the ground truth of these."""

    run: ChosenRun
    detections: Detections
    matches: Matches
    classes: NDArray[np.int64]
    """``[K of the part]`` class of the whole for each class of the part."""

    @property
    def name(self) -> str:
        return self.run.record.name

    @property
    def run_id(self) -> str:
        return self.run.record.run_id


@dataclass(frozen=True)
class Parts:
    """Several models, and the images with the ground truth of all classes that any of them has."""

    evaluated: AnnotationIndex
    parts: tuple[Part, ...]

    @property
    def num_models(self) -> NDArray[np.int64]:
        """``[K]`` how many of the models know a class."""
        counts = np.zeros(self.evaluated.num_classes, dtype=np.int64)
        for part in self.parts:
            counts[part.classes] += 1
        return counts

    @property
    def group_of_weight(self) -> float:
        """By which all of them were evaluated."""
        return self.parts[0].matches.group_of_weight


def load_parts(names: Sequence[str], stop: StopRequest) -> Parts:
    """The models of some runs, given by id, name or folder, on the images that the first one was evaluated on.

    Raises ValueError for runs that do not exist or are named twice, and unless all were evaluated on the same images,
    annotations and by the same rules; FileNotFoundError where the images or annotations are not there any more.
    """
    runs = [chosen_run(name) for name in names]
    if not runs:
        raise ValueError("runs must name at least one run, but got none")
    _refuse_repeated(runs)
    first = runs[0]
    whole = evaluated_images_of_all_classes(first.stored)
    classes = [_classes_in(whole, run, first) for run in runs]
    for run, own in zip(runs, classes, strict=True):
        _refuse_other_ground_truth(whole, run, own, first)
    union = np.unique(np.concatenate(classes))
    evaluated = whole if len(union) == whole.num_classes else whole.with_classes(union)
    parts = []
    for run, own in zip(runs, classes, strict=True):
        part = whole.with_classes(own)
        detections, matches = _detections(run, part, stop)
        parts.append(Part(run, detections, matches, np.searchsorted(union, own)))
    return Parts(evaluated, tuple(parts))


def joined_bins(parts: Parts) -> ClassBins:
    """Bins of all classes from what each model was trained on; of a shared class the first model's counts hold."""
    images, boxes = (np.zeros(parts.evaluated.num_classes, dtype=np.int64) for _ in range(2))
    for part in reversed(parts.parts):
        training = part.run.stored.training
        known = training.images > 0
        images[part.classes[known]], boxes[part.classes[known]] = training.images[known], training.boxes[known]
    if not images.any():
        # Evaluated files of predictions: nobody knows what they were trained on.
        return ClassBins(images, boxes, np.zeros(1), np.full(len(images), -1, np.int32), "none", 0)
    settings = parts.parts[0].run.stored.settings
    given = {name: settings[name] for name in ("num_bins", "bin_strategy", "bin_edges") if name in settings}
    config = resolve(TrainConfig, given)
    return make_bins(
        _Counts(images, boxes), num_bins=config.num_bins, strategy=config.bin_strategy, edges=config.bin_edges
    )


@dataclass(frozen=True)
class _Counts:
    images_per_class: NDArray[np.int64]
    boxes_per_class: NDArray[np.int64]


def _refuse_repeated(runs: Sequence[ChosenRun]) -> None:
    ids = [run.record.run_id for run in runs]
    twice = sorted({run_id for run_id in ids if ids.count(run_id) > 1})
    if twice:
        raise ValueError(f"each run can be merged once, but got twice: {', '.join(twice)}")


def _classes_in(whole: AnnotationIndex, run: ChosenRun, first: ChosenRun) -> NDArray[np.int64]:
    missing = [mid for mid in run.stored.class_ids if mid not in whole.taxonomy.index_of]
    if missing:
        raise ValueError(
            f"only runs of one class list can be merged, but {_called(run)} has {', '.join(missing[:5])}, which the "
            f"list that {_called(first)} was evaluated with lacks; evaluate both with one list by evaluate"
        )
    return np.array([whole.taxonomy.index_of[mid] for mid in run.stored.class_ids], dtype=np.int64)


def _refuse_other_ground_truth(
    whole: AnnotationIndex, run: ChosenRun, classes: NDArray[np.int64], first: ChosenRun
) -> None:
    found, kept = ground_truth_digest(whole.with_classes(classes)), run.stored.ground_truth
    for what, here, there in (
        (
            "images",
            f"{len(whole):,} images {found.images}",
            f"{len(run.stored.matches.image_ids):,} images {kept.images}",
        ),
        ("annotations", f"ground truth {found.of_all}", f"ground truth {kept.of_all}"),
        (
            "rules",
            f"group_of_weight={first.stored.matches.group_of_weight:g}",
            f"group_of_weight={run.stored.matches.group_of_weight:g}",
        ),
    ):
        if here != there and run is first:
            raise ValueError(f"{_called(run)}: the {what} have changed since it was evaluated ({here}, then {there})")
        if here != there:
            raise ValueError(
                f"only runs evaluated on the same {what} can be merged, but {_called(first)} has {here}, {_called(run)} "
                f"{there}; evaluate them alike with evaluate and merge those runs"
            )


def _called(run: ChosenRun) -> str:
    record = run.record
    return f"run {record.name} ({record.run_id})" if record.experiment_id else f"run {record.run_id}"


def _detections(run: ChosenRun, evaluated: AnnotationIndex, stop: StopRequest) -> tuple[Detections, Matches]:
    kept = run.stored.matches
    for path in _logged(run):
        found = read_predictions(path, evaluated, RowErrors("stop"))
        matches = match(found, evaluated, group_of_weight=kept.group_of_weight)
        if _same_entries(matches, kept):
            report(f"{_called(run)}: {len(found):,} detections of {path.name}")
            # Detections on images without annotations cannot be evaluated, nor written with an ImageID.
            known = found.image_index >= 0
            return (found, matches) if known.all() else _matched(found.take(known), evaluated, kept.group_of_weight)
    model = _model_of(run)
    report(f"{_called(run)}: detecting on {len(evaluated):,} images")
    settings: dict[str, Any] = {"from_run": str(model), "on_bad_image": run.stored.settings.get("on_bad_image", "stop")}
    found = detect_as_trained(model, evaluated, resolve(EvaluateConfig, settings), stop)
    return _matched(found, evaluated, kept.group_of_weight)


def _matched(found: Detections, evaluated: AnnotationIndex, group_of_weight: float) -> tuple[Detections, Matches]:
    return found, match(found, evaluated, group_of_weight=group_of_weight)


def _logged(run: ChosenRun) -> Iterator[Path]:
    """Files that may hold all detections of a run."""
    record = run.record
    for name in (PREDICTIONS, "predictions.csv"):
        if not record.experiment_id:
            path = Path(record.run_id) / name
            if path.is_file():
                yield path
        elif record.tags.get("retinaflow.command") != "train":
            try:
                yield store.fetch(record.run_id, name)
            except ValueError:
                continue
    evaluated = record.tags.get("retinaflow.evaluated", "")
    if Path(evaluated).suffix and Path(evaluated).is_file() and Path(evaluated).suffix != ".pt":
        yield Path(evaluated)


def _same_entries(found: Matches, kept: Matches) -> bool:
    """Whether two matchings have the same entries; kept scores are float32."""
    return (
        len(found.score) == len(kept.score)
        and np.array_equal(found.class_index, kept.class_index)
        and np.array_equal(found.image_index, kept.image_index)
        and np.array_equal(found.score.astype(np.float32), kept.score.astype(np.float32))
    )


def _model_of(run: ChosenRun) -> Path | str:
    """The checkpoint of a training. Raises ValueError for a run that has none."""
    record = run.record
    if not record.experiment_id:
        path = Path(record.run_id) / "checkpoints" / "best.pt"
        if path.is_file():
            return path
    elif record.tags.get("retinaflow.command") == "train":
        return record.run_id
    raise ValueError(
        f"{_called(run)} has neither a model of its own nor all of its detections; evaluate its model again with evaluate "
        "and merge that run"
    )
