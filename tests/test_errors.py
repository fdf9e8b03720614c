"""What a user can cause shows a message; a bug shows its traceback."""

from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from retinaflow.cli import main
from retinaflow.commands import binning
from retinaflow.errors import DataError, Interrupted, SettingError, StoreError, TrainingError, WorkerError

BUGS = (
    ValueError("planted"),
    OSError("planted"),
    KeyError("planted"),
    RuntimeError("planted"),
    FileNotFoundError(2, "x"),
)
SHOWN = (
    *(kind("planted") for kind in (SettingError, DataError, StoreError, TrainingError, WorkerError)),
    OSError(errno.ENOSPC, "planted", "out/last.pt"),
    PermissionError(errno.EACCES, "planted", "out"),
)


UNTRACKED = ["binning", "--data", "demo", "--track", "false"]


def _plant(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> None:
        raise error

    monkeypatch.setattr(binning, "run", broken)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: type(bug).__name__)
def test_a_bug_is_not_caught(bug: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    _plant(bug, monkeypatch)
    with pytest.raises(type(bug)) as caught:
        main(UNTRACKED)
    assert caught.value is bug


@pytest.mark.slow
def test_the_shape_error_of_a_bug_ends_with_its_traceback_and_exit_code_1(tmp_path: Path) -> None:
    script = (
        "import numpy as np; from retinaflow.cli import main; from retinaflow.commands import binning\n"
        "binning.run = lambda config: np.zeros(2) + np.zeros(3)\n"
        "raise SystemExit(main(['binning', '--data', 'demo', '--track', 'false']))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback (most recent call last)" in done.stderr
    assert "operands could not be broadcast" in done.stderr


@pytest.mark.parametrize("error", SHOWN, ids=lambda error: type(error).__name__)
def test_what_a_user_can_cause_is_a_message_and_exit_code_2(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _plant(error, monkeypatch)
    assert main(UNTRACKED) == 2
    assert capsys.readouterr().err == f"error: {error}\n"


@pytest.mark.parametrize(
    ("stop", "text"), [(Interrupted("signal SIGTERM"), "signal SIGTERM"), (KeyboardInterrupt(), "interrupted")]
)
def test_a_stop_on_request_is_exit_code_130(
    stop: BaseException, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _plant(stop, monkeypatch)
    assert main(UNTRACKED) == 130
    assert capsys.readouterr().err == f"stopped: {text}\n"


def test_every_traceback_is_shown_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    _plant(SettingError("planted"), monkeypatch)
    monkeypatch.setenv("RETINAFLOW_TRACEBACK", "1")
    with pytest.raises(SettingError, match="planted"):
        main(UNTRACKED)


def test_an_output_that_is_a_file_is_a_message(tmp_path: Path, tiny_dataset: Callable[[], Path]) -> None:
    (tmp_path / "out").write_text("here")
    words = ["binning", "--data", str(tiny_dataset()), "--track", "false", "--output", str(tmp_path / "out")]
    assert main(words) == 2
