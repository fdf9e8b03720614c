"""Where a study is kept: an Optuna RDB storage on sqlite (one machine) or PostgreSQL (many), that survives outages.

- :class:`PatientStorage` waits for a database that is away (restarted, locked) instead of failing the trial that runs,
  up to :data:`PATIENCE_SECONDS`. Each call is one transaction, so a call that failed can be made again.
- :meth:`PatientStorage.claiming` is a lock among all processes of a study, on all machines: who holds it may count the
  trials and take one. Optuna's ``MaxTrialsCallback`` counts after the fact and overshoots.
- Trials send heartbeats (Optuna's, in the database's time); silence of four intervals counts as death.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import inspect
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import RDBStorage
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, IntegrityError, InterfaceError, OperationalError, ProgrammingError

PATIENCE_SECONDS = 600.0
GRACE_BEATS = 4
"""Heartbeats missed before a worker counts as dead."""

StaleCallback = Callable[[optuna.Study, optuna.trial.FrozenTrial], None]


def storage_url(storage: str, *, beside: str, output: Path) -> str:
    """The database URL of a ``storage`` setting; ``auto``: ``optuna.db`` in the folder of the MLflow store ``beside``
    if that is a sqlite file, else in ``output``.

    Raises ValueError for a database that this does not work with.
    """
    if storage == "auto":
        file = beside.removeprefix("sqlite:///")
        storage = str(Path(file).with_name("optuna.db") if file != beside else output / "optuna.db")
    if "://" not in storage:
        return f"sqlite:///{Path(storage).resolve()}"
    try:
        url = make_url(storage)
    except ArgumentError:
        raise ValueError(f"storage must be a file or a database URL, but got {storage}") from None
    if url.drivername == "sqlite" and url.database:
        return f"sqlite:///{Path(url.database).resolve()}"
    if url.drivername in ("postgresql", "postgresql+psycopg"):
        return url.set(drivername="postgresql+psycopg").render_as_string(hide_password=False)
    raise ValueError(f"storage must be a file, sqlite:/// or postgresql://, but got {without_password(storage)}")


def without_password(url: str) -> str:
    """A URL fit to be shown and logged."""
    return make_url(url).render_as_string(hide_password=True) if "://" in url else url


def is_connection_error(error: BaseException | None) -> bool:
    """Whether a database could not be reached or was busy, rather than asked wrongly."""
    while error is not None:
        if isinstance(error, OperationalError | InterfaceError):
            return True
        error = error.__cause__
    return False


class PatientStorage(RDBStorage):
    """An RDB storage whose calls wait for a database that is away."""

    def __init__(self, url: str, *, heartbeat: int, when_stale: StaleCallback) -> None:
        self._seen_away = float("-inf")
        self._waiting = False
        sqlite = url.startswith("sqlite")
        with warnings.catch_warnings():
            # Heartbeats are experimental in Optuna, and SQLAlchemy 2.1 deprecates what Optuna's tables are made with.
            warnings.simplefilter("ignore")
            super().__init__(
                url,
                engine_kwargs={"connect_args": {"timeout": 60}} if sqlite else {"pool_pre_ping": True},
                heartbeat_interval=heartbeat,
                grace_period=GRACE_BEATS * heartbeat,
                heartbeat_stale_trial_callback=when_stale,
            )

    @property
    def grace_seconds(self) -> float:
        """Silence after which a worker counts as dead."""
        assert self.heartbeat_interval is not None
        return float(GRACE_BEATS * self.heartbeat_interval)

    @contextlib.contextmanager
    def claiming(self, study: str) -> Iterator[None]:
        """The lock of a study. It goes with the process or connection that holds it, so a killed holder frees it."""
        url = self.engine.url
        with _file_lock(url) if url.get_backend_name() == "sqlite" else self._advisory_lock(study):
            yield

    @contextlib.contextmanager
    def _advisory_lock(self, study: str) -> Iterator[None]:
        key = int.from_bytes(hashlib.sha256(study.encode()).digest()[:8], "big", signed=True)
        connection = patiently(self, lambda: _locked(self.engine, key))
        try:
            yield
        finally:
            # A server that went away meanwhile has freed the lock with the connection.
            with contextlib.suppress(OperationalError, InterfaceError):
                connection.close()

    def _get_stale_trial_ids(self, study_id: int) -> list[int]:
        # Nobody could send a sign of life while the database was away: give everybody time to do so.
        if time.monotonic() - self._seen_away < self.grace_seconds:
            return []
        return super()._get_stale_trial_ids(study_id)

    def close(self) -> None:
        """Give the connections back; a later call opens new ones."""
        self.remove_session()
        self.engine.dispose()

    def note_away(self) -> None:
        """Remember that the database was away just now, and say so once per outage."""
        if time.monotonic() - self._seen_away > self.grace_seconds:
            print(f"waiting for the storage {without_password(self.url)}", flush=True)
        self._seen_away = time.monotonic()


def patiently(storage: PatientStorage, call: Callable[[], Any]) -> Any:
    """The result of a call, made again while the database is away."""
    deadline, pause = time.monotonic() + PATIENCE_SECONDS, 0.1
    while True:
        try:
            return call()
        except (StorageInternalError, OperationalError, InterfaceError) as error:
            if not is_connection_error(error) or time.monotonic() > deadline:
                raise
            storage.note_away()
            time.sleep(pause)
            pause = min(pause * 2, 5.0)


def _patient(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: PatientStorage, *words: Any, **named: Any) -> Any:
        tries = 0

        def once() -> Any:
            nonlocal tries
            tries += 1
            try:
                return method(self, *words, **named)
            except UpdateFinishedTrialError:
                # On the first try another process finished the trial. After an outage it was this very call, whose
                # answer was lost.
                if tries == 1:
                    raise
                return True

        return patiently(self, once)

    return call


def _calls_of_the_database() -> list[str]:
    """Methods about a study or a trial that make a transaction of their own; those that Optuna's cache uses too."""
    names = []
    for name, method in vars(RDBStorage).items():
        arguments = inspect.signature(method).parameters if inspect.isfunction(method) else {}
        if {"study_id", "trial_id", "study_name"} & set(arguments) and "session" not in arguments:
            names.append(name)
    return names


