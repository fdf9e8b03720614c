"""Stopping on request, with real signals to this process and a real parent that dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from retinaflow.errors import Interrupted
from retinaflow.interrupts import StopRequest


def _handlers() -> list[object]:
    return [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_first_signal_only_notes_the_wish(number: signal.Signals) -> None:
    with StopRequest() as stop:
        stop.check()
        assert stop.reason is None
        os.kill(os.getpid(), number)
        assert stop.reason == f"signal {number.name}"
        with pytest.raises(Interrupted, match=number.name):
            stop.check()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_second_signal_ends_at_once(number: signal.Signals) -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), number)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
        assert stop.reason is not None


def test_what_listened_to_signals_before_does_so_again() -> None:
    before = _handlers()
    with StopRequest():
        assert all(new != old for new, old in zip(_handlers(), before, strict=True))
    assert _handlers() == before

    def fail() -> None:
        with StopRequest():
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert _handlers() == before


def test_a_request_inside_another_gives_back_to_the_outer_one() -> None:
    with StopRequest() as outer:
        with StopRequest() as inner:
            os.kill(os.getpid(), signal.SIGTERM)
        assert (inner.reason, outer.reason) == ("signal SIGTERM", None)
        os.kill(os.getpid(), signal.SIGTERM)
        assert outer.reason == "signal SIGTERM"


def test_in_another_thread_it_listens_to_nothing_and_breaks_nothing() -> None:
    before, reasons = _handlers(), []

    def work() -> None:
        with StopRequest() as stop:
            stop.check()
            reasons.append(stop.reason)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert reasons == [None]
    assert _handlers() == before


WATCHER = """
import time
from retinaflow.interrupts import StopRequest
with StopRequest(watch_parent=True) as stop:
    print(stop.reason, flush=True)
    for _ in range(600):
        if stop.reason is not None:
            break
        time.sleep(0.02)
    print(stop.reason, flush=True)
"""


def test_the_end_of_the_parent_counts_as_a_request() -> None:
    """``mlflow run`` dies on SIGTERM and tells its child nothing."""
    starter = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {WATCHER!r}])"
    with subprocess.Popen([sys.executable, "-c", starter], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline().strip() == "None"
        parent.kill()
        assert parent.stdout.readline().strip() == "the process that started this run has ended"
