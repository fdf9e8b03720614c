"""The run of a training: one process at a time trains in it, and a folder holds one training."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from retinaflow.progress import report
from retinaflow.runs import store, tracking
from retinaflow.runs.owner import OWNER, owner_of, owner_where_writable
from retinaflow.runs.run import CHECKPOINTS, FINISHED, STATUS_TAG, Run
from retinaflow.runs.start import start_run
from retinaflow.settings.commands import TrainConfig
from retinaflow.training.distributed import World
from retinaflow.training.resume import Resumed


def folder_name_of(config: TrainConfig, resumed: Resumed | None, name: str | None) -> str:
    """The name of the folder in ``output`` that a training without MLflow has; ``name``: of the run, if it has one.

    A training that is resumed has that of its folder, which may have been renamed since its checkpoint was written.
    """
    if resumed is None or config.track:
        return name or "train"
    place = resumed.folder.resolve()
    is_here = place.name == CHECKPOINTS and place.parent.parent == config.output.resolve()
    return place.parent.name if is_here else resumed.run_id


def report_finished(run_id: str, config: TrainConfig, world: World) -> None:
    """Report that this training is done already, by which run and how to train again; other ranks exit."""
    if not world.is_first:
        sys.exit(0)
    if config.track:
        tracking.link_launched(run_id)
    where = f"run {run_id}" if config.track else config.output / run_id
    report(
        f"{where} has these settings and data and is finished, so nothing is trained; resume=none trains the same again"
    )


def refuse_second_training(config: TrainConfig, resumed: Resumed | None, *, folder_name: str) -> None:
    """Raise SettingError when another process trains where this training would; called before the data are read."""
    folders = [resumed.folder] if resumed else []
    folders += [config.output / folder_name / CHECKPOINTS] if not config.track else []
    for folder in filter(Path.is_dir, folders):
        with owner_where_writable(folder):
            pass


@contextlib.contextmanager
def training_run(
    config: TrainConfig, resumed: Resumed | None, world: World, *, name: str | None, called: str, folder_name: str
) -> Iterator[Run]:
    """The run of a training, new or resumed, which this process owns while the block runs; none on other ranks.

    ``called``: its name unless it is given one. ``folder_name``: of its folder in ``output`` with ``track=false``.
    Raises SettingError when another process trains in it.
    """
    if not world.is_first:
        yield Run()
        return
    resume = resumed.run_id if resumed else None
    if resume is not None and config.track and not store.has_run(resume):
        report(f"the checkpoint's run {resume} is not in {store.uri()}: a new run resumes it")
        resume = None
    with contextlib.ExitStack() as owned:
        if resumed is not None:
            # Where it comes from may be read-only, and then nobody else trains there either.
            owned.enter_context(owner_where_writable(resumed.folder))
        folder = config.output / (folder_name if not config.track else resume or "")
        is_elsewhere = resumed is None or (folder / CHECKPOINTS).resolve() != resumed.folder.resolve()
        if is_elsewhere and not config.track:
            owned.enter_context(_emptied(folder))
        elif is_elsewhere and resume is not None:
            owned.enter_context(owner_of(folder / CHECKPOINTS))
        with start_run(
            "train",
            config,
            # With MLflow only what has not arrived waits there, and is found by the id of its run.
            output=config.output if config.track else config.output / folder_name,
            name=name,
            default_name=called,
            resume=resume,
        ) as run:
            if resume is None and config.track:
                owned.enter_context(owner_of(config.output / run.run_id / CHECKPOINTS))
            if not config.track:
                run.set_tags({STATUS_TAG: "RUNNING"})
            yield run
            if not config.track:
                run.set_tags({STATUS_TAG: FINISHED})


@contextlib.contextmanager
def _emptied(folder: Path) -> Iterator[None]:
    """Own a folder for a training that begins there: what an earlier one left is renamed, as two must not mix."""
    with contextlib.ExitStack() as owned:
        owned.enter_context(owner_of(folder / CHECKPOINTS))
        if any((folder / CHECKPOINTS).glob("*.pt")) or (folder / "metrics.jsonl").exists():
            number = 1
            while (aside := folder.with_name(f"{folder.name}-{number}")).exists():
                number += 1
            folder.replace(aside)
            report(f"{folder} holds an earlier training, which is now {aside}")
            (aside / CHECKPOINTS / OWNER).unlink(missing_ok=True)
            # The lock went along; nobody owns what was renamed.
            owned.close()
            owned.enter_context(owner_of(folder / CHECKPOINTS))
        yield
