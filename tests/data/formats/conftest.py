"""Small images, and a shortcut through reading and checking."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from retinaflow.data.formats.checks import check
from retinaflow.data.formats.detection_set import DetectionSet
from retinaflow.data.formats.source import SourceSet
from retinaflow.data.tables import RowErrors

ImageWriter = Callable[..., Path]
Checked = Callable[..., tuple[DetectionSet, RowErrors, list[str]]]


@pytest.fixture
def write_image(tmp_path: Path) -> ImageWriter:
    """``write_image("a/b.jpg", width=40, height=20, orientation=1)`` writes a file under ``tmp_path``."""

    def write(name: str, *, width: int = 40, height: int = 20, orientation: int = 1) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        exif = Image.Exif()
        exif[274] = orientation
        Image.new("RGB", (width, height), (90, 120, 90)).save(path, exif=exif)
        return path

    return write


@pytest.fixture
def checked() -> Checked:
    """``checked(source, drop=False)`` -> the set, the errors, and what was said."""

    def run(
        source: SourceSet, errors: RowErrors | None = None, **given: Any
    ) -> tuple[DetectionSet, RowErrors, list[str]]:
        errors = errors or RowErrors()
        said: list[str] = []
        found = check(source, errors, **{"exhaustive": True, "report": said.append, **given})
        return found, errors, said

    return run
