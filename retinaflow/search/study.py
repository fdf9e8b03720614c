"""A study, opened from settings: with its space, objective, data, storage and runs it is a :class:`Search`.

A study holds trials that can be compared: it stores what they were made with, and a command with another space,
objective, data or training settings is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import optuna

from retinaflow.data.training_data import TrainingData, load_training_data
from retinaflow.errors import SettingError
from retinaflow.interrupts import StopRequest
from retinaflow.progress import report
from retinaflow.runs import store, tracking
from retinaflow.runs.datasets import training_datasets
from retinaflow.runs.run import Run
from retinaflow.runs.start import start_run
from retinaflow.search.objective import Objective, ObjectiveMetrics, keep_best_of, read_objective
from retinaflow.search.runs import FolderRuns, MlflowRuns, SearchRuns
from retinaflow.search.sampler_and_pruner import pruner_of, quiet
from retinaflow.search.seed_test import SeedTest
from retinaflow.search.space import SEARCHABLE, Space, read_space
from retinaflow.search.storage import StudyStorage, as_optuna, open_storage, storage_url
from retinaflow.settings.commands import WITHOUT_EFFECT, SearchConfig, TrainConfig
from retinaflow.settings.resolve import changed
from retinaflow.training.earlier_training import digest_of_weights
from retinaflow.training.fit_to_data import fit_to_data
from retinaflow.training.validation import known_metrics

IDENTITY, PARENT = "retinaflow", "retinaflow_run"
"""User attributes of a study: what makes its trials comparable, and the run that holds their runs."""


@dataclass(frozen=True)
class Search:
    """An open search. ``study`` is an ordinary Optuna study, ``objective`` takes its trials."""

    config: SearchConfig
    space: Space
    metrics: ObjectiveMetrics
    data: TrainingData
    storage: StudyStorage
    study: optuna.Study
    runs: SearchRuns
    stop: StopRequest
    objective: Objective


@contextmanager
def open_search(config: SearchConfig, *, stop: StopRequest | None = None) -> Iterator[Search]:
    """Open a search with its parent run, which ends with the block; the study is created, or resumed.

    In a notebook::

        with open_search(resolve(SearchConfig, {"data": "mydata"})) as search:
            trial = search.study.ask()
            search.study.tell(trial, search.objective(trial))

    Raises SettingError for settings that do not fit each other, the data or the study of that name, and StoreError for
    a storage that cannot be opened.
    """
    space, joined = _checked_space(config), tracking.launched_by_mlflow() and config.track
    # The storage first, as annotations may take minutes to read.
    stop = stop or StopRequest()
    with closing(open_storage(_storage_url(config), stop=stop)) as storage:
        setup = _Setup.read(config, space)
        study = storage.transaction(config.study, lambda: _open_study(storage, setup))
        known = study.user_attrs.get(PARENT)
        is_lost = known is not None and config.track and not store.has_run(known)
        if is_lost:
            report(f"the study's run {known} is not in {store.uri()}: a new run continues it")
        with start_run(
            "search",
            config,
            output=config.output / config.study,
            name=config.study,
            resume=None if joined or is_lost else known,
        ) as run:
            lost = known if is_lost else None
            parent = storage.transaction(config.study, lambda: _parent_of(study, lost=lost, otherwise=run.run_id))
            if parent != run.run_id:
                # `mlflow run` has made a run of its own; the trials stay together under the study's first.
                run.set_tags({"retinaflow.command": "search-worker", "retinaflow.continues": parent})
            with _parent_run(config, run, parent) as parent_run:
                search = _search(setup, storage, study, parent_run, stop)
                _log_inputs(search)
                yield search


def attach(config: SearchConfig, *, stop: StopRequest) -> Search:
    """The search in a worker process: the study and its parent run are there, and nothing is logged to the latter."""
    setup = _Setup.read(config, _checked_space(config))
    # The database may be away just now, but it is there.
    storage = StudyStorage(_storage_url(config), stop=stop, wait=True)
    study = storage.transaction(config.study, lambda: _open_study(storage, setup))
    return _search(setup, storage, study, Run(), stop)


@dataclass(frozen=True)
class _Setup:
    """What is searched, and on which data: all that must be the same for two trials to be comparable."""

    config: SearchConfig
    space: Space
    metrics: ObjectiveMetrics
    data: TrainingData

    @classmethod
    def read(cls, config: SearchConfig, space: Space) -> _Setup:
        """Load the data and check the objective against it."""
        data = load_training_data(space.base)
        config, known = fit_to_data(config, data.train), known_metrics(data, config)
        metrics = read_objective(config, num_bins=data.bins.num_bins, known=known, taxonomy=data.evaluated.taxonomy)
        config = changed(config, {"keep_best": keep_best_of(config, known)})
        return cls(config, read_space(config), metrics, data)

    def identity(self) -> dict[str, Any]:
        """The form in which the study stores it."""
        base, searched = self.space.base.model_dump(mode="json"), self.space.domains
        return {
            "space": self.space.document(),
            # The name of an earlier version, which stays: it is in every study.
            "goal": self.metrics.document(),
            "seeds": self.config.seeds,
            "data digest": self.data.digest,
            **digest_of_weights(self.space.base),
            "settings": {
                name: base[name] for name in TrainConfig.model_fields if name not in {*WITHOUT_EFFECT, *searched}
            },
        }


def _checked_space(config: SearchConfig) -> Space:
    """The space of a search. Raises SettingError for settings that do not fit a search."""
    for name in ("resume", "register_as", "target"):
        if getattr(config, name) is not None:
            raise SettingError(f"{name} is a setting of train, not of search, but got {name}={getattr(config, name)}")
    if config.nproc != 1:
        raise SettingError(
            f"nproc must be 1, as each training of a search is one process, but got nproc={config.nproc}; "
            "search_workers= runs several trainings at a time"
        )
    pruner_of(config)
    space = read_space(config)
    if not space.domains:
        raise SettingError("the space must have a range or choices, but every setting of it was given one value")
    return space


def _storage_url(config: SearchConfig) -> str:
    return storage_url(config.storage, beside=store.uri() if config.track else "", output=config.output)


def _open_study(storage: StudyStorage, setup: _Setup) -> optuna.Study:
    """The study of that name, created if it is new. Raises SettingError with the differences when it was made with
    other data, space, objective or settings."""
    config, names = setup.config, setup.metrics.names
    study = optuna.create_study(
        study_name=config.study,
        storage=as_optuna(storage),
        directions=["maximize"] * len(names),
        pruner=pruner_of(config),
        load_if_exists=True,
    )
    attributes, identity = study.user_attrs, setup.identity()
    if IDENTITY in attributes:
        found = list(differences(attributes[IDENTITY], identity))
        if found:
            raise SettingError(
                f"study {config.study} holds trials that cannot be compared with these; choose another name as study=, "
                "or give the settings that it was made with:\n" + "\n".join(found)
            )
    elif study.get_trials(deepcopy=False) or len(study.directions) != len(names):
        raise SettingError(f"study {config.study} was not made by retinaflow; choose another name as study=")
    else:
        with quiet():
            study.set_metric_names([name.removeprefix("val/") for name in names])
        study.set_user_attr(IDENTITY, identity)
    return study


def _parent_of(study: optuna.Study, *, lost: str | None, otherwise: str) -> str:
    """The run that holds those of the trials, which is the first that asks; ``lost``: one that is no longer there."""
    parent = study.user_attrs.get(PARENT)
    parent = otherwise if parent in (None, lost) else str(parent)
    study.set_user_attr(PARENT, parent)
    return parent


def differences(made_with: Mapping[str, Any], given: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """One line per entry that differs between two nested documents."""
    for name in sorted({*made_with, *given}):
        old, new = made_with.get(name, "not in it"), given.get(name, "not in it")
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from differences(old, new, f"{prefix}{name}: ")
        elif old != new:
            yield f"  {prefix}{name}: the study has {old}, now {new}"


@contextmanager
def _parent_run(config: SearchConfig, run: Run, parent: str) -> Iterator[Run]:
    """The run that holds those of the trials: the one that was opened, or the study's first, opened and ended too."""
    if not config.track or parent == run.run_id:
        yield run
        return
    first, status = tracking.open_run(parent, config.output / config.study, resumed=True), "KILLED"
    try:
        yield first
        status = "FINISHED"
    finally:
        tracking.end_run(first, status, command="search")


