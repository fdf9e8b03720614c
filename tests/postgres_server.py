"""A throw-away PostgreSQL cluster for tests that need one."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

PASSWORD = "S3cret-Pw"


class Server:
    """A cluster on a socket in a folder of its own, run as a user that is not root."""

    def __init__(self, folder: Path, programs: Path) -> None:
        self.folder, self._programs = folder, programs
        self._user = "postgres" if os.geteuid() == 0 else None
        if self._user:
            shutil.chown(folder, self._user)
        self._run("initdb", "-D", str(folder / "data"), "-U", "postgres", "--auth=trust", "--no-sync", "-E", "UTF8")

    @property
    def url(self) -> str:
        """For ``storage=``. The server takes any password, so that tests can look where it appears."""
        return f"postgresql://postgres:{PASSWORD}@/postgres?host={self.folder}"

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


def running_server() -> Iterator[Server]:
    """A server for a fixture; skips the test where its programs or its driver are not installed."""
    pytest.importorskip("psycopg", reason="psycopg is not installed: pip install 'psycopg[binary]'")
    programs = _programs()
    if programs is None:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    # Not below pytest's folder, which no other user may enter.
    folder = Path(tempfile.mkdtemp(prefix="retinaflow-postgres-"))
    server = Server(folder, programs)
    server.control("start")
    yield server
    server.control("stop")
    shutil.rmtree(folder, ignore_errors=True)


def _programs() -> Path | None:
    found = shutil.which("pg_ctl")
    folders = [Path(found).resolve().parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    return next((folder for folder in reversed(folders) if (folder / "initdb").is_file()), None)
