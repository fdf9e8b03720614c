"""Settings -> the trained model that they name, and how it turns outputs into detections."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from retinaflow.commands.evaluate import as_trained, find_checkpoint
from retinaflow.inference.checkpoint import Checkpoint, load_checkpoint
from retinaflow.progress import report
from retinaflow.runs import registry, store
from retinaflow.settings.model_groups import ModelSettings

Given = TypeVar("Given", bound=ModelSettings)


@dataclass(frozen=True)
class ChosenModel(Generic[Given]):
    """A checkpoint, and the settings with those that were not given from its training."""

    name: str
    """As it was given: a run id, a model URI or a path."""
    path: Path
    checkpoint: Checkpoint
    run_id: str | None
    """The run that trained it, None where that is not known."""
    config: Given

    @staticmethod
    def open(config: Given) -> ChosenModel[Given]:
        """Find and read it. Raises ValueError or FileNotFoundError when there is no such model."""
        name = config.from_run or store.last_run("train")
        path = find_checkpoint(name)
        report(f"model {name}" if config.from_run else f"model of the last training, run {name}")
        checkpoint = load_checkpoint(path)
        run_id = None if path == Path(name) else name
        if name.startswith("models:/"):
            run_id = registry.run_of_model(name)
        return ChosenModel(name, path, checkpoint, run_id, as_trained(config, checkpoint))

    def tags(self) -> dict[str, str]:
        """What links a run to the model that it uses."""
        run = {"retinaflow.model_run": self.run_id} if self.run_id else {}
        return {"retinaflow.model": self.name, "retinaflow.model_digest": self.checkpoint.digest[:16], **run}
