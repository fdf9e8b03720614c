"""A logged model names all that it needs: it serves in an environment that has nothing else."""

from __future__ import annotations

import base64
import json
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import mlflow
import pytest
from fresh_environment import fresh_environment, run_in

from retinaflow.commands.train import TrainResult
from retinaflow.runs import served_requirements
from retinaflow.runs.served_requirements import imported_modules, serving_requirements


def test_the_requirements_are_what_the_served_code_imports_and_no_more() -> None:
    modules = imported_modules()
    # Each is imported by another file: the server's, the detector's, the decoder's, the progress bar's.
    assert {"mlflow", "torch", "simplejpeg", "cv2", "tqdm", "albumentations"} <= modules
    assert not modules & {"optuna", "matplotlib", "jinja2", "cmaes", "onnx", "json", "retinaflow"}
    names = [line.partition("==")[0] for line in serving_requirements()]
    assert names == sorted(names)
    # One distribution for a module that three have files of, and the distribution's name where it is another one.
    assert {"mlflow", "opencv-python-headless", "pillow"} <= set(names)
    assert [line.partition("==")[0] for line in serving_requirements(["timm"])] == sorted([*names, "timm"])
    assert not {"mlflow-skinny", "mlflow-tracing", "cv2", "PIL"} & set(names)


def test_a_version_of_one_machine_is_given_as_the_published_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class Local:
        version, requires = "2.9.1+cpu", None

    def asked(name: str) -> Any:
        return Local if name == "torch" else distribution(name)

    monkeypatch.setattr(served_requirements, "distribution", asked)
    assert "torch==2.9.1" in serving_requirements()


@pytest.mark.slow
def test_the_logged_model_predicts_in_an_environment_of_exactly_its_requirements(
    trained: TrainResult, workshop: Any, tmp_path: Path
) -> None:
    del trained
    model = Path(mlflow.artifacts.download_artifacts("models:/tiny-detector/1", dst_path=str(tmp_path / "model")))
    python = fresh_environment(tmp_path / "environment", (model / "requirements.txt").read_text().split())
    image = base64.b64encode((workshop.data / "images" / "validation001.jpg").read_bytes()).decode()
    request = {"dataframe_split": {"columns": ["image"], "data": [[image]]}}
    (tmp_path / "request.json").write_text(json.dumps(request))
    words = ["-m", "mlflow", "models", "predict", "-m", model, "-i", "request.json", "-t", "json"]
    done = run_in(python, *words, "--env-manager", "local", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)["predictions"]
    assert found
    assert set(found[0]) == {"image", "x1", "y1", "x2", "y2", "score", "label", "class"}
    # What the requirements lack is not there: the environment is what the test takes it for.
    assert run_in(python, "-c", "import optuna", cwd=tmp_path).returncode == 1
    assert run_in(python, "-c", "import retinaflow", cwd=tmp_path).returncode == 1
