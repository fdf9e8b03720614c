"""Who runs which trial, with real processes on real databases: exact numbers, kills, stops, a restarted database."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState
from search_bench import finish, start_worker, wait_for
from sqlalchemy.exc import OperationalError, PendingRollbackError

from retinaflow.errors import StoreError
from retinaflow.search.storage import open_storage
from retinaflow.search.study import open_search
from retinaflow.search.trial import RETRY_OF, WORKER, counts, is_lost
from retinaflow.settings.commands import SearchConfig
from retinaflow.settings.resolve import resolve

Prepare = Callable[[SearchConfig], optuna.Study]


class TinyDataset(Protocol):
    """The fixture of ``tests/conftest.py``."""

    def __call__(self, name: str = "tiny", *, train: int = 12, validation: int = 6, seed: int = 0) -> Path: ...


class Server:
    """A throw-away PostgreSQL cluster on a socket in a folder of its own, run as a user that is not root."""

    def __init__(self, folder: Path, programs: Path) -> None:
        self.folder, self._programs = folder, programs
        self._user = "postgres" if os.geteuid() == 0 else None
        if self._user:
            shutil.chown(folder, self._user)
        self._run("initdb", "-D", str(folder / "data"), "-U", "postgres", "--auth=trust", "--no-sync", "-E", "UTF8")

    @property
    def url(self) -> str:
        """For ``storage=``."""
        return f"postgresql://postgres@/postgres?host={self.folder}"

    def control(self, action: str, *, mode: str = "fast") -> None:
        """Start, stop or restart."""
        options = f"-c listen_addresses='' -c unix_socket_directories='{self.folder}' -c fsync=off"
        words = [action, "-w", "-D", str(self.folder / "data"), "-l", str(self.folder / "log"), "-o", options]
        self._run("pg_ctl", *words, *(() if action == "start" else ("-m", mode)))

    def _run(self, program: str, *words: str) -> None:
        more: dict[str, Any] = {"user": self._user, "group": self._user} if self._user else {}
        command = [str(self._programs / program), *words]
        subprocess.run(
            command, check=True, cwd=self.folder, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT, **more
        )


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    pytest.importorskip("psycopg", reason="psycopg is not installed: pip install 'psycopg[binary]'")
    found = shutil.which("pg_ctl")
    folders = [Path(found).resolve().parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    programs = next((folder for folder in reversed(folders) if (folder / "initdb").is_file()), None)
    if programs is None:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    # Not below pytest's folder, which no other user may enter.
    folder = Path(tempfile.mkdtemp(prefix="retinaflow-postgres-"))
    server = Server(folder, programs)
    server.control("start")
    yield server
    server.control("stop")
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def prepare() -> Iterator[Prepare]:
    """Makes the study and its parent run, as the process that starts workers does, and watches the study."""
    with ExitStack() as open_searches:
        yield lambda config: open_searches.enter_context(open_search(config)).study


@pytest.fixture
def hold(tmp_path: Path) -> Path:
    """While this file is there, trials do not end."""
    return tmp_path / "hold"


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def config(
    request: pytest.FixtureRequest, tiny_dataset: TinyDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> SearchConfig:
    """A search in folders, its study in each kind of database in turn."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    monkeypatch.chdir(tmp_path)
    storage = "auto" if request.param == "sqlite" else request.getfixturevalue("server").url
    given = {"data": str(tiny_dataset()), "storage": storage, "study": tmp_path.name, "trials": 6, "epochs": 2}
    return resolve(SearchConfig, {**given, "track": False, "sampler": "random", "heartbeat": 60})


def done(trials: list[FrozenTrial]) -> list[FrozenTrial]:
    return [trial for trial in trials if trial.state == TrialState.COMPLETE]


def states_of_runs(config: SearchConfig) -> list[str]:
    """The states that the runs of the trials were left in, sorted."""
    folder = config.output / config.study
    return sorted(json.loads(path.read_text())["retinaflow.state"] for path in folder.glob("trial-*/tags.json"))


@pytest.mark.slow
def test_workers_that_race_run_exactly_the_trials_asked_for(config: SearchConfig, hold: Path, prepare: Prepare) -> None:
    config = config.model_copy(update={"trials": 10})
    study = prepare(config)
    assert finish(*(start_worker(config, hold) for _ in range(3))) == [0, 0, 0]
    trials = study.get_trials()
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 10
    assert [trial.number for trial in trials] == list(range(10))
    assert len({tuple(trial.params.items()) for trial in trials}) == 10, "two workers drew the same values"
    assert states_of_runs(config) == ["complete"] * 10


def test_the_same_command_resumes_and_adds_only_what_is_missing(
    config: SearchConfig, hold: Path, prepare: Prepare
) -> None:
    few = config.model_copy(update={"trials": 2})
    study = prepare(few)
    for number, asked in ((2, few), (2, few), (4, config.model_copy(update={"trials": 4}))):
        assert finish(start_worker(asked, hold, seconds=0)) == [0]
        assert len(study.get_trials()) == number


