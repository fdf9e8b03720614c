"""The commands of the documents: all can be given as they stand, and those of the tutorial lead to a served model."""

from __future__ import annotations

import base64
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import mlflow
import pytest
import requests

from retinaflow.cli import build_parser, main
from retinaflow.settings.commands import COMMANDS
from retinaflow.settings.resolve import resolve


class TinyDataset(Protocol):
    """The fixture of ``tests/conftest.py``."""

    def __call__(self, name: str = "tiny", *, train: int = 12, validation: int = 6, seed: int = 0) -> Path: ...


ROOT = Path(__file__).parents[1]
DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
TUTORIAL = ROOT / "docs" / "tutorial.md"
MINI = """
data: mydata
image_size: 64
num_buckets: 1
fpn_channels: 64
head_depth: 1
batch_size: 4
epochs: 1
epoch_length: 8
lr: 0.001
"""
"""The recipe with which the tutorial is tested: what it leads to is no detector, but every step is done."""
MORE = {"search": "--trials 1 --confirm_seeds 1 --sampling binned", "evaluate": "--bootstrap 20"}
"""Settings that make a step of the tutorial small."""


def blocks(document: Path, kind: str) -> list[str]:
    """The fenced blocks of a kind."""
    return re.findall(rf"^```{kind}\n(.*?)^```", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def commands(document: Path) -> list[list[str]]:
    """The words of every shell command, continued lines joined, comments and what stands after them left out."""
    lines = [line for block in blocks(document, "bash") for line in block.replace("\\\n", " ").splitlines()]
    parts = [part for line in lines for part in re.split(r"&&", line)]
    return [words for part in parts if (words := shlex.split(part, comments=True))]


def settings_of(words: list[str]) -> tuple[str, dict[str, str]] | None:
    """The entry point and the settings that a command gives it; None for a command of another program."""
    if words[0] in ("python", "torchrun") and "retinaflow" in words:
        given = vars(build_parser().parse_args(words[words.index("retinaflow") + 1 :]))
        return given.pop("command"), given
    if words[:3] != ["mlflow", "run", "."]:
        return None
    name = words[words.index("-e") + 1] if "-e" in words else "main"
    pairs = [words[place + 1].split("=", 1) for place, word in enumerate(words) if word == "-P"]
    return name, {pair[0]: pair[1] for pair in pairs}


ALL = [(document.name, words) for document in DOCUMENTS for words in commands(document)]
OURS = [
    (name, words)
    for name, words in ALL
    if words[:3] == ["mlflow", "run", "."] or (words[0] in ("python", "torchrun") and "retinaflow" in words)
]


def test_the_documents_show_commands() -> None:
    assert len(OURS) > 30
    assert len(commands(TUTORIAL)) > 12


@pytest.mark.parametrize(("document", "words"), OURS, ids=[f"{name}: {' '.join(words)[:90]}" for name, words in OURS])
def test_a_command_in_the_documents_can_be_given(document: str, words: list[str]) -> None:
    found = settings_of(words)
    assert found is not None, f"{document}: {' '.join(words)} starts no entry point"
    name, given = found
    assert name in COMMANDS, f"{document}: {name} is no entry point"
    # Files of runs and of the reader are not here; every other value is checked by the settings themselves.
    given = {setting: value for setting, value in given.items() if setting not in ("config", "data")}
    settings = resolve(COMMANDS[name], given)
    assert set(given) <= set(type(settings).model_fields), f"{document}: {name} lacks one of {sorted(given)}"


def test_the_recipe_of_the_tutorial_holds_settings_of_train_and_search(tmp_path: Path) -> None:
    (recipe,) = blocks(TUTORIAL, "yaml")
    (tmp_path / "recipe.yaml").write_text(recipe, encoding="utf-8")
    for name in ("train", "search"):
        assert resolve(COMMANDS[name], {"config": str(tmp_path / "recipe.yaml")}).config is not None


def test_what_the_index_of_the_package_names_is_there() -> None:
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| [^|`]+ \| (`[^|]+`) \| `retinaflow\.([\w.]+)`", text, flags=re.MULTILINE)
    assert len(rows) > 12
    for names, module in rows:
        place = ROOT / "retinaflow" / module.replace(".", "/")
        files = sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
        source = "\n".join(file.read_text(encoding="utf-8") for file in files)
        for name in re.findall(r"`(\w+)`", names):
            assert re.search(rf"^(?:def|class) {name}\b", source, flags=re.MULTILINE), f"{module} has no {name}"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An empty folder as the current one, with a store of its own."""
    uri, before = f"sqlite:///{tmp_path}/mlflow.db", mlflow.get_tracking_uri()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    with warnings.catch_warnings():
        # MLflow's tables are not yet made for SQLAlchemy 2.1, and say so once, when a store is first opened.
        warnings.simplefilter("ignore")
        mlflow.set_tracking_uri(uri)
        mlflow.search_experiments()
    yield uri
    # Choosing an experiment is remembered in the environment.
    os.environ.pop("MLFLOW_EXPERIMENT_ID", None)
    mlflow.set_tracking_uri(before)


@pytest.mark.slow
def test_the_tutorial_leads_to_a_served_model(
    tiny_dataset: TinyDataset, tmp_path: Path, store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every command of the tutorial in its order, with the small recipe, on the tiny set instead of the demo set."""
    (tmp_path / "recipe.yaml").write_text(MINI, encoding="utf-8")
    changed = {"demo": str(tiny_dataset())}
    said = ""
    for words in commands(TUTORIAL):
        if words[:3] == ["mlflow", "models", "serve"]:
            with serving(words, tmp_path, store) as port:
                answer = ask(port, next((tmp_path / "mycoco" / "val").iterdir()))
            assert "predictions" in answer
            continue
        assert words[:3] == ["python", "-m", "retinaflow"], f"{' '.join(words)}: a step that is not run here"
        words = [changed.get(word, word).replace("SEARCH_RUN", run_named_last(said)) for word in words[3:]]
        code = main([*words, *shlex.split(MORE.get(words[0], ""))])
        captured = capsys.readouterr()
        assert code == 0, f"{' '.join(words)}\n{captured.out}\n{captured.err}"
        said += captured.out
    for page in ("outputs/explore/explore.html", "outputs/compare/comparison.html"):
        assert (tmp_path / page).stat().st_size > 10_000


def run_named_last(text: str) -> str:
    """The run that a search said holds best.yaml."""
    found = re.findall(r"best\.yaml at run (\w+)", text)
    return str(found[-1]) if found else "none"


@contextmanager
def serving(words: list[str], folder: Path, store: str) -> Iterator[int]:
    """The served model, on a port of its own instead of the tutorial's."""
    environment = {**os.environ, "MLFLOW_TRACKING_URI": store, "PYTHONPATH": str(ROOT)}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [str(port) if word == "5001" else word for word in words]
    with (folder / "serve.log").open("w") as log:
        server = subprocess.Popen(words, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        for _ in range(600):
            try:
                if requests.get(f"http://127.0.0.1:{port}/ping", timeout=2).ok:
                    break
            except requests.ConnectionError:
                assert server.poll() is None, (folder / "serve.log").read_text()
                time.sleep(0.5)
        yield port
    finally:
        os.killpg(server.pid, 15)
        server.wait(timeout=30)


def ask(port: int, picture: Path) -> dict[str, object]:
    """What the tutorial's Python sends and gets."""
    frame = {"dataframe_records": [{"image": base64.b64encode(picture.read_bytes()).decode()}]}
    response = requests.post(f"http://127.0.0.1:{port}/invocations", json=frame, timeout=120)
    assert response.ok, response.text
    answer: dict[str, object] = json.loads(response.text)
    return answer
