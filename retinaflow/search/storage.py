"""The storage of a study: Optuna's RDBStorage on sqlite (one machine) or PostgreSQL (many), with a lock per study.

How a search gets through a restart of its database:

- Before each transaction SQLAlchemy checks the connection (``pool_pre_ping``) and replaces a dead one. A new connection
  is tried until the database is back, for at most :data:`PATIENCE_SECONDS`. A training in progress therefore waits.
- A connection can still break within a transaction, which takes milliseconds. :meth:`StudyStorage.retry` repeats the
  calls that would otherwise end a search or lose a training: taking a trial, heartbeats, reports, the results of a
  trial, ``tell``, and the progress that is printed. Each may be repeated: attributes are overwritten, ``tell`` skips a
  trial that is finished, and a trial that was taken without an answer is later found without a worker. A trial whose
  connection breaks in any other call, most of which come before its training, is queued again.
- Optuna cannot distinguish a dead worker from one that could not reach the database, so no worker counts as dead until
  :attr:`StudyStorage.grace_seconds` after an outage.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy
from optuna.storages import RDBStorage
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, InterfaceError, OperationalError, ProgrammingError

from retinaflow import files
from retinaflow.errors import SettingError, StoreError, first_line
from retinaflow.files import growing_waits
from retinaflow.progress import report

PATIENCE_SECONDS = 600.0
"""How long a search waits for a database that cannot be reached."""
GRACE_BEATS = 4
"""Number of missed heartbeats after which a worker counts as dead."""
ATTEMPTS = 5
"""Number of attempts at a call whose connection breaks."""

Result = TypeVar("Result")


def storage_url(storage: str, *, beside: str, output: Path) -> str:
    """The database URL of a ``storage`` setting. ``auto`` is ``optuna.db`` in the folder of the MLflow store ``beside``
    if that is a sqlite file, else in ``output``.

    Raises SettingError for a database that is not supported.
    """
    if storage == "auto":
        file = beside.removeprefix("sqlite:///")
        storage = str(Path(file).with_name("optuna.db") if file != beside else output / "optuna.db")
    if "://" not in storage:
        return f"sqlite:///{Path(storage).resolve()}"
    try:
        url = make_url(storage)
    except ArgumentError:
        raise SettingError("storage must be a file or a database URL, but got a URL that cannot be parsed") from None
    if url.drivername == "sqlite" and url.database:
        return f"sqlite:///{Path(url.database).resolve()}"
    if url.drivername in ("postgresql", "postgresql+psycopg"):
        return url.set(drivername="postgresql+psycopg").render_as_string(hide_password=False)
    raise SettingError(f"storage must be a file, sqlite:/// or postgresql://, but got {without_password(storage)}")


def without_password(url: str) -> str:
    """A URL that may be printed and logged."""
    return make_url(url).render_as_string(hide_password=True) if "://" in url else url


def is_connection_error(error: BaseException | None) -> bool:
    """Whether the cause of an error is a connection that broke or a database that is busy.

    SQLAlchemy's PendingRollbackError has the error of the connection in its ``__context__``. A StoreError is raised
    after retries, here or for MLflow's store.
    """
    while error is not None and not isinstance(error, StoreError):
        if isinstance(error, OperationalError | InterfaceError):
            return True
        error = error.__cause__ or error.__context__
    return False


class StudyStorage(RDBStorage):
    """An RDBStorage that waits for its database and has a lock per study."""

    def __init__(self, url: str, *, heartbeat: int) -> None:
        """heartbeat: seconds between two heartbeats of a trial."""
        self._away_at = float("-inf")
        sqlite = url.startswith("sqlite")
        with warnings.catch_warnings():
            # Heartbeats are experimental in Optuna, and SQLAlchemy 2.1 deprecates what Optuna's tables are made with.
            warnings.simplefilter("ignore")
            super().__init__(
                url,
                engine_kwargs={"connect_args": {"timeout": 60}} if sqlite else {"pool_pre_ping": True},
                heartbeat_interval=heartbeat,
                grace_period=GRACE_BEATS * heartbeat,
            )
        # After the first connection: a wrong address must be reported at once.
        sqlalchemy.event.listen(self.engine, "do_connect", self._connect)

    @property
    def address(self) -> str:
        """The URL without its password, to be printed and logged."""
        return without_password(self.url)

    @property
    def grace_seconds(self) -> float:
        """Silence after which a worker counts as dead."""
        assert self.heartbeat_interval is not None
        return float(GRACE_BEATS * self.heartbeat_interval)

    @property
    def was_away(self) -> bool:
        """Whether the database could not be reached within the last grace period, so that silence proves nothing."""
        return time.monotonic() - self._away_at < self.grace_seconds

    def retry(self, call: Callable[[], Result]) -> Result:
        """The result of a call that is repeated when its connection breaks. The call must be safe to repeat.

        Raises StoreError when the database stays out of reach.
        """
        try:
            # No pauses: a new connection waits for the database.
            return files.retry(call, waits=[0.0] * (ATTEMPTS - 1), may_pass=is_connection_error)
        except Exception as error:
            if is_connection_error(error):
                raise StoreError(f"storage={self.address}: {_first_line(error)}") from error
            raise

    @contextlib.contextmanager
    def lock(self, study: str) -> Iterator[Callable[[], None]]:
        """The lock of a study among all processes on all machines: who holds it may count the trials and take one.

        It is released with the process or connection that holds it. Yields a function that raises when the lock was
        lost with its connection.
        """
        url = self.engine.url
        if url.get_backend_name() == "sqlite":
            with files.lock(Path(f"{url.database}.lock")):
                yield lambda: None
            return
        key = int.from_bytes(hashlib.sha256(study.encode()).digest()[:8], "big", signed=True)
        connection = self.retry(lambda: _locked(self.engine, key))
        try:
            yield lambda: connection.execute(sqlalchemy.text("SELECT 1")).close()
        finally:
            # A server that was restarted meanwhile has released the lock.
            with contextlib.suppress(DBAPIError):
                connection.close()

    def close(self) -> None:
        """Close the connections; a later call opens new ones."""
        self.remove_session()
        self.engine.dispose()

    def _connect(self, dialect: Any, record: Any, args: Any, parameters: Any) -> Any:
        """A new connection (SQLAlchemy's ``do_connect`` event), tried until the database is there."""
        del record

        def is_away(error: Exception) -> bool:
            if not isinstance(error, dialect.loaded_dbapi.OperationalError):
                return False
            if not self.was_away:
                report(f"waiting for the storage {self.address}")
            self._away_at = time.monotonic()
            return True

        waits = growing_waits(0.1, 5.0, patience=PATIENCE_SECONDS)
        return files.retry(lambda: dialect.connect(*args, **parameters), waits=waits, may_pass=is_away)


def open_storage(url: str, *, heartbeat: int) -> StudyStorage:
    """Connect, and create the tables where there are none. Raises StoreError for a database that cannot be opened."""
    shown = f"storage={without_password(url)}"
    if url.startswith("sqlite"):
        Path(make_url(url).database or "").parent.mkdir(parents=True, exist_ok=True)
    try:
        return files.retry(
            lambda: StudyStorage(url, heartbeat=heartbeat), waits=growing_waits(0.2, 1.0, count=4), may_pass=_is_race
        )
    except ImportError:
        raise SettingError(f"{shown} needs psycopg; pip install 'psycopg[binary]'") from None
    except (OperationalError, IntegrityError, ProgrammingError) as error:
        raise StoreError(f"{shown} cannot be opened: {_first_line(error)}") from None


def _is_race(error: Exception) -> bool:
    """Whether another process is creating the tables at the same time."""
    return isinstance(error, IntegrityError | ProgrammingError) or "already exists" in str(error)


def _first_line(error: Exception) -> str:
    """Without SQLAlchemy's statement and parameters."""
    return first_line(getattr(error, "orig", None) or error)


def _locked(engine: sqlalchemy.Engine, key: int) -> sqlalchemy.Connection:
    connection = engine.connect()
    try:
        connection.execute(sqlalchemy.text("SELECT pg_advisory_xact_lock(:key)"), {"key": key})
    except BaseException:
        connection.close()
        raise
    return connection
