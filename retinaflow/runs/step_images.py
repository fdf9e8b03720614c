"""Images of a run by step, as the Image Grid of ``mlflow ui`` reads them, each once.

MLflow keeps an image as two files in ``images/``, the whole one and a small one, whose names hold key, step and time.
Its own ``log_image`` puts a random number into them, so that a repeated call adds two files more; here the number
follows from run, key and step, and a repeated call replaces the files.
"""

from __future__ import annotations

import re
import tempfile
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlflow
from PIL import Image

from retinaflow.runs.run import IMAGES

SMALL = 256
"""Longest side of the small image, which the grid shows."""
_TAG = "mlflow.loggedImages"
_NAME = re.compile(r"(?P<key>.+)\+step\+(?P<step>\d+)\+timestamp\+\d+\+[^+]+\+compressed\.webp")


class StepImages:
    """The images of one run. Raises what MLflow raises."""

    def __init__(self, client: mlflow.MlflowClient, run_id: str) -> None:
        self._client, self._run_id = client, run_id
        self._known: set[tuple[str, int]] | None = None
        self._is_tagged = False

    def deliver(self, file: Path, content: Mapping[str, Any], *, resumed: bool) -> None:
        """Send a PNG file. ``content``: its key, step and time. A resumed run keeps the image that it has."""
        key, step = content["key"].replace("/", "~"), int(content["step"])
        if resumed and (key, step) in self._images_of_run():
            return
        number = uuid.uuid5(uuid.NAMESPACE_OID, f"{self._run_id} {key} {step}")
        name = f"{key}+step+{step}+timestamp+{content['time']}+{number}"
        with tempfile.TemporaryDirectory() as folder:
            whole, small = Path(folder) / f"{name}.png", Path(folder) / f"{name}+compressed.webp"
            whole.write_bytes(file.read_bytes())
            with Image.open(file) as image:
                image.thumbnail((SMALL, SMALL))
                image.save(small)
            # The small one last: with it the image is complete.
            for path in (whole, small):
                self._client.log_artifact(self._run_id, str(path), IMAGES)
        if not self._is_tagged:
            self._client.set_tag(self._run_id, _TAG, "True")
            self._is_tagged = True

    def _images_of_run(self) -> set[tuple[str, int]]:
        """Key and step of the images that the run had when it was resumed."""
        if self._known is None:
            names = [Path(item.path).name for item in self._client.list_artifacts(self._run_id, IMAGES)]
            found = [match for name in names if (match := _NAME.fullmatch(name))]
            self._known = {(match["key"], int(match["step"])) for match in found}
        return self._known
