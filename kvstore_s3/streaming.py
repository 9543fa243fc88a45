"""One load under way: band after band of layers, the next on the wire while one is used, planned anew on the way."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import torch

from kvstore_s3.bitstream import Identity
from kvstore_s3.covers import meet
from kvstore_s3.encode import view_bits
from kvstore_s3.layout import Shard
from kvstore_s3.load import LOST, Place, StoredChunk, cut_chunks, part_of, run_all
from kvstore_s3.metrics import Count, ignore
from kvstore_s3.pace import Pace
from kvstore_s3.planner import ChunkCost, Plan, Replanner, plan
from kvstore_s3.quality import find_quality
from kvstore_s3.reader import Reader
from kvstore_s3.shared_link import SharedLink
from kvstore_s3.transfer.link import urgency
from kvstore_s3.transfer.ranges import Band
from kvstore_s3.transfer.turns import LoadTurns

__all__ = ["Pace", "Stream"]

_BANDS_AHEAD = 1
"""Bands that are read while one is handed over."""
_REPLAN_S = 0.05
"""Most seconds between two looks at the plan of a load under way."""
_MAY_LOSE = 0.25
"""Share of the time that computing everything takes which a load may cost beyond what it saved so far."""


Sink = Callable[[int, int, torch.Tensor], Awaitable[None]]
"""Takes a chunk's values [layers, 2, tokens, heads, dim]: the band's first layer, the chunk's number in the hit, and
them. It may be given chunks in any order, and such as turn out to lie behind a lost one."""


PlaceFinder: TypeAlias = "Callable[[Band, int], Place | None]"
"""Where the share of a band that a chunk, by its number in the hit, has is decoded to; None: into new memory, for the
sink."""


@dataclass(slots=True)
class Group:
    """A band that is read into `kv`, which has room for the first `chunks` chunks of the load (see `Stream._room`)."""

    band: Band
    kv: torch.Tensor
    chunks: int
    jobs: dict[int, asyncio.Task[None]] = field(default_factory=dict)
    task: asyncio.Task[None] | None = None


class Stream:
    """Reads the rectangle `shard` of chunks, band by band of layers.

    `chunks` learn their headers; the first `good` of them are what the load gives. Each has the objects that it is read
    from, and no others.

    `allocate(band, chunks)` makes the tensor [layers of the band, 2, tokens, kv heads, head dim] that a band is decoded
    into, or a chunk's share of it where there is a `sink`, which is awaited for each as soon as it is there; `view`
    makes what the reader gets of it. `find_place`, beside a sink, gives some chunks their places. `on_lost` hears of
    objects that could not be used, and since when the load runs; it ends before the first of them. A chunk's share is
    worked on when `turns` say so.
    """

    def __init__(
        self,
        reader: Reader,
        link: SharedLink,
        chunks: Sequence[StoredChunk],
        bands: Sequence[Band],
        *,
        shard: Shard,
        allocate: Callable[[Band, int], torch.Tensor],
        on_lost: Callable[[Identity, Exception, float], None],
        turns: LoadTurns,
        view: Callable[[torch.Tensor], Place] = view_bits,
        sink: Sink | None = None,
        find_place: PlaceFinder | None = None,
        pace: Pace | None = None,
        lowest_profile: str | None = None,
        count: Count = ignore,
    ) -> None:
        self.chunks = list(chunks)
        self.good = len(self.chunks)
        self.levels = [reader.quality.levels] * len(self.chunks)
        self._reader = reader
        self._link = link
        self._bands = bands
        self._allocate = allocate
        self._view = view
        self._on_lost = on_lost
        self._sink = sink
        self._find_place = find_place
        self._turns = turns
        self._pace = pace
        self._count = count
        self._lowest = find_quality(lowest_profile).levels if lowest_profile else reader.quality.levels
        self._shard = shard
        self._parts = cut_chunks(shard, self.chunks)
        self._lost: dict[int, Identity] = {}
        self._headers = [[asyncio.Event() for _ in chunk.tiles] for chunk in self.chunks]
        self._layers_read = [0] * len(self.chunks)
        self._sizes = [reader.level_bytes(chunk, shard, planned=pace is not None) for chunk in self.chunks]
        self._layers = bands[-1].layer_end - bands[0].layer_begin
        self._begun = time.monotonic()
        self._next_band = 0
        self._groups: deque[Group] = deque()
        self._replanner: Replanner | None = None
        self._planned_at = float("-inf")
        self._may_lose_s = float("inf")
        if pace is not None and not pace.by_layer:
            self._may_lose_s = _MAY_LOSE * pace.prefill.seconds(self.chunks[0].first_token, pace.prompt_tokens)
        self._tick_s = min(_REPLAN_S, self._may_lose_s / 10)

    @property
    def qualities(self) -> tuple[str, ...]:
        """Of the chunks that are good so far."""
        read = zip(self.chunks[: self.good], self.levels, strict=False)
        return tuple(chunk.quality(levels) for chunk, levels in read)

    async def run(self) -> AsyncGenerator[tuple[Band, torch.Tensor], None]:
        """Each band and its tensor, in order; the first `good` chunks of it are right. Ends early where none is."""
        try:
            while self.good and (group := self._next_group()) is not None:
                await self._finish(group)
                self._start_groups()
                yield group.band, group.kv
        finally:
            self._link.loads.pop(id(self), None)
            await _cancel(self._groups)

    def _next_group(self) -> Group | None:
        self._start_groups()
        return self._groups.popleft() if self._groups else None

    def _start_groups(self) -> None:
        while self._next_band < len(self._bands) and len(self._groups) <= _BANDS_AHEAD:
            if self._replan():
                self._cancel_cut()
            if not self.good:
                return
            band = self._bands[self._next_band]
            self._next_band += 1
            group = Group(band, self._room(band), self.good)
            group.task = asyncio.create_task(self._read_group(group, self._urgency(band)))
            self._groups.append(group)

    def _room(self, band: Band) -> torch.Tensor:
        """What a band is decoded into.

        With a sink it is an outline, without memory for all tokens: a chunk takes some for as long as it needs it, so
        that a load takes no more for being long.
        """
        if self._sink is None:
            return self._allocate(band, self.good)
        identity = self.chunks[0].identity
        layout, layers = identity.layout, band.layer_end - band.layer_begin
        one = torch.empty(layers, 2, 1, self._shard.heads, layout.head_dim, dtype=getattr(torch, layout.dtype))
        return one.expand(-1, -1, self.good * identity.tokens, -1, -1)

    async def _finish(self, group: Group) -> None:
        assert group.task is not None
        self._groups.appendleft(group)  # so that it is cancelled with the others
        while not group.task.done():
            await asyncio.wait({group.task}, timeout=self._tick_s if self._pace else None)
            if not group.task.done() and self._replan():
                self._cancel_cut()
        self._groups.popleft()
        group.task.result()

    async def _read_group(self, group: Group, urgency: float) -> None:
        tokens = group.kv.shape[2] // group.chunks
        whole = self._view(group.kv) if self._sink is None else None

        async def read(index: int) -> None:
            async with self._turns:
                if index >= self.good:
                    return
                if whole is not None:
                    place = whole[:, :, index * tokens : (index + 1) * tokens]
                    await self._read_chunk(index, group.band, place, urgency)
                    return
                given = self._find_place(group.band, index) if self._find_place is not None else None
                if given is not None:
                    await self._read_chunk(index, group.band, given, urgency)
                    return
                values = self._allocate(group.band, 1)
                if await self._read_chunk(index, group.band, self._view(values), urgency) and self._sink is not None:
                    await self._sink(group.band.layer_begin, index, values)

        try:
            async with asyncio.TaskGroup() as tasks:
                for index in range(group.chunks):
                    group.jobs[index] = tasks.create_task(read(index))
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None

    async def _read_chunk(self, index: int, band: Band, target: Place, urgency: float) -> bool:
        """Read a chunk's share of a band, from all objects that have some of it at once. False: it is lost."""
        layers = replace(self._shard, layer_begin=band.layer_begin, layer_end=band.layer_end)
        parts = [(number, piece, part) for number, piece in self._parts[index] if (part := meet(piece, layers))]
        try:
            work = []
            for number, piece, part in parts:
                known_before = piece.layer_begin < band.layer_begin  # an earlier band reads the header
                out = part_of(target, part, layers)
                work.append(self._read_tile(index, number, part, out, urgency, wait=known_before))
            if len(work) == 1:
                await work[0]
            else:
                await run_all(work)
            if any(self.chunks[index].tiles[number].header is None for number, _, _ in parts):
                return False  # lost in another band, or the load is failing
            self._layers_read[index] += band.layer_end - band.layer_begin
            return True
        except LOST as error:
            self.good = min(self.good, index)
            self._cancel_cut()  # nobody waits for what lies behind it, least of all where the link hangs
            self._on_lost(self._lost.pop(index, self.chunks[index].identity), error, self._begun)
            return False
        finally:
            for number, _, _ in parts:
                self._headers[index][number].set()

    async def _read_tile(
        self, index: int, number: int, wanted: Shard, out: Place, urgency: float, *, wait: bool
    ) -> None:
        """Read the rectangle `wanted` of one object of a chunk.

        With `wait`, once its header is known; where it stays unknown, nothing is read.
        """
        if wait and self.chunks[index].tiles[number].header is None:
            await self._headers[index][number].wait()  # before a slab is taken: its reader may need one
            if self.chunks[index].tiles[number].header is None:
                return
        tiles = list(self.chunks[index].tiles)
        try:
            header = await self._reader.read_tile(tiles[number], wanted, self.levels[index], out, urgency=urgency)
        except LOST:
            self._lost.setdefault(index, tiles[number].identity)
            raise
        if tiles[number].header is not header:
            tiles = list(self.chunks[index].tiles)  # others may have learned theirs meanwhile
            tiles[number] = replace(tiles[number], table=header.table, header=header)
            self.chunks[index] = StoredChunk.join(tiles)

    def _cancel_cut(self) -> None:
        for group in self._groups:
            for index, job in group.jobs.items():
                if index >= self.good and job is not asyncio.current_task():
                    job.cancel()

    def _urgency(self, band: Band) -> float:
        """Of a read of `band`; notes what the load is to the others."""
        pace, first_layer = self._pace, self._bands[0].layer_begin
        left = sum(cost.bytes(levels) for cost, levels in zip(self._costs(), self.levels, strict=False))
        needed_at = self._begun + (band.layer_begin - first_layer) * (pace.seconds_per_layer if pace else 0.0)
        mine = urgency(needed_at=needed_at, remaining_bytes=left, bandwidth=self._link.bytes_per_s())
        self._link.loads[id(self)] = (mine, left)
        return mine

    def _costs(self) -> list[ChunkCost]:
        """What is still to be read of each chunk that is loaded."""
        return [
            ChunkCost(tuple(size * (self._layers - done) // self._layers for size in sizes))
            for sizes, done in zip(self._sizes[: self.good], self._layers_read, strict=False)
        ]

    def _replan(self) -> bool:
        """Look again at what is worth loading; True where the load was cut."""
        pace, now = self._pace, time.monotonic()
        if pace is None or now - self._planned_at < self._tick_s / 2:
            return False
        self._planned_at = now
        before, whole = self.good, self._whole_chunks()
        if self._lost_s(pace, whole, now) > self._may_lose_s:
            if whole < before:
                self._count("loads_given_up", 1)
                self._count("chunks_left_to_recompute", before - whole)
                self.good = whole
            return whole < before
        plan = self._first_plan(pace) if self._replanner is None else self._revise(self._replanner, now)
        for index, levels in enumerate(plan.levels[: self.good]):
            if levels < min(self.levels[index], len(self._sizes[index])):
                self._count("levels_left_out", self.levels[index] - levels)
                self.levels[index] = levels
        if plan.keep < self.good:
            self._count("chunks_left_to_recompute", self.good - plan.keep)
            self.good = plan.keep
        return self.good < before

    def _whole_chunks(self) -> int:
        """How many chunks from the first on are read in all layers."""
        read = zip(range(self.good), self._layers_read, strict=False)
        return next((index for index, layers in read if layers < self._layers), self.good)

    def _lost_s(self, pace: Pace, whole: int, now: float) -> float:
        """What the load has cost so far beyond what it saves."""
        first = self.chunks[0].first_token
        saved_s = pace.prefill.seconds(first, first + whole * self.chunks[0].identity.tokens)
        return now - self._begun + pace.spent_s - saved_s

    def _first_plan(self, pace: Pace) -> Plan:
        tokens, first_token = self.chunks[0].identity.tokens, self.chunks[0].first_token
        highest = max(len(sizes) for sizes in self._sizes)
        lowest = min(self._lowest, highest)
        first = plan(
            self._costs(),
            bandwidth=self._link.bytes_per_s(),
            latency_s=self._wait_s(),
            prefill=pace.prefill,
            chunk_tokens=tokens,
            first_token=first_token,
            prompt_tokens=pace.prompt_tokens,
            deadline_s=pace.deadline_s,
            lowest_levels=lowest,
            highest_levels=highest,
        )
        self._replanner = Replanner(
            first,
            prefill=pace.prefill,
            chunk_tokens=tokens,
            first_token=first_token,
            prompt_tokens=pace.prompt_tokens,
            deadline_s=pace.deadline_s,
            lowest_levels=lowest,
        )
        return first

    def _revise(self, replanner: Replanner, now: float) -> Plan:
        return replanner.revise(
            self._costs(),
            bandwidth=self._link.bytes_per_s(),
            elapsed_s=now - self._begun,
            latency_s=self._wait_s(),
        )

    def _wait_s(self) -> float:
        """Seconds until the next band of this load gets its first byte."""
        band = self._groups[0].band if self._groups else self._bands[min(self._next_band, len(self._bands) - 1)]
        return self._link.wait_s(id(self), self._urgency(band))


async def _cancel(groups: deque[Group]) -> None:
    tasks = [group.task for group in groups if group.task is not None]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
