"""The files of a training: whole, and replaced rather than written into."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from retinaflow.training.checkpoints import Checkpoints
from retinaflow.training.distributed import ALONE


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    trainer = SimpleNamespace(step=0, world=ALONE)
    (tmp_path / "earlier").mkdir()
    (tmp_path / "earlier" / "best.pt").write_bytes(b"better")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "best.pt").write_bytes(b"its own")
    return Checkpoints(tmp_path / "own", *cast(tuple[Any, Any, Any, Any], (trainer, None, None, None)))


def test_the_best_that_is_taken_over_leaves_what_waits_for_mlflow_as_it_was(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    os.link(checkpoints.best, tmp_path / "unsent.pt")
    checkpoints.take_over(tmp_path / "earlier" / "best.pt")
    assert checkpoints.best.read_bytes() == b"better"
    assert (tmp_path / "unsent.pt").read_bytes() == b"its own"
    assert [path.name for path in checkpoints.best.parent.iterdir()] == ["best.pt"]


def test_the_best_is_whole_when_no_other_can_be_taken_over(
    checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_short(source: Path, target: Path) -> None:
        target.write_bytes(source.read_bytes()[:3])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shutil, "copyfile", cut_short)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.take_over(tmp_path / "earlier" / "best.pt")
    assert checkpoints.best.read_bytes() == b"its own"


def test_its_own_best_stays(checkpoints: Checkpoints) -> None:
    checkpoints.take_over(checkpoints.best.parent / ".." / "own" / "best.pt")
    assert checkpoints.best.read_bytes() == b"its own"
