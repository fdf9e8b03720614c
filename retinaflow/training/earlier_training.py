"""The earlier trainings of the same settings, data and version: by them the same command finds what it began.

Every training carries a digest of all that it depends on as a tag of its run (``track=false``: in ``tags.json``), so
``train`` with ``resume=auto`` and ``split`` find the newest one that is finished or that can be resumed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import retinaflow
from retinaflow.detector.weights import digest_of_file
from retinaflow.errors import DataError, SettingError
from retinaflow.progress import report
from retinaflow.runs import store
from retinaflow.runs.owner import owner_of, owner_where_writable
from retinaflow.runs.run import CHECKPOINTS, FINISHED, STATUS_TAG, tags_of_folder
from retinaflow.settings.commands import WITHOUT_EFFECT, TrainConfig
from retinaflow.training.distributed import ALONE, World
from retinaflow.training.resume import (
    AUTO,
    Resumed,
    find_resumed,
    folder_of_run,
    is_steered,
    resumed_settings,
)

TRAINING_TAG = "retinaflow.training"
"""Tag of a training: :func:`training_key`."""
RESTARTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
"""Environment variables in which torchrun and Slurm count how often they have started the same command again."""


def is_restart() -> bool:
    """Whether torchrun or Slurm has started this process again."""
    return any(count.isdecimal() and int(count) > 0 for count in (os.environ.get(name, "") for name in RESTARTS))


def after_restart(config: TrainConfig) -> TrainConfig:
    """The settings of a command that was started again: with ``resume=auto``, unless ``resume`` was given."""
    if "resume" in config.model_fields_set:
        return config
    return config.model_copy(update={"resume": AUTO})


def training_key(config: TrainConfig, data_digest: str) -> str:
    """Digest of everything that a training depends on: settings, data, the content of a weights file, version."""
    settings = {name: value for name, value in config.model_dump(mode="json").items() if name not in WITHOUT_EFFECT}
    settings |= digest_of_weights(config)
    document = json.dumps([settings, data_digest, retinaflow.__version__], sort_keys=True)
    return hashlib.sha256(document.encode()).hexdigest()[:16]


def digest_of_weights(config: TrainConfig) -> dict[str, str]:
    """What a training depends on besides its settings and data: the content of the weights file; empty without one."""
    digest = digest_of_file(config.weights)
    return {} if digest is None else {"digest of weights": digest}


def training_tags(key: str, config: TrainConfig, resumed: Resumed | None) -> dict[str, str]:
    """The tags by which a training is found: none of one that had other settings in a part of it."""
    if resumed is None:
        return {TRAINING_TAG: key}
    # A resumed run has its tag already.
    return {TRAINING_TAG: "its settings were changed"} if is_steered(config, resumed.checkpoint) else {}


@dataclass(frozen=True)
class EarlierTraining:
    """The newest training of a key: ``finished`` (its run id; ``track=false``: the name of its folder), or else
    ``resumed``; None for neither. ``config``: the settings to train with."""

    config: TrainConfig
    finished: str | None = None
    resumed: Resumed | None = None


@contextlib.contextmanager
def own_training(
    key: str, config: TrainConfig, resumed: Resumed | None = None, world: World = ALONE
) -> Iterator[EarlierTraining]:
    """What to train from, on every rank: with ``resume=auto`` the earlier training with a key, which no other process
    in ``output`` trains while the block runs; else ``resumed``. Raises as :func:`earlier_training`."""
    if config.resume != AUTO:
        yield EarlierTraining(config, resumed=resumed)
        return
    with contextlib.ExitStack() as owned:
        found = None
        if world.is_first:
            owned.enter_context(owner_of(config.output / f".training-{key}"))
            found = earlier_training(key, config)
        found = world.broadcast(found)
        assert found is not None
        yield found


@dataclass(frozen=True)
class _Candidate:
    """A training with the key. ``run_id``: also the name of its folder; ``name``: in messages."""

    run_id: str
    name: str
    is_finished: bool
    checkpoints: Path


def earlier_training(key: str, config: TrainConfig) -> EarlierTraining:
    """The newest training with the key ``key`` that is finished or can be resumed.

    Reports which one is resumed, and what cannot be. A training whose status is RUNNING may have been killed: it is
    running if a process owns its folder. Raises SettingError then, and StoreError when the store does not answer.
    """
    found = list(_in_store(key, config) if config.track else _in_folder(key, config))
    newest = next((number for number, candidate in enumerate(found) if candidate.is_finished), len(found))
    unfinished = found[:newest]
    for candidate in unfinished:
        _refuse_while_owned(candidate)
        resumed = _resumable(candidate, config)
        if resumed is not None:
            others = ", ".join(other.name for other in unfinished if other is not candidate)
            more = f"; it is the newest of {len(unfinished)} that can be, the others: {others}" if others else ""
            report(f"{candidate.name} has these settings and data, is not finished, and is resumed{more}")
            is_here = config.track and resumed.folder == candidate.checkpoints
            own = config.model_copy(update={"resume": candidate.run_id if is_here else str(resumed.folder)})
            return EarlierTraining(resumed_settings(own, resumed.checkpoint), resumed=resumed)
    if newest < len(found):
        return EarlierTraining(config, finished=found[newest].run_id)
    if unfinished:
        report("a new training starts")
    return EarlierTraining(config.model_copy(update={"resume": None}))


def _in_store(key: str, config: TrainConfig) -> Iterator[_Candidate]:
    for run in store.find_runs(store.filter_of({f"tags.`{TRAINING_TAG}`": key})):
        folder = folder_of_run(run.run_id, config)
        yield _Candidate(run.run_id, f"run {run.run_id}", run.status == "FINISHED", folder)


def _in_folder(key: str, config: TrainConfig) -> Iterator[_Candidate]:
    """The trainings without MLflow in ``output``, newest first."""
    files = sorted(config.output.glob("*/tags.json"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    for folder in (path.parent for path in files):
        tags = tags_of_folder(folder)
        if tags.get(TRAINING_TAG) == key:
            yield _Candidate(folder.name, f"{folder}", tags.get(STATUS_TAG) == FINISHED, folder / CHECKPOINTS)


def _refuse_while_owned(candidate: _Candidate) -> None:
    if candidate.checkpoints.is_dir():
        with owner_where_writable(candidate.checkpoints):
            pass


def _resumable(candidate: _Candidate, config: TrainConfig) -> Resumed | None:
    """Its checkpoint here, or else the one that its last orderly end has stored with the run."""
    places: list[Callable[[], Path]] = []
    if not config.track or (candidate.checkpoints / "last.pt").is_file():
        places.append(lambda: candidate.checkpoints)
    if config.track:
        places.append(lambda: store.fetch(candidate.run_id, CHECKPOINTS))
    for place in places:
        try:
            resumed = find_resumed(config.model_copy(update={"resume": str(place() / "last.pt")}))
        except (SettingError, DataError, OSError) as error:
            report(f"{candidate.name} has these settings and data and is not finished, but {error}")
        else:
            assert resumed is not None
            # A folder may have been renamed, as another training was begun there: it is resumed where it is now.
            return replace(resumed, run_id=candidate.run_id)
    return None
