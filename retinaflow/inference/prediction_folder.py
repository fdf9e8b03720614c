"""The output folder of ``predict``: predictions in shards, Parquet files of some images each.

    output/manifest.json        the request: model, settings, images. Another request is refused.
    output/shards/00000.parquet detections of the first images; whole or absent
    output/predictions.csv      all of them

A shard holds its notes (which images, how many detections, a digest of all that is read from it) in the metadata of its
file, so a shard that is there and has its digest is done. Parquet has no checksum of its own: a flipped bit would be
another score. The files made of the shards are written shard by shard: no more than one is in memory. One command at a
time works in a folder: it holds a lock that the system releases when it ends, however it ends.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pa_parquet
from numpy.typing import NDArray

from retinaflow.data.coco_results import CocoResults
from retinaflow.data.images import BadImage
from retinaflow.data.index import AnnotationIndex
from retinaflow.data.predictions import SCHEMA, predictions_frame, submission_rows
from retinaflow.data.spreadsheets import for_spreadsheet
from retinaflow.detections import Detections
from retinaflow.errors import DataError, SettingError
from retinaflow.files import atomic_file, lock, remove_partial_files

MANIFEST = "manifest.json"
FORMAT = 1
MAX_SHARD_SIZE = 1000
SHARDS_PER_PROCESS = 4
"""At least so many, so that no process waits long for the last shard."""
_NOTES = b"retinaflow"


@dataclass(frozen=True)
class Shard:
    """Images ``first`` to ``last`` (not included) of the index, a digest of the state of their files, and the path of
    the file of their detections."""

    first: int
    last: int
    files: str
    path: Path

    def __len__(self) -> int:
        """Images."""
        return self.last - self.first

    @property
    def _identity(self) -> dict[str, Any]:
        """The part of the notes that states which images these are."""
        return {"first": self.first, "last": self.last, "files": self.files}

    def notes(self) -> ShardNotes | None:
        """None when the file is absent, damaged, or of image files that have changed since."""
        try:
            table = pa_parquet.read_table(self.path)
            notes = json.loads((table.schema.metadata or {})[_NOTES])
            is_whole = notes.pop("digest") == _digest(notes, table)
        # A damaged file makes the readers raise whatever their parsing meets.
        except Exception:
            return None
        if not is_whole or any(notes[name] != value for name, value in self._identity.items()):
            return None
        return ShardNotes(notes["detections"], [BadImage(image_id, reason) for image_id, reason in notes["skipped"]])

    def write(self, detections: Detections, index: AnnotationIndex, skipped: Sequence[BadImage]) -> None:
        """Write detections on the shard's images, of which ``index`` is, and which of them could not be read."""
        pairs = [[image.image_id, image.reason] for image in skipped]
        notes = {**self._identity, "detections": len(detections), "skipped": pairs}
        table = pa.Table.from_pandas(predictions_frame(detections, index), schema=SCHEMA, preserve_index=False)
        stored = {**notes, "digest": _digest(notes, table)}
        with atomic_file(self.path) as partial:
            # from_pandas adds notes of its own about the frame, which are not for readers of these files.
            pa_parquet.write_table(table.replace_schema_metadata({_NOTES: json.dumps(stored).encode()}), partial)


@dataclass(frozen=True)
class ShardNotes:
    """What a finished shard holds: the number of detections, and images that could not be read."""

    detections: int
    skipped: list[BadImage]


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
        """Take the folder for this request, new or resumed.

        ``shard_size="auto"`` is what the folder has, else by ``nproc``.

        Raises SettingError for a folder of another request, listing the differences, unless ``overwrite``, which
        replaces whatever is there; SettingError for a folder in which another command is working; DataError for a
        damaged manifest.
        """
        with _only_command(path):
            known = None if overwrite else _read_manifest(path / MANIFEST)
            if shard_size == "auto":
                shard_size = known["shard_size"] if known else _fitting_size(len(states), nproc)
            request = json.loads(json.dumps({"format": FORMAT, **request, "shard_size": shard_size}))
            differences = [] if known is None else _differences(known, request)
            if differences:
                raise SettingError(
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
            found.append(Shard(first, first + len(states), files, path))
        return found

    def write_predictions(self, file_format: Literal["csv", "parquet"] | CocoResults) -> Path:
        """All rows of the shards, in order, as one file. Returns its path."""
        suffix = file_format if isinstance(file_format, str) else "json"
        path = self.path / f"predictions.{suffix}"
        tables = (pa_parquet.read_table(shard.path) for shard in self.shards)
        with atomic_file(path) as partial:
            if isinstance(file_format, CocoResults):
                file_format.write(tables, partial)
            elif file_format == "parquet":
                with pa_parquet.ParquetWriter(partial, SCHEMA) as writer:
                    for table in tables:
                        writer.write_table(table.replace_schema_metadata(None))
            else:
                pd.DataFrame(columns=SCHEMA.names).to_csv(partial, index=False)
                for table in tables:
                    for_spreadsheet(table.to_pandas()).to_csv(partial, mode="a", header=False, index=False)
        return path

    def write_submission(self, path: Path, image_ids: NDArray[np.str_], *, without_file: Sequence[str] = ()) -> None:
        """A Kaggle submission: of the images in ``image_ids [I]``, and of those without a readable file."""
        with atomic_file(path) as partial:
            submission_rows(SCHEMA.empty_table(), []).to_csv(partial, index=False)
            for shard in self.shards:
                rows = submission_rows(pa_parquet.read_table(shard.path), image_ids[shard.first : shard.last].tolist())
                rows.to_csv(partial, mode="a", header=False, index=False)
            submission_rows(SCHEMA.empty_table(), without_file).to_csv(partial, mode="a", header=False, index=False)


def _digest(notes: Mapping[str, Any], table: pa.Table) -> str:
    """sha256 of the notes and of every value of the table, in their order."""
    hasher = hashlib.sha256(json.dumps([notes, table.schema.names], sort_keys=True).encode())
    hasher.update(pd.util.hash_pandas_object(table.to_pandas(), index=False).to_numpy().tobytes())
    return hasher.hexdigest()


def _fitting_size(images: int, nproc: int) -> int:
    return max(min(MAX_SHARD_SIZE, -(-images // (SHARDS_PER_PROCESS * nproc))), 1) if nproc > 1 else MAX_SHARD_SIZE


def _read_manifest(path: Path) -> dict[str, Any] | None:
    """None when there is none."""
    try:
        manifest: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise DataError(f"{path}: not a readable manifest ({error}); give overwrite=true to replace it") from None
    if isinstance(manifest, dict) and isinstance(manifest.get("shard_size"), int) and manifest.get("format") == FORMAT:
        return manifest
    raise DataError(f"{path}: not a manifest of format {FORMAT}; give another output=")


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
def _only_command(folder: Path) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lock(folder / ".lock", wait=False))
        except BlockingIOError:
            raise SettingError(f"output={folder}: another predict is working in this folder; wait for it") from None
        yield
