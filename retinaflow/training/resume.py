"""Resuming a training: from which checkpoint, in which run, with which settings.

The settings are those of the checkpoint, so ``resume=RUN_ID`` alone is enough. A setting that is given besides is used
when it changes nothing of what was done (paths, number of ranks), used and reported when it steers the rest (more
epochs, another learning rate), and refused when the checkpoint cannot be resumed with it (another network, another
order of images). Sampling and its like may change between two epochs only: the trainer refuses another plan for an
epoch that has begun.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retinaflow.errors import SettingError, shown
from retinaflow.files import is_file_name
from retinaflow.inference.checkpoint import Checkpoint, load_checkpoint, require
from retinaflow.progress import report
from retinaflow.runs import store
from retinaflow.runs.run import CHECKPOINTS
from retinaflow.settings.commands import STEERING, WITHOUT_EFFECT, TrainConfig
from retinaflow.settings.resolve import resolve
from retinaflow.settings.value_types import as_text

AUTO = "auto"
"""Value of ``resume``: the unfinished training of the same settings and data, or a new one
(:mod:`retinaflow.training.earlier_training`)."""

_BEFORE = {"backbone_lr_factor": 1.0}
"""What trainings did before a setting existed, where its default is another."""


@dataclass(frozen=True)
class Resumed:
    """A checkpoint to resume from, the best one before it, the run that they belong to, and the folder of both."""

    checkpoint: Checkpoint
    best: Path | None
    run_id: str
    folder: Path


def prepare(config: TrainConfig) -> tuple[TrainConfig, Resumed | None]:
    """The settings to train with, and what to resume from."""
    resumed = find_resumed(config)
    return (config, None) if resumed is None else (resumed_settings(config, resumed.checkpoint), resumed)


def find_resumed(config: TrainConfig) -> Resumed | None:
    """The checkpoint that ``resume`` names: a file, a folder that holds one, or a run's ``last.pt``, here or among its
    artifacts; None for none and auto.

    Raises SettingError or DataError when there is none, or none to resume from.
    """
    if config.resume in (None, AUTO):
        return None
    path, run_id = _last_of(config.resume, config)
    checkpoint = load_checkpoint(path)
    progress = checkpoint.progress
    if progress is None:
        raise SettingError(f"resume={config.resume}: best.pt holds weights only and cannot be resumed; pass last.pt")
    best = path.with_name("best.pt")
    run_id = run_id or str(progress.get("run_id", ""))
    if not is_file_name(run_id):
        raise SettingError(f"resume={config.resume}: the checkpoint names the run {run_id!r}, which names no folder")
    return Resumed(checkpoint, best if best.is_file() else None, run_id, path.parent)


def check_progress(progress: Mapping[str, Any]) -> None:
    """Raise KeyError, TypeError or ValueError for the progress of a checkpoint whose values are of other kinds."""
    counts = {name: progress[name] for name in ("epoch", "step", "without_gain")}
    counts |= {name: progress["open"][name] for name in ("batches", "images", "plan")}
    counts["steps of the curve"] = progress["curve"]["steps"]
    for name, count in counts.items():
        require(type(count) is int and count >= 0, f"{name} must be a whole number, 0 or more, but got {shown(count)}")
    require(isinstance(progress["curve"]["sums"], dict), "the sums of the curve must have names")
    require(isinstance(progress["best"], int | float), f"best must be a number, but got {shown(progress['best'])}")


def _last_of(resume: str, config: TrainConfig) -> tuple[Path, str | None]:
    given = Path(resume)
    if given.is_file():
        return given, None
    for path in (given / "last.pt", given / CHECKPOINTS / "last.pt"):
        if path.is_file():
            return path, None
    if given.suffix == ".pt":
        raise SettingError(f"resume={resume}: no such checkpoint file")
    path = folder_of_run(resume, config) / "last.pt"
    return path if path.is_file() else store.fetch(resume, CHECKPOINTS) / "last.pt", resume


def folder_of_run(run_id: str, config: TrainConfig) -> Path:
    """The local folder of a run's checkpoints: in ``output``, or where its own ``output`` was. It may not exist."""
    folder = config.output / run_id / CHECKPOINTS
    if (folder / "last.pt").is_file():
        return folder
    return Path(store.params_of(run_id).get("output", config.output)) / run_id / CHECKPOINTS


def resumed_settings(config: TrainConfig, checkpoint: Checkpoint) -> TrainConfig:
    """The settings to resume with: those of the checkpoint, and those given that may change.

    Raises SettingError for a setting that the checkpoint cannot be resumed with.
    """
    stored = _stored(checkpoint)
    given = {name for name in config.model_fields_set if name in TrainConfig.model_fields}
    changed = sorted(name for name in given if getattr(config, name) != getattr(stored, name))
    for name in changed:
        new, old = as_text(getattr(config, name)), as_text(getattr(stored, name))
        if name in STEERING:
            report(f"resume: {name}={new} from here on, instead of {old}")
        elif name not in WITHOUT_EFFECT:
            raise SettingError(
                f"resume={config.resume}: {name} must be that of the checkpoint, but got {name}={new}, the "
                f"checkpoint's {old}; leave it out, or start a new training"
            )
    return stored.model_copy(update={"resume": config.resume, **{name: getattr(config, name) for name in changed}})


def is_steered(config: TrainConfig, checkpoint: Checkpoint) -> bool:
    """Whether the rest of the training has other settings than the part before the checkpoint."""
    stored = _stored(checkpoint)
    return any(getattr(config, name) != getattr(stored, name) for name in STEERING)


def _stored(checkpoint: Checkpoint) -> TrainConfig:
    return resolve(TrainConfig, {**_BEFORE, **checkpoint.settings, "config": None})
