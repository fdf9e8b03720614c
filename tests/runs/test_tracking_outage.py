"""A real MLflow server that stops answering, dies, comes back: the work continues, and everything arrives in order and
once, or is named."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow.tracking import MlflowClient
from workshop import SMALL as SMALLEST

from retinaflow.commands import train
from retinaflow.errors import StoreError
from retinaflow.runs import tracking
from retinaflow.runs.datasets import DatasetInput
from retinaflow.runs.run import Run
from retinaflow.runs.start import start_run
from retinaflow.settings.commands import TrainConfig
from retinaflow.settings.data_settings import TrackingSettings
from retinaflow.settings.resolve import resolve

pytestmark = pytest.mark.slow
DATASET = DatasetInput("birds/train", "a" * 16, "/data/birds", {"images": 3}, "training")
SMALL = {**SMALLEST, "eval_every": 2}


class Server:
    """``mlflow server`` on a sqlite store, in a process group of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None
        with warnings.catch_warnings():
            # MLflow's tables are not yet made for SQLAlchemy 2.1, and say so once, when a store is first opened.
            warnings.simplefilter("ignore")
            mlflow.MlflowClient(self._store).search_experiments()

    @property
    def _store(self) -> str:
        return f"sqlite:///{self.folder}/server.db"

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", self._store, "--workers", "1"]
        place = ["--host", "127.0.0.1", "--port", str(self.port), "--artifacts-destination", str(self.folder / "files")]
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [*command, *place],
                cwd=self.folder,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            )
        deadline = time.monotonic() + 600
        while not self._healthy():
            assert time.monotonic() < deadline, (self.folder / "server.log").read_text()[-2000:]
            time.sleep(0.1)
        # The first request loads half of the server.
        urllib.request.urlopen(f"{self.uri}/api/2.0/mlflow/experiments/get?experiment_id=0", timeout=600).close()

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=1) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def signal(self, number: signal.Signals) -> None:
        """To the server and its workers: SIGSTOP leaves connections open and answers nothing."""
        assert self._process is not None
        os.killpg(self._process.pid, number)
        if number == signal.SIGKILL:
            self._process.wait()
            self._process = None

    def end(self) -> None:
        if self._process is not None:
            self.signal(signal.SIGKILL)


@pytest.fixture(scope="module")
def _server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.end()


