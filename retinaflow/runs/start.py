"""The run of a command: one of MLflow, or with ``track=false`` a folder, for which MLflow is not loaded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from retinaflow.runs.run import FolderRun, Run, refuse_folder_of_another
from retinaflow.settings.data_settings import TrackingSettings


@contextlib.contextmanager
def start_run(
    command: str,
    config: TrackingSettings,
    *,
    output: Path | None = None,
    name: str | None = None,
    default_name: str | None = None,
    resume: str | None = None,
) -> Iterator[Run]:
    """Open a run, nested when one is open; end it by how the block ends.

    ``output``: another folder than that of the settings. ``name``: of the run; ``default_name``: where neither this,
    nor the environment, nor ``mlflow run --run-name`` gives one. ``resume``: id of an MLflow run to resume instead of a
    new one. Raises StoreError when no run can be started, and SettingError where the files of a command would replace
    those of a training or of a run that it reads.
    """
    output = output or config.output
    if command != "train":
        refuse_folder_of_another(config, output)
    if not config.track:
        yield FolderRun(output, resumed=resume is not None)
        return
    from retinaflow.runs.tracking import start_tracked_run

    with start_tracked_run(command, config, output=output, name=name, default_name=default_name, resume=resume) as run:
        yield run
