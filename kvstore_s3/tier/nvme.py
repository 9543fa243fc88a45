"""The NVMe tier: pieces of objects as files on a local disk, shared by several processes.

This half decides, on the event loop; `nvme_files` carries out, in threads. What is kept is known from the files' names,
read once at the start and again when another process says that it wrote something.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import aiofiles

from kvstore_s3.errors import InvalidArgumentError
from kvstore_s3.metrics import Count, ignore
from kvstore_s3.objectstore.awaiting import finish
from kvstore_s3.objectstore.base import check_key
from kvstore_s3.tier.background import Background
from kvstore_s3.tier.base import TierStats
from kvstore_s3.tier.extents import Extent
from kvstore_s3.tier.nvme_files import NvmeFiles
from kvstore_s3.tier.nvme_index import NvmeIndex, Victim
from kvstore_s3.tier.nvme_names import digest_of
from kvstore_s3.tier.nvme_records import Committed, Step
from kvstore_s3.tier.nvme_usage import parse
from kvstore_s3.tier.open_pieces import OpenPiece, OpenPieces
from kvstore_s3.tier.pieces import Write, file_size
from kvstore_s3.tier.switch import Switch

_MOST_OPEN = 128
_MOST_ROUNDS = 8
_NEWS_S = 2.0
_LARGEST_PIECE = 1024 * 1024 * 1024
_logger = logging.getLogger("kvstore_s3")


class NvmeTier:
    """Extents in files below `directory` (see `DiskTier`), at most `budget_bytes` for all processes together.

    It is empty until `start` was called, or until the first offer. A disk that fails is left alone for a while and
    tried again by itself; each kind of failure is logged once. `threads` bounds the reads at a time, and the writes.
    Counts "nvme_hit_bytes", "nvme_kept_bytes", "nvme_errors" and "tier_evictions".
    """

    name = "nvme"

    def __init__(self, directory: Path, budget_bytes: int, threads: int = 4, count: Count = ignore) -> None:
        self._directory = directory
        self._count = count
        self._files = NvmeFiles(directory, budget_bytes)
        self._index = NvmeIndex(budget_bytes)
        self._leaving: dict[Extent, asyncio.Task[None]] = {}
        self._open = OpenPieces(_MOST_OPEN)
        self._background = Background(threads, self.name)
        self._reads, self._writes = Switch(failures=3), Switch(failures=1)
        self._said: set[int | None] = set()
        self._starting: asyncio.Task[bool] | None = None
        self._started = self._closed = False
        self._generation = 0
        self._own_generations: set[int] = set()
        self._next_news = 0.0

    @property
    def stats(self) -> TierStats:
        """What this process knows of; the budget counts what all processes keep."""
        return TierStats(len(self._index.extents), self._index.bytes, self._files.budget)

    @property
    def is_on(self) -> bool:
        """Whether it is read from: not while it is left alone because it failed."""
        return self._started and self._reads.is_on(time.monotonic())

    async def settle(self) -> None:
        """Wait until all that goes on in the background is done: removing what was dropped, looking for news."""
        await self._background.settle()

    async def start(self) -> bool:
        """Find what is kept, remove what dead writers left. False where the directory cannot be used now."""
        if self._started or self._closed:
            return self._started
        if self._starting is None or self._starting.done():
            self._starting = self._background.spawn(self._start())
        return await asyncio.shield(self._starting)

    def covers(self, key: str, start: int, end: int) -> bool:
        now = time.monotonic()
        covered = self._reads.is_on(now) and self._index.extents.covers(digest_of(key), start, end)
        if not covered and self._started and now >= self._next_news:
            self._next_news = now + _NEWS_S
            self._background.spawn(self._look_for_news())
        return covered

    async def read(self, key: str, start: int, into: memoryview) -> bool:
        parts = self._index.extents.parts(digest_of(key), start, start + len(into))
        if not parts or not self._reads.is_on(time.monotonic()):
            return False
        for extent, begin, end in parts:
            if not await self._read_part(key, extent, begin, into[begin - start : end - start]):
                return False
        self._count("nvme_hit_bytes", len(into))
        return True

    async def offer(self, key: str, piece_start: int, piece_end: int, start: int, data: memoryview) -> None:
        extent = Extent(digest_of(check_key(key)), piece_start, piece_end)
        if not 0 <= piece_start <= start <= start + len(data) <= piece_end:
            raise InvalidArgumentError(f"bytes {start} to {start + len(data)} are not in [{piece_start}, {piece_end})")
        if self._closed or not self._writes.is_on(time.monotonic()) or not await self.start():
            return
        if (holder := self._index.extents.holding(*extent)) is not None:
            self._index.visit(holder, time.monotonic())
            return
        if (removal := self._leaving.get(extent)) is not None:  # or it would remove the new file
            await asyncio.wait([removal])
            if not self._started:  # closed meanwhile
                return
        for idle in self._open.pop_idle(time.monotonic()):
            self._abandon(idle)
        piece = self._open.find(key, extent, time.monotonic())
        if piece is not None and data:
            await self._offer_to(piece, start, data)

    def abandon(self, key: str, piece_start: int) -> None:
        piece = self._open.pop(digest_of(key), piece_start)
        if piece is not None:
            self._abandon(piece)

    def drop(self, key: str) -> None:
        name = digest_of(key)
        for piece in self._open.pop_all(name):
            piece.dropped = True
            self._abandon(piece)
        self._remove_soon(self._index.extents.of(name))

    async def close(self) -> None:
        self._closed = True
        self._started = False
        for piece in self._open.pop_all():
            self._abandon(piece)
        await self._background.close()
        self._index.forget_all()

    async def _start(self) -> bool:
        try:
            with self._index.listing():
                listing = await self._background.write(self._files.open)
                self._index.add_found(listing.found, self._leaving, time.monotonic())
        except OSError as error:
            self._failed(error, self._writes, "write")
            return False
        self._generation = listing.generation
        self._own_generations.clear()
        self._started = not self._closed
        self._writes.worked()
        return self._started

    async def _look_for_news(self) -> None:
        try:
            async with aiofiles.open(self._files.usage_path, "rb") as file:
                _, generation = parse(await file.read(64))
            if generation == self._generation:
                return
            began = time.monotonic()
            with self._index.listing():
                found = await self._background.read(self._files.find)
                self._index.add_found(found, self._leaving, began)
            self._next_news = max(self._next_news, began + 50 * (time.monotonic() - began))
            self._generation = generation
        except OSError as error:
            self._failed(error, self._reads, "read")

    async def _read_part(self, key: str, extent: Extent, start: int, into: memoryview) -> bool:
        if self._closed:
            return False
        now = time.monotonic()
        verify_for = None if self._index.is_verified(extent) else key
        touch = self._index.wants_touch(extent, now)

        def read() -> int | None:
            return self._files.read(extent, start, into, verify_for=verify_for, touch=touch)

        try:
            used_ns = await self._background.read(read)
        except FileNotFoundError:  # another process evicted it
            self._index.forget(extent)
            return False
        except OSError as error:
            self._failed(error, self._reads, "read")
            self._remove_soon([extent])
            return False
        self._reads.worked()
        self._index.verify(extent)
        self._index.visit(extent, now)
        if used_ns is not None:
            self._index.touched(extent, used_ns)
        return True

    async def _offer_to(self, piece: OpenPiece, start: int, data: memoryview) -> None:
        try:
            async with piece.lock:
                if not piece.closed:
                    await finish(self._advance(piece, start, data))
        except asyncio.CancelledError:
            self._open.remove(piece)
            self._abandon(piece)
            raise

    async def _advance(self, piece: OpenPiece, start: int, data: memoryview) -> None:
        """Write what was offered, and give the file its name once it is whole. The caller holds the piece's lock."""
        if piece.ignored:
            piece.piece.skip(start, start + len(data))
        else:
            await self._write(piece, piece.piece.take(start, data))
        if piece.piece.is_whole:
            piece.closed = True
            self._open.remove(piece)

    async def _write(self, piece: OpenPiece, writes: list[Write]) -> None:
        try:
            step = await self._take_step(piece, writes)
        except OSError as error:
            piece.temporary = None  # discarded
            self._open.ignore(piece)
            self._failed(error, self._writes, "write")
            return
        self._writes.worked()
        if step is None:
            self._open.ignore(piece)
        elif step.committed is not None:
            piece.temporary = None
            self._keep(piece, step.committed)
        else:
            piece.temporary = step.reservation.temporary

    async def _take_step(self, piece: OpenPiece, writes: list[Write]) -> Step | None:
        """Write, evicting as it takes; None where no place is to be had."""
        if file_size(piece.extent) > self._files.budget or piece.extent.size > _LARGEST_PIECE:
            return None
        missing = 0 if piece.temporary else self._index.bytes + self._open.bytes - self._files.budget
        for attempt in range(_MOST_ROUNDS):
            victims = self._index.choose_victims(missing)
            if attempt and not victims:
                victims = await self._find_victims(missing)
            work = partial(self._files.advance, piece.key, piece.extent, piece.temporary, victims, writes)
            step: Step | None = None
            try:
                step = await self._background.write(partial(work, whole=piece.piece.is_whole))
            finally:
                self._index.settle(victims, step.reservation if step else None, time.monotonic())
            if step.reservation.removed:
                self._count("tier_evictions", len(step.reservation.removed))
            if step.reservation.temporary is not None:
                return step
            missing = step.reservation.missing
        return None

    async def _find_victims(self, missing: int) -> list[Victim]:
        """Where this process knows of nothing to evict: others wrote it, or the count drifted."""
        with self._index.listing():
            found = await self._background.write(self._files.recount)
            self._index.add_found(found, self._leaving, time.monotonic())
        return self._index.choose_victims(missing)

    def _keep(self, piece: OpenPiece, committed: Committed) -> None:
        self._own_generations.add(committed.generation)
        while self._generation + 1 in self._own_generations:  # what this process wrote is no news to it
            self._generation += 1
            self._own_generations.discard(self._generation)
        self._index.add(piece.extent, committed.modified_ns, time.monotonic(), proven=False)
        self._index.verify(piece.extent)
        self._count("nvme_kept_bytes", piece.extent.size)
        superfluous = self._index.extents.within(piece.extent)
        self._remove_soon([piece.extent] if piece.dropped else superfluous)

    def _abandon(self, piece: OpenPiece) -> None:
        """The piece was taken out already; what it wrote is removed once nobody works on it."""
        piece.closed = True
        if piece.temporary is not None or piece.lock.locked():
            self._background.spawn(self._discard(piece))

    async def _discard(self, piece: OpenPiece) -> None:
        async with piece.lock:
            temporary, piece.temporary = piece.temporary, None
            if temporary is not None:
                await self._background.write(partial(self._files.discard, temporary))

    def _remove_soon(self, extents: Iterable[Extent]) -> None:
        leaving = [extent for extent in extents if extent not in self._leaving]
        for extent in leaving:
            self._index.forget(extent)
        if leaving:
            self._leaving |= dict.fromkeys(leaving, self._background.spawn(self._remove(leaving)))

    async def _remove(self, extents: list[Extent]) -> None:
        try:
            await self._background.write(partial(self._files.remove, extents))
        except OSError as error:
            self._failed(error, self._writes, "write")
        finally:
            for extent in extents:
                del self._leaving[extent]

    def _failed(self, error: OSError, switch: Switch, verb: str) -> None:
        switch.failed(time.monotonic())
        if error.errno == errno.ENOENT:  # the directory was removed: begin again with an empty one
            self._started = False
            self._index.forget_all()
            for piece in self._open.pop_all():
                self._abandon(piece)
        self._count("nvme_errors", 1)
        if error.errno not in self._said:
            self._said.add(error.errno)
            _logger.warning(
                "the NVMe tier in %s could not %s (%s); the object store goes on without it, it is tried again later",
                self._directory,
                verb,
                error,
            )
