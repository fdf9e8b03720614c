"""What a user sees by name, and what a toy training computes: neither may change unnoticed.

``golden/outside.json`` holds the commands, the flags of each, the entry points of MLproject, and what one run of each
cheap command leaves: MLflow parameters with their values, metrics, tags, artifacts, files, columns of tables. After an
intended change ``UPDATE_GOLDEN=1 pytest -n 0 tests/test_outside.py`` writes both files of ``golden/`` anew; read the
difference before you commit it.

``golden/toy_training.json`` holds the losses and gradient norms of the first steps, and ``per_class_ap.csv`` without
AP. Processors round differently, and a training amplifies it: between kernels for AVX512 and for SSE the losses of the
first three steps differ by up to 0.05%, the gradient norms by 0.7%, AP by half of itself. So a change that must not
alter results is compared on one machine, to the last digit::

    RETINAFLOW_EXACT_TRACE=/some/folder/trace.json pytest -n 0 tests/test_outside.py -k exact

writes the file if there is none, and compares with it otherwise: every step's losses and gradient norm, every other
metric but speeds, and every cell of every table (``per_class_ap.csv``, predictions, exposure, ...) of all runs.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from retinaflow.cli import build_parser

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).with_name("golden")
OUTSIDE, TOY_TRAINING = GOLDEN / "outside.json", GOLDEN / "toy_training.json"
DECLARED, LEFT = "declared", "left by the toy runs"
TOLERANCE = {"train/loss_class": 2e-3, "train/loss_box": 2e-3, "train/gradient_norm": 3e-2}
"""Curves that are compared, and the relative difference allowed between processors."""
FIRST_STEPS = 3
OF_THE_MACHINE = re.compile(r"system/.*|.*images_per_second|train/(waiting_for_images|peak_memory_mib)")
"""Metrics that differ from run to run."""
OF_THE_CHECKOUT = re.compile(r"mlflow\..*|retinaflow\.(commit|dirty)")
"""Tags that are MLflow's own, or that only a git checkout has."""

Names = dict[str, list[str]]


def difference(expected: Names, found: Names) -> str:
    """What was added and removed, by section; empty when nothing was."""
    lines = []
    for name in sorted(expected.keys() | found.keys()):
        before, now = expected.get(name, []), found.get(name, [])
        if before == now:
            continue
        removed = [value for value in before if value not in now]
        added = [value for value in now if value not in before]
        moved = "" if removed or added else "; the order differs"
        lines.append(f"{name}: added {_shown(added)}, removed {_shown(removed)}{moved}")
    return "\n".join(lines)


def _shown(values: list[str]) -> str:
    more = f" and {len(values) - 20} more" if len(values) > 20 else ""
    return (", ".join(values[:20]) or "nothing") + more


def _write(path: Path, document: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _golden(part: str) -> Names:
    names: Names = _read(OUTSIDE).get(part, {})
    return names


def _checked(part: str, found: Names) -> Names:
    """What was found, written to the golden file first when that is asked for."""
    if os.environ.get("UPDATE_GOLDEN") == "1":
        _write(OUTSIDE, {**_read(OUTSIDE), part: found})
    return found


# What is declared


@pytest.fixture(scope="module")
def declared() -> Names:
    """Commands, flags, and the entry points of MLproject."""
    (commands,) = (action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction))
    entry_points = yaml.safe_load((ROOT / "MLproject").read_text(encoding="utf-8"))["entry_points"]
    names = {"commands": list(commands.choices), "entry points of MLproject": list(entry_points)}
    for command, parser in commands.choices.items():
        names[f"flags of {command}"] = sorted(flag for action in parser._actions for flag in action.option_strings)
    return _checked(DECLARED, names)


@pytest.mark.parametrize("name", _golden(DECLARED))
def test_a_declared_name_stays(name: str, declared: Names) -> None:
    found = difference({name: _golden(DECLARED)[name]}, {name: declared.get(name, [])})
    assert not found, f"{found}\n(if intended: UPDATE_GOLDEN=1)"


def test_nothing_else_is_declared(declared: Names) -> None:
    assert sorted(declared) == sorted(_golden(DECLARED))


# What the toy runs leave


class ToyRuns:
    """The folder in which ``toy_run.py`` ran, and its record."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runs: dict[str, dict[str, Any]] = _read(folder / "record.json")

    def masked(self, text: str) -> str:
        """A text without what is new in each run: ids, names of runs, the folder."""
        for command, run in self.runs.items():
            text = text.replace(run["run_id"], f"RUN_OF_{command}").replace(run["run_name"], f"RUN_OF_{command}")
        return text.replace(f"{self.folder}/", "").replace(str(self.folder), ".")

    def artifacts(self, command: str) -> Path:
        """The folder of a run's artifacts."""
        return Path(self.runs[command]["artifacts"].removeprefix("file://"))

    def files(self, folder: Path) -> list[str]:
        """The files in a folder and its subfolders; image ids without number, images by step without time."""
        found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
        names = {self.masked(path.as_posix()) for path in found if not path.name.startswith(".")}
        names = {re.sub(r"timestamp\+\d+\+[0-9a-f-]{36}", "TIME", name) for name in names}
        return sorted({re.sub(r"(train|validation)\d\d", r"\1NN", name) for name in names})

    def tables(self) -> Iterator[tuple[str, dict[str, list[str]]]]:
        """Every table of every tracked run, as "command/file" and its columns of texts."""
        for command in self.runs:
            folder = self.artifacts(command)
            for path in sorted(folder.rglob("*")):
                if path.suffix in (".csv", ".parquet"):
                    columns = _columns(path)
                    yield (
                        f"{command}/{path.relative_to(folder)}",
                        {name: [self.masked(cell) for cell in cells] for name, cells in columns.items()},
                    )


