"""The output folder of ``predict``: what it is of (``manifest.json``), which shards are done, who works in it.

    output/manifest.json        the request: model, settings, images. Another request is refused.
    output/shards/00000.parquet done; written whole or not at all
    output/predictions.csv      all of them

One command at a time works in a folder: it holds a lock that the system takes away when it ends, however it ends.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from retinaflow.files import atomic_file, remove_partial_files
from retinaflow.inference.prediction_shards import read_notes

try:
    import fcntl
except ImportError:  # Windows: nobody is kept from starting two commands in one folder.
    fcntl = None  # type: ignore[assignment]

MANIFEST = "manifest.json"
FORMAT = 1
MOST_IN_SHARD = 1000
SHARDS_EACH = 4
"""At least so many for each process, so that none waits long for the last one."""


@dataclass(frozen=True)
class Shard:
    """Images ``first`` to ``last`` (not included) of the index, the state of their files (a digest), and the file of
    their detections."""

    number: int
    first: int
    last: int
    files: str
    path: Path

    def notes(self) -> dict[str, Any] | None:
        """What the file says of itself; None when it is not there, damaged, or of image files that were others."""
        notes = read_notes(self.path)
        return notes if notes and all(notes.get(name) == value for name, value in self.identity.items()) else None

    @property
    def identity(self) -> dict[str, Any]:
        """The part of the notes that says which images these are."""
        return {"first": self.first, "last": self.last, "files": self.files}


@dataclass(frozen=True)
class PredictionFolder:
    """An opened folder of predictions on readable images; ``states [I, S]`` of their files, as
    :func:`retinaflow.data.images.file_states` gives them."""

    path: Path
    states: NDArray[np.int64]
    shard_size: int

    @staticmethod
    @contextlib.contextmanager
    def opened(
        path: Path,
        request: Mapping[str, Any],
        states: NDArray[np.int64],
        *,
        shard_size: int | Literal["auto"] = "auto",
        nproc: int = 1,
        overwrite: bool = False,
    ) -> Iterator[PredictionFolder]:
        """Take the folder for this request, begun anew or resumed.

        ``shard_size="auto"`` is what the folder has, else by ``nproc``.

        Raises ValueError for a folder of another request, which differences are listed, unless ``overwrite``, which
        begins anew whatever is there; and for a folder in which another command is working.
        """
        path.mkdir(parents=True, exist_ok=True)
        with _alone(path):
            known = None if overwrite else _read_manifest(path / MANIFEST)
            if shard_size == "auto":
                shard_size = known["shard_size"] if known else _fitting_size(len(states), nproc)
            request = json.loads(json.dumps({"format": FORMAT, **request, "shard_size": shard_size}))
            differences = [] if known is None else _differences(known, request)
            if differences:
                raise ValueError(
                    f"output={path} holds predictions of another request: {'; '.join(differences)}. Give another "
                    "output=, or overwrite=true to replace them"
                )
            if known is None:
                shutil.rmtree(path / "shards", ignore_errors=True)
                with atomic_file(path / MANIFEST) as partial:
                    partial.write_text(json.dumps(request, indent=1) + "\n", encoding="utf-8")
            for folder in (path, path / "shards"):
                remove_partial_files(folder)
            yield PredictionFolder(path, states, shard_size)

    @property
    def shards(self) -> list[Shard]:
        """All shards, done or not, in the order of the images."""
        found = []
        for number, first in enumerate(range(0, len(self.states), self.shard_size)):
            states = self.states[first : first + self.shard_size]
            files = hashlib.sha256(states.tobytes()).hexdigest()
            path = self.path / "shards" / f"{number:05d}.parquet"
            found.append(Shard(number, first, first + len(states), files, path))
        return found


def _fitting_size(images: int, nproc: int) -> int:
    return max(min(MOST_IN_SHARD, -(-images // (SHARDS_EACH * nproc))), 1) if nproc > 1 else MOST_IN_SHARD


def _read_manifest(path: Path) -> dict[str, Any] | None:
    """None when there is none."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path}: not a readable manifest ({error}); give overwrite=true to begin anew") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{path}: not a manifest of format {FORMAT}; give another output=")
    return manifest


def _differences(known: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """``name: before, now`` of every entry that differs, one level down."""
    found = []
    for name in dict.fromkeys([*known, *asked]):
        before, now = known.get(name), asked.get(name)
        if isinstance(before, dict) and isinstance(now, dict):
            found += _differences(before, now)
        elif before != now:
            found.append(f"{name} {_shown(before)} there, {_shown(now)} now")
    return found


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)[:60]


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    if fcntl is None:
        yield
        return
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"output={folder}: another predict is working in this folder; wait for it") from None
        yield
