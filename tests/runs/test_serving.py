"""The logged model: from Python, and behind MLflow's real scoring server, which garbage does not bring down."""

from __future__ import annotations

import base64
import gzip
import io
import json
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import psutil
import pytest
import uvicorn
from mlflow.pyfunc import scoring_server
from PIL import Image
from starlette.requests import Request

import retinaflow
from retinaflow.commands.train import TrainResult

pytestmark = pytest.mark.slow

MODEL = "models:/tiny-detector/1"
LIMITS = {"max_images": 3, "max_bytes": 50_000, "max_pixels": 100_000, "max_request_bytes": 300_000}


def _encoded(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def _expected(evaluated: Path, image_id: str, size: tuple[int, int]) -> pd.DataFrame:
    """Detections of ``evaluate`` in pixels, as the model gives them."""
    table = pd.read_csv(evaluated / "predictions.csv")
    table = table[table["ImageID"] == image_id]
    corners = table[["XMin", "YMin", "XMax", "YMax"]].to_numpy() * [size[1], size[0], size[1], size[0]]
    return pd.DataFrame(corners, columns=["x1", "y1", "x2", "y2"]).assign(
        score=table["Score"].to_numpy(), label=table["LabelName"].to_numpy()
    )


def _assert_same(found: pd.DataFrame, expected: pd.DataFrame) -> None:
    assert len(found) == len(expected) > 0
    assert found["label"].tolist() == expected["label"].tolist()
    numbers = ["x1", "y1", "x2", "y2", "score"]
    np.testing.assert_allclose(found[numbers], expected[numbers], rtol=0, atol=1e-3)


# From Python


def test_the_logged_model_gives_the_boxes_of_evaluate_for_texts_and_for_paths(
    trained: TrainResult, evaluated: Path, workshop: Any
) -> None:
    del trained
    files = {f"validation00{n}": workshop.data / "images" / f"validation00{n}.jpg" for n in (0, 1)}
    texts = mlflow.pyfunc.load_model(MODEL).predict(pd.DataFrame({"image": [_encoded(f) for f in files.values()]}))
    model = mlflow.pyfunc.load_model(MODEL, model_config={"images": "paths", "max_images": 1})
    paths = model.predict(pd.DataFrame({"image": [str(file) for file in files.values()]}))
    assert list(texts.columns) == ["image", "x1", "y1", "x2", "y2", "score", "label", "class"]
    pd.testing.assert_frame_equal(texts, paths)
    # 64 x 96 and 96 x 64 pixels.
    for number, (image_id, size) in enumerate(zip(files, ((64, 96), (96, 64)), strict=True)):
        _assert_same(texts[texts["image"] == number], _expected(evaluated, image_id, size))
    best = float(texts["score"].max())
    fewer = model.predict(pd.DataFrame({"image": [str(f) for f in files.values()]}), {"score_threshold": best * 0.9})
    assert len(fewer) == (texts["score"] > best * 0.9).sum() < len(texts)
    with pytest.raises(ValueError, match="row 0: image must be the path of a file, but"):
        model.predict(pd.DataFrame({"image": ["nowhere.jpg"]}))
    for endless in ("/dev/zero", str(workshop.folder)):
        with pytest.raises(ValueError, match="row 0: image must be the path of a file, but"):
            model.predict(pd.DataFrame({"image": [endless]}))


def test_the_logged_model_has_no_pickle_and_says_what_it_takes(trained: TrainResult, workshop: Any) -> None:
    del trained
    folder = Path(mlflow.artifacts.download_artifacts(MODEL, dst_path=str(workshop.folder / "model")))
    assert not [path for path in folder.rglob("*") if path.suffix in (".pkl", ".pickle", ".joblib")]
    info = mlflow.models.get_model_info(MODEL)
    assert mlflow.get_logged_model(info.model_id).experiment_id == mlflow.get_run(info.run_id).info.experiment_id
    assert info.signature.inputs.input_names() == ["image"]
    assert [param.name for param in info.signature.params.params] == ["score_threshold"]
    example = json.loads((folder / "serving_input_example.json").read_text())
    assert len(mlflow.pyfunc.load_model(MODEL).predict(pd.DataFrame(**example["dataframe_split"]))) >= 0
    assert "torch==" in (folder / "requirements.txt").read_text()


def test_the_logged_model_carries_the_whole_package(trained: TrainResult) -> None:
    del trained
    code = Path(mlflow.artifacts.download_artifacts(MODEL)) / "code" / "retinaflow"
    package = Path(retinaflow.__file__).parent
    assert {path.relative_to(code) for path in code.rglob("*.py")} == {
        path.relative_to(package) for path in package.rglob("*.py")
    }


@pytest.mark.parametrize("setting", [{"images": "urls"}, {"max_pixels": 0}, {"max_bytes": "many"}], ids=str)
def test_settings_of_a_loaded_model_are_checked(trained: TrainResult, setting: dict[str, Any]) -> None:
    del trained
    with pytest.raises(ValueError, match="must be"):
        mlflow.pyfunc.load_model(MODEL, model_config=setting)


# Behind a server


class Client:
    """Asks a server on this machine."""

    def __init__(self, port: int) -> None:
        self.port = port

    def post(self, body: bytes, kind: str = "application/json", encoding: str = "identity") -> tuple[int, str]:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request("POST", "/invocations", body, {"Content-Type": kind, "Content-Encoding": encoding})
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    def ask(self, *images: Any, **params: Any) -> tuple[int, Any]:
        table = {"columns": ["image"], "data": [[image] for image in images]}
        status, text = self.post(json.dumps({"dataframe_split": table, "params": params}).encode())
        return status, json.loads(text)


@pytest.fixture
def client(trained: TrainResult, workshop: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    """MLflow's scoring server, in a thread of this process."""
    del trained, workshop
    # As `mlflow models serve` tells its server; and what the two change is changed back.
    monkeypatch.setenv("__pyfunc_model_path__", MODEL)
    monkeypatch.setenv("SERVING_MODEL_CONFIG", json.dumps(LIMITS))
    monkeypatch.setenv("_MLFLOW_IS_IN_SERVING_ENVIRONMENT", "true")
    monkeypatch.setattr(Request, "body", Request.body)
    app = scoring_server.init(scoring_server.load_model_with_mlflow_config(MODEL))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", ws="none", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.05)
    yield Client(server.servers[0].sockets[0].getsockname()[1])
    server.should_exit = True
    thread.join()


def test_a_server_answers_with_the_boxes_of_evaluate(client: Client, evaluated: Path, workshop: Any) -> None:
    encoded = _encoded(workshop.data / "images" / "validation001.jpg")
    status, answer = client.ask(encoded, score_threshold=0.0)
    assert status == 200
    _assert_same(pd.DataFrame(answer["predictions"]), _expected(evaluated, "validation001", (96, 64)))
    assert answer["predictions"][0]["class"] in ("Car", "Vehicle", "Tree", "Plant", "Bus")


def _png_of(width: int, height: int) -> str:
    """A file that announces so many pixels and has none."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    chunks = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(chunks)).decode()


def _refused_images(photo: Path) -> dict[str, tuple[list[Any], str]]:
    data = photo.read_bytes()
    return {
        "no text": ([None], "image"),
        "a number": ([3], "image"),
        "no base64": (["not base64!"], "row 0: image must be a base64-encoded image file, but is 'not base64!'"),
        "no image": ([base64.b64encode(b"no picture").decode()], "row 0: not an image file of JPEG, PNG, WEBP, BMP"),
        "cut short": ([base64.b64encode(data[: len(data) // 2]).decode()], "row 0: image: the JPEG is cut short"),
        "a second one bad": ([_encoded(photo), ""], "row 1: not an image file"),
        "too many pixels": ([_png_of(1000, 101)], "an image may have 100,000 pixels, but has 1000 x 101"),
        "a bomb": ([_png_of(60_000, 60_000)], "an image may have 100,000 pixels"),
        "pixels that are not there": ([_png_of(100, 100)], "row 0: "),
        "too many bytes": (["A" * 100_000], "an image file may have 50,000 bytes, but has 75,000"),
        "too many images": ([_encoded(photo)] * 4, "a request may have 3 images (max_images), but has 4"),
        "too many values": ([{f"c{n}": 1 for n in range(1500)}], "a request may have 1,300 values"),
        "too many scans": ([base64.b64encode(_of_scans(200)).decode()], "a JPEG may have 100 scans, but has more"),
        "too large a request": (["A" * 400_000], "a request may have 300,000 bytes (max_request_bytes)"),
        "a file of the server": ([str(photo)], "row 0: image must be a base64-encoded image file"),
        "a system file": (["/etc/hostname"], "row 0: "),
    }


def _of_scans(more: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    return data[:-2] + data[data.rfind(b"\xff\xda") : -2] * more + data[-2:]


GARBAGE = (b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"a": 1}', b'{"dataframe_split": {}}', b'{"dataframe_records": 3}')


def test_what_is_no_request_is_answered_with_400_and_the_server_lives_on(client: Client, workshop: Any) -> None:
    photo = workshop.data / "images" / "validation001.jpg"
    for name, (images, message) in _refused_images(photo).items():
        status, answer = client.ask(*images)
        assert (name, status) == (name, 400)
        assert message in answer["message"], name
    for body in GARBAGE:
        assert (body, client.post(body)[0]) == (body, 400)
    for params in ({"score_threshold": 2}, {"score_threshold": "high"}):
        assert client.ask(_encoded(photo), **params)[0] == 400
    assert client.post(b"<xml/>", "text/xml")[0] == 415
    table = pd.DataFrame({"image": [_encoded(photo)]})
    assert client.post(table.to_parquet(), "application/vnd.apache.parquet")[0] == 400
    assert client.post(table.to_csv(index=False).encode(), "text/csv")[0] == 200
    assert client.post(gzip.compress(b"{}"), encoding="gzip")[0] == 400
    assert client.post(b"{}", kind="")[0] == 400
    assert client.ask(_encoded(photo))[0] == 200


def test_a_server_refuses_to_take_paths(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    del client
    monkeypatch.setenv("SERVING_MODEL_CONFIG", json.dumps({"images": "paths"}))
    with pytest.raises(ValueError, match="a server must not read files that a request names"):
        scoring_server.load_model_with_mlflow_config(MODEL)


def test_mlflow_models_serve_outlives_a_thousand_malformed_requests(
    trained: TrainResult, evaluated: Path, workshop: Any
) -> None:
    del trained
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", MODEL, "--env-manager", "local"]
    environment = {
        **os.environ,
        "MLFLOW_TRACKING_URI": workshop.uri,
        "SERVING_MODEL_CONFIG": json.dumps(LIMITS),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    log = workshop.folder / "serve.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*command, "--port", str(port)], env=environment, stdout=file, stderr=file, start_new_session=True
        )
    try:
        client, photo = Client(port), workshop.data / "images" / "validation001.jpg"
        deadline = time.monotonic() + 900
        while True:
            try:
                status, answer = client.ask(_encoded(photo))
                break
            except ConnectionError:
                assert process.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() < deadline
                time.sleep(0.5)
        assert status == 200
        before = _memory(process.pid)
        draw, refused = random.Random(0), list(_refused_images(photo).values())
        for _ in range(1000):
            if draw.random() < 0.5:
                assert client.ask(*draw.choice(refused)[0])[0] == 400
            else:
                assert client.post(draw.choice([*GARBAGE, draw.randbytes(draw.randrange(5000))]))[0] == 400
        status, again = client.ask(_encoded(photo))
        assert (status, again) == (200, answer)
        _assert_same(pd.DataFrame(answer["predictions"]), _expected(evaluated, "validation001", (96, 64)))
        assert _memory(process.pid) - before < 100 << 20
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _memory(pid: int) -> int:
    """Bytes of a process and its children."""
    whole = psutil.Process(pid)
    return sum(one.memory_info().rss for one in (whole, *whole.children(recursive=True)))