@pytest.mark.slow
def test_the_trial_of_a_killed_worker_is_run_again_and_counted_once(
    config: SearchConfig, hold: Path, prepare: Prepare
) -> None:
    config = config.model_copy(update={"heartbeat": 2, "trials": 3})
    study = prepare(config)
    hold.touch()
    victim = start_worker(config, hold)
    wait_for(lambda: [t for t in study.get_trials() if t.intermediate_values], what="a trial in progress")
    victim.kill()
    assert finish(victim) == [-signal.SIGKILL]
    hold.unlink()
    assert finish(start_worker(config, hold), start_worker(config, hold)) == [0, 0]
    trials = study.get_trials()
    lost = [trial for trial in trials if is_lost(trial)]
    assert [trial.number for trial in lost] == [0]
    assert lost[0].user_attrs[WORKER].endswith(f":{victim.pid}")
    assert len(done(trials)) == sum(map(counts, trials)) == 3
    (again,) = [trial for trial in trials if trial.user_attrs.get(RETRY_OF) == 0]
    assert again.params == lost[0].params
    assert states_of_runs(config) == ["complete"] * 3 + ["lost"]


@pytest.mark.slow
def test_a_worker_that_is_stopped_queues_its_trial_again(config: SearchConfig, hold: Path, prepare: Prepare) -> None:
    config = config.model_copy(update={"trials": 2})
    study = prepare(config)
    hold.touch()
    worker = start_worker(config, hold)
    wait_for(lambda: [t for t in study.get_trials() if t.intermediate_values], what="a trial in progress")
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGINT)
    assert finish(worker) == [0]
    # The second of the starts was queued from the beginning.
    stopped, *waiting = study.get_trials()
    assert is_lost(stopped)
    assert [trial.state for trial in waiting] == [TrialState.WAITING] * 2
    hold.unlink()
    assert finish(start_worker(config, hold)) == [0]
    trials = study.get_trials()
    assert (len(done(trials)), len(trials)) == (2, 3)
    assert trials[2].params == stopped.params
    assert states_of_runs(config) == ["complete"] * 2 + ["stopped"]


@pytest.mark.slow
@pytest.mark.postgres
@pytest.mark.parametrize("config", ["postgresql"], indirect=True)
def test_a_search_survives_a_restart_of_the_database(
    config: SearchConfig, hold: Path, server: Server, prepare: Prepare, capfd: pytest.CaptureFixture[str]
) -> None:
    config = config.model_copy(update={"trials": 4, "heartbeat": 1})
    study = prepare(config)
    hold.touch()
    workers = [start_worker(config, hold), start_worker(config, hold)]
    wait_for(lambda: len([t for t in study.get_trials() if t.intermediate_values]) == 2, what="two trials in progress")
    server.control("stop")
    # The workers beat once a second: they are sure to meet a database that is away.
    time.sleep(2.5)
    server.control("start")
    hold.unlink()
    assert finish(*workers) == [0, 0]
    trials = study.get_trials()
    assert len(done(trials)) == sum(map(counts, trials)) == 4
    assert states_of_runs(config).count("complete") == 4
    assert capfd.readouterr().out.count("waiting for the storage postgresql") >= 2, "no worker met the outage"


@pytest.mark.slow
@pytest.mark.postgres
@pytest.mark.parametrize("config", ["postgresql"], indirect=True)
@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_restarts_of_the_database_at_any_moment_lose_and_duplicate_no_trial(
    config: SearchConfig, hold: Path, server: Server, prepare: Prepare, mode: str
) -> None:
    config = config.model_copy(update={"trials": 20, "heartbeat": 2})
    study = prepare(config)
    moments = np.random.default_rng(0).uniform(0.2, 2, size=4)
    workers = [start_worker(config, hold, seconds=0.3) for _ in range(2)]
    for moment in moments:
        time.sleep(moment)
        server.control("restart", mode=mode)
    assert finish(*workers) == [0, 0]
    trials = study.get_trials()
    assert len(done(trials)) == sum(map(counts, trials)) == 20
    again = [trial.user_attrs[RETRY_OF] for trial in trials if RETRY_OF in trial.user_attrs]
    assert len(again) == len(set(again)), "a lost trial was queued twice"


def test_a_call_whose_connection_breaks_is_repeated_and_another_error_is_not(tmp_path: Path) -> None:
    storage = open_storage(f"sqlite:///{tmp_path}/optuna.db", heartbeat=60)
    calls = []

    def call() -> int:
        calls.append(len(calls))
        if len(calls) < 3:
            # As SQLAlchemy raises it when a connection breaks within a transaction: the cause is the context.
            try:
                raise OperationalError("SELECT 1", {}, Exception("server closed the connection"))
            except OperationalError:
                raise PendingRollbackError("Can't reconnect until invalid transaction is rolled back")  # noqa: B904
        return calls[-1]

    assert storage.retry(call) == 2
    with pytest.raises(KeyError):
        storage.retry(lambda: calls.append(0) or {}["key"])
    assert len(calls) == 4
    with pytest.raises(StoreError, match="server closed the connection"):
        storage.retry(lambda: raised(OperationalError("SELECT 1", {}, Exception("server closed the connection"))))
    storage.close()


def raised(error: Exception) -> None:
    raise error


def test_a_database_that_cannot_be_reached_is_named_without_its_password(
    tiny_dataset: TinyDataset, tmp_path: Path
) -> None:
    pytest.importorskip("psycopg", reason="psycopg is not installed")
    storage = f"postgresql://ada:secret@/nowhere?host={tmp_path}"
    config = resolve(SearchConfig, {"data": str(tiny_dataset()), "storage": storage, "track": False})
    with pytest.raises(StoreError, match=r"storage=postgresql.*ada:\*\*\*@.* cannot be opened") as caught:
        open_search(config).__enter__()
    assert "secret" not in str(caught.value)