@pytest.fixture
def server(_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(_server.uri)
    yield _server
    os.environ.pop("MLFLOW_EXPERIMENT_ID", None)
    mlflow.set_tracking_uri(before)


def log_steps(run: Run, steps: range) -> float:
    """The longest that logging one step's metrics took, seconds."""
    longest = 0.0
    for step in steps:
        start = time.perf_counter()
        run.log_metrics({"train/loss": 1 / (1 + step), "train/lr": 0.001}, step=step)
        longest = max(longest, time.perf_counter() - start)
        time.sleep(0.02)
    return longest


def assert_all_arrived_once(run_id: str, steps: range) -> None:
    points = MlflowClient().get_metric_history(run_id, "train/loss")
    assert [(point.step, point.value) for point in points] == [(step, 1 / (1 + step)) for step in steps]
    assert [point.timestamp for point in points] == sorted(point.timestamp for point in points)
    assert [point.step for point in MlflowClient().get_metric_history(run_id, "train/lr")] == list(steps)


def stop_answering(server: Server) -> Callable[[], None]:
    server.signal(signal.SIGSTOP)
    return lambda: server.signal(signal.SIGCONT)


def die(server: Server) -> Callable[[], None]:
    server.signal(signal.SIGKILL)
    return server.start


@pytest.mark.parametrize("fault", [stop_answering, die], ids=["stops answering", "dies"])
def test_everything_arrives_in_order_and_once_from_a_server_that_comes_back(
    fault: Callable[[Server], Callable[[], None]],
    server: Server,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    table = pd.DataFrame({"class": ["A"], "ap": [0.5]})
    with start_run("train", TrackingSettings(experiment="outage", output=Path("out"))) as run:
        # So that a few seconds hold several requests that a sleeping server has in its ears but never answered.
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        log_steps(run, range(20))
        come_back = fault(server)
        longest = log_steps(run, range(20, 60))
        run.log_csv(table, "per_class_ap.csv")
        run.log_table(table, "per_class_ap.json")
        run.log_params({"lr": 0.001})
        run.log_datasets([DATASET])
        run.log_image(np.full((40, 60, 3), 90, dtype=np.uint8), key="validation/1 A", step=3)
        run.set_description("first")
        run.set_description("last")
        time.sleep(4)
        waiting = Path(f"out/unsent-{run.run_id}/unsent.jsonl").read_text().splitlines()
        come_back()
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        longest = max(longest, log_steps(run, range(60, 80)))
    said = capsys.readouterr().err
    assert longest < 0.5, f"logging held up the work for {longest:.2f} s"
    assert len(waiting) >= 40
    assert "is out of reach; results wait in out/unsent-" in said
    assert "answers again after" in said
    assert_all_arrived_once(run.run_id, range(80))
    found = MlflowClient().get_run(run.run_id)
    assert found.info.status == "FINISHED"
    assert found.data.params == {"lr": "0.001"}
    assert [one.dataset.name for one in found.inputs.dataset_inputs] == [DATASET.name]
    images = [Path(item.path).name for item in MlflowClient().list_artifacts(run.run_id, "images")]
    assert sorted(Path(name).suffix for name in images) == [".png", ".webp"]
    assert found.data.tags["mlflow.note.content"] == "last"
    assert mlflow.artifacts.load_dict(f"runs:/{run.run_id}/per_class_ap.json")["data"] == [["A", 0.5]]
    assert not list(Path("out").rglob("*")), "nothing is left behind"


def test_what_never_arrived_is_in_the_file_of_the_last_message_and_resuming_the_run_sends_it_once(
    server: Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "PATIENCE", 0.5)
    with start_run("train", TrackingSettings(experiment="outage", output=Path("out"))) as run:
        log_steps(run, range(10))
        server.signal(signal.SIGKILL)
        log_steps(run, range(10, 20))
        run.log_json({"a": 1}, "config.json")
    assert mlflow.active_run() is None
    last = capsys.readouterr().err.strip().splitlines()[-1]
    journal = Path(f"out/unsent-{run.run_id}/unsent.jsonl")
    assert re.match(
        rf"run {run.run_id}: \d+ points of curves, 1 files \(config.json\), .*the end of the run never", last
    )
    assert f"They are in {journal}; a training that resumes resume={run.run_id} sends them first" in last
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "metrics"][-10:] == list(range(10, 20))

    server.start()
    assert MlflowClient().get_run(run.run_id).info.status == "RUNNING"
    monkeypatch.setattr(tracking, "PATIENCE", 120.0)
    with start_run("train", TrackingSettings(experiment="outage", output=Path("out")), resume=run.run_id) as resumed:
        # As after kill -9, which makes a training repeat steps that it had logged.
        log_steps(resumed, range(15, 30))
    assert_all_arrived_once(run.run_id, range(30))
    assert mlflow.artifacts.load_dict(f"runs:/{run.run_id}/config.json") == {"a": 1}
    assert MlflowClient().get_run(run.run_id).info.status == "FINISHED"


WHAT_HELPS = {
    "train": "a training that resumes resume={} sends them first",
    "search": "the same search sends them first when it is started again",
    "main": "main with resume=auto logs them to a new run and trains nothing again",
    "evaluate": "the same command logs them to a new run when it is started again",
    "split": "the same command logs them to a new run when it is started again",
}


def test_what_never_arrived_is_named_with_what_helps(
    server: Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "PATIENCE", 0.5)
    runs = {}
    with contextlib.ExitStack() as ended:
        for command in WHAT_HELPS:
            config = TrackingSettings(experiment="outage", output=Path(f"out-{command}"))
            runs[command] = ended.enter_context(tracking.start_run(command, config)).run_id
        server.signal(signal.SIGKILL)
    said = capsys.readouterr().err
    server.start()
    for command, text in WHAT_HELPS.items():
        (line,) = (line for line in said.splitlines() if line.startswith(f"run {runs[command]}:"))
        journal = f"out-{command}/unsent-{runs[command]}/unsent.jsonl"
        assert line.endswith(f"They are in {journal}; {text.format(runs[command])}")


def kill_after_first_epoch(server: Server, output: Path) -> threading.Thread:
    def wait() -> None:
        while not any(output.glob("*/checkpoints/last.pt")):
            time.sleep(0.01)
        server.signal(signal.SIGKILL)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def test_a_training_whose_server_dies_for_good_ends_well_names_what_never_arrived_and_resume_sends_it(
    server: Server,
    tiny_dataset: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tracking, "PATIENCE", 1.0)
    settings = {"data": str(tiny_dataset()), "output": "out", **SMALL}
    killer = kill_after_first_epoch(server, Path("out"))
    result = train.run(resolve(TrainConfig, settings))
    killer.join()
    assert mlflow.active_run() is None
    out, err = capsys.readouterr()
    assert "epoch   2/2" in out
    match = re.fullmatch(
        r"run (\w+): \d+ points of curves, \d+ files \(.*last\.pt.*\), .*the end of the run never arrived in MLflow "
        r"at http://127.* \(.*\)\. They are in (\S+); a training that resumes resume=\1 sends them first",
        err.strip().splitlines()[-1],
    )
    assert match, err
    run_id, journal = match[1], Path(match[2])
    assert run_id == result.run_id
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    assert {"metrics", "file", "model", "end"} <= {line["kind"] for line in lines}
    assert all((journal.parent / line["file"]).is_file() for line in lines if "file" in line)

    server.start()
    client = MlflowClient()
    assert client.get_run(run_id).info.status == "RUNNING"
    monkeypatch.setattr(tracking, "PATIENCE", 120.0)
    train.run(resolve(TrainConfig, {**settings, "resume": run_id}))
    assert not journal.parent.exists()
    assert client.get_run(run_id).info.status == "FINISHED"
    for name, steps in (
        ("train/epoch", [3, 6]),
        ("train/loss", [3, 6]),
        ("val/mAP", [6]),
        ("best/mAP", [6]),
    ):
        assert [point.step for point in client.get_metric_history(run_id, name)] == steps, name
    names = {item.path for item in client.list_artifacts(run_id)}
    assert {"per_class_ap.csv", "detections.png", "checkpoints", "metrics.json", "config.json"} <= names


def test_a_server_that_was_never_there_is_an_error_at_once(server: Server) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{free.getsockname()[1]}"
    mlflow.set_tracking_uri(nowhere)
    with (
        pytest.raises(StoreError, match=f"experiment outage cannot be opened in {nowhere}"),
        start_run("train", TrackingSettings(experiment="outage", output=Path("out"))),
    ):
        pass
    mlflow.set_tracking_uri(server.uri)
