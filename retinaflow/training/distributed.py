"""The ranks of one training, as torchrun numbers them, and their collective operations.

A :class:`World` of one rank answers at once and needs no torch.distributed, so callers need not know whether there are
several. Values on the CPU travel by gloo, those on a GPU by nccl. All ranks must make the same calls in the same order;
a rank that dies makes the calls of the others fail.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous as meet

TIMEOUT = timedelta(hours=1)
"""Longest wait for another rank: rank 0 alone scores a whole validation set while the others wait."""

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The rank of this process out of ``size``; ``local_rank``: on its machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which alone prints, logs and saves."""
        return self.rank == 0

    def sum_(self, values: Tensor) -> Tensor:
        """Each element summed over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def sum_all_(self, tensors: Iterable[Tensor]) -> None:
        """Many dense tensors summed in place; their memory orders must agree between the ranks."""
        if self.size == 1:
            return
        # Viewed as one row of memory, so that no order of dimensions needs a copy.
        rows = [tensor.as_strided((tensor.numel(),), (1,)) for tensor in tensors]
        works = [dist.all_reduce(row, async_op=True) for row in rows]
        for work in works:
            work.wait()

    def any(self, flag: bool) -> bool:
        """Whether the flag is true on any rank."""
        return bool(self.sum_(torch.tensor(float(flag))).item()) if self.size > 1 else flag

    def all_gather(self, value: T) -> list[T]:
        """The values of all ranks, in their order, on every rank. Values are pickled: small ones only."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def gather(self, value: T) -> list[T] | None:
        """The values of all ranks, in their order, on rank 0 alone; None elsewhere."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.is_first else None
        dist.gather_object(value, values)
        return values

    def broadcast(self, value: T) -> T:
        """The value of rank 0, on every rank."""
        if self.size == 1:
            return value
        box = [value if self.is_first else None]
        dist.broadcast_object_list(box, device=torch.device("cpu"))
        return box[0]  # type: ignore[return-value]

    @contextlib.contextmanager
    def first_on_machine(self) -> Iterator[None]:
        """A block that one rank of each machine runs before the others there: it fills a cache for them."""
        if self.local_rank > 0:
            self.any(False)
        yield
        if self.local_rank == 0:
            self.any(False)


ALONE = World()


@contextlib.contextmanager
def joined_world(*, rendezvous: str = "env://") -> Iterator[World]:
    """The world of the environment variables ``RANK``, ``WORLD_SIZE`` and ``LOCAL_RANK``, as torchrun sets them.

    ``rendezvous``: where the ranks meet, a URL of torch.distributed; ``env://`` is torchrun's.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    with connected(World(rank, size, int(os.environ.get("LOCAL_RANK", rank))), rendezvous) as world:
        yield world


@contextlib.contextmanager
def connected(world: World, rendezvous: str) -> Iterator[World]:
    """Inside the block the ranks of a world are connected."""
    if world.size == 1:
        yield world
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(world.local_rank)
    store = next(iter(meet(rendezvous, world.rank, world.size, timeout=TIMEOUT)))[0]
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        store=_of_these_processes(store, world),
        rank=world.rank,
        world_size=world.size,
        timeout=TIMEOUT,
    )
    try:
        yield world
    finally:
        dist.destroy_process_group()


def _of_these_processes(store: Store, world: World) -> Store:
    """The store under a prefix that the present processes alone have.

    torchrun gives ranks that it starts again the store of those that have died, with their addresses. So each rank asks
    with a word of its own, and rank 0 answers with the prefix until the rank has been there: what rank 0 reads, or
    finds answered, may be of the processes before.
    """
    if world.is_first:
        prefix = secrets.token_hex(8)
        for rank in range(1, world.size):
            while not store.check([f"{prefix}/{rank}"]):
                store.set(f"answer/{store.get(f'asked/{rank}').decode()}", prefix)
                time.sleep(0.02)
    else:
        word = secrets.token_hex(8)
        store.set(f"asked/{world.rank}", word)
        prefix = store.get(f"answer/{word}").decode()
        store.set(f"{prefix}/{world.rank}", "here")
    return PrefixStore(prefix, store)
