"""Predictions in shards, Parquet files of some images each, and the one file that is made of all of them.

A shard is written whole or not at all, with its notes (what it is of) in the file's own metadata, so a shard that is
there is done. The files made of them are written shard by shard: no more than one shard is in memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pa_parquet

from retinaflow.data.index import AnnotationIndex
from retinaflow.data.openimages import predictions_frame
from retinaflow.data.predictions import SCHEMA, submission_rows
from retinaflow.detections import Detections
from retinaflow.files import atomic_file

_NOTES = b"retinaflow"


def write_shard(path: Path, detections: Detections, index: AnnotationIndex, notes: Mapping[str, Any]) -> None:
    """Write detections on images of ``index`` in the published columns, with notes of JSON values."""
    schema = SCHEMA.with_metadata({_NOTES: json.dumps(dict(notes)).encode()})
    table = pa.Table.from_pandas(predictions_frame(detections, index), schema=schema, preserve_index=False)
    with atomic_file(path) as partial:
        # from_pandas adds notes of its own about the frame, which is nobody's business here.
        pa_parquet.write_table(table.replace_schema_metadata(schema.metadata), partial)


def read_notes(path: Path) -> dict[str, Any] | None:
    """The notes of a shard; None when there is no file, or none that is a shard."""
    try:
        metadata = pa_parquet.read_schema(path).metadata or {}
        notes: dict[str, Any] = json.loads(metadata[_NOTES])
        return notes
    except (OSError, pa.ArrowInvalid, KeyError, ValueError):
        return None


def write_predictions(shards: Iterable[Path], path: Path) -> None:
    """All rows of the shards, in order, as one CSV or Parquet file, by the suffix of ``path``."""
    with atomic_file(path) as partial:
        if path.suffix == ".parquet":
            with pa_parquet.ParquetWriter(partial, SCHEMA) as writer:
                for shard in shards:
                    writer.write_table(pa_parquet.read_table(shard).replace_schema_metadata(None))
            return
        pd.DataFrame(columns=SCHEMA.names).to_csv(partial, index=False)
        for shard in shards:
            frame = pa_parquet.read_table(shard).to_pandas()
            frame.to_csv(partial, mode="a", header=False, index=False)


def write_submission(
    shards: Iterable[tuple[Path, Sequence[str]]], path: Path, *, without_file: Sequence[str] = ()
) -> None:
    """A Kaggle submission of the shards, each with the ids of its images, and of images without a readable file."""
    with atomic_file(path) as partial:
        submission_rows(SCHEMA.empty_table(), []).to_csv(partial, index=False)
        for shard, image_ids in shards:
            submission_rows(pa_parquet.read_table(shard), image_ids).to_csv(
                partial, mode="a", header=False, index=False
            )
        submission_rows(SCHEMA.empty_table(), without_file).to_csv(partial, mode="a", header=False, index=False)
