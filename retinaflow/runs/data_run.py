"""The run of a command that makes a data folder: its own files go there, so without MLflow nothing is logged."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from retinaflow.runs.run import NullRun, Run
from retinaflow.runs.tracking import start_run
from retinaflow.settings.data_commands import ConvertConfig, DownloadConfig


@contextlib.contextmanager
def data_run(command: str, config: ConvertConfig | DownloadConfig) -> Iterator[Run]:
    """An MLflow run beside the folder ``config.output``; with ``track=false`` one that does nothing."""
    if not config.track:
        yield NullRun()
        return
    parent = config.output.absolute().parent
    with start_run(command, track=True, experiment=config.experiment, output=parent) as run:
        yield run
