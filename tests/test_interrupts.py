"""Stopping on request, with real signals to this process and a real parent that dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable

import pytest

from retinaflow import interrupts
from retinaflow.errors import Interrupted
from retinaflow.interrupts import StopRequest, stopping_at_once, without_ctrl_c


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


PAIRS = [
    (signal.SIGINT, signal.SIGTERM),
    (signal.SIGTERM, signal.SIGTERM),
    (signal.SIGTERM, signal.SIGINT),
    (signal.SIGINT, signal.SIGINT),
]


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_signals_that_follow_each_other_at_once_are_one_stop(first: signal.Signals, second: signal.Signals) -> None:
    """``mlflow run`` sends SIGTERM after the Ctrl-C that the terminal has sent to both."""
    with StopRequest() as stop:
        os.kill(os.getpid(), first)
        os.kill(os.getpid(), second)
        assert stop.reason == f"signal {first.name}"


def test_a_later_ctrl_c_ends_at_once_and_a_later_sigterm_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupts, "SAME_STOP_SECONDS", 0.0)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt, match="SIGTERM, and Ctrl-C again"):
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.reason == "signal SIGTERM"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_outside_of_a_request_a_stop_ends_the_command_where_it_is_but_not_its_ending(number: signal.Signals) -> None:
    ended = False
    with pytest.raises(KeyboardInterrupt, match=number.name), stopping_at_once():  # noqa: PT012
        try:
            os.kill(os.getpid(), number)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            ended = True
    assert ended


class _StoppedAsItGoes:
    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)


def _stopped_in_del() -> None:
    _StoppedAsItGoes()


def _stopped_in_the_callback_of_a_weak_reference() -> None:
    thing = threading.Event()
    reference = weakref.ref(thing, lambda _: os.kill(os.getpid(), signal.SIGTERM))
    del thing
    assert reference() is None


DROPPED = [_stopped_in_del, _stopped_in_the_callback_of_a_weak_reference]


@pytest.mark.parametrize("stopped", DROPPED)
def test_a_stop_where_python_drops_exceptions_is_not_lost(
    stopped: Callable[[], None], capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> None:
        with stopping_at_once():
            stopped()
            time.sleep(5)

    before = sys.unraisablehook
    with pytest.raises(KeyboardInterrupt, match="SIGTERM"):
        work()
    assert sys.unraisablehook == before
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("stopped", DROPPED)
def test_a_stop_that_python_dropped_before_a_request_is_known_to_it(stopped: Callable[[], None]) -> None:
    with stopping_at_once():
        stopped()
        with StopRequest() as stop:
            time.sleep(0.2)
            assert stop.reason == "signal SIGTERM"


def test_the_second_signal_of_a_stop_does_not_reach_what_comes_after_the_request() -> None:
    with stopping_at_once():
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.reason == "signal SIGINT"
        with StopRequest() as later:
            assert later.reason == "signal SIGINT", "the command is being stopped"
    with StopRequest() as another:
        assert another.reason is None, "another command is not"


def test_a_forked_worker_leaves_the_stop_to_its_parent_and_can_be_ended() -> None:
    with StopRequest():
        worker = os.fork()
        if worker == 0:
            for _ in range(1000):
                time.sleep(0.01)
            os._exit(0)
        time.sleep(0.2)
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(worker, number)
        time.sleep(0.2)
        assert os.waitpid(worker, os.WNOHANG) == (0, 0)
        os.kill(worker, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) == -signal.SIGTERM


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


def test_a_stop_is_known_to_all_requests_of_the_process() -> None:
    with StopRequest() as outer, StopRequest() as inner:
        os.kill(os.getpid(), signal.SIGTERM)
        assert (inner.reason, outer.reason) == ("signal SIGTERM", "signal SIGTERM")


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


IMPORTS = "import sys, time; print('here', flush=True); time.sleep(0.5); print(sys.stdin.readline())"


def test_a_process_that_was_started_without_ctrl_c_leaves_it_to_this_one() -> None:
    with StopRequest() as stop:
        with without_ctrl_c():
            process = subprocess.Popen(
                [sys.executable, "-c", IMPORTS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            # To this thread: threads that other tests have left would take a signal of the whole process.
            signal.raise_signal(signal.SIGINT)
            assert stop.reason is None
        assert stop.reason == "signal SIGINT", "it arrives after the block"
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate("end\n", timeout=60)[0] == "end\n\n"
        assert process.returncode == 0


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
