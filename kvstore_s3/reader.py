"""Reading one object's share of a band of layers: from host memory, NVMe or the store, verified, decoded, kept."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import Executor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from kvstore_s3.bitstream import Header, Identity, parse_header
from kvstore_s3.errors import BitstreamFault, DamagedObjectError
from kvstore_s3.layout import Shard
from kvstore_s3.load import MissingCalibrationError, Place, StoredChunk, decode_band, in_thread
from kvstore_s3.metrics import Count, ignore
from kvstore_s3.quality import Quality
from kvstore_s3.section_index import SectionTable
from kvstore_s3.tiers import Extent, Tiers
from kvstore_s3.transfer.prefetcher import Prefetcher
from kvstore_s3.transfer.ranges import Band, BandRange, band_ranges, count_levels, has_boundaries

if TYPE_CHECKING:
    from kvstore_s3.codec.calibration import Calibration

_NO_TIERS = Tiers()


@dataclass(slots=True)
class Brought:
    """The ranges of an object in memory, in order: those that a tier gave, and those that are new to host memory."""

    pieces: list[tuple[BandRange, memoryview]]
    new: list[tuple[BandRange, memoryview]]
    local: bool
    holding: AsyncExitStack
    """Keeps the slab of the new ones until it is closed."""


@dataclass(frozen=True, slots=True)
class Reader:
    """What reading takes: the tiers, the store behind them, the quality wanted, threads."""

    prefetcher: Prefetcher
    tiers: Tiers
    quality: Quality
    threads: Executor
    find_calibration: Callable[[bytes], Awaitable[Calibration | None]]
    count: Count = ignore

    async def read_tile(self, tile: StoredChunk, wanted: Shard, levels: int, out: Place, *, urgency: float) -> Header:
        """Read `levels` levels of a part of one object, the rectangle `wanted`, into `out`, which is that rectangle.

        `out`: [layers, 2, tokens, heads, dim]. Returns the verified header. Raises `DamagedObjectError` or
        `ObjectNotFoundError` where the object cannot be used, and `StoreError` where the store fails; `out` is then
        undefined. What a tier gave damaged is dropped there and read from the store.
        """
        header = await self._read(tile, wanted, levels, out, urgency, self.tiers)
        if header is None:
            self.count("tier_damage", 1)
            self.tiers.drop(tile.object_key)
            header = await self._read(tile, wanted, levels, out, urgency, _NO_TIERS)
        assert header is not None  # without tiers, damage is raised
        return header

    def is_near(self, key: str, start: int, end: int) -> bool:
        """Whether a tier will probably give these bytes of an object."""
        return self.tiers.covers(key, Extent(start, end))

    def level_bytes(self, chunk: StoredChunk, shard: Shard, *, planned: bool) -> tuple[int, ...]:
        """Stored bytes of `shard` up to each level that is read; where it matters to a plan, without what is near."""
        levels = min(self.quality.levels, max(count_levels(tile.table) for tile in chunk.tiles))
        sizes = [0] * levels
        for tile in chunk.tiles:
            wanted = [
                section
                for section in tile.table.sections
                if section.level < levels
                and section.layer_begin < shard.layer_end
                and shard.layer_begin < section.layer_end
            ]
            if planned and self.is_near(tile.object_key, wanted[0].offset, wanted[-1].end):
                continue
            for section in wanted:
                if not (planned and self.is_near(tile.object_key, section.offset, section.end)):
                    for level in range(section.level, levels):
                        sizes[level] += section.stored_length
        return tuple(sizes)

    async def _read(
        self, tile: StoredChunk, wanted: Shard, levels: int, out: Place, urgency: float, tiers: Tiers
    ) -> Header | None:
        """As `read_tile`; None where a tier is to blame."""
        band = Band(wanted.layer_begin, wanted.layer_end)
        ranges = band_ranges(tile.table, band, levels=levels)
        if ranges[0].sections.start == 0:
            if tile.header is None or self.tiers:
                ranges[0] = replace(ranges[0], start=0)  # the header comes along
        elif tile.header is None:
            ranges.insert(0, BandRange(range(0), 0, tile.table.header_length))
        async with self._bring(tile.object_key, ranges, urgency, tiers) as brought:
            try:
                header = tile.header or self._parse_header(brought.pieces[0][1], tile.identity)
                self._check_quality(header.table)
                if header.table == tile.table:
                    calibration = await self._find_calibration(header)
                    work = (header, tile.first_token, calibration, wanted, brought.pieces)
                    if isinstance(out, np.ndarray):
                        await in_thread(self.threads, decode_band, *work, out)
                    else:
                        await out.decode_band(self.threads, *work)
                    self._keep(tile.object_key, header, brought)
                    return header
                if brought.local:
                    return None  # a tier has an object that was there before this one
            except MissingCalibrationError:
                raise
            except DamagedObjectError:
                if brought.local:
                    return None
                raise
        if not has_boundaries(header.table, band):
            raise DamagedObjectError(BitstreamFault.BAD_INDEX, "the object's sections are not those in its metadata")
        corrected = replace(tile, table=header.table, header=header)  # the hint was wrong; the header is verified
        return await self._read(corrected, wanted, levels, out, urgency, tiers)

    @asynccontextmanager
    async def _bring(
        self, key: str, ranges: Sequence[BandRange], urgency: float, tiers: Tiers
    ) -> AsyncIterator[Brought]:
        local = False

        async def read_near(key: str, start: int, into: memoryview) -> bool:
            nonlocal local
            if not tiers.covers(key, Extent(start, start + len(into))) or not await tiers.read(key, start, into):
                return False
            local = True
            return True

        async with AsyncExitStack() as holding:
            found: dict[BandRange, memoryview] = {}
            for part in ranges:
                context = tiers.borrow(key, Extent(part.start, part.end))
                if context is not None:
                    found[part] = holding.enter_context(context)
                    local = True
            rest = [part for part in ranges if part not in found]
            if rest:
                extents = [(part.start, part.end) for part in rest]
                fetching = self.prefetcher.fetch_ranges(key, extents, urgency, near=read_near if tiers else None)
                found.update(zip(rest, await holding.enter_async_context(fetching), strict=True))
            yield Brought(
                [(part, found[part]) for part in ranges], [(part, found[part]) for part in rest], local, holding
            )

    def _keep(self, key: str, header: Header, brought: Brought) -> None:
        """Offer what is new to the tiers, unless slabs are short: reading comes first."""
        if not brought.new or not self.tiers or 2 * self.prefetcher.pool.leased > self.prefetcher.pool.budget:
            return
        runs = [run for part, data in brought.new for run in _verified_runs(part, data, header)]
        self.tiers.keep_soon(key, header.table, runs, brought.holding.pop_all())

    def _parse_header(self, data: memoryview, identity: Identity) -> Header:
        return parse_header(data, identity, profiles=self.quality.accepts, calibrations=None)

    def _check_quality(self, table: SectionTable) -> None:
        """Refuse an object that is not as good as was asked for: the hit may be of a reader that asked for less."""
        levels = count_levels(table)
        if not self.quality.is_met_by(table.profile, levels):
            found = f"an object of header profile {table.profile} with {levels} levels"
            needs = f"{found} is less than profile {self.quality.name!r} needs"
            raise DamagedObjectError(BitstreamFault.UNSUPPORTED_FEATURE, needs)

    async def _find_calibration(self, header: Header) -> Calibration | None:
        if header.calibration is None:
            return None
        calibration = await self.find_calibration(header.calibration)
        if calibration is None:
            raise MissingCalibrationError(header.calibration)
        return calibration


def _verified_runs(part: BandRange, data: memoryview, header: Header) -> list[tuple[int, memoryview]]:
    """The bytes of `part` that were verified, as (offset, bytes): whole sections, the header with the first one."""
    runs: list[tuple[int, int]] = [(0, header.table.header_length)] if part.start == 0 else []
    for number in part.sections:
        section = header.table.sections[number]
        if runs and runs[-1][1] == section.offset:
            runs[-1] = (runs[-1][0], section.end)
        else:
            runs.append((section.offset, section.end))
    return [(start, data[start - part.start : end - part.start]) for start, end in runs]
