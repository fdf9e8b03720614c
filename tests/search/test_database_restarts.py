"""A PostgreSQL that restarts while a search runs: no trial is lost or duplicated, and no search ends.

``RETINAFLOW_RESTARTS=20`` makes the series longer; the figures in docs/decisions.md come from such series.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from made_index import TinyDataset
from optuna.trial import TrialState
from postgres_server import PASSWORD, Server, running_server
from search_bench import finish, start_worker, wait_for
from workshop import SMALL

from retinaflow.interrupts import StopRequest
from retinaflow.search.storage import as_optuna, open_storage, storage_url
from retinaflow.search.study import open_search
from retinaflow.search.trial import RETRY_OF, counts
from retinaflow.settings.commands import SearchConfig
from retinaflow.settings.resolve import resolve

pytestmark = [pytest.mark.slow, pytest.mark.postgres]

RESTARTS = int(os.environ.get("RETINAFLOW_RESTARTS", "3"))
SECONDS_DOWN = (0, 0, 0, 30) if "RETINAFLOW_RESTARTS" in os.environ else (0, 0, 3)
"""How long the server is away in a restart, chosen at random."""
TINY = {
    **SMALL,
    "objective": "val/mAP",
    "sampler": "random",
    "confirm_seeds": 0,
    "pruner": "none",
}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    yield from running_server()


class Restarts:
    """Restarts of a server at random moments, in all modes."""

    def __init__(self, server: Server, *, seed: int, longest_pause: float) -> None:
        self._server, self._longest = server, longest_pause
        self._rng = np.random.default_rng(seed)
        self.done: list[str] = []

    def until(self, is_over: Callable[[], bool]) -> None:
        """Restart until the search is over or all restarts are done."""
        while len(self.done) < RESTARTS:
            pause = time.monotonic() + self._rng.uniform(0.2, self._longest)
            while time.monotonic() < pause:
                if is_over():
                    return
                time.sleep(0.05)
            mode, down = self._rng.choice(["fast", "immediate"]), self._rng.choice(SECONDS_DOWN)
            self._server.control("stop", mode=mode)
            time.sleep(down)
            self._server.control("start")
            self.done.append(f"{mode}, {down} s")


def check(server: Server, folder: Path, *, requested: int) -> None:
    """Exactly the requested trials are complete, each with parameters of its own, and each lost one was queued once."""
    url = storage_url(server.url, beside="", output=folder)
    with closing(open_storage(url, stop=StopRequest())) as storage:
        trials = optuna.load_study(study_name=folder.name, storage=as_optuna(storage)).trials
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    assert len(complete) == sum(map(counts, trials)) == requested
    assert len({tuple(trial.params.items()) for trial in complete}) == requested, "a trial was run twice"
    again = [trial.user_attrs[RETRY_OF] for trial in trials if RETRY_OF in trial.user_attrs]
    assert len(again) == len(set(again)), "a lost trial was queued twice"
    states = [json.loads(path.read_text())["retinaflow.state"] for path in folder.glob("trial-*/tags.json")]
    assert states.count("complete") == requested


def test_workers_of_short_trials(
    server: Server, tiny_dataset: TinyDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    restarts, data, searches, ended = Restarts(server, seed=0, longest_pause=2), tiny_dataset(), 0, 0
    while len(restarts.done) < RESTARTS:
        study, searches = f"{tmp_path.name}-{searches}", searches + 1
        given = {"data": str(data), "storage": server.url, "study": study, "trials": 20, "track": False}
        ended += work_through(restarts, resolve(SearchConfig, {**given, **TINY, "heartbeat": 2}), tmp_path / "hold")
        check(server, tmp_path / "outputs" / study, requested=20)
    print(f"{len(restarts.done)} restarts, {searches} searches: {Counter(restarts.done)}; {ended} workers ended")
    assert ended == 0


def work_through(restarts: Restarts, config: SearchConfig, hold: Path) -> int:
    """Two workers on a study during restarts; returns how many of them ended with an error."""
    with open_search(config):
        workers = [start_worker(config, hold, seconds=0.3) for _ in range(2)]
        restarts.until(lambda: not any(worker.is_alive() for worker in workers))
        return sum(code != 0 for code in finish(*workers))


def test_searches_of_two_workers(server: Server, tiny_dataset: TinyDataset, tmp_path: Path) -> None:
    restarts, data, searches = Restarts(server, seed=1, longest_pause=6), tiny_dataset(), 0
    ended: list[str] = []
    while len(restarts.done) < RESTARTS:
        study, searches = f"{tmp_path.name}-{searches}", searches + 1
        trials = 6 if RESTARTS < 10 else 12
        given = {"data": data, "storage": server.url, "study": study, "trials": trials, "track": False, "heartbeat": 2}
        code, shown = search_through(restarts, tmp_path, {**given, **TINY, "search_workers": 2})
        if code == 0 and "Traceback" not in shown:
            check(server, tmp_path / "outputs" / study, requested=trials)
        else:
            ended.append(f"exit code {code}\n{shown[-3000:]}")
    print(f"{len(restarts.done)} restarts, {searches} searches: {Counter(restarts.done)}; {len(ended)} ended")
    assert not ended, ended[-1]
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path for path in written if PASSWORD.encode() in path.read_bytes()] == []


def search_through(restarts: Restarts, folder: Path, given: dict[str, Any]) -> tuple[int, str]:
    """A search as a command during restarts; returns its exit code, and what it and its workers printed."""
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    log, study = folder / f"{given['study']}.log", str(given["study"])
    with log.open("wb") as file:
        command = [sys.executable, "-m", "retinaflow", "search", *words]
        process = subprocess.Popen(command, cwd=folder, stdout=file, stderr=subprocess.STDOUT)
        # An address that cannot be reached at the start is an error.
        wait_for(lambda: "trials requested" in log.read_text() or process.poll() is not None, what="the search")
        restarts.until(lambda: process.poll() is not None)
        code = process.wait(timeout=400)
    logs = [log, *sorted((folder / "outputs" / study).glob("worker-*.log"))]
    return code, "\n".join(path.read_text() for path in logs)
