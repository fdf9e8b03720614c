"""A real MLflow store, the tiny data set, and trainings that several tests use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from retinaflow.cli import main
from retinaflow.settings.commands import TrainConfig
from retinaflow.settings.resolve import resolve

Result = TypeVar("Result")
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
