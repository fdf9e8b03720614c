"""A sqlite store is whole or absent: stopped while it is made, made twice at once, left half-made by another."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
import warnings
from contextlib import closing
from pathlib import Path

import mlflow
import pytest

from retinaflow.runs import new_store
from retinaflow.runs.new_store import database_file, make_store

ROOT = Path(__file__).resolve().parents[2]
MAKE = "import sys; from retinaflow.runs.new_store import make_store; make_store(sys.argv[1])"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that was made whole."""
    file = tmp_path_factory.mktemp("whole") / "mlflow.db"
    with warnings.catch_warnings():
        # MLflow's tables are not yet made for SQLAlchemy 2.1, and print a warning once.
        warnings.simplefilter("ignore")
        make_store(f"sqlite:///{file}")
    return file


def _start(file: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", MAKE, f"sqlite:///{file}"], env=environment)


def _experiments(file: Path) -> list[str]:
    with closing(sqlite3.connect(file)) as database:
        return [name for (name,) in database.execute("SELECT name FROM experiments")]


def _copy(whole: Path, file: Path, *commands: str) -> Path:
    file.write_bytes(whole.read_bytes())
    with closing(sqlite3.connect(file)) as database:
        for command in commands:
            database.execute(command)
        database.commit()
    return file


@pytest.mark.parametrize(
    ("address", "file"),
    [
        ("sqlite:///mlflow.db", Path("mlflow.db")),
        ("sqlite:////srv/a%2520b/x.db", Path("/srv/a%20b/x.db")),
        ("sqlite://", None),
        ("sqlite:///:memory:", None),
        ("postgresql://h/db", None),
        ("http://h:5000", None),
        ("databricks", None),
    ],
)
def test_a_file_is_a_store_only_under_sqlite(address: str, file: Path | None) -> None:
    assert database_file(address) == file


def test_a_new_store_is_whole_and_nothing_lies_beside_it(whole: Path) -> None:
    assert _experiments(whole) == ["Default"]
    assert sorted(path.name for path in whole.parent.iterdir()) == [".mlflow.db.lock", "mlflow.db"]


def test_a_whole_store_is_left_alone(whole: Path) -> None:
    before = whole.stat().st_mtime_ns
    make_store(f"sqlite:///{whole}")
    assert whole.stat().st_mtime_ns == before


@pytest.mark.slow
def test_a_process_that_is_killed_while_it_makes_a_store_leaves_none(tmp_path: Path) -> None:
    file = tmp_path / "mlflow.db"
    process = _start(file)
    while not (tmp_path / ".mlflow.db.partial").exists():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.5)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not file.exists()
    assert _start(file).wait() == 0
    assert _experiments(file) == ["Default"]
    assert not list(tmp_path.glob(".mlflow.db.partial*"))


@pytest.mark.slow
def test_processes_that_start_together_make_one_store(tmp_path: Path) -> None:
    file = tmp_path / "mlflow.db"
    assert [process.wait() for process in [_start(file) for _ in range(3)]] == [0, 0, 0]
    assert _experiments(file) == ["Default"]


HALF_MADE = {
    "in the middle of a step": ["CREATE TABLE _alembic_tmp_runs (run_uuid TEXT)"],
    "between two steps": ["UPDATE alembic_version SET version_num = '451aebb31d03'"],
    "before the first step": ["DROP TABLE alembic_version"],
}


@pytest.mark.parametrize("commands", HALF_MADE.values(), ids=HALF_MADE)
def test_a_half_made_store_without_runs_is_set_aside_and_made_anew(
    commands: list[str],
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(new_store, "SECONDS_WITHOUT_CHANGE", -1.0)
    file = _copy(whole, tmp_path / "mlflow.db", *commands)
    Path(f"{file}-journal").write_bytes(b"left by the killed process")
    monkeypatch.setattr(new_store, "_make", lambda file: _copy(whole, file))
    make_store(f"sqlite:///{file}")
    assert "half-made by a process that was stopped, and holds no run: it is now mlflow.db.half-made-1" in (
        capsys.readouterr().out
    )
    assert file.read_bytes() == whole.read_bytes()
    assert not Path(f"{file}-journal").exists()
    assert (tmp_path / "mlflow.db.half-made-1").is_file()


RUN = "INSERT INTO runs (run_uuid, experiment_id, status, lifecycle_stage) VALUES ('a', 0, 'FINISHED', 'active')"
MODEL = "INSERT INTO registered_models (name) VALUES ('a')"


@pytest.mark.parametrize("something", [RUN, MODEL], ids=["a run", "a registered model"])
def test_a_half_made_store_that_holds_something_is_never_replaced(something: str, whole: Path, tmp_path: Path) -> None:
    file = _copy(whole, tmp_path / "mlflow.db", something, "CREATE TABLE _alembic_tmp_runs (run_uuid TEXT)")
    before = file.read_bytes()
    make_store(f"sqlite:///{file}")
    assert file.read_bytes() == before


@pytest.mark.parametrize("content", [b"no database at all" * 100, None], ids=["no database", "another database"])
def test_a_file_that_is_no_store_is_never_replaced(content: bytes | None, tmp_path: Path) -> None:
    file = tmp_path / "mlflow.db"
    if content is None:
        with closing(sqlite3.connect(file)) as database:
            database.execute("CREATE TABLE studies (study_id INTEGER)")
            database.commit()
    else:
        file.write_bytes(content)
    before = file.read_bytes()
    make_store(f"sqlite:///{file}")
    assert file.read_bytes() == before


def test_a_store_that_another_program_is_making_is_waited_for(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = _copy(whole, tmp_path / "mlflow.db", "DROP TABLE alembic_version")
    waited: list[float] = []

    def finished(seconds: float) -> None:
        waited.append(seconds)
        _copy(whole, file)

    monkeypatch.setattr(new_store.time, "sleep", finished)
    make_store(f"sqlite:///{file}")
    assert len(waited) == 1
    assert not list(tmp_path.glob("*.half-made*"))


def test_an_empty_file_counts_as_none(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mlflow.db").touch()
    monkeypatch.setattr(new_store, "_make", lambda file: _copy(whole, file))
    make_store(f"sqlite:///{tmp_path}/mlflow.db")
    assert _experiments(tmp_path / "mlflow.db") == ["Default"]


def test_mlflow_takes_the_store(whole: Path) -> None:
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{whole}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert [experiment.name for experiment in mlflow.search_experiments()] == ["Default"]
    finally:
        mlflow.set_tracking_uri(before)
