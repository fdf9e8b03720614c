"""The wheel is the whole program: built from the tree and installed where no checkout is, it trains and serves."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import Distribution, PathDistribution
from pathlib import Path

import pytest
from documents import ROOT
from fresh_environment import fresh_environment, run_in
from made_index import TinyDataset
from workshop import SMALL as SMALLEST

pytestmark = pytest.mark.slow

SMALL = {**SMALLEST, "epochs": 1, "epoch_length": 8, "lr": 0.001, "weights": "none"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the tree, so that nothing of an earlier build gets into it."""
    folder = tmp_path_factory.mktemp("wheel")
    tree = folder / "tree"
    shutil.copytree(ROOT / "retinaflow", tree / "retinaflow", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, tree)
    (built,) = folder.glob("*.whl")
    return built


def pip(*words: str | Path) -> None:
    done = subprocess.run([sys.executable, "-m", "pip", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def flags(**settings: object) -> list[str]:
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def test_the_wheel_has_every_file_of_the_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("retinaflow/")}
    there = (path for path in (ROOT / "retinaflow").rglob("*") if path.is_file() and path.suffix != ".pyc")
    assert packed == {path.relative_to(ROOT).as_posix() for path in there}


def test_the_installed_wheel_trains_compares_explores_and_serves(
    wheel: Path, tiny_dataset: TinyDataset, tmp_path: Path
) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "unpacked")
    (metadata,) = (tmp_path / "unpacked").glob("*.dist-info")
    own: Distribution = PathDistribution(metadata)
    # Its requirements are all that there is besides it, without extras.
    python = fresh_environment(
        tmp_path / "environment", [line for line in own.requires or [] if "extra ==" not in line]
    )
    pip("--python", python, "install", "--quiet", "--no-deps", wheel)
    data, work = tiny_dataset(), tmp_path / "work"
    work.mkdir()
    store = f"sqlite:///{work}/mlflow.db"

    def run(*words: str | Path) -> str:
        done = run_in(python, *words, cwd=work, MLFLOW_TRACKING_URI=store)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    program = python.with_name("retinaflow")
    for words in (
        ["main", *flags(data=data, num_bins=2, **SMALL)],
        ["train", *flags(data=data, register_as="flowers", **SMALL)],
        ["compare", *flags(bootstrap=100)],
        ["explore", *flags(data=data)],
    ):
        run(program, *words)
    for page in ("compare/comparison.html", "explore/explore.html"):
        text = (work / "outputs" / page).read_text(encoding="utf-8")
        assert "</html>" in text
        assert "{{" not in text
    place = run("-c", "import retinaflow; print(retinaflow.__file__)").strip()
    assert Path(place).is_relative_to(tmp_path / "environment")
    image = base64.b64encode((data / "images" / "validation001.jpg").read_bytes()).decode()
    (work / "in.json").write_text(json.dumps({"dataframe_split": {"columns": ["image"], "data": [[image]]}}))
    served = ["-m", "mlflow", "models", "predict", "-m", "models:/flowers/1", "-i", "in.json", "-t", "json"]
    assert "predictions" in json.loads(run(*served, "--env-manager", "local"))
