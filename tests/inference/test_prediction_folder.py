"""A shard of predictions that is damaged on the disk is predicted again: no flipped bit becomes another score."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pa_parquet
import pytest
from made_index import make_index

from retinaflow.data.images import BadImage
from retinaflow.detections import Detections
from retinaflow.inference.prediction_folder import PredictionFolder, Shard


@pytest.fixture
def shard(tmp_path: Path) -> Shard:
    """Of three images with 20 detections, one of which could not be read."""
    rng = np.random.default_rng(0)
    found = Detections(
        np.sort(rng.integers(0, 2, 20)).astype(np.int32),
        rng.integers(0, 2, 20).astype(np.int32),
        rng.random(20).astype(np.float32),
        rng.random((20, 4)).astype(np.float32),
    )
    with PredictionFolder.opened(tmp_path, {"model": "a"}, np.ones((3, 2), dtype=np.int64)) as folder:
        (one,) = folder.shards
        one.write(found, make_index([[], [], []], classes=2), [BadImage("c", "no file")])
    return one


def test_a_whole_shard_is_known_by_its_notes(shard: Shard) -> None:
    notes = shard.notes()
    assert notes is not None
    assert (notes.detections, notes.skipped) == (20, [BadImage("c", "no file")])


def test_an_empty_shard_is_whole(tmp_path: Path) -> None:
    with PredictionFolder.opened(tmp_path, {"model": "a"}, np.ones((1, 2), dtype=np.int64)) as folder:
        (one,) = folder.shards
        one.write(Detections.concatenate([]), make_index([[]], classes=2), [])
        notes = one.notes()
    assert notes is not None
    assert notes.detections == 0


@pytest.mark.slow
def test_no_flipped_bit_of_a_shard_is_taken_as_done(shard: Shard) -> None:
    whole, expected, notes = shard.path.read_bytes(), pa_parquet.read_table(shard.path).to_pandas(), shard.notes()
    unnoticed = 0
    for offset in range(0, len(whole), 3):
        damaged = bytearray(whole)
        damaged[offset] ^= 1 << offset % 8
        shard.path.write_bytes(bytes(damaged))
        if (found := shard.notes()) is not None:
            # A byte that nobody reads, such as the name of the program that wrote the file.
            unnoticed += 1
            assert found == notes, offset
            pd.testing.assert_frame_equal(pa_parquet.read_table(shard.path).to_pandas(), expected)
    assert unnoticed < len(whole) / 6


@pytest.mark.parametrize("rest", [0, 4, 100, -8, -1])
def test_a_shard_that_is_cut_short_is_done_again(shard: Shard, rest: int) -> None:
    shard.path.write_bytes(shard.path.read_bytes()[:rest])
    assert shard.notes() is None


def test_a_shard_of_an_earlier_version_without_a_digest_is_done_again(shard: Shard) -> None:
    table = pa_parquet.read_table(shard.path)
    pa_parquet.write_table(
        table.replace_schema_metadata({b"retinaflow": b'{"detections": 20, "skipped": []}'}), shard.path
    )
    assert shard.notes() is None
