"""A detector over shards of images, in this process or in several: each takes the next shard when it is done with one.

A process that dies ends the command with an error; the shards that are done stay. On a GPU machine the processes take
the GPUs in turn.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from retinaflow.data.images import BadImage
from retinaflow.data.index import AnnotationIndex
from retinaflow.detector.device import device_of
from retinaflow.errors import WorkerError
from retinaflow.inference.detector import Detector
from retinaflow.inference.prediction_folder import Shard
from retinaflow.interrupts import StopRequest, without_ctrl_c
from retinaflow.progress import report
from retinaflow.settings.model_settings import DetectingSettings

_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Work:
    """A model, by its checkpoint file and the settings of its detections, and the images of all shards."""

    checkpoint: Path
    config: DetectingSettings
    index: AnnotationIndex


class FinishedShard(NamedTuple):
    """A shard that was written, and its images that could not be read."""

    shard: Shard
    skipped: list[BadImage]


def predict_shards(
    work: Work, shards: Sequence[Shard], *, nproc: int, stop: StopRequest, after_batch: Callable[[int], None]
) -> Iterator[FinishedShard]:
    """Write the shards; each is yielded when it is done. ``after_batch`` is called with the number of images done: of a
    batch, or, with several processes, of a shard.

    Raises Interrupted on request, DataError for an image that cannot be read, WorkerError when a process dies.
    """
    if 1 < len(shards) < nproc:
        report(f"{len(shards)} of {nproc} processes have work: so many shards are left")
    nproc = min(nproc, len(shards))
    if nproc > 1:
        yield from _by_processes(work, shards, nproc=nproc, stop=stop, after_shard=after_batch)
    elif shards:

        def count(images: int) -> None:
            after_batch(images)
            stop.check()

        writer = _ShardWriter(work)
        for shard in shards:
            yield writer.write(shard, count)


class _ShardWriter:
    """The detector of a process."""

    def __init__(self, work: Work, *, rank: int = 0) -> None:
        self._index = work.index
        self._skip = work.config.on_bad_image == "skip"
        self._detector = Detector.load(
            work.checkpoint,
            work.config,
            parents=work.config.parents,
            sizes=work.index.sizes,
            device=device_of(rank),
        )

    def write(self, shard: Shard, after_batch: Callable[[int], None] = lambda images: None) -> FinishedShard:
        """Detect on the images of a shard and write it."""
        bad: list[BadImage] = []
        images = self._index.take(np.arange(shard.first, shard.last))
        found = self._detector.detect(images, after_batch=after_batch, on_bad_image=bad.append if self._skip else None)
        shard.write(found, images, bad)
        return FinishedShard(shard, bad)


def _by_processes(
    work: Work, shards: Sequence[Shard], *, nproc: int, stop: StopRequest, after_shard: Callable[[int], None]
) -> Iterator[FinishedShard]:
    context = multiprocessing.get_context("spawn")
    ranks = context.SimpleQueue()
    for rank in range(nproc):
        ranks.put(rank)
    threads = max(1, torch.get_num_threads() // nproc)
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(nproc, context, _start, (work, threads, ranks)) as pool:
        try:
            with without_ctrl_c():
                waiting = {pool.submit(_write, shard) for shard in shards}
            while waiting:
                done, waiting = wait(waiting, _POLL_SECONDS, FIRST_COMPLETED)
                for future in done:
                    finished = future.result()
                    after_shard(len(finished.shard) - len(finished.skipped))
                    yield finished
                stop.check()
        except BaseException as error:
            # Processes in the middle of a shard would finish it first.
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()
            pool.shutdown(cancel_futures=True)
            if isinstance(error, BrokenProcessPool):
                raise WorkerError(
                    f"one of {nproc} processes died, often because the memory ran out; the same command resumes. Give "
                    "a smaller nproc= or batch_size= if it happens again"
                ) from None
            raise


_own: tuple[Work, int]
"""What a process of the pool works on, and its rank."""


def _start(work: Work, threads: int, ranks: Any) -> None:
    """First call in a process of the pool."""
    global _own
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    _own = work, ranks.get()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@functools.cache
def _writer() -> _ShardWriter:
    """Made by the first shard of a process, so that its errors are those of that shard."""
    work, rank = _own
    return _ShardWriter(work, rank=rank)


def _write(shard: Shard) -> FinishedShard:
    return _writer().write(shard)
