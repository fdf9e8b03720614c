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
    OSError(errno.ENAMETOOLONG, "planted", "out"),
    OSError(errno.EMFILE, "planted", "out"),
)
STEPS = {
    errno.ENOSPC: "make room, or give another output=",
    errno.EACCES: "give a path that this user may use",
    errno.ENAMETOOLONG: "give a shorter path",
    errno.EMFILE: "raise the limit of open files (ulimit -n), or give fewer workers=",
}


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
    expected = error if not isinstance(error, OSError) else f"{error.strerror}: {error.filename}; {STEPS[error.errno]}"
    assert capsys.readouterr().err == f"error: {expected}\n"


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


@pytest.mark.parametrize("name", ["a" * 300, "loop", "gone", "gone/out"])
def test_an_output_that_cannot_be_made_is_a_message_before_any_work(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    Path("gone").symlink_to("nowhere")
    _plant(RuntimeError("work"), monkeypatch)
    assert main([*UNTRACKED, "--output", name]) == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize("setting", ["config", "data"])
def test_a_path_that_is_too_long_is_a_message(setting: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["binning", "--track", "false", f"--{setting}", "a" * 5000]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: File name too long: aaa")
    assert shown.endswith("...; give a shorter path\n")


def test_an_output_that_is_a_file_is_a_message(tmp_path: Path, tiny_dataset: Callable[[], Path]) -> None:
    (tmp_path / "out").write_text("here")
    words = ["binning", "--data", str(tiny_dataset()), "--track", "false", "--output", str(tmp_path / "out")]
    assert main(words) == 2