def _search(setup: _Setup, storage: StudyStorage, study: optuna.Study, parent_run: Run, stop: StopRequest) -> Search:
    """``parent_run``: the run that results of the whole search are logged to."""
    config, space, metrics, data = setup.config, setup.space, setup.metrics, setup.data
    folder = config.output / config.study
    runs: SearchRuns = FolderRuns(parent_run, folder)
    if config.track:
        runs = MlflowRuns(study.user_attrs[PARENT], parent_run, folder)
    objective = Objective(
        space=space,
        metrics=metrics,
        data=data,
        runs=runs,
        heartbeat=config.heartbeat,
        folder=folder,
        seed_test=SeedTest.on(data, metrics.parts, seeds=config.seeds, ends_trials=config.pruner != "none"),
        prunes=not isinstance(study.pruner, optuna.pruners.NopPruner),
        stop=stop,
    )
    return Search(config, space, metrics, data, storage, study, runs, stop, objective)


def _log_inputs(search: Search) -> None:
    config, run, ranges = search.config, search.runs.parent, search.space.document()
    settings = {**config.model_dump(mode="json"), **config.space, "storage": search.storage.address}
    run.log_params(settings)
    run.log_json(settings, "config.json")
    run.log_json({name: ranges.get(name, getattr(config, name)) for name in SEARCHABLE}, "space.json")
    run.log_datasets(training_datasets(search.space.base.model_dump(), search.data))
    run.set_tags({"retinaflow.data_digest": search.data.digest, "retinaflow.study": config.study})
