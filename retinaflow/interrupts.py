"""Stop on request: SIGTERM, Ctrl-C, or the end of the process that started the training.

Inside ``with StopRequest() as stop`` a first signal only sets ``stop.reason``; the loop looks at it after every step,
leaves a checkpoint and ends in order. A second signal ends at once. ``mlflow run`` dies on SIGTERM without passing it
on, so with ``watch_parent`` the loss of the parent process counts as a request too.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

from retinaflow.errors import Interrupted


class StopRequest:
    """``reason`` is None until somebody asks to stop."""

    def __init__(self, *, watch_parent: bool = False) -> None:
        self._signal: str | None = None
        self._parent = os.getppid() if watch_parent else None
        self._previous: dict[int, Any] = {}

    @property
    def reason(self) -> str | None:
        if self._signal is None and self._parent is not None and os.getppid() != self._parent:
            return "the process that started this run has ended"
        return self._signal

    def check(self) -> None:
        """Raise Interrupted if somebody asked."""
        if self.reason is not None:
            raise Interrupted(self.reason)

    def __enter__(self) -> Self:
        # Python delivers signals to the main thread only; elsewhere (a notebook's worker) there is nothing to listen
        # to.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self._signal is not None:
            raise KeyboardInterrupt
        self._signal = f"signal {signal.Signals(number).name}"