def _columns(path: Path) -> dict[str, list[str]]:
    if path.suffix == ".parquet":
        return {str(name): [repr(cell) for cell in cells.tolist()] for name, cells in pd.read_parquet(path).items()}
    with path.open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    return {name: [row[number] for row in rows] for number, name in enumerate(header)}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> ToyRuns:
    """All commands run once on one thread, so that each number is the same in every run on a machine."""
    folder = tmp_path_factory.mktemp("toy")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("toy_run.py"))],
        cwd=folder,
        env={
            **environment,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "MLFLOW_TRACKING_URI": "sqlite:///mlflow.db",
            "RETINAFLOW_CACHE": str(folder / "cache"),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return ToyRuns(folder)


@pytest.fixture(scope="module")
def left(toy: ToyRuns) -> Names:
    """Names of what each run has left."""
    names: Names = {}
    for command, run in toy.runs.items():
        names[f"parameters of {command}"] = sorted(f"{k}={toy.masked(v)}" for k, v in run["params"].items())
        names[f"metrics of {command}"] = sorted(name for name in run["points"] if not name.startswith("system/"))
        names[f"tags of {command}"] = sorted(name for name in run["tags"] if not OF_THE_CHECKOUT.fullmatch(name))
        names[f"artifacts of {command}"] = toy.files(toy.artifacts(command))
    for folder in sorted([*toy.runs, *(path.name for path in toy.folder.glob("untracked-*"))]):
        names[f"files in output of {folder}"] = toy.files(toy.folder / folder)
    for table, columns in toy.tables():
        names[f"columns of {table}"] = list(columns)
    return _checked(LEFT, names)


@pytest.mark.slow
@pytest.mark.parametrize("name", _golden(LEFT))
def test_a_name_that_a_run_leaves_stays(name: str, left: Names) -> None:
    found = difference({name: _golden(LEFT)[name]}, {name: left.get(name, [])})
    assert not found, f"{found}\n(if intended: UPDATE_GOLDEN=1)"


@pytest.mark.slow
def test_the_runs_leave_nothing_else(left: Names) -> None:
    assert sorted(left) == sorted(_golden(LEFT))


# What the toy training computes


@pytest.mark.slow
@pytest.mark.parametrize("name", TOLERANCE)
def test_a_curve_of_the_toy_training_has_every_step(name: str, toy: ToyRuns) -> None:
    assert [step for step, _ in toy.runs["train"]["points"][name]] == list(range(1, 25))


@pytest.mark.slow
def test_the_first_steps_of_the_toy_training_stay(toy: ToyRuns) -> None:
    points = toy.runs["train"]["points"]
    curves = {name: [value for _, value in points[name][:FIRST_STEPS]] for name in TOLERANCE}
    table = _columns(toy.artifacts("train") / "per_class_ap.csv")
    found = {"curves": curves, "per_class_ap.csv": {name: table[name] for name in table if name != "ap"}}
    if os.environ.get("UPDATE_GOLDEN") == "1":
        _write(TOY_TRAINING, found)
    expected = _read(TOY_TRAINING)
    assert found["per_class_ap.csv"] == expected["per_class_ap.csv"]
    for name, tolerance in TOLERANCE.items():
        assert curves[name] == pytest.approx(expected["curves"][name], rel=tolerance), name


@pytest.mark.slow
def test_the_toy_runs_stay_exact_to_the_last_digit(toy: ToyRuns) -> None:
    asked = os.environ.get("RETINAFLOW_EXACT_TRACE")
    if not asked:
        pytest.skip("RETINAFLOW_EXACT_TRACE names no file of this machine to compare with")
    found = {
        f"{command}: {name} by step": [f"{step}: {value!r}" for step, value in points]
        for command, run in toy.runs.items()
        for name, points in run["points"].items()
        if not OF_THE_MACHINE.fullmatch(name)
    }
    for table, columns in toy.tables():
        found |= {f"{table}: {name}": cells for name, cells in columns.items()}
    if not Path(asked).is_file():
        _write(Path(asked), found)
        pytest.skip(f"{asked} was written: {sum(map(len, found.values())):,} values to compare with")
    different = difference(_read(Path(asked)), found)
    assert not different, different
