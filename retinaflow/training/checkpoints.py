"""The checkpoints of a training: ``last.pt`` to resume from, and ``best.pt`` with the weights alone."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from retinaflow.data.batching import AspectBuckets
from retinaflow.data.training_data import TrainingData
from retinaflow.errors import DataError
from retinaflow.files import atomic_file
from retinaflow.inference.checkpoint import Checkpoint, save_checkpoint
from retinaflow.progress import report
from retinaflow.runs.run import CHECKPOINTS, Run
from retinaflow.settings.commands import TrainConfig
from retinaflow.settings.resolve import with_absolute_paths
from retinaflow.training.loop import Trainer


class Checkpoints:
    """Writes both files of a folder on rank 0; on other ranks every method does nothing."""

    def __init__(
        self, folder: Path, trainer: Trainer, data: TrainingData, config: TrainConfig, buckets: AspectBuckets
    ) -> None:
        self.last, self.best = folder / "last.pt", folder / "best.pt"
        self._trainer, self._data, self._config, self._buckets = trainer, data, config, buckets
        self._last_saved = float("-inf")
        self._last_step = trainer.step if trainer.step > 0 and self.last.is_file() else None

    @property
    def is_due(self) -> bool:
        """Whether ``save_minutes`` have passed since ``last.pt`` was written, as they have at the first step; False on
        all ranks but the first."""
        seconds = self._config.save_minutes * 60
        return self._trainer.world.is_first and seconds > 0 and time.monotonic() - self._last_saved >= seconds

    def take_over(self, best: Path) -> None:
        """Begin with the best checkpoint of the training that is resumed."""
        if self._trainer.world.is_first and best.resolve() != self.best.resolve():
            # Never written into: the file that is there may be linked from what waits for MLflow.
            with atomic_file(self.best) as partial:
                shutil.copyfile(best, partial)

    def save_best(self, checkpoint: Checkpoint) -> None:
        """Write ``best.pt``, the checkpoint that was evaluated."""
        if self._trainer.world.is_first:
            save_checkpoint(checkpoint, self.best)

    def save_last(self, progress: Mapping[str, Any], *, must: bool = False) -> None:
        """Write ``last.pt``. ``progress``: what resuming needs besides the state of the trainer.

        When it cannot be written the training continues, unless it ends with this checkpoint (``must``): the one before
        is whole, and there may be room for the next.
        """
        if not self._trainer.world.is_first:
            return
        self._last_saved = time.monotonic()
        problem = self._trainer.not_finite()
        if problem:
            report(f"no checkpoint at step {self._trainer.step}: {problem}. {self.what_last_holds}")
            return
        try:
            save_checkpoint(self.current(progress), self.last)
            self._last_step = self._trainer.step
        except DataError as error:
            if must:
                raise
            report(f"no checkpoint at step {self._trainer.step}, the training continues: {error}")

    @property
    def what_last_holds(self) -> str:
        """A sentence about ``last.pt``, for the message of a training that fails."""
        if self._last_step is None:
            return "No checkpoint has been written."
        return f"{self.last} holds the state after step {self._last_step}."

    def log(self, run: Run) -> None:
        """Log the files that are there."""
        for path in (self.last, self.best):
            if self._trainer.world.is_first and path.is_file():
                run.log_file(path, CHECKPOINTS)

    def current(self, progress: Mapping[str, Any] | None = None) -> Checkpoint:
        """The present weights as a checkpoint; with ``progress`` one to resume from."""
        trainer, data = self._trainer, self._data
        return Checkpoint(
            network=trainer.model.config,
            state={name: value.cpu() for name, value in trainer.evaluated_model.state_dict().items()},
            taxonomy=data.train.taxonomy,
            bins=data.bins,
            buckets=self._buckets,
            parents=self._config.parents,
            settings=with_absolute_paths(self._config),
            data_digest=data.digest,
            epoch=trainer.epoch,
            progress=None if progress is None else {**trainer.state(), **progress},
        )
