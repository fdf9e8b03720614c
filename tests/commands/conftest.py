"""A real MLflow store, the tiny data set, and trainings that several tests look at."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import mlflow
import pytest

from retinaflow.cli import main
from retinaflow.commands import evaluate, train
from retinaflow.config import EvaluateConfig, TrainConfig
from retinaflow.resolving import resolve

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


class TinyDataset(Protocol):
    """The fixture of ``tests/conftest.py``."""

    def __call__(self, name: str = "tiny", *, train: int = 12, validation: int = 6, seed: int = 0) -> Path: ...


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


@pytest.fixture(scope="session")
def _workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    workshop = Workshop(tmp_path_factory.mktemp("commands"))
    folder, before = workshop.folder, mlflow.get_tracking_uri()
    with warnings.catch_warnings():
        # MLflow's tables are not yet made for SQLAlchemy 2.1, and say so once, when a store is first opened.
        warnings.simplefilter("ignore")
        mlflow.set_tracking_uri(workshop.uri)
        mlflow.search_experiments()
    mlflow.set_tracking_uri(before)
    yield workshop
    # Checkpoints of 45 MB and more must not outlive the tests.
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def workshop(_workshop: Workshop, tiny_dataset: TinyDataset, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workshop]:
    """The workshop as current folder, its store as MLflow's."""
    if not _workshop.data.exists():
        shutil.move(tiny_dataset(), _workshop.data)
    monkeypatch.chdir(_workshop.folder)
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(_workshop.uri)
    yield _workshop
    # Choosing an experiment is remembered in the environment.
    os.environ.pop("MLFLOW_EXPERIMENT_ID", None)
    mlflow.set_tracking_uri(before)


@pytest.fixture
def trained(workshop: Workshop) -> train.TrainResult:
    """A tracked training of two epochs, registered as tiny-detector."""
    return workshop.once("trained", lambda: train.run(workshop.settings(register_as="tiny-detector")))


@pytest.fixture
def judged(trained: train.TrainResult, workshop: Workshop) -> Path:
    """The output folder of ``evaluate`` of the training."""

    def make() -> Path:
        output = workshop.folder / "judged"
        evaluate.run(resolve(EvaluateConfig, {"from_run": trained.run_id, "output": str(output), "bootstrap": 0}))
        return output

    result: Path = workshop.once("judged", make)
    return result
