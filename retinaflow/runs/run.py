"""Where a command's results go: a run that takes parameters, metrics, tags, tables and figures.

:class:`FolderRun` (``track=false``) writes them to a folder; :class:`retinaflow.runs.mlflow_run.MlflowRun` writes the
same files to MLflow. A command takes a :class:`Run` and never asks which of the two it is.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from retinaflow.addresses import without_secrets
from retinaflow.data.spreadsheets import for_spreadsheet
from retinaflow.errors import DataError, SettingError, shown
from retinaflow.files import atomic_file, read_json, read_text
from retinaflow.runs.datasets import DatasetInput
from retinaflow.settings.data_settings import TrackingSettings
from retinaflow.settings.value_types import as_text

FIGURE_DPI = 110
TAGS = "tags.json"
STATUS_TAG, FINISHED = "retinaflow.status", "FINISHED"
"""Tag of a training without MLflow, which has the status of a run itself; its value after a whole training."""
DESCRIPTION = "mlflow.note.content"
"""Tag that ``mlflow ui`` shows as the description of a run, in Markdown."""
CHECKPOINTS = "checkpoints"
"""Folder in that of a training; its owner owns the run."""
IMAGES = "images"
"""Folder of images by step, where ``mlflow ui`` looks for them."""
Pixels = NDArray[np.uint8]


def as_parameters(settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings as the parameters of a run: as they are written, without the secrets of addresses."""
    return {name: without_secrets(as_text(value)) for name, value in settings.items()}


def _without_secrets(table: pd.DataFrame) -> pd.DataFrame:
    texts = table.select_dtypes(include=["object", "str"])
    cleaned = {
        name: column.map(lambda value: without_secrets(value) if isinstance(value, str) else value)
        for name, column in texts.items()
        if column.astype("str").str.contains("://", regex=False).any()
    }
    return table.assign(**{str(name): column for name, column in cleaned.items()}) if cleaned else table


