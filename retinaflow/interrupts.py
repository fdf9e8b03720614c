"""Stop on request: SIGTERM, Ctrl-C, or the end of the process that started this one.

Inside ``with StopRequest() as stop`` a signal only sets ``stop.reason``; the loop looks at it after every step, leaves
a checkpoint and ends in order. The rest of a command, under :func:`stopping_at_once`, ends where it is.

One stop is one stop, however many signals it arrives as: ``mlflow run`` sends SIGTERM after a Ctrl-C that the terminal
has sent already, and a scheduler may send the same signal to a process and to those that it started. So only a further
Ctrl-C, at least :data:`SAME_STOP_SECONDS` after the first signal, ends the ending too. ``mlflow run`` dies on SIGTERM
without passing it on, so with ``watch_parent`` the loss of the parent process counts as a request.
"""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

from retinaflow.errors import Interrupted

SAME_STOP_SECONDS = 1.0
"""Signals that follow each other so fast belong to one stop; a person takes longer to press Ctrl-C again."""
STOPPED = 130
"""Exit code after a stop: 128 and the number of SIGINT, as in a shell."""
_ANNOUNCED = b"\nstopping once the present step is stored; Ctrl-C again ends at once\n"


class StopRequest:
    """``reason`` is None until somebody asks to stop."""

    def __init__(self, *, watch_parent: bool = False) -> None:
        self._parent = os.getppid() if watch_parent else None
        self._listens = False
        self._past: str | None = None

    @property
    def reason(self) -> str | None:
        asked = self._past or _signals.reason
        if asked is None and self._parent is not None and os.getppid() != self._parent:
            return "the process that started this run has ended"
        return asked

    def check(self) -> None:
        """Raise Interrupted if somebody asked."""
        if self.reason is not None:
            raise Interrupted(self.reason)

    def __enter__(self) -> Self:
        self._listens = _signals.open(only_note=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._listens:
            self._past = _signals.reason
            _signals.close(only_note=True)


@contextmanager
def stopping_at_once() -> Iterator[None]:
    """Inside the block, but outside of a :class:`StopRequest`, a stop raises KeyboardInterrupt, once."""
    listens = _signals.open(only_note=False)
    try:
        yield
    finally:
        if listens:
            _signals.close(only_note=False)


@contextmanager
def without_ctrl_c() -> Iterator[None]:
    """Processes that are started inside the block get no Ctrl-C of the terminal: this one decides for them.

    They inherit that the signal is blocked. They could otherwise be interrupted before their first line, in an import,
    and their death would be reported instead of the stop. A Ctrl-C during the block arrives after it.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Signals:
    """What this process has been asked, from the first opened block to the end of the last."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self._at = 0.0
        self._opened = self._noting = 0
        self._announces = False
        self._process = os.getpid()
        self._terminated = 0
        self._previous: dict[int, Any] = {}
        self._previous_hook = sys.unraisablehook
        self._lost: str | None = None

    def open(self, *, only_note: bool) -> bool:
        """Listen from now on; returns whether it does."""
        # Python delivers signals to the main thread only; elsewhere (a notebook's worker) there is nothing to listen
        # to.
        if threading.current_thread() is not threading.main_thread():
            return False
        if self._opened == 0:
            self.reason, self._process, self._terminated, self._lost = None, os.getpid(), 0, None
            self._announces = not only_note
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._note)
            self._previous_hook, sys.unraisablehook = sys.unraisablehook, self._note_lost
        self._opened += 1
        self._noting += only_note
        return True

    def close(self, *, only_note: bool) -> None:
        """Listen no longer, with the last block."""
        self._opened -= 1
        self._noting -= only_note
        if self._opened == 0:
            for number, handler in self._previous.items():
                signal.signal(number, handler)
            sys.unraisablehook = self._previous_hook
            self.reason = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        if os.getpid() != self._process:
            self._note_in_fork(number)
            return
        lost, self._lost = self._lost, None
        if lost is not None:
            if lost != self.reason or not self._noting:
                raise KeyboardInterrupt(lost)
            return
        now = time.monotonic()
        if self.reason is None:
            self.reason, self._at = f"signal {signal.Signals(number).name}", now
            if not self._noting:
                raise KeyboardInterrupt(self.reason)
            if number == signal.SIGINT and self._announces:
                # A buffered stream must not be written to from within a signal.
                os.write(2, _ANNOUNCED)
        elif number == signal.SIGINT and now - self._at >= SAME_STOP_SECONDS:
            raise KeyboardInterrupt(f"{self.reason}, and Ctrl-C again")

    def _note_lost(self, unraisable: sys.UnraisableHookArgs) -> None:
        """Python drops what is raised within ``__del__``, a weak reference's callback and the like, so a stop that
        arrives there would be none. It is raised again, a moment later, where it can go up."""
        if isinstance(unraisable.exc_value, KeyboardInterrupt) and os.getpid() == self._process:
            self._lost = str(unraisable.exc_value)
            # Not threading.Thread: its locks may be held by what the garbage collection interrupted.
            _thread.start_new_thread(self._raise_lost, ())
        else:
            self._previous_hook(unraisable)

    def _raise_lost(self) -> None:
        time.sleep(0.05)
        if self._lost is not None and self._opened:
            _thread.interrupt_main(signal.SIGINT)

    def _note_in_fork(self, number: int) -> None:
        """In a loader worker, which got these handlers with its memory: the process that it works for decides, and ends
        it. A signal to the whole group comes once; the second SIGTERM is meant for this process."""
        self._terminated += number == signal.SIGTERM
        if self._terminated > 1:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)


_signals = _Signals()