for _name in _calls_of_the_database():
    setattr(PatientStorage, _name, _patient(getattr(PatientStorage, _name)))


def open_storage(url: str, *, heartbeat: int, when_stale: StaleCallback) -> PatientStorage:
    """Connect, and make the tables where there are none. Raises ValueError for a database that cannot be reached."""
    if url.startswith("sqlite"):
        Path(make_url(url).database or "").parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(5):
        try:
            return PatientStorage(url, heartbeat=heartbeat, when_stale=when_stale)
        except ImportError:
            raise ValueError(f"storage={without_password(url)} needs psycopg; pip install 'psycopg[binary]'") from None
        except OperationalError as error:
            if "already exists" not in str(error):
                raise ValueError(f"storage={without_password(url)} cannot be opened: {_said(error)}") from None
        except (IntegrityError, ProgrammingError) as error:
            # Two processes made the tables at the same time; the other one won.
            if attempt == 4:
                raise ValueError(f"storage={without_password(url)} cannot be opened: {_said(error)}") from None
        time.sleep(0.2 * (attempt + 1))
    raise ValueError(f"storage={without_password(url)} cannot be opened: its tables are being made by another process")


def _said(error: Exception) -> str:
    return str(getattr(error, "orig", error)).strip().splitlines()[0]


def _locked(engine: sqlalchemy.Engine, key: int) -> sqlalchemy.Connection:
    connection = engine.connect()
    try:
        connection.execute(sqlalchemy.text("SELECT pg_advisory_xact_lock(:key)"), {"key": key})
    except BaseException:
        connection.close()
        raise
    return connection


@contextlib.contextmanager
def _file_lock(url: URL) -> Iterator[None]:
    with Path(f"{url.database}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
