"""The storage of a study: Optuna's RDBStorage on sqlite (one machine) or PostgreSQL (many), waited for when away.

How a search gets through a restart of its database:

- :class:`StudyStorage` stands between Optuna and its RDBStorage. A call whose connection breaks is repeated until the
  database is back, for at most :data:`PATIENCE_SECONDS`; a training in progress waits. Such a call reads, or writes a
  value that a second call writes again.
- What several workers must not do at the same time, such as taking a trial, is a :meth:`StudyStorage.transaction`:
  one transaction of the database, which holds the lock of the study. When its connection breaks, the database undoes
  the transaction and releases the lock, and it is repeated as a whole.
- A worker is dead when it is silent while others can reach the database (:class:`retinaflow.search.trial.LostTrials`).
"""

from __future__ import annotations

import hashlib
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar, cast

import optuna
import sqlalchemy
from optuna.storages import BaseStorage, RDBStorage
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import (
    ArgumentError,
    IntegrityError,
    InterfaceError,
    OperationalError,
    PendingRollbackError,
    ProgrammingError,
)

from retinaflow import files
from retinaflow.addresses import without_secrets
from retinaflow.errors import SettingError, StoreError, first_line
from retinaflow.files import growing_waits
from retinaflow.interrupts import StopRequest
from retinaflow.progress import report

PATIENCE_SECONDS = 600.0
"""How long a search waits for a database that cannot be reached."""
LONGEST_WAIT = 5.0
"""Seconds between two attempts to reach it."""

Result = TypeVar("Result")


def storage_url(storage: str, *, beside: str, output: Path) -> str:
    """The database URL of a ``storage`` setting. ``auto`` is ``optuna.db`` in the folder of the MLflow store ``beside``
    if that is a sqlite file, else in ``output``.

    Raises SettingError for a database that is not supported.
    """
    if storage == "auto":
        is_file = beside.startswith("sqlite:///")
        return _file_url((Path(make_url(beside).database or "") if is_file else output / "_").with_name("optuna.db"))
    if "://" not in storage:
        return _file_url(Path(storage))
    try:
        url = make_url(storage)
    except ArgumentError:
        raise SettingError("storage must be a file or a database URL, but got a URL that cannot be parsed") from None
    if url.drivername == "sqlite" and url.database:
        return _file_url(Path(url.database))
    if url.drivername in ("postgresql", "postgresql+psycopg"):
        return url.set(drivername="postgresql+psycopg").render_as_string(hide_password=False)
    raise SettingError(f"storage must be a file, sqlite:/// or postgresql://, but got {without_secrets(storage)}")


def _file_url(file: Path) -> str:
    """The URL of a sqlite file, in which characters with a meaning in URLs (``%``, ``?``) are quoted."""
    return URL.create("sqlite", database=str(file.resolve())).render_as_string()


