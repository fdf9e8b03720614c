"""The commands of the tutorial, in their order, lead to a served model."""

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

import mlflow
import pytest
import requests
from documents import ROOT, TUTORIAL, commands
from made_index import TinyDataset

from retinaflow.cli import main

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
@pytest.mark.trains
def test_the_tutorial_leads_to_a_served_model(
    tiny_dataset: TinyDataset, tmp_path: Path, store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every command of the tutorial in its order, with the small recipe, on the tiny set instead of the demo set."""
    (tmp_path / "recipe.yaml").write_text(MINI, encoding="utf-8")
    changed = {"demo": str(tiny_dataset())}
    printed = ""
    for words in commands(TUTORIAL):
        if words[:3] == ["mlflow", "models", "serve"]:
            with serving(words, tmp_path, store) as port:
                answer = ask(port, next((tmp_path / "mycoco" / "val").iterdir()))
            assert "predictions" in answer
            continue
        assert words[:3] == ["python", "-m", "retinaflow"], f"{' '.join(words)}: a step that is not run here"
        words = [changed.get(word, word).replace("SEARCH_RUN", run_named_last(printed)) for word in words[3:]]
        code = main([*words, *shlex.split(MORE.get(words[0], ""))])
        captured = capsys.readouterr()
        assert code == 0, f"{' '.join(words)}\n{captured.out}\n{captured.err}"
        printed += captured.out
    for page in ("outputs/explore/explore.html", "outputs/compare/comparison.html"):
        assert (tmp_path / page).stat().st_size > 10_000


def run_named_last(text: str) -> str:
    """The run that a search printed holds best.yaml."""
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


def ask(port: int, image: Path) -> dict[str, object]:
    """What the tutorial's Python sends and gets."""
    frame = {"dataframe_records": [{"image": base64.b64encode(image.read_bytes()).decode()}]}
    response = requests.post(f"http://127.0.0.1:{port}/invocations", json=frame, timeout=120)
    assert response.ok, response.text
    answer: dict[str, object] = json.loads(response.text)
    return answer
