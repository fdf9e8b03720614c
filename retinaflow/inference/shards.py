"""A model over shards of images, in this process or in several: each takes the next shard when it is done with one.

The processes are told by this one, over a pipe each, which shard to take, so nothing is shared that a killed process
could leave locked. A process that dies ends the command with an error that names it; the shards that are done stay.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from retinaflow.data.batching import AspectBuckets
from retinaflow.data.images import BadImage
from retinaflow.data.index import AnnotationIndex
from retinaflow.detections import Detections
from retinaflow.detector.device import device_of, loader_workers
from retinaflow.detector.precision import fast_precision
from retinaflow.errors import Interrupted, WorkerError
from retinaflow.inference.batches import detect
from retinaflow.inference.checkpoint import Checkpoint, load_checkpoint
from retinaflow.inference.prediction_folder import Shard
from retinaflow.inference.prediction_shards import write_shard
from retinaflow.interrupts import StopRequest
from retinaflow.progress import report
from retinaflow.settings.model_groups import DetectingSettings

_POLL_SECONDS = 0.5


class Detector:
    """A model on its device, with the settings by which it detects."""

    def __init__(
        self, checkpoint: Checkpoint, config: DetectingSettings, buckets: AspectBuckets, *, rank: int = 0
    ) -> None:
        self._config, self._buckets = config, buckets
        self._device = device_of(rank)
        self._model = checkpoint.build(self._device)
        expand = "expand" in (config.parents, checkpoint.parents)
        is_ancestor = torch.from_numpy(checkpoint.taxonomy.is_ancestor).to(self._device)
        self._ancestors = is_ancestor if expand else None

    def detect(
        self,
        index: AnnotationIndex,
        *,
        after_batch: Callable[[int], None],
        on_bad_image: Callable[[BadImage], None] | None,
    ) -> Detections:
        """Detections on all images, in their order, best score first within an image."""
        config = self._config
        parts = detect(
            self._model,
            index,
            self._buckets,
            config=config,
            expand_to=self._ancestors,
            batch_size=config.batch_size,
            workers=loader_workers(config.workers, self._device),
            device=self._device,
            precision=fast_precision(self._device) if config.precision == "auto" else config.precision,
            after_batch=after_batch,
            on_bad_image=on_bad_image,
        )
        found = Detections.concatenate(list(parts))
        return found.take(np.argsort(found.image_index, kind="stable"))


def buckets_for(checkpoint: Checkpoint, config: DetectingSettings, index: AnnotationIndex) -> AspectBuckets:
    """The shapes of the training, or as many fitted to other sizes when ``image_size`` is given."""
    if config.image_size == "trained":
        return checkpoint.buckets
    count = len(checkpoint.buckets.shapes)
    return AspectBuckets.fit(np.asarray(index.sizes), image_size=config.image_size, num_buckets=count)


@dataclass(frozen=True)
class Work:
    """What every process is told at its start."""

    checkpoint: Path
    index: AnnotationIndex
    buckets: AspectBuckets
    config: DetectingSettings
    skip_bad_images: bool


class Done(NamedTuple):
    """A shard that was written."""

    shard: Shard
    notes: dict[str, Any]


class _Doer:
    """Does shards, one at a time."""

    def __init__(self, work: Work, *, rank: int = 0) -> None:
        self._work = work
        self._detector = Detector(load_checkpoint(work.checkpoint), work.config, work.buckets, rank=rank)

    def do(self, shard: Shard, after_batch: Callable[[int], None]) -> Done:
        """Detect on its images and write it."""
        bad: list[BadImage] = []
        part = self._work.index.take(np.arange(shard.first, shard.last))
        found = self._detector.detect(
            part, after_batch=after_batch, on_bad_image=bad.append if self._work.skip_bad_images else None
        )
        skipped = [[image.image_id, image.reason] for image in bad]
        notes = {**shard.identity, "detections": len(found), "skipped": skipped}
        write_shard(shard.path, found, part, notes)
        return Done(shard, notes)


def predict_shards(
    work: Work, shards: Sequence[Shard], *, nproc: int, stop: StopRequest, after_batch: Callable[[int], None]
) -> Iterator[Done]:
    """The shards as they are done. ``after_batch`` is told the number of images.

    Raises Interrupted on request, ValueError for an image that cannot be read, WorkerError when a process dies.
    """

    def count(images: int) -> None:
        after_batch(images)
        stop.check()

    if 1 < len(shards) < nproc:
        report(f"{len(shards)} of {nproc} processes have work: so many shards are left")
    nproc = min(nproc, len(shards))
    if nproc > 1:
        yield from _by_processes(work, shards, nproc=nproc, stop=stop, after_batch=count)
    elif shards:
        doer = _Doer(work)
        for shard in shards:
            yield doer.do(shard, count)


def _by_processes(
    work: Work, shards: Sequence[Shard], *, nproc: int, stop: StopRequest, after_batch: Callable[[int], None]
) -> Iterator[Done]:
    waiting = list(reversed(shards))
    with _team(work, nproc) as team:
        while team:
            for ready in wait([connection for connection, _ in team.values()], _POLL_SECONDS):
                rank = next(rank for rank, (connection, _) in team.items() if connection is ready)
                message = _received(rank, *team[rank])
                if isinstance(message, int):
                    after_batch(message)
                    continue
                if isinstance(message, str):
                    raise ValueError(message)
                if message is not None:
                    yield message
                connection, process = team[rank] if waiting else team.pop(rank)
                # One that has died meanwhile is heard of when it is listened to.
                with contextlib.suppress(BrokenPipeError):
                    connection.send(waiting.pop() if waiting else None)
                if rank not in team:
                    process.join()
            stop.check()


def _received(rank: int, connection: Connection[Any, Any], process: SpawnProcess) -> Any:
    try:
        return connection.recv()
    except EOFError:
        process.join()
        raise WorkerError(
            f"process {rank + 1} (pid {process.pid}) died with code {process.exitcode}, often for want of memory; the "
            "same command goes on where it was, with fewer nproc= or a smaller batch_size= if it happens again"
        ) from None


@contextlib.contextmanager
def _team(work: Work, nproc: int) -> Iterator[dict[int, tuple[Connection[Any, Any], SpawnProcess]]]:
    """Rank -> pipe and process; all are gone when the block ends."""
    context = multiprocessing.get_context("spawn")
    threads = max(1, torch.get_num_threads() // nproc)
    team: dict[int, tuple[Connection[Any, Any], SpawnProcess]] = {}
    started = []
    try:
        for rank in range(nproc):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(work, rank, threads, theirs), name=f"predict {rank + 1}")
            process.start()
            # Only the process itself holds its end now, so that its death ends the pipe.
            theirs.close()
            started.append(process)
            team[rank] = ours, process
        yield team
    finally:
        for process in started:
            if process.is_alive():
                process.terminate()
        for process in started:
            process.join()


def _work(work: Work, rank: int, threads: int, connection: Connection[Any, Any]) -> None:
    """Main function of a process: ask for a shard with None, tell images done as a number, a written shard as Done,
    what it cannot go on after as text."""
    torch.set_num_threads(threads)
    try:
        with StopRequest(watch_parent=True) as stop:

            def after_batch(images: int) -> None:
                connection.send(images)
                stop.check()

            doer = _Doer(work, rank=rank)
            connection.send(None)
            while (shard := connection.recv()) is not None:
                connection.send(doer.do(shard, after_batch))
    except (Interrupted, KeyboardInterrupt, EOFError, BrokenPipeError):
        pass
    except Exception as error:
        if os.environ.get("RETINAFLOW_TRACEBACK") == "1" or not isinstance(error, (ValueError, OSError)):
            traceback.print_exc()
        with contextlib.suppress(BrokenPipeError):
            connection.send(str(error) or type(error).__name__)
