"""The owner of a run: the process that writes its checkpoints.

It holds a lock in their folder, which the system releases when the process ends, however it ends; ``.owner.json``
beside it records who that is.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from retinaflow.errors import SettingError
from retinaflow.files import lock

LOCK, OWNER = ".owner.lock", ".owner.json"
_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)
"""Not only the permissions of a folder decide, but the mount too, whose refusal is no PermissionError."""


@contextlib.contextmanager
def owner_of(folder: Path) -> Iterator[None]:
    """Own a folder while the block runs. Raises SettingError that names the process which owns it already."""
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(lock(folder / LOCK, wait=False))
        except BlockingIOError:
            raise SettingError(
                f"a training is in progress in {folder}, by {_owner(folder)}; wait for it or stop it, or give another "
                "output= to train beside it"
            ) from None
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        document = json.dumps({"process": os.getpid(), "machine": platform.node(), "since": now})
        (folder / OWNER).write_text(document + "\n", encoding="utf-8")
        try:
            yield
        finally:
            (folder / OWNER).unlink(missing_ok=True)


@contextlib.contextmanager
def owner_where_writable(folder: Path) -> Iterator[None]:
    """The same for a folder that is there and is only read from: nobody owns one that this process may not write."""
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(owner_of(folder))
        except OSError as error:
            if error.errno not in _READ_ONLY:
                raise
        yield


def _owner(folder: Path) -> str:
    try:
        owner = json.loads((folder / OWNER).read_text(encoding="utf-8"))
        return f"process {owner['process']} on {owner['machine']} since {owner['since']}"
    except (OSError, ValueError, KeyError):
        return "another process"
