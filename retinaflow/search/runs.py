"""The runs of a search: a parent with a child per trial, in MLflow or in folders.

They are created and ended by id, as the trials of a search run in several processes and on several machines.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

from retinaflow.errors import StoreError
from retinaflow.progress import report
from retinaflow.runs import store, tracking
from retinaflow.runs.mlflow_run import MlflowRun
from retinaflow.runs.run import CHECKPOINTS, TAGS, FolderRun, Pixels, Run, tags_of_folder
from retinaflow.runs.store import RunRecord

STATE, REASON, STUDY, TRIAL = (f"retinaflow.{name}" for name in ("state", "reason", "study", "trial"))
"""Tags of a child run: how its trial ended and why, and which trial of which study it was."""


class SearchRuns(Protocol):
    """The parent run of a search, and the runs of its trials."""

    parent: Run
    """The run of the search, in the process that opened it; worker processes log nothing to it."""

    def start(self, name: str, *, study: str, trial: int) -> Run:
        """Start the run of a trial."""

    def end(self, run: Run, status: str, *, state: str, reason: str) -> None:
        """End the run of a trial as FINISHED, FAILED or KILLED."""

    def end_lost(self, *, study: str, trial: int, reason: str) -> None:
        """End the run of a trial whose process has ended, if it had started one."""

    def note(self, run: Run, name: str) -> str:
        """Where the run of a trial is, as Markdown."""


class MlflowRuns:
    """Nested MLflow runs; results that could not be sent yet wait in ``folder``."""

    def __init__(self, parent_id: str, parent: Run, folder: Path) -> None:
        self.parent = parent
        self._parent_id, self._folder = parent_id, folder

    def start(self, name: str, *, study: str, trial: int) -> Run:
        # The tags are part of the request that creates the run, so that a process killed right after it leaves a run
        # that can be found.
        tags = {"retinaflow.command": "trial", STUDY: study, TRIAL: str(trial), STATE: "running"}
        return tracking.start_child(self._parent_id, name=name, tags=tags, folder=self._folder)

    def end(self, run: Run, status: str, *, state: str, reason: str) -> None:
        assert isinstance(run, MlflowRun)
        run.set_tags({STATE: state, REASON: reason[:500]})
        tracking.end_run(run, status)

    def end_lost(self, *, study: str, trial: int, reason: str) -> None:
        try:
            found = tracking.children(self._parent_id, tags={STUDY: study, TRIAL: str(trial)})
        except StoreError as error:
            # The trial is queued again all the same.
            report(f"the run of trial {trial} stays RUNNING: {error}")
            return
        for run_id in found:
            run = tracking.open_run(run_id, self._folder, resumed=True)
            self.end(run, "KILLED", state="lost", reason=reason)

    def note(self, run: Run, name: str) -> str:
        record = replace(self._parent_record, run_id=run.run_id)
        if record.page is not None:
            return f"MLflow: [{name}]({record.page})"
        return f"MLflow: [{name}](http://127.0.0.1:5000/{record.path}) (while `mlflow ui` runs on this machine)"

    @cached_property
    def _parent_record(self) -> RunRecord:
        return store.find_run(self._parent_id)


class FolderRuns:
    """A folder per trial inside the folder of the search (``track=false``)."""

    def __init__(self, parent: Run, folder: Path) -> None:
        self.parent = parent
        self._folder = folder

    def start(self, name: str, *, study: str, trial: int) -> Run:
        run = FolderRun(self._folder / name)
        run.set_tags({STUDY: study, TRIAL: str(trial), STATE: "running"})
        return run

    def end(self, run: Run, status: str, *, state: str, reason: str) -> None:
        run.set_tags({STATE: state, REASON: reason, "retinaflow.status": status})

    def end_lost(self, *, study: str, trial: int, reason: str) -> None:
        for path in self._folder.glob(f"*/{TAGS}"):
            tags = tags_of_folder(path.parent)
            if (tags.get(STUDY), tags.get(TRIAL)) == (study, str(trial)):
                self.end(FolderRun(path.parent, resumed=True), "KILLED", state="lost", reason=reason)

    def note(self, run: Run, name: str) -> str:
        del run
        return f"Folder: `{self._folder / name}`"


def trial_name(number: int) -> str:
    """Name of the run of a trial."""
    return f"trial-{number:04d}"


class TrialRun(Run):
    """The run of a trial as a training logs to it: drops checkpoints, and passes on the metrics of evaluated epochs.

    It takes metrics, files and images. Parameters, tags and tables of a trial are logged to its own run.
    ``curves``: whether metrics by step are logged; with several seeds those of the first are.
    ``evaluated`` is called with the metrics of an epoch and may raise to end the training.
    """

    def __init__(self, run: Run, *, curves: bool, evaluated: Callable[[Mapping[str, float]], None]) -> None:
        self.run_id = run.run_id
        self._run, self._curves, self._evaluated = run, curves, evaluated

    def log_metrics(self, metrics: Mapping[str, float], *, step: int) -> None:
        if self._curves:
            self._run.log_metrics(metrics, step=step)
        if any(name.startswith("val/") for name in metrics):
            self._evaluated(metrics)

    def log_file(self, path: Path, folder: str | None = None) -> None:
        # 200 MB of weights per trial are of no use; the best settings are trained again in full.
        if folder != CHECKPOINTS:
            self._run.log_file(path, folder)

    def log_written(self, name: str, write: Callable[[Path], object]) -> None:
        self._run.log_written(name, write)

    def log_image(self, image: Pixels, *, key: str, step: int) -> None:
        self._run.log_image(image, key=key, step=step)
