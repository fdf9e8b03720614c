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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests

from retinaflow.cli import build_parser
from retinaflow.config import COMMANDS
from retinaflow.resolving import resolve

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
MORE = {"search": "--trials 2 --confirm_seeds 1 --sampling uniform,binned", "evaluate": "--bootstrap 20"}
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
OURS = [(name, words) for name, words in ALL if "retinaflow" in words or words[:3] == ["mlflow", "run", "."]]


def test_the_documents_show_commands() -> None:
    assert len(OURS) > 30
    assert len(commands(TUTORIAL)) > 12


@pytest.mark.parametrize(("document", "words"), OURS, ids=[f"{name}: {' '.join(words)[:90]}" for name, words in OURS])
def test_a_command_in_the_documents_can_be_given(document: str, words: list[str]) -> None:
    if "predict" in words and "predict" not in COMMANDS:
        pytest.skip("predict is not there yet")
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


@pytest.mark.slow
def test_the_tutorial_leads_to_a_served_model(tmp_path: Path) -> None:
    """Every command of the tutorial in its order, with the small recipe, each in a process of its own."""
    (tmp_path / "recipe.yaml").write_text(MINI, encoding="utf-8")
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db", "PYTHONPATH": str(ROOT)}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    said = ""
    for words in commands(TUTORIAL):
        if words[:3] == ["mlflow", "models", "serve"]:
            with serving(words, tmp_path, environment) as port:
                answer = ask(port, next((tmp_path / "mycoco" / "val").iterdir()))
            assert set(answer) >= {"predictions"}
            continue
        name = words[words.index("retinaflow") + 1]
        if name not in COMMANDS and name == "predict":
            continue
        words = [word.replace("SEARCH_RUN", run_named_last(said)) for word in words]
        words += shlex.split(MORE.get(name, ""))
        done = subprocess.run(
            [sys.executable, *words[1:]], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}\n{done.stderr}"
        said += done.stdout
    for page in ("outputs/explore/explore.html", "outputs/compare/comparison.html"):
        assert (tmp_path / page).stat().st_size > 10_000


def run_named_last(text: str) -> str:
    """The run that a search said holds best.yaml."""
    found = re.findall(r"best\.yaml at run (\w+)", text)
    return str(found[-1]) if found else "none"


@contextmanager
def serving(words: list[str], folder: Path, environment: dict[str, str]) -> Iterator[int]:
    """The served model, on a port of its own instead of the tutorial's."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [str(port) if word == "5001" else word for word in words]
    log = (folder / "serve.log").open("w")
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
        log.close()


def ask(port: int, picture: Path) -> dict[str, object]:
    """What the tutorial's Python sends and gets."""
    frame = {"dataframe_records": [{"image": base64.b64encode(picture.read_bytes()).decode()}]}
    response = requests.post(f"http://127.0.0.1:{port}/invocations", json=frame, timeout=120)
    assert response.ok, response.text
    answer: dict[str, object] = json.loads(response.text)
    return answer