class StudyStorage:
    """A storage for Optuna that waits for its database. It has all methods of ``optuna.storages.BaseStorage``."""

    def __init__(self, url: str, *, stop: StopRequest, wait: bool) -> None:
        """Connect, and create the tables where there are none. ``wait``: also if the database is away. ``stop`` ends
        the waiting."""
        self._url, self._stop, self._thread = url, stop, threading.local()
        self._away_since: float | None = None
        self.last_outage = float("-inf")
        """When the database could not be reached last, by ``time.monotonic()``."""
        self._database = self._repeat(lambda: _database(url)) if wait else _database(url)
        self._optuna = optuna.storages.get_storage(self._database)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """A method of Optuna's storage."""
        if name.startswith("_"):
            raise AttributeError(name)
        return lambda *values, **named: self._repeat(lambda: getattr(self._optuna, name)(*values, **named))

    @property
    def address(self) -> str:
        """The URL without its secrets, to be printed and logged."""
        return without_secrets(self._url)

    def transaction(self, study: str, action: Callable[[], Result]) -> Result:
        """The result of an action on a study, as one transaction; transactions of a study follow each other, in
        whichever process and on whichever machine.

        The action is repeated when its connection breaks. It should be short and change nothing but the study. Where
        the connection breaks during the commit, what the action did may be stored already.
        """
        return self._repeat(lambda: self._transact(study, action))

    def close(self) -> None:
        """Close the connections; a later call opens new ones."""
        self._database.remove_session()
        self._database.engine.dispose()

    def _transact(self, study: str, action: Callable[[], Result]) -> Result:
        sessions = self._database.scoped_session
        sessions.remove()
        try:
            with self._database.engine.begin() as connection:
                _lock(connection, study)
                # Optuna takes the session of the thread: what it commits becomes a part of this transaction.
                sessions(bind=connection, join_transaction_mode="create_savepoint")
                self._thread.transacts = True
                return action()
        except BaseException:
            # Optuna must not remember what was undone.
            self._optuna = optuna.storages.get_storage(self._database)
            raise
        finally:
            self._thread.transacts = False
            sessions.remove()

    def _repeat(self, call: Callable[[], Result]) -> Result:
        """The result of a call that is repeated while its connection breaks; in a transaction the whole is repeated.

        Raises StoreError when the database stays out of reach.
        """
        if getattr(self._thread, "transacts", False):
            return call()
        try:
            result = files.retry(call, waits=self._waits(), may_pass=self._is_away, sleep=self._sleep)
        except Exception as error:
            if _is_connection_error(error):
                raise StoreError(f"storage={self.address}: {_first_line(error)}") from error
            raise
        self._away_since = None
        return result

    def _is_away(self, error: Exception) -> bool:
        if not _is_connection_error(error):
            return False
        now = time.monotonic()
        if now - self.last_outage > 2 * LONGEST_WAIT:
            report(f"waiting for the storage {self.address}: {_first_line(error)}")
        self.last_outage, self._away_since = now, self._away_since or now
        return True

    def _waits(self) -> Iterator[float]:
        for wait in growing_waits(0.1, LONGEST_WAIT):
            if time.monotonic() - (self._away_since or time.monotonic()) > PATIENCE_SECONDS:
                return
            yield wait

    def _sleep(self, seconds: float) -> None:
        self._stop.check()
        time.sleep(seconds)


def open_storage(url: str, *, stop: StopRequest) -> StudyStorage:
    """Connect, and create the tables where there are none. Raises StoreError for a database that cannot be opened in a
    few seconds: its address may be wrong."""
    shown = f"storage={without_secrets(url)}"
    if url.startswith("sqlite"):
        Path(make_url(url).database or "").parent.mkdir(parents=True, exist_ok=True)
    try:
        return files.retry(
            lambda: StudyStorage(url, stop=stop, wait=False),
            waits=growing_waits(0.2, 1.0, count=4),
            may_pass=lambda error: _is_connection_error(error) or _is_race(error),
        )
    except ImportError:
        raise SettingError(f"{shown} needs psycopg; pip install 'psycopg[binary]'") from None
    except Exception as error:
        if _is_connection_error(error) or _is_race(error):
            raise StoreError(f"{shown} cannot be opened: {_first_line(error)}") from None
        raise


def as_optuna(storage: StudyStorage) -> BaseStorage:
    """The storage as Optuna's functions take it."""
    return cast(BaseStorage, storage)


def _database(url: str) -> RDBStorage:
    timeout = {"timeout": 60} if url.startswith("sqlite") else {}
    with warnings.catch_warnings():
        # SQLAlchemy 2.1 deprecates what Optuna's tables are made with.
        warnings.simplefilter("ignore")
        return RDBStorage(url, engine_kwargs={"connect_args": timeout})


def _lock(connection: sqlalchemy.Connection, study: str) -> None:
    """Take the lock of a study, which ends with the transaction."""
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql("BEGIN IMMEDIATE")
        return
    key = int.from_bytes(hashlib.sha256(study.encode()).digest()[:8], "big", signed=True)
    connection.execute(sqlalchemy.text("SELECT pg_advisory_xact_lock(:key)"), {"key": key})


def _is_connection_error(error: BaseException | None) -> bool:
    """Whether the cause of an error is a connection that broke or a database that is busy.

    SQLAlchemy raises PendingRollbackError for later calls on a connection that broke.
    """
    while error is not None:
        if isinstance(error, OperationalError | InterfaceError | PendingRollbackError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _is_race(error: Exception) -> bool:
    """Whether another process is creating the tables at the same time."""
    return isinstance(error, IntegrityError | ProgrammingError)


def _first_line(error: Exception) -> str:
    """Without the lines that Optuna and SQLAlchemy add."""
    cause: BaseException | None = error
    while cause is not None:
        if getattr(cause, "orig", None):
            return first_line(cause.orig)  # type: ignore[attr-defined]
        cause = cause.__cause__ or cause.__context__
    return first_line(error)
