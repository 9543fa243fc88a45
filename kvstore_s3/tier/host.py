"""The host tier: encoded bytes in this process's memory, used where they lie."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from types import TracebackType

import numpy as np

from kvstore_s3.metrics import Count, ignore
from kvstore_s3.objectstore.awaiting import finish
from kvstore_s3.tier.base import PAGE, Memory, TierStats
from kvstore_s3.tier.eviction import Eviction
from kvstore_s3.tier.extents import Extent, Extents


@dataclass(slots=True)
class _Block:
    memory: memoryview
    borrowers: int = 0
    kept: bool = True


class _Loan(AbstractContextManager[memoryview]):
    """Part of a block that is not freed from now on until the context ends."""

    def __init__(self, block: _Block, start: int, end: int, give_back: Callable[[_Block], None]) -> None:
        block.borrowers += 1
        self._block = block
        self._view = block.memory[start:end]
        self._give_back = give_back

    def __enter__(self) -> memoryview:
        return self._view

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._block.borrowers -= 1
        self._give_back(self._block)


class HostTier:
    """Extents in blocks of `memory` (see `MemoryTier`), which it uses alone and does not close.

    A borrowed extent keeps its block until the last borrower is done, even where it is dropped meanwhile. What `borrow`
    returns must be entered, and at once: the bytes are held from then on.
    Counts "host_hit_bytes", "host_kept_bytes" and "tier_evictions".
    """

    name = "host"

    def __init__(self, memory: Memory, count: Count = ignore) -> None:
        self._memory = memory
        self._count = count
        self._extents = Extents()
        self._blocks: dict[Extent, _Block] = {}
        self._arriving: dict[Extent, _Block] = {}
        self._eviction: Eviction[Extent] = Eviction(memory.size)
        self._closed = False

    @property
    def stats(self) -> TierStats:
        return TierStats(len(self._extents), self._eviction.bytes, self._memory.size)

    def covers(self, key: str, start: int, end: int) -> bool:
        """Whether `read` would answer, and `borrow` where one extent holds all."""
        return start < end and self._extents.covers(key, start, end)

    def borrow(self, key: str, start: int, end: int) -> AbstractContextManager[memoryview] | None:
        extent = self._extents.holding(key, start, end) if start < end else None
        if extent is None:
            return None
        self._eviction.visit(extent, time.monotonic())
        self._count("host_hit_bytes", end - start)
        return _Loan(self._blocks[extent], start - extent.start, end - extent.start, self._free_unused)

    async def read(self, key: str, start: int, into: memoryview) -> bool:
        """Copy the bytes from `start` on, which may lie in several extents. False: not all of them are here.

        A thread copies; nothing is written into `into` after the call has ended, cancelled or not.
        """
        parts = self._extents.parts(key, start, start + len(into))
        with ExitStack() as holding:
            loans = [self.borrow(key, begin, end) for _, begin, end in parts]
            lent = [holding.enter_context(loan) for loan in loans if loan is not None]
            if lent:
                await finish(asyncio.get_running_loop().run_in_executor(None, _copy, lent, into))
        return bool(lent)

    async def offer(self, key: str, start: int, data: memoryview) -> bool:
        """Copy verified bytes [start, start + len(data)) into the tier, in a thread. False: not kept."""
        extent = Extent(key, start, start + len(data))
        if self._closed or extent in self._arriving or not 0 < extent.size <= self._memory.size:
            return False
        if (holder := self._extents.holding(*extent)) is not None:
            self._eviction.visit(holder, time.monotonic())
            return True
        memory = self._allocate(extent.size)
        if memory is None:
            return False
        block = self._arriving[extent] = _Block(memory)
        try:
            await finish(asyncio.get_running_loop().run_in_executor(None, _copy, [data], memory[: extent.size]))
        except BaseException:
            block.kept = False
            raise
        finally:
            del self._arriving[extent]
            self._free_unused(block)
        if block.kept:
            self._add(extent, block)
        return block.kept

    def drop(self, key: str) -> None:
        for extent in self._extents.of(key):
            self._discard(extent)
        for extent, block in self._arriving.items():
            block.kept &= extent.name != key

    async def close(self) -> None:
        self._closed = True
        for block in self._arriving.values():
            block.kept = False
        for extent in tuple(self._extents):
            self._discard(extent)

    def _add(self, extent: Extent, block: _Block) -> None:
        for superfluous in self._extents.within(extent):
            self._discard(superfluous)
        self._blocks[extent] = block
        self._extents.add(extent)
        self._eviction.add(extent, _pages(extent.size), time.monotonic())
        self._count("host_kept_bytes", extent.size)

    def _allocate(self, size: int) -> memoryview | None:
        while (block := self._memory.allocate(size)) is None:
            victim = self._eviction.evict(self._is_borrowed)
            if victim is None:
                return None
            self._discard(victim)
            self._count("tier_evictions", 1)
        return block

    def _is_borrowed(self, extent: Extent) -> bool:
        return self._blocks[extent].borrowers > 0

    def _discard(self, extent: Extent) -> None:
        self._extents.discard(extent)
        self._eviction.remove(extent)
        block = self._blocks.pop(extent)
        block.kept = False
        self._free_unused(block)

    def _free_unused(self, block: _Block) -> None:
        if not block.kept and block.borrowers == 0:
            self._memory.free(block.memory)


def _copy(parts: Sequence[memoryview], into: memoryview) -> None:
    done = 0
    for part in parts:
        np.copyto(np.frombuffer(into[done : done + len(part)], np.uint8), np.frombuffer(part, np.uint8))
        done += len(part)


def _pages(size: int) -> int:
    return -(-size // PAGE) * PAGE
