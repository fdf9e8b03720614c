"""The detector as an MLflow model (models from code): MLflow runs this file and takes what ``set_model`` names.

Input: a frame with a column ``image``, each value a base64-encoded image file or the path of one. Output: one row per
detection: ``image`` (row of the input), ``x1, y1, x2, y2`` (pixels of that image), ``score``, ``label`` (class id).
"""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import torch
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel
from numpy.typing import NDArray

from retinaflow.data.image_files import decode_bytes
from retinaflow.detector.postprocess import detect
from retinaflow.training.checkpoint import Checkpoint, load_checkpoint
from retinaflow.training.thinning import postprocess_config

COLUMNS = ("image", "x1", "y1", "x2", "y2", "score", "label")


class DetectorModel(PythonModel):
    """Loads the checkpoint that was logged with it."""

    checkpoint: Checkpoint

    def load_context(self, context: Any) -> None:
        """Called once by MLflow."""
        self.checkpoint = load_checkpoint(Path(context.artifacts["checkpoint"]))
        self.model = self.checkpoint.build(torch.device("cpu"))
        expand = self.checkpoint.parents == "expand"
        self.ancestors = torch.from_numpy(self.checkpoint.taxonomy.is_ancestor) if expand else None

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Detections of every image of the frame. Raises ValueError for a value that is no image."""
        del context, params
        rows = [row for number, value in enumerate(model_input["image"]) for row in self._detect(number, str(value))]
        return pd.DataFrame(rows, columns=list(COLUMNS))

    def _detect(self, number: int, value: str) -> list[tuple[Any, ...]]:
        data = _bytes(number, value)
        height, width = _size(number, data)
        buckets = self.checkpoint.buckets
        shape = buckets.shapes[int(buckets.assign(np.array([[height, width]]))[0])]
        # By the loader's own way of reducing an image, so that serving gives the scores of evaluating.
        resized = decode_bytes(data, (height, width), shape, name=f"row {number}")
        with torch.inference_mode():
            output = self.model(torch.from_numpy(resized).permute(2, 0, 1)[None])
            settings = self.checkpoint.settings
            names = ("nms", "nms_iou", "score_threshold", "max_detections")
            config = postprocess_config(
                **{name: settings[name] for name in names},
                taxonomy=self.checkpoint.taxonomy,
                bins=self.checkpoint.bins,
            )
            found = detect(output, self.model.anchors(shape), config=config, ancestors=self.ancestors)
        boxes = found.boxes.numpy().astype(float) * [width, height, width, height]
        return [
            (number, *box, float(score), self.checkpoint.taxonomy.ids[label])
            for box, score, label in zip(boxes.tolist(), found.score, found.label.tolist(), strict=True)
        ]


def _bytes(number: int, value: str) -> NDArray[np.uint8]:
    try:
        data = (
            Path(value).read_bytes()
            if len(value) < 1024 and Path(value).is_file()
            else base64.b64decode(value, validate=True)
        )
    except (binascii.Error, ValueError):
        raise ValueError(f"row {number}: image must be a file or base64, but is neither") from None
    return np.frombuffer(data, dtype=np.uint8)


def _size(number: int, data: NDArray[np.uint8]) -> tuple[int, int]:
    """(height, width) of the pixels, as they lie in the file."""
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    pixels = cv2.imdecode(data, flags) if len(data) else None
    if pixels is None:
        raise ValueError(f"row {number}: not a readable image")
    height, width = pixels.shape[:2]
    return height, width


set_model(DetectorModel())
