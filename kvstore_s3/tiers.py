"""The tiers on this machine, in front of the object store: host memory in front of NVMe.

They keep byte ranges of objects that a load has verified. Whatever goes wrong in them is a miss: the store has it too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AbstractContextManager, AsyncExitStack
from typing import NamedTuple

from kvstore_s3.arena import Arena
from kvstore_s3.config import Settings
from kvstore_s3.metrics import Count, ignore
from kvstore_s3.section_index import SectionTable
from kvstore_s3.tier.host import HostTier
from kvstore_s3.tier.nvme import NvmeTier


class Extent(NamedTuple):
    """Bytes `start` to `end` of an object."""

    start: int
    end: int


def level_extents(table: SectionTable) -> list[Extent]:
    """The bytes of each level of an object; the first begins with the header. Levels follow each other without gaps."""
    ends: dict[int, int] = {}
    for section in table.sections:
        ends[section.level] = section.end
    starts = [0, *list(ends.values())[:-1]]
    return [Extent(start, end) for start, end in zip(starts, ends.values(), strict=True)]


class TierState(NamedTuple):
    """What a tier keeps, of how much, and whether it is used at the moment."""

    bytes: int
    budget: int
    on: bool


class Tiers:
    """Both tiers, or one, or none. For one event loop."""

    def __init__(
        self, host: HostTier | None = None, nvme: NvmeTier | None = None, *, arena: Arena | None = None
    ) -> None:
        self._host = host
        self._nvme = nvme
        self._arena = arena
        self._keeping: set[asyncio.Task[None]] = set()

    @classmethod
    def open(cls, settings: Settings, count: Count = ignore) -> Tiers:
        """The tiers that `settings` ask for."""
        host = nvme = arena = None
        if settings.host_tier_bytes:
            arena = Arena(settings.host_tier_bytes, pin=settings.pin_memory)
            host = HostTier(arena, count=count)
        if settings.nvme_tier_dir is not None:
            nvme = NvmeTier(
                settings.nvme_tier_dir,
                budget_bytes=settings.nvme_tier_bytes,
                threads=settings.download_concurrency,
                count=count,
            )
        return cls(host, nvme, arena=arena)

    def __bool__(self) -> bool:
        return self._host is not None or self._nvme is not None

    def states(self) -> dict[str, TierState]:
        """Each tier that there is, by its name. For any thread."""
        found = {}
        for tier in (self._host, self._nvme):
            if tier is not None:
                stats = tier.stats
                is_on = tier.is_on if isinstance(tier, NvmeTier) else True
                found[tier.name] = TierState(stats.bytes, stats.budget, is_on)
        return found

    async def start(self) -> None:
        """Find what earlier processes, and other ones, keep on NVMe."""
        if self._nvme is not None:
            await self._nvme.start()

    def borrow(self, key: str, extent: Extent) -> AbstractContextManager[memoryview] | None:
        """The bytes where they lie in host memory, kept while the context is open; None: not there in one piece."""
        return self._host.borrow(key, *extent) if self._host else None

    def covers(self, key: str, extent: Extent) -> bool:
        """Whether `read` will probably succeed."""
        return any(tier is not None and tier.covers(key, *extent) for tier in (self._host, self._nvme))

    async def read(self, key: str, start: int, into: memoryview) -> bool:
        """Fill `into` from a tier. False: it is not there, or cannot be read; `into` is then undefined."""
        if self._host is not None and await self._host.read(key, start, into):
            return True
        return self._nvme is not None and await self._nvme.read(key, start, into)

    async def read_start(self, key: str, length: int) -> bytes | None:
        """The first `length` bytes of an object, where a tier has them."""
        extent = Extent(0, length)
        borrowed = self.borrow(key, extent)
        if borrowed is not None:
            with borrowed as view:
                return bytes(view)
        if not self.covers(key, extent):
            return None
        data = bytearray(length)
        return bytes(data) if await self.read(key, 0, memoryview(data)) else None

    def keep_soon(
        self, key: str, table: SectionTable, runs: Sequence[tuple[int, memoryview]], holding: AsyncExitStack
    ) -> None:
        """Offer verified bytes of an object, in the background: nobody waits for a disk that is slow.

        `runs` are (offset, bytes) each, whole sections, the header with the first. `holding` keeps their memory; it is
        closed when they have arrived.
        """

        async def keep() -> None:
            async with holding:
                await self._keep(key, table, runs)

        task = asyncio.create_task(keep())
        self._keeping.add(task)
        task.add_done_callback(self._keeping.discard)

    async def settle(self) -> None:
        """Wait until what is on its way has arrived."""
        while self._keeping:
            await asyncio.wait(set(self._keeping))

    async def _keep(self, key: str, table: SectionTable, runs: Sequence[tuple[int, memoryview]]) -> None:
        extents = level_extents(table)
        for start, data in runs:
            if self._host is not None:
                await self._host.offer(key, start, data)
            if self._nvme is not None:
                for piece in extents:
                    begin, end = max(start, piece.start), min(start + len(data), piece.end)
                    if begin < end and not self._nvme.covers(key, *piece):
                        await self._nvme.offer(key, *piece, begin, data[begin - start : end - start])

    def drop(self, key: str) -> None:
        """Forget an object: what the tiers gave of it was damaged."""
        for tier in (self._host, self._nvme):
            if tier is not None:
                tier.drop(key)

    async def close(self) -> None:
        await self.settle()
        for tier in (self._host, self._nvme):
            if tier is not None:
                await tier.close()
        if self._arena is not None:
            self._arena.close()  # page-locked memory is unlocked before it is unmapped
