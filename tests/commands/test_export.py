"""``export``: the lines of docs/using-models.md run the file and find what ``predict`` finds."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from retinaflow.commands import export
from retinaflow.commands.train import TrainResult
from retinaflow.settings.commands import ExportConfig
from retinaflow.settings.resolve import resolve

pytest.importorskip("onnxruntime")
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "using-models.md"


@pytest.mark.slow
def test_an_exported_model_finds_what_evaluate_finds_by_the_lines_of_the_document(
    trained: TrainResult, evaluated: Path, workshop: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photo = workshop.data / "images" / "validation002.jpg"
    checkpoint = trained.checkpoint.absolute()
    monkeypatch.chdir(tmp_path)
    config = resolve(ExportConfig, {"from_run": str(checkpoint), "output": "model.onnx", "track": "false"})
    assert export.run(config) == Path("model.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"], "it may lie beside the files of a training"

    # An image of just the model's shape, 64 x 64, so that resizing leaves it as it is; here as the loader makes it.
    Image.open(photo).resize((64, 64), Image.Resampling.BILINEAR).save("photo.png")
    (lines,) = (
        text for text in re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL) if "onnxruntime" in text
    )
    names: dict[str, Any] = {}
    exec(lines.replace("photo.jpg", "photo.png"), names)
    found = names["scores"] > 0
    assert names["boxes"].shape == (300, 4)
    # 80 x 80 pixels are reduced a little otherwise by Pillow than by the loader: the same objects, nearly the same
    # scores. Exactly the same pixels are compared in tests/detector/test_onnx_graph.py.
    expected = pd.read_csv(evaluated / "predictions.csv").query("ImageID == 'validation002'")
    assert abs(found.sum() - len(expected)) <= 0.2 * len(expected)
    np.testing.assert_allclose(names["scores"][0], expected["Score"].max(), atol=0.05)
