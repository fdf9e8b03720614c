"""What the user gave is used, also under ``mlflow run`` and also when it equals the default; and where paths begin."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlflow
import pytest

ROOT = Path(__file__).resolve().parents[2]


def _mlflow_run(folder: Path, entry_point: str, experiment: str, **given: object) -> subprocess.CompletedProcess[str]:
    binaries = Path(sys.executable).parent
    options = ("--env-manager", "local", "--experiment-name", experiment)
    words = [word for name, value in given.items() for word in ("-P", f"{name}={value}")]
    return subprocess.run(
        [str(binaries / "mlflow"), "run", str(ROOT), "-e", entry_point, *options, *words],
        env={**os.environ, "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def _params(experiment: str) -> dict[str, str]:
    (run,) = mlflow.search_runs(experiment_names=[experiment], output_format="list")
    params: dict[str, str] = run.data.params
    return params


@pytest.fixture
def folder(workshop: Any, tiny_dataset: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder and a YAML file that give other values than the defaults."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", workshop.uri)
    data: Path = tiny_dataset()
    (data / "retinaflow.yaml").write_text("exhaustive: true\n", encoding="utf-8")
    (data.parent / "mine.yaml").write_text("num_bins: 2\nbin_strategy: quantile\nseed: 5\n", encoding="utf-8")
    return data.parent


@pytest.mark.slow
def test_a_value_that_is_given_under_mlflow_run_wins_also_when_it_is_the_default(folder: Path) -> None:
    given = {"data": folder / "tiny", "config": folder / "mine.yaml", "output": folder / "out"}
    done = _mlflow_run(folder, "binning", "given", **given, exhaustive="false", num_bins=7)
    assert done.returncode == 0, done.stderr
    params = _params("given")
    assert (params["exhaustive"], params["num_bins"]) == ("false", "7"), "given, and equal to the defaults"
    assert (params["bin_strategy"], params["seed"]) == ("quantile", "5"), "from the file, as nobody gave another"
    assert params["balance"] == "0.75", "the value used, not auto"
    assert not [name for name in params if name.startswith("used/")]


@pytest.mark.slow
def test_a_value_that_is_given_as_auto_is_logged_as_given_and_as_used(folder: Path) -> None:
    (folder / "mine.yaml").write_text("num_buckets: 3\n", encoding="utf-8")
    given = {"data": folder / "tiny", "config": folder / "mine.yaml", "output": folder / "out", "num_buckets": "auto"}
    done = _mlflow_run(folder, "explore", "auto", samples=0, **given)
    assert done.returncode == 0, done.stderr
    params = _params("auto")
    assert (params["num_buckets"], params["used/num_buckets"]) == ("auto", "7")


@pytest.mark.slow
def test_a_relative_path_under_mlflow_run_is_explained(folder: Path) -> None:
    done = _mlflow_run(folder, "binning", "relative", data="tiny")
    assert done.returncode != 0
    assert f"data=tiny: no such folder\n(paths are relative to {ROOT}, the project's folder, in which" in done.stderr


@pytest.mark.parametrize(
    ("command", "given", "relative"),
    [
        ("binning", {"data": "nowhere"}, True),
        ("binning", {"config": "nowhere.yaml"}, True),
        ("binning", {"data": "tiny", "eval_ids": "ids/nowhere.txt"}, True),
        ("binning", {"data": "tiny", "images": "tiny/images,nowhere"}, True),
        ("binning", {"data": "/nowhere"}, False),
        ("binning", {"data": "tiny", "class_group": "Boat"}, False),
    ],
    ids=["data", "a file of settings", "a list of ids", "one of two folders", "an absolute path", "no path"],
)
def test_a_missing_relative_path_is_named_with_the_folder_that_it_is_relative_to(
    command: str, given: dict[str, str], relative: bool, folder: Path, workshop: Any, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(folder)
    assert workshop.cli(command, track="false", **given) == 2
    assert (f"\n(paths are relative to {folder})\n" in capsys.readouterr().err) == relative
