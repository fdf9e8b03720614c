"""An ensemble: the models of several runs, on one set of images with the ground truth of all their classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from retinaflow.comparison.chosen_runs import ChosenRun, called, chosen_run
from retinaflow.comparison.ground_truth_digest import ground_truth_digest
from retinaflow.comparison.images_of_run import images_of_run_with_all_classes
from retinaflow.data.frequency_bins import ClassBins, make_bins
from retinaflow.data.index import AnnotationIndex
from retinaflow.detections import Detections
from retinaflow.ensemble.member_detections import detections_of, model_of
from retinaflow.errors import SettingError
from retinaflow.inference.checkpoint import Checkpoint
from retinaflow.metric.matches import Matches
from retinaflow.runs import store
from retinaflow.settings.commands import TrainConfig
from retinaflow.settings.resolve import resolve


@dataclass(frozen=True)
class Member:
    """One model: its run, its detections in its own classes, and how they match the ground truth of these."""

    run: ChosenRun
    detections: Detections
    matches: Matches
    classes: NDArray[np.int64]
    """Class index in the ensemble of each class of the model."""
    model: Checkpoint | str
    """What has made the detections; the reason where that is not here."""

    @property
    def name(self) -> str:
        return self.run.record.name

    @property
    def run_id(self) -> str:
        return self.run.record.run_id


@dataclass(frozen=True)
class Ensemble:
    """Several models, and the images with the ground truth of all classes that any of them has."""

    evaluated: AnnotationIndex
    members: tuple[Member, ...]
    has_some_classes: bool
    """Whether the class list of the images has more classes."""

    @property
    def without_model(self) -> str | None:
        """Why a member has no model; None when all have one."""
        return _without_model([member.model for member in self.members])

    @property
    def num_models(self) -> NDArray[np.int64]:
        """``[K]`` how many of the models have a class."""
        counts = np.zeros(self.evaluated.num_classes, dtype=np.int64)
        for member in self.members:
            counts[member.classes] += 1
        return counts

    @property
    def group_of_weight(self) -> float:
        """The ``group_of_weight`` by which all of them were evaluated."""
        return self.members[0].matches.group_of_weight


def load_ensemble(names: Sequence[str], *, register_as: str | None = None) -> Ensemble:
    """The models of some runs, given by id, name or folder, on the images that the first one was evaluated on.

    Raises SettingError for runs that do not exist or are named twice, with ``register_as`` for one without a model, and
    unless all were evaluated on the same images, annotations and by the same rules; DataError where the images or
    annotations do not exist any more.
    """
    runs = [chosen_run(name) for name in names]
    if not runs:
        raise SettingError("runs must name at least one run, but got none")
    _refuse_repeated(runs)
    models = [model_of(run) for run in runs]
    if register_as is not None and (reason := _without_model(models)) is not None:
        raise SettingError(f"register_as={register_as} needs a model of each run, but {reason}")
    first = runs[0]
    whole = images_of_run_with_all_classes(first.stored)
    classes = [_classes_in(whole, run, first) for run in runs]
    for run, own in zip(runs, classes, strict=True):
        _refuse_other_ground_truth(whole, run, own, first)
    union = np.unique(np.concatenate(classes))
    evaluated = whole if len(union) == whole.num_classes else whole.with_classes(union)
    members = []
    for run, own, model in zip(runs, classes, models, strict=True):
        detections, matches = detections_of(run, whole.with_classes(own), model)
        members.append(Member(run, detections, matches, np.searchsorted(union, own), model))
    return Ensemble(evaluated, tuple(members), has_some_classes=evaluated is not whole)


def _without_model(models: Sequence[Checkpoint | str]) -> str | None:
    return next((model for model in models if isinstance(model, str)), None)


def parts_of_last_split() -> list[str]:
    """Ids of the runs that the newest finished split has trained. Raises SettingError when there is none."""
    try:
        last = store.find_run(store.last_run("split"))
    except SettingError:
        raise SettingError(
            f"runs must name the runs to merge (runs=ID,ID), as there is no finished split in {store.uri()}"
        ) from None
    return last.tags["retinaflow.parts"].split(",")


def ensemble_bins(ensemble: Ensemble) -> ClassBins:
    """Bins of all classes from what each model was trained on; a shared class has the counts of the first model."""
    images, boxes = (np.zeros(ensemble.evaluated.num_classes, dtype=np.int64) for _ in range(2))
    for member in reversed(ensemble.members):
        training = member.run.stored.training
        known = training.images > 0
        images[member.classes[known]], boxes[member.classes[known]] = training.images[known], training.boxes[known]
    if not images.any():
        # Evaluated files of predictions: their training data is unknown.
        return ClassBins.unknown(len(images))
    settings = ensemble.members[0].run.stored.settings
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
        raise SettingError(f"each run can be merged once, but got twice: {', '.join(twice)}")


def _classes_in(whole: AnnotationIndex, run: ChosenRun, first: ChosenRun) -> NDArray[np.int64]:
    missing = [mid for mid in run.stored.class_ids if mid not in whole.taxonomy.index_of]
    if missing:
        raise SettingError(
            f"only runs of one class list can be merged, but {called(run)} has {', '.join(missing[:5])}, which the "
            f"list that {called(first)} was evaluated with lacks; evaluate both with one list by evaluate"
        )
    return np.array([whole.taxonomy.index_of[mid] for mid in run.stored.class_ids], dtype=np.int64)


def _refuse_other_ground_truth(
    whole: AnnotationIndex, run: ChosenRun, classes: NDArray[np.int64], first: ChosenRun
) -> None:
    found, stored = ground_truth_digest(whole.with_classes(classes)), run.stored.ground_truth
    for what, here, there in (
        (
            "images",
            f"{len(whole):,} images {found.images}",
            f"{len(run.stored.matches.image_ids):,} images {stored.images}",
        ),
        ("annotations", f"ground truth {found.of_all}", f"ground truth {stored.of_all}"),
        (
            "rules",
            f"group_of_weight={first.stored.matches.group_of_weight:g}",
            f"group_of_weight={run.stored.matches.group_of_weight:g}",
        ),
    ):
        if here != there and run is first:
            raise SettingError(f"{called(run)}: the {what} have changed since it was evaluated ({here}, then {there})")
        if here != there:
            raise SettingError(
                f"only runs evaluated on the same {what} can be merged, but {called(first)} has {here}, {called(run)} "
                f"{there}; evaluate them alike with evaluate and merge those runs"
            )
