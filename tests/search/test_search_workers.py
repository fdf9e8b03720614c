"""Who runs which trial, with real processes on real databases: exact numbers, kills, stops, a restarted database."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest
from made_index import TinyDataset
from optuna.trial import FrozenTrial, TrialState, create_trial
from postgres_server import Server, running_server
from search_bench import finish, start_worker, wait_for
from sqlalchemy import event

from retinaflow.errors import DataError, Interrupted, StoreError
from retinaflow.interrupts import StopRequest
from retinaflow.search.storage import StudyStorage, as_optuna, open_storage
from retinaflow.search.study import open_search
from retinaflow.search.trial import HEARTBEAT, RETRY_OF, WORKER, LostTrials, counts, is_lost
from retinaflow.settings.commands import SearchConfig
from retinaflow.settings.resolve import resolve

Prepare = Callable[[SearchConfig], optuna.Study]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    yield from running_server()


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


@pytest.mark.parametrize("config", ["sqlite"], indirect=True)
def test_a_search_stops_when_its_last_trials_gained_nothing(config: SearchConfig, hold: Path, prepare: Prepare) -> None:
    # The value of a trial is its focal_gamma, drawn at random.
    config = config.model_copy(update={"trials": 60, "search_patience": 4})
    study = prepare(config)
    for patience in (4, 8):
        assert finish(start_worker(config.model_copy(update={"search_patience": patience}), hold, seconds=0)) == [0]
        trials = study.get_trials()
        # The first five are the defaults with each sampling strategy, and do not count.
        assert len(trials) - 1 - max(study.best_trial.number, 4) == patience
        assert len(trials) < 60


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


class Breaking:
    """Breaks the connections of a storage: the next ``left`` statements fail as they do when the server stops."""

    def __init__(self, storage: StudyStorage) -> None:
        self.left = 0
        event.listen(storage._database.engine, "before_cursor_execute", self)

    def __call__(self, *values: object) -> None:
        del values
        if self.left:
            self.left -= 1
            raise sqlite3.OperationalError("server closed the connection")


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[StudyStorage]:
    with closing(open_storage(f"sqlite:///{tmp_path}/optuna.db", stop=StopRequest())) as opened:
        yield opened


def test_a_call_waits_for_its_database_and_another_error_is_raised(
    storage: StudyStorage, capsys: pytest.CaptureFixture[str]
) -> None:
    study, breaking = optuna.create_study(storage=as_optuna(storage), study_name="s"), Breaking(storage)
    for _ in range(2):
        breaking.left = 2
        study.set_user_attr("key", "value")
        assert breaking.left == 0
    assert study.user_attrs == {"key": "value"}
    assert capsys.readouterr().out.count("waiting for the storage sqlite:///") == 1
    with pytest.raises(KeyError):
        storage.get_study_id_from_name("another")


def test_a_transaction_whose_connection_breaks_leaves_nothing_and_is_repeated_as_a_whole(storage: StudyStorage) -> None:
    study, breaking, attempts = optuna.create_study(storage=as_optuna(storage), study_name="s"), Breaking(storage), []

    def action() -> int:
        attempts.append(len(study.trials))
        study.enqueue_trial({"x": 1.0})
        number = study.ask().number
        breaking.left = 1 if len(attempts) < 3 else 0
        study.set_user_attr("taken", number)
        return number

    assert storage.transaction("s", action) == 0
    assert attempts == [0, 0, 0]
    assert [trial.state for trial in study.trials] == [TrialState.RUNNING]


def test_what_an_error_undoes_is_undone_for_optuna_too(storage: StudyStorage) -> None:
    study = optuna.create_study(storage=as_optuna(storage), study_name="s")
    running = study.ask()

    def action() -> None:
        study.tell(running, 1.0)
        study.ask()
        raise DataError("no")

    with pytest.raises(DataError):
        storage.transaction("s", action)
    assert [trial.state for trial in study.trials] == [TrialState.RUNNING]


def test_transactions_follow_each_other(storage: StudyStorage) -> None:
    study = optuna.create_study(storage=as_optuna(storage), study_name="s")

    def add_one() -> None:
        study.set_user_attr("count", study.user_attrs.get("count", 0) + 1)

    threads = [threading.Thread(target=lambda: [storage.transaction("s", add_one) for _ in range(20)]) for _ in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert study.user_attrs == {"count": 40}


def test_a_database_that_stays_away_is_an_error_that_later_calls_do_not_wait_for(
    storage: StudyStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("retinaflow.search.storage.PATIENCE_SECONDS", 0.5)
    study, breaking = optuna.create_study(storage=as_optuna(storage), study_name="s"), Breaking(storage)
    breaking.left = 1000
    with pytest.raises(StoreError, match="server closed the connection"):
        study.set_user_attr("key", "value")
    left = breaking.left
    with pytest.raises(StoreError):
        study.set_user_attr("key", "value")
    assert breaking.left == left - 1
    breaking.left = 0
    study.set_user_attr("key", "value")


def test_a_request_to_stop_ends_the_waiting(tmp_path: Path) -> None:
    stop = StopRequest()
    with closing(open_storage(f"sqlite:///{tmp_path}/optuna.db", stop=stop)) as storage:
        study, breaking = optuna.create_study(storage=as_optuna(storage), study_name="s"), Breaking(storage)
        breaking.left = 1000
        stop._past = "signal SIGINT"
        with pytest.raises(Interrupted):
            study.set_user_attr("key", "value")


def test_a_trial_is_lost_when_its_heartbeat_stays_the_same_and_the_database_was_there(
    storage: StudyStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("retinaflow.search.trial.time", SimpleNamespace(monotonic=lambda: now[0]))
    lost = LostTrials(storage, heartbeat=1)

    def at(second: float, *beats: str | None) -> list[int]:
        now[0] = second
        trials = [
            create_trial(state=TrialState.RUNNING, user_attrs={} if beat is None else {HEARTBEAT: beat})
            for beat in beats
        ]
        for number, trial in enumerate(trials):
            trial.number = number
        return [trial.number for trial in lost.among(trials)]

    assert at(100, "a", "a", None) == []
    assert at(104, "a", "b", None) == []
    assert at(104.5, "a", "b", None) == [0, 2]
    storage.last_outage = 105.0
    assert at(108.9, "a", "b") == []
    assert at(109.1, "a", "b") == [0, 1]


def test_a_database_that_cannot_be_reached_is_named_without_its_password(
    tiny_dataset: TinyDataset, tmp_path: Path
) -> None:
    pytest.importorskip("psycopg", reason="psycopg is not installed")
    storage = f"postgresql://ada:secret@/nowhere?host={tmp_path}"
    config = resolve(SearchConfig, {"data": str(tiny_dataset()), "storage": storage, "track": False})
    with pytest.raises(StoreError, match=r"storage=postgresql\+psycopg:///nowhere.* cannot be opened") as caught:
        open_search(config).__enter__()
    assert "secret" not in str(caught.value)
