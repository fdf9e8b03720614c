"""A new MLflow store in a sqlite file: whole or absent, however many processes start at once and whenever they end.

MLflow makes its tables by many small steps, which take seconds. A process that is stopped in between leaves a file on
which every later start fails, and two that start together get into each other's way. So the file is made beside its
path, under a lock, and renamed. A half-made file of another program is set aside when it holds no run.
"""

from __future__ import annotations

import os
import sqlite3
import time
from contextlib import closing
from pathlib import Path

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from retinaflow.files import lock
from retinaflow.progress import report

SECONDS_WITHOUT_CHANGE = 15.0
"""A half-made file that did not change for so long is not being made by another program."""
_POLL_SECONDS = 0.5


def database_file(address: str) -> Path | None:
    """The file of a sqlite store; None for any other store."""
    try:
        url = make_url(address)
    except ArgumentError:
        return None
    if url.get_backend_name() != "sqlite" or not url.database or url.database.startswith((":memory:", "file:")):
        return None
    return Path(url.database)


def make_store(address: str) -> None:
    """Make the file of a sqlite store if there is none, or only a half-made one without a run.

    Any other store is left alone. Raises OSError where the file cannot be written, and what MLflow raises.
    """
    file = database_file(address)
    if file is None or _is_whole(file):
        return
    file = file.absolute()
    with lock(file.with_name(f".{file.name}.lock"), before_wait=lambda: report(f"waiting for the MLflow store {file}")):
        while not _is_whole(file):
            if not _has_content(file):
                _make(file)
            elif time.time() - _changed(file) > SECONDS_WITHOUT_CHANGE:
                _set_aside(file)
            else:
                # Another program, such as `mlflow ui`, may be making it right now.
                time.sleep(_POLL_SECONDS)


def _has_content(file: Path) -> bool:
    return file.is_file() and file.stat().st_size > 0


def _side_files(file: Path) -> list[Path]:
    """The files that sqlite keeps beside a database, those that are there."""
    return [path for end in ("-journal", "-wal", "-shm") if (path := file.with_name(file.name + end)).is_file()]


def _changed(file: Path) -> float:
    """When the file or one beside it was written last, seconds since 1970."""
    return max(path.stat().st_mtime for path in (file, *_side_files(file)))


def _is_whole(file: Path) -> bool:
    """Whether the file is a finished store, or anything that is not ours to replace: one with runs, another database,
    no database at all. MLflow reports then what is wrong with it."""
    if not _has_content(file):
        return False
    try:
        with closing(sqlite3.connect(file, timeout=5)) as database:
            tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if not tables & {"alembic_version", "experiments"}:
                return bool(tables)
            for table in tables & {"runs", "registered_models"}:
                if database.execute(f"SELECT 1 FROM {table} LIMIT 1").fetchone():
                    return True
            half_made = any(table.startswith("_alembic_tmp_") for table in tables) or "alembic_version" not in tables
            return not half_made and database.execute("SELECT * FROM alembic_version").fetchall() == [_newest_version()]
    except sqlite3.Error:
        # Locked for long, or not a database.
        return True


def _newest_version() -> tuple[str]:
    from mlflow.store.db.utils import _get_latest_schema_revision

    return (str(_get_latest_schema_revision()),)  # type: ignore[no-untyped-call]


def _make(file: Path) -> None:
    from mlflow.tracking._tracking_service.utils import _get_sqlalchemy_store

    report(f"making the MLflow store {file} (once, some seconds)")
    partial = file.with_name(f".{file.name}.partial")
    # Whatever a killed process left there would be played back into the new file.
    for left in (partial, *_side_files(partial), *_side_files(file)):
        left.unlink(missing_ok=True)
    address = URL.create("sqlite", database=str(partial)).render_as_string()
    _get_sqlalchemy_store(address, None).engine.dispose()  # type: ignore[no-untyped-call]
    if _has_content(file):
        # Another program has begun to make it meanwhile.
        partial.unlink()
        return
    with partial.open("rb+") as whole:
        os.fsync(whole.fileno())
    partial.replace(file)


def _set_aside(file: Path) -> None:
    number = 1
    while (aside := file.with_name(f"{file.name}.half-made-{number}")).exists():
        number += 1
    report(
        f"the MLflow store {file} was left half-made by a process that was stopped, and holds no run: it is now "
        f"{aside.name}, and a new one is made"
    )
    file.replace(aside)
    for side in _side_files(file):
        side.replace(side.with_name(side.name.replace(file.name, aside.name, 1)))
