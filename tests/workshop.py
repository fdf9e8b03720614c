"""A real MLflow store, the tiny data set, and trainings that several tests use."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from retinaflow.cli import main
from retinaflow.settings.commands import TrainConfig
from retinaflow.settings.resolve import resolve

Result = TypeVar("Result")


def make_store(folder: Path) -> str:
    """The address of a new store of MLflow in a folder, with all that it stores."""
    import mlflow

    uri, before = f"sqlite:///{folder}/mlflow.db", mlflow.get_tracking_uri()
    # A store remembers the folder in which it was first opened as the place of its artifacts.
    with contextlib.chdir(folder), warnings.catch_warnings():
        # MLflow's tables are not yet made for SQLAlchemy 2.1, and say so once, when a store is first opened.
        warnings.simplefilter("ignore")
        mlflow.set_tracking_uri(uri)
        mlflow.search_experiments()
    mlflow.set_tracking_uri(before)
    return uri


SMALL = {
    "image_size": 64,
    "num_buckets": 1,
    "batch_size": 4,
    "fpn_channels": 64,
    "head_depth": 1,
    "epochs": 2,
    "precision": "float32",
}
"""The smallest training there is."""


@dataclass
class Workshop:
    """One folder for all tests here; the store, the data and the outputs lie in it."""

    folder: Path
    done: dict[str, Any] = field(default_factory=dict)

    @property
    def uri(self) -> str:
        return f"sqlite:///{self.folder}/mlflow.db"

    @property
    def data(self) -> Path:
        return self.folder / "tiny"

    def once(self, name: str, make: Callable[[], Result]) -> Result:
        """The result of the first call of that name; a failure is not tried again."""
        if name not in self.done:
            try:
                self.done[name] = make()
            except Exception as error:
                self.done[name] = error
        if isinstance(self.done[name], Exception):
            raise self.done[name]
        result: Result = self.done[name]
        return result

    def settings(self, **more: Any) -> TrainConfig:
        """Settings of a small training."""
        return resolve(TrainConfig, {"data": str(self.data), **SMALL, **more})

    def cli(self, command: str, **given: Any) -> int:
        """The exit code of a command line."""
        return main([command, *(word for name, value in given.items() for word in (f"--{name}", str(value)))])
