"""Small images, and a shortcut through reading and checking."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from retinaflow.data.formats.checks import check
from retinaflow.data.formats.conversion import convert
from retinaflow.data.formats.detection_set import DetectionSet
from retinaflow.data.formats.known_formats import layout_of
from retinaflow.data.formats.source import SourceSet
from retinaflow.data.tables import RowErrors
from retinaflow.settings.conversion_settings import ConvertConfig, Layout
from retinaflow.settings.resolve import resolve

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
def said(capsys: pytest.CaptureFixture[str]) -> Callable[[], list[str]]:
    """``said()`` -> the lines that were printed since the last call."""
    return lambda: capsys.readouterr().out.splitlines()


@pytest.fixture
def checked(said: Callable[[], list[str]]) -> Checked:
    """``checked(source, drop=False)`` -> the set, the errors, and what was said, by the reading of the source too."""

    def run(
        source: SourceSet, errors: RowErrors | None = None, **given: Any
    ) -> tuple[DetectionSet, RowErrors, list[str]]:
        errors = errors or RowErrors()
        found = check(ConvertConfig(**{"exhaustive": True, **given}), source, errors)
        return found, errors, said()

    return run


@dataclass(frozen=True)
class Converted:
    """What a conversion made: the set, the errors that it dropped, the lines that it printed, and its folder."""

    found: DetectionSet
    errors: RowErrors
    lines: list[str]
    folder: Path

    @property
    def splits(self) -> dict[str, int]:
        """Images of each split."""
        return dict(self.found.images["split"].value_counts())

    @property
    def ids(self) -> dict[str, str]:
        """Image id -> split."""
        return dict(zip(self.found.images["image_id"], self.found.images["split"], strict=True))

    def said(self, text: str) -> bool:
        """Whether a line holds a text."""
        return any(text in line for line in self.lines)


Converter = Callable[..., Converted]


@pytest.fixture
def converted(tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]) -> Converter:
    """``converted(folder, to="openimages", **settings)`` converts without a split of its own making."""

    def run(data: Path, *, to: Layout = "openimages", **given: Any) -> Converted:
        folder = tmp_path_factory.mktemp("converted")
        config = resolve(ConvertConfig, {"data": str(data), "validation_fraction": 0, "output": str(folder), **given})
        capsys.readouterr()
        found, errors = convert(config, data, folder, layout=layout_of(data), target=to)
        return Converted(found, errors, capsys.readouterr().out.splitlines(), folder)

    return run
