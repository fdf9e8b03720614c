"""The detector as an MLflow model (models from code): MLflow runs this file and takes what ``set_model`` names.

Input: a frame with a column ``image``, each value a base64-encoded image file (JPEG, PNG, WebP, BMP). Output: one row
per detection: ``image`` (row of the input), ``x1, y1, x2, y2`` (pixels of that image), ``score``, ``label`` (class id),
``class`` (name), best score first within an image; an image without detections has no row. The parameter
``score_threshold`` leaves out detections that do not exceed it (those below the model's own are never made).

What is allowed is set when the model is loaded, never by a request: ``model_config=`` of ``mlflow.pyfunc.load_model``,
or, for ``mlflow models serve``, the environment variable ``SERVING_MODEL_CONFIG`` with a JSON object.
:class:`~retinaflow.runs.served_images.Limits` has the limits and their defaults. ``images="paths"`` takes
values as paths of files on this machine, for batches from Python; MLflow's server refuses to load a model so.

Whatever is wrong with a request is an MlflowException that the server answers with 400. Images are decoded and detected
one at a time over all threads of a process, so its memory does not grow with the number of requests.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel

from retinaflow.errors import DataError, SettingError
from retinaflow.inference.detector import Detector, MergedDetector
from retinaflow.runs.served_images import Limits, image_at, sent_image
from retinaflow.runs.served_requests import BadRequest, limit_request_bodies

COLUMNS = ("image", "x1", "y1", "x2", "y2", "score", "label", "class")
_SERVERS = ("__pyfunc_model_path__", "_MLFLOW_IS_IN_SERVING_ENVIRONMENT")
"""Environment variables that MLflow's scoring server has."""


class DetectorModel(PythonModel):
    """Loads the checkpoint that was logged with it."""

    detector: Detector | MergedDetector

    def load_context(self, context: Any) -> None:
        """Called once by MLflow. Raises SettingError for settings that it does not have."""
        settings = context.model_config or {}
        self.limits = Limits.of(settings)
        self.takes_paths = _takes_paths(settings.get("images", "base64"))
        if _is_server():
            limit_request_bodies(self.limits)
        self.detector = Detector.load(Path(context.artifacts["checkpoint"]))
        self.one_at_a_time = threading.Lock()

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Detections of every image of the frame. Raises BadRequest naming the row for what is no image."""
        del context
        threshold = _threshold((params or {}).get("score_threshold", 0.0))
        if "image" not in model_input:
            raise BadRequest(f"a column image is needed, but there are only {', '.join(map(str, model_input))}")
        if len(model_input) > self.limits.max_images and not self.takes_paths:
            raise BadRequest(
                f"a request may have {self.limits.max_images} images (max_images), but has {len(model_input)}"
            )
        rows = []
        for number, value in enumerate(model_input["image"]):
            try:
                with self.one_at_a_time:
                    rows += [(number, *row) for row in self._detect(value) if row[4] > threshold]
            except DataError as error:
                raise BadRequest(f"row {number}: {error}") from None
        return pd.DataFrame(rows, columns=list(COLUMNS)).astype({"image": "int64"})

    def _detect(self, value: Any) -> list[tuple[Any, ...]]:
        """Rows without the image's number."""
        file = image_at(value, self.limits) if self.takes_paths else sent_image(value, self.limits)
        found = self.detector.detect_file(file.data, file.size)
        taxonomy, (height, width) = self.detector.taxonomy, file.size
        boxes = found.boxes.astype(float) * [width, height, width, height]
        return [
            (*box, score, taxonomy.ids[label], taxonomy.labels[label])
            for box, score, label in zip(boxes.tolist(), found.score.tolist(), found.class_index.tolist(), strict=True)
        ]


def _is_server() -> bool:
    return any(os.environ.get(name) for name in _SERVERS)


def _takes_paths(images: Any) -> bool:
    if images not in ("base64", "paths"):
        raise SettingError(f"images must be base64 or paths, but got images={images!r}")
    if images == "paths" and _is_server():
        raise SettingError("a server must not read files that a request names (images=base64), but got images=paths")
    return bool(images == "paths")


def _threshold(value: Any) -> float:
    if not isinstance(value, int | float) or not 0 <= value <= 1:
        raise BadRequest(f"0 <= score_threshold <= 1 must hold, but got score_threshold={value!r}")
    return float(value)


set_model(DetectorModel())
