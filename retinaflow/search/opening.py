"""Settings -> everything that a worker, a report or a notebook needs of a search: space, goal, data, study, runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import optuna

from retinaflow.commands.binning import log_bins
from retinaflow.data.training_data import TrainingData, load_training_data
from retinaflow.interrupts import StopRequest
from retinaflow.runs import store, tracking
from retinaflow.runs.run import NullRun, Run
from retinaflow.search.goal import Goal, read_goal
from retinaflow.search.objective import Objective
from retinaflow.search.runs import FolderRuns, MlflowRuns, SearchRuns
from retinaflow.search.space import Space, read_space
from retinaflow.search.storage import PatientStorage, open_storage, storage_url, without_password
from retinaflow.search.study import PARENT, LostTrials, open_study, pruner_of
from retinaflow.settings.commands import SearchConfig, TrainConfig, may_change, searchable
from retinaflow.settings.fields import OnResume

_FREE = may_change(OnResume.FREE)
"""Training settings that may differ between commands that share a study: paths on a machine, and what the digest of
the data says better."""


@dataclass(frozen=True)
class Search:
    """An open search. ``study`` is an ordinary Optuna study, ``objective`` takes its trials."""

    config: SearchConfig
    space: Space
    goal: Goal
    data: TrainingData
    storage: PatientStorage
    study: optuna.Study
    runs: SearchRuns
    lost: LostTrials
    stop: StopRequest
    objective: Objective


@contextmanager
def open_search(config: SearchConfig, *, stop: StopRequest | None = None) -> Iterator[Search]:
    """Open a search with its parent run, which ends with the block; the study is made, or resumed.

    In a notebook::

        with open_search(resolve(SearchConfig, {"data": "mydata"})) as search:
            trial = search.study.ask()
            search.study.tell(trial, search.objective(trial))

    Raises ValueError for settings that do not fit each other, the data, the storage or the study of that name.
    """
    opened = _Opening(config)
    with closing(opened.storage):
        yield from _open(opened, stop or StopRequest())


def _open(opened: _Opening, stop: StopRequest) -> Iterator[Search]:
    config = opened.config
    with opened.storage.claiming(config.study):
        study = opened.open_study()
        parent = study.user_attrs.get(PARENT)
    joined = tracking.launched_by_mlflow() and config.track
    with tracking.start_run(
        "search",
        track=config.track,
        experiment=config.experiment,
        output=config.output / config.study,
        name=config.study,
        resume=None if joined else parent,
    ) as run:
        with opened.storage.claiming(config.study):
            parent = study.user_attrs.get(PARENT) or run.run_id
            study.set_user_attr(PARENT, parent)
        if parent != run.run_id:
            # `mlflow run` has made a run of its own; the trials stay together under the study's first.
            run.set_tags({"retinaflow.command": "search-worker", "retinaflow.continues": parent})
        with _parent_run(config, run, parent) as parent_run:
            search = opened.search(study, parent, parent_run, stop)
            _log_inputs(search)
            yield search


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
        tracking.end_run(first, status)


def attach(config: SearchConfig, *, stop: StopRequest) -> Search:
    """The search as another process of it sees it: the study and the parent run are there already."""
    opened = _Opening(config)
    study = opened.open_study()
    return opened.search(study, study.user_attrs[PARENT], NullRun(), stop)


class _Opening:
    """The steps from settings to a :class:`Search`; each may refuse."""

    def __init__(self, config: SearchConfig) -> None:
        for name in ("resume", "register_as"):
            if getattr(config, name) is not None:
                raise ValueError(f"search has no use for {name}, but got {name}={getattr(config, name)}; train has")
        if config.nproc != 1:
            raise ValueError(
                f"each training of a search is one process, but got nproc={config.nproc}; search_workers= runs several "
                "trainings at a time"
            )
        self.config = config
        self.space = read_space(config)
        self.data = load_training_data(self.space.base)
        self.goal = read_goal(config, num_bins=self.data.bins.num_bins)
        pruner_of(config, self.goal)
        if not self.space.domains:
            raise ValueError("the space must have a range or choices, but every setting of it was given one value")
        url = storage_url(config.storage, beside=store.uri() if config.track else "", output=config.output)
        self._lost: LostTrials | None = None
        self.storage = open_storage(url, heartbeat=config.heartbeat, when_stale=self._when_stale)

    def _when_stale(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        assert self._lost is not None
        self._lost.when_stale(study, trial)

    def open_study(self) -> optuna.Study:
        """The study of that name, if it is one of this search."""
        return open_study(self.storage, self.config, self.goal, identity(self))

    def search(self, study: optuna.Study, parent: str, parent_run: Run, stop: StopRequest) -> Search:
        """All of it. ``parent``: id of the run that holds those of the trials; ``parent_run``: what is logged to it."""
        config = self.config
        folder = config.output / config.study
        runs: SearchRuns = MlflowRuns(parent, parent_run, folder) if config.track else FolderRuns(parent_run, folder)
        self._lost = LostTrials(self.storage, runs)
        objective = Objective(
            space=self.space,
            goal=self.goal,
            data=self.data,
            runs=runs,
            storage=self.storage,
            folder=folder,
            seeds=config.seeds,
            prunes=not isinstance(study.pruner, optuna.pruners.NopPruner),
            stop=stop,
        )
        return Search(config, self.space, self.goal, self.data, self.storage, study, runs, self._lost, stop, objective)


def identity(opening: _Opening) -> dict[str, Any]:
    """What must be the same for two trials to be comparable."""
    base = opening.space.base.model_dump(mode="json")
    searched = opening.space.domains
    return {
        "space": opening.space.document(),
        "goal": opening.goal.document(),
        "seeds": opening.config.seeds,
        "data digest": opening.data.digest,
        "settings": {
            name: base[name] for name in TrainConfig.model_fields if name not in _FREE and name not in searched
        },
    }


def _log_inputs(search: Search) -> None:
    config, run = search.config, search.runs.parent
    shown = {**config.model_dump(mode="json"), **config.space, "storage": without_password(search.storage.url)}
    run.log_params(shown)
    run.log_json(shown, "config.json")
    run.log_json(
        {name: search.space.document().get(name, getattr(config, name)) for name in searchable()}, "space.json"
    )
    run.set_tags({"retinaflow.data_digest": search.data.digest, "retinaflow.study": config.study})
    log_bins(run, search.data)
