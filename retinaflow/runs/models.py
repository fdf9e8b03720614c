"""The name of a trained model -> its checkpoint file and its run.

A name is what every command takes as ``from_run``: a run id, ``models:/NAME@ALIAS``, ``models:/NAME/VERSION``, the path
of a checkpoint file, or None for the last training. Copies of artifacts last as long as the process.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from retinaflow.inference.merged_checkpoint import Model, load_model
from retinaflow.progress import report
from retinaflow.runs import logged_model, registry, store

MODEL_URI = "models:/"


@dataclass(frozen=True)
class TrainedModel:
    """A model that was found: its ``name`` as it was given, the ``path`` of its checkpoint file, and the ``run_id`` of
    its training, None where that is not known."""

    name: str
    path: Path
    run_id: str | None

    @staticmethod
    def find(name: str | Path | None) -> TrainedModel:
        """The model of that name. Raises ValueError when there is none in the store; a path is not opened yet."""
        text = store.last_run("train") if name is None else str(name)
        if text.startswith(MODEL_URI):
            found = TrainedModel(text, registry.fetch_model(text), registry.run_of_model(text))
        elif Path(text).suffix == ".pt" or Path(text).is_file():
            found = TrainedModel(text, Path(text), None)
        else:
            found = TrainedModel(text, store.fetch(text, "checkpoints/best.pt"), text)
        report(f"model {text}" if name is not None else f"model of the last training, run {text}")
        return found

    @cached_property
    def checkpoint(self) -> Model:
        """The checkpoint or merged model, read once. Errors as of
        :func:`retinaflow.inference.checkpoint.load_checkpoint`."""
        return load_model(self.path)

    @cached_property
    def model_id(self) -> str | None:
        """Id of the logged model that has these weights; None when the store is not known to have one."""
        if self.name.startswith(MODEL_URI):
            return logged_model.model_of_name(self.name)
        return None if self.run_id is None else logged_model.model_of_run(self.run_id, self.checkpoint.digest)

    def tags(self) -> dict[str, str]:
        """Tags that link a run to the model that it uses."""
        run = {"retinaflow.model_run": self.run_id} if self.run_id else {}
        return {"retinaflow.model": self.name, "retinaflow.model_digest": self.checkpoint.digest[:16], **run}