class Run:
    """What a command logs its results to. This one logs nothing: it is the run of every rank but the first.

    Tables, figures and documents become files, which ``log_file`` stores; text is written without the secrets of
    addresses. ``log_image``: a uint8 RGB image ``[H, W, 3]`` of a step; images of one key are a series.
    ``log_model_input``: the logged model that the run uses, None: it is not known; ``evaluated_on``: the metrics of
    step 0 of the run are those of the model on these images. ``log_model``: the checkpoint that was evaluated at
    ``step``, on ``dataset``.
    """

    run_id: str = "none"

    def log_params(self, params: Mapping[str, Any]) -> None: ...
    def log_metrics(self, metrics: Mapping[str, float], *, step: int) -> None: ...
    def set_tags(self, tags: Mapping[str, str]) -> None: ...
    def set_description(self, text: str) -> None: ...
    def log_datasets(self, datasets: Sequence[DatasetInput]) -> None: ...
    def log_model_input(self, model_id: str | None, *, evaluated_on: DatasetInput | None = None) -> None: ...
    def log_file(self, path: Path, folder: str | None = None) -> None: ...
    def log_table(self, table: pd.DataFrame, name: str) -> None: ...
    def log_image(self, image: Pixels, *, key: str, step: int) -> None: ...
    def log_model(self, checkpoint: Path, *, register_as: str | None, step: int, dataset: DatasetInput) -> None: ...

    def log_json(self, document: Any, name: str) -> None:
        self.log_text(json.dumps(document, indent=1, default=str) + "\n", name)

    def log_text(self, text: str, name: str) -> None:
        self.log_written(name, lambda path: path.write_text(without_secrets(text), encoding="utf-8"))

    def log_csv(self, table: pd.DataFrame, name: str) -> None:
        self.log_written(name, lambda path: for_spreadsheet(_without_secrets(table)).to_csv(path, index=False))

    def log_figure(self, figure: Figure, name: str) -> None:
        self.log_written(name, lambda path: figure.savefig(path, dpi=FIGURE_DPI))

    def log_written(self, name: str, write: Callable[[Path], object]) -> None:
        """A file of that name, which ``write`` makes."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name
            write(path)
            self.log_file(path)


def tags_of_folder(folder: Path) -> dict[str, str]:
    """The tags of a run in a folder; none where there is no file of tags. Raises DataError for a damaged one."""
    path = folder / TAGS
    tags = read_json(path) if path.is_file() else {}
    if not isinstance(tags, dict):
        raise DataError(f"{path}: must hold the tags of a run, but holds {shown(tags)}; move the folder away")
    return tags


def refuse_folder_of_another(config: TrackingSettings, output: Path | None = None) -> None:
    """Raise SettingError where the files of a command would replace those of a training, or of a run that it reads.

    ``output``: another folder than that of the settings.
    """
    folder = (output or config.output).resolve()
    if STATUS_TAG in tags_of_folder(folder) or (folder / CHECKPOINTS / "last.pt").is_file():
        raise SettingError(
            f"output={folder}: the folder holds a training, whose files this would replace; give another output="
        )
    names = [*getattr(config, "runs", ()), getattr(config, "from_run", None), getattr(config, "calibrators", None)]
    read = [Path(part).resolve() for name in names if name is not None for part in name.split("+")]
    # A model may be named by its file.
    if any(folder == (path.parents[1] if path.parent.name == CHECKPOINTS else path) for path in read):
        raise SettingError(
            f"output must be another folder than those of the runs that are read, but got output={folder}"
        )


class FolderRun(Run):
    """The same files in a folder, and the metrics in ``metrics.jsonl``, which ``resumed`` continues.

    A folder has no evaluation view, no logged models and no registry; the tags name the model that was used.
    """

    def __init__(self, folder: Path, *, resumed: bool = False) -> None:
        if folder.exists() and not folder.is_dir():
            raise SettingError(f"output={folder}: must be a folder, but it is a file")
        folder.mkdir(parents=True, exist_ok=True)
        self.run_id = folder.name
        self.folder = folder
        self._metrics = folder / "metrics.jsonl"
        if not resumed:
            self._metrics.unlink(missing_ok=True)
        # A training that was killed repeats the steps since its last checkpoint, and their points are there already.
        self._last_step = self._last_steps()

    def _last_steps(self) -> dict[str, int]:
        """The last step of each metric in the file, from which a line cut short by a kill is removed."""
        if not self._metrics.is_file():
            return {}
        text = read_text(self._metrics)
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            self._metrics.write_text(whole, encoding="utf-8")
        last: dict[str, int] = {}
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                point = json.loads(line)
                step = int(point.pop("step"))
            except (ValueError, KeyError, TypeError, AttributeError):
                raise DataError(f"{self._metrics} line {number}: must be the metrics of a step; remove it") from None
            last |= {name: max(step, last.get(name, -1)) for name in point}
        return last

    def log_params(self, params: Mapping[str, Any]) -> None:
        self.log_json(as_parameters(params), "params.json")

    def log_metrics(self, metrics: Mapping[str, float], *, step: int) -> None:
        new = {name: float(value) for name, value in metrics.items() if step > self._last_step.get(name, -1)}
        if new:
            with self._metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **new}) + "\n")

    def set_tags(self, tags: Mapping[str, str]) -> None:
        self.log_json({**tags_of_folder(self.folder), **tags}, TAGS)

    def set_description(self, text: str) -> None:
        self.set_tags({DESCRIPTION: text})

    def log_datasets(self, datasets: Sequence[DatasetInput]) -> None:
        self.log_json([dataset.document() for dataset in datasets], "datasets.json")

    def log_file(self, path: Path, folder: str | None = None) -> None:
        target = self.folder / (folder or "") / path.name
        if path.resolve() != target.resolve():
            with atomic_file(target) as partial:
                partial.write_bytes(path.read_bytes())

    def log_image(self, image: Pixels, *, key: str, step: int) -> None:
        path = self.folder / IMAGES / key / f"step_{step:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)


def with_folder(run: Run, config: TrackingSettings) -> list[Run]:
    """Where the files of a command go that people open: the run, and ``output`` beside MLflow."""
    return [run, FolderRun(config.output)] if config.track else [run]
