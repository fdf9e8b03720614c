"""Errors that a user can cause or meet. The command line shows these without a traceback; anything else is a bug.

SettingError and DataError are ValueErrors, so that code which calls retinaflow from Python can catch them as such.
"""

from __future__ import annotations

import errno
import reprlib
from typing import Any

from retinaflow.addresses import without_secrets


class SettingError(ValueError):
    """A setting, or a combination of settings, that breaks a rule. The message names setting, rule and value."""


class DataError(ValueError):
    """A file that is missing, cannot be read or written, or breaks a rule. The message names file, line and rule."""


class StoreError(RuntimeError):
    """A store of runs or trials (MLflow, a database) that cannot be reached, or that refused a request."""


class TrainingError(Exception):
    """A training that cannot continue: its losses or gradients are not finite."""


class WorkerError(Exception):
    """A process of this command that died: a loader worker or another rank. Often the memory ran out."""


class Interrupted(Exception):
    """Work that ended early on request: a signal, or the end of the process that started it. What was saved stays."""


SHOWN = (SettingError, DataError, StoreError, TrainingError, WorkerError)
"""The errors whose message is enough for a user."""

_ROOM = "make room, or give another output="
_NEXT_STEPS = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EFBIG: "raise the limit of file sizes (ulimit -f)",
    errno.EROFS: "give a path on another disk",
    errno.EACCES: "give a path that this user may use",
    errno.EPERM: "give a path that this user may use",
    errno.ENAMETOOLONG: "give a shorter path",
    errno.ELOOP: "the links of this path lead in a circle",
    errno.EMFILE: "raise the limit of open files (ulimit -n), or give fewer workers=",
    errno.ENFILE: "end other programs that hold files open",
    errno.EIO: "the disk, or the connection to it, fails",
    errno.ESTALE: "the disk, or the connection to it, fails",
}


def refusal(error: OSError) -> str | None:
    """The message for what the system refused (a full disk, a name that is too long) with the next step; None for any
    other error.

    Every file that is opened can meet this, so the error number distinguishes it from a bug.
    """
    step = _NEXT_STEPS.get(error.errno or 0)
    place = "" if error.filename is None else f": {shown(str(error.filename), limit=300, quotes=False)}"
    return None if step is None else f"{error.strerror}{place}; {step}"


def first_line(error: BaseException) -> str:
    """The first line of an error's message without secrets, or its class name where there is no message."""
    lines = str(error).strip().splitlines()
    return without_secrets(lines[0]) if lines else type(error).__name__


class _Cut(reprlib.Repr):
    """``repr`` that cuts while it formats: a value of 400 bytes (nested YAML anchors) may have a text of gigabytes."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxlong, self.maxother = 3, 100, 100, 100

    def repr_int(self, x: int, level: int) -> str:
        """An integer of too many digits has no text in Python."""
        return super().repr_int(x, level) if x.bit_length() < 10_000 else f"an integer of {x.bit_length():,} bits"


def shown(value: Any, *, limit: int = 100, quotes: bool = True) -> str:
    """A value from a file or a setting as it stands in a message: its ``repr``, of at most ``limit`` characters.

    ``quotes=False``: texts without quotes.
    """
    text = value[: limit + 1] if isinstance(value, str) and not quotes else _Cut().repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
