"""Trainings side by side, in real processes: what one sends reaches this one, and none outlives the others."""

from __future__ import annotations

import io
import multiprocessing
import time
from contextlib import redirect_stdout
from typing import Any

import pytest

from retinaflow.errors import SettingError
from retinaflow.interrupts import StopRequest
from retinaflow.progress import report
from retinaflow.settings.commands import TrainConfig
from retinaflow.training.side_by_side import NamedLines, train_side_by_side

pytestmark = pytest.mark.slow


class OddError(Exception):
    """Pickle makes it again from its arguments, which are not those of its constructor."""

    def __init__(self, *, what: str) -> None:
        super().__init__(what)


def _train(config: TrainConfig, *, data: Any, name: str) -> bytes:
    del config, data
    if name == "refused":
        raise SettingError("lr=7: too large")
    if name == "odd":
        raise OddError(what="three wheels")
    with StopRequest() as stop:
        while stop.reason is None:
            time.sleep(0.01)
    # As many bytes as the matches of a validation set, and more than a pipe holds.
    return bytes(5_000_000)


def _run(*names: str) -> None:
    none: Any = None
    train_side_by_side(_train, dict.fromkeys(names, TrainConfig(track=False)), none, parent=none)


def test_a_training_that_ends_as_the_other_fails_is_waited_for_and_no_longer() -> None:
    with pytest.raises(SettingError, match="lr=7: too large"):
        _run("refused", "finishes")
    assert multiprocessing.active_children() == []


def test_an_error_that_pickle_cannot_make_again_is_shown_with_its_traceback() -> None:
    with pytest.raises(RuntimeError, match="OddError: three wheels"):
        _run("odd", "finishes")


def test_named_lines_are_written_in_the_encoding_of_the_stream() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    with redirect_stdout(NamedLines(stream, "binned")):
        report("skipped 日本.jpg")
    stream.seek(0)
    assert stream.read() == "binned: skipped \\u65e5\\u672c.jpg\n"
