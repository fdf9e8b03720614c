"""Images of a run by step, as the Image Grid of ``mlflow ui`` reads them, each once.

MLflow keeps an image as two files in ``images/``, the whole one and a small one, whose names hold key, step and time.
Its own ``log_image`` puts a random number into them, so that a repeated call adds two files more; here the number
follows from run, key and step, and an image that the run has is not sent again.
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
_NAME = re.compile(
    r"(?P<key>.+)\+step\+(?P<step>\d+)\+timestamp\+(?P<time>\d+)\+[^+]+?(?P<small>\+compressed\.webp|\.png)"
)


class StepImages:
    """The images of one run. Raises what MLflow raises."""

    def __init__(self, client: mlflow.MlflowClient, run_id: str) -> None:
        self._client, self._run_id = client, run_id
        self._complete: set[tuple[str, int]] = set()
        self._times: dict[tuple[str, int], str] | None = None
        self._is_tagged = False

    def deliver(self, file: Path, content: Mapping[str, Any], *, resumed: bool) -> None:
        """Send a PNG file. ``content``: its key, step and time. A complete image stays as it is."""
        key, step = content["key"].replace("/", "~"), int(content["step"])
        # A process that was killed may have left the whole image alone: the same names replace it.
        time = self._times_of_run().get((key, step), content["time"]) if resumed else content["time"]
        if (key, step) in self._complete:
            return
        number = uuid.uuid5(uuid.NAMESPACE_OID, f"{self._run_id} {key} {step}")
        name = f"{key}+step+{step}+timestamp+{time}+{number}"
        with tempfile.TemporaryDirectory() as folder:
            whole, small = Path(folder) / f"{name}.png", Path(folder) / f"{name}+compressed.webp"
            whole.write_bytes(file.read_bytes())
            with Image.open(file) as image:
                image.thumbnail((SMALL, SMALL))
                image.save(small)
            # The small one last: with it the image is complete.
            for path in (whole, small):
                self._client.log_artifact(self._run_id, str(path), IMAGES)
        self._complete.add((key, step))
        if not self._is_tagged:
            self._client.set_tag(self._run_id, _TAG, "True")
            self._is_tagged = True

    def _times_of_run(self) -> dict[tuple[str, int], str]:
        """By key and step, the time of each image that the run had when it was resumed; notes which are complete."""
        if self._times is None:
            names = [Path(item.path).name for item in self._client.list_artifacts(self._run_id, IMAGES)]
            found = [match for name in names if (match := _NAME.fullmatch(name))]
            self._complete |= {(one["key"], int(one["step"])) for one in found if one["small"] != ".png"}
            self._times = {(one["key"], int(one["step"])): one["time"] for one in found}
        return self._times
