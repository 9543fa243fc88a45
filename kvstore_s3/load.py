"""What a load is made of: chunks that were found, the checks and the decoding of what was read, work in threads."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np

from kvstore_s3.bitstream import (
    PARTS_K,
    PARTS_KV,
    PARTS_V,
    PROFILES,
    Header,
    Identity,
    SectionTable,
)
from kvstore_s3.codec.base import Bits
from kvstore_s3.codec.registry import codec_for
from kvstore_s3.covers import cut_cover
from kvstore_s3.errors import (
    BitstreamFault,
    DamagedObjectError,
    InvalidArgumentError,
    ObjectNotFoundError,
    StoreUnavailableError,
)
from kvstore_s3.layout import Shard
from kvstore_s3.objectstore.awaiting import finish
from kvstore_s3.quality import quality_of, worst_quality
from kvstore_s3.transfer.ranges import BandRange, count_levels, group_levels

if TYPE_CHECKING:
    from kvstore_s3.codec.calibration import Calibration
    from kvstore_s3.device_load import DevicePlace

T = TypeVar("T")

Place: TypeAlias = "Bits | DevicePlace"
"""Where values [layers, 2, tokens, heads, dim] are decoded to, on the host or on a device."""

LOST = (DamagedObjectError, ObjectNotFoundError)
"""What ends a hit instead of failing it."""

HALVES = {PARTS_K: slice(0, 1), PARTS_V: slice(1, 2), PARTS_KV: slice(0, 2)}
"""Where a section's K, V or both lie in values [layers, 2, ...]."""


class MissingCalibrationError(DamagedObjectError):
    """An object names a calibration that is not at hand. That was logged once, so nobody need say it of each object."""

    def __init__(self, digest: bytes) -> None:
        name = digest.hex()[:16]
        super().__init__(BitstreamFault.UNSUPPORTED_FEATURE, f"it was coded with calibration {name}, not at hand")


@dataclass(frozen=True, slots=True)
class ChunkPlace:
    """A chunk that a lookup found, without what every process of an engine knows: to be sent from one to another.

    `tiles` are its objects: the shard of each, and where its sections lie.
    """

    key: bytes
    first_token: int
    tiles: tuple[tuple[Shard, SectionTable], ...]

    @property
    def size(self) -> int:
        """Stored bytes of all its objects."""
        return sum(table.object_length for _, table in self.tiles)


@dataclass(frozen=True, slots=True)
class StoredChunk:
    """One object that a lookup found, and those `beside` it that its chunk takes for the reader's rectangle.

    `first_token` is the position of its first token in the prompt. `header` is None where only the hint in its metadata
    was read so far.
    """

    object_key: str
    identity: Identity
    table: SectionTable
    header: Header | None
    first_token: int
    beside: tuple[StoredChunk, ...] = ()

    @classmethod
    def join(cls, tiles: Sequence[StoredChunk]) -> StoredChunk:
        """One chunk of its objects: one at least."""
        return replace(tiles[0], beside=tuple(tiles[1:])) if len(tiles) > 1 else tiles[0]

    @property
    def tiles(self) -> tuple[StoredChunk, ...]:
        """Each of its objects, alone."""
        return (replace(self, beside=()), *self.beside) if self.beside else (self,)

    @property
    def size(self) -> int:
        """Stored bytes of all its objects."""
        return sum(tile.table.object_length for tile in (self, *self.beside))

    def place(self) -> ChunkPlace:
        """What another process needs to read the chunk: see `KVStore.hit_of`."""
        tiles = tuple((tile.identity.shard, tile.table) for tile in self.tiles)
        return ChunkPlace(self.identity.key, self.first_token, tiles)

    def within(self, shard: Shard) -> StoredChunk:
        """The chunk with those of its objects that a reader of `shard` needs.

        Raises `InvalidArgumentError` where they do not have all of it.
        """
        if self.identity.shard == shard:
            return replace(self, beside=()) if self.beside else self
        tiles = self.tiles
        pieces = cut_cover(shard, [tile.identity.shard for tile in tiles])
        if pieces is None:
            found = ", ".join(tile.identity.shard.name for tile in tiles)
            raise InvalidArgumentError(f"the hit has {found}, not all of {shard.name}; look it up for that rectangle")
        needed = sorted({number for number, _ in pieces})
        return StoredChunk.join([tiles[number] for number in needed])

    def moved(self, first_token: int) -> StoredChunk:
        """The chunk in another prompt of the same prefix: at the position `first_token`."""
        if first_token == self.first_token:
            return self
        beside = tuple(replace(tile, first_token=first_token) for tile in self.beside)
        return replace(self, first_token=first_token, beside=beside)

    def quality(self, levels: int) -> str:
        """The quality that a reader of `levels` levels gets of this chunk: that of its worst object."""
        return worst_quality(
            [quality_of(tile.table.profile, min(levels, count_levels(tile.table))) for tile in (self, *self.beside)]
        )

    @property
    def calibrated(self) -> bool | None:
        """Whether its objects were coded with a calibration; None: not known yet, or not all of a scalable profile."""
        told = {_names_calibration(tile) for tile in (self, *self.beside)}
        return False if False in told else (True if told == {True} else None)


def _names_calibration(tile: StoredChunk) -> bool | None:
    if tile.header is None or tile.table.profile != PROFILES["scalable"]:
        return None
    return tile.header.calibration is not None


def cut_chunks(shard: Shard, chunks: Sequence[StoredChunk]) -> list[list[tuple[int, Shard]]]:
    """For each chunk, the pieces of `shard` with the number of the object that each is read from."""
    known: dict[tuple[Shard, ...], list[tuple[int, Shard]]] = {}
    cut = []
    for chunk in chunks:
        tiles = tuple(tile.identity.shard for tile in chunk.tiles)
        if tiles not in known:
            known[tiles] = cut_cover(shard, tiles) or []
        cut.append(known[tiles])
    return cut


def part_of(values: Place, part: Shard, whole: Shard) -> Place:
    """The rectangle `part` of `values` [layers, 2, tokens, heads, dim], which are those of `whole`."""
    layers = slice(part.layer_begin - whole.layer_begin, part.layer_end - whole.layer_begin)
    heads = slice(part.head_begin - whole.head_begin, part.head_end - whole.head_begin)
    return values[layers, :, :, heads]


def decode_band(
    header: Header,
    first_token: int,
    calibration: Calibration | None,
    wanted: Shard,
    pieces: Sequence[tuple[BandRange, memoryview]],
    out: Bits,
) -> None:
    """Verify the sections in `pieces` and decode what they have of the rectangle `wanted` into `out`, which is that.

    `pieces` hold whole sections; those that reach beyond the wanted layers are decoded aside.
    """
    payloads: dict[int, memoryview] = {}
    for part, data in pieces:
        payloads |= verify_range(header, part, data)
    head_begin = wanted.head_begin - header.identity.shard.head_begin
    for numbers in group_levels(header.table, list(payloads)):
        place = header.table.sections[numbers[0]]
        begin, end = max(place.layer_begin, wanted.layer_begin), min(place.layer_end, wanted.layer_end)
        target = whole = out[begin - wanted.layer_begin : end - wanted.layer_begin]
        if end - begin < place.layers:
            whole = np.empty((place.layers, *out.shape[1:]), out.dtype)
        stored = [payloads[number] for number in numbers]
        decode_section(header, numbers, stored, whole, first_token, calibration, head_begin=head_begin)
        if whole is not target:
            halves = HALVES[place.parts]
            target[:, halves] = whole[begin - place.layer_begin : end - place.layer_begin, halves]


def verify_range(header: Header, part: BandRange, data: memoryview) -> dict[int, memoryview]:
    """The payloads of the sections that `data`, the bytes of `part`, has. Raises `DamagedObjectError`."""
    payloads = {}
    for number in part.sections:
        section = header.table.sections[number]
        payloads[number] = header.verify(number, data[section.offset - part.start : section.end - part.start])
    return payloads


def decode_section(
    header: Header,
    numbers: Sequence[int],
    payloads: Sequence[memoryview],
    out: Bits,
    first_token: int | None,
    calibration: Calibration | None,
    *,
    head_begin: int = 0,
) -> None:
    """Decode verified payloads of one place, base first, into `out` [layers of the section, 2, tokens, heads, dim].

    `out` has as many heads as are wanted, from `head_begin` of the object's on. `first_token` None believes what a
    scalable object says of its own position.
    """
    sections = [header.table.sections[number] for number in numbers]
    base, identity = sections[0], header.identity
    dtype = identity.layout.dtype
    out = out[:, HALVES[base.parts]]
    if header.table.profile == PROFILES["scalable"]:
        from kvstore_s3.codec.scalable import decode_scalable  # brings torch, which verifying alone does without

        decode_scalable(
            [(section.codec, payload) for section, payload in zip(sections, payloads, strict=True)],
            out,
            dtype,
            layer_begin=base.layer_begin,
            head_begin=head_begin,
            section_heads=identity.shard.heads,
            first_position=first_token,
            calibration=calibration,
            first_head=identity.shard.head_begin,
            object_levels=header.table.sections[-1].level + 1,
        )
        return
    codec = codec_for(base.codec, dtype, cachegen=header.table.profile == PROFILES["cachegen"])
    codec.decode(payloads[0], out, head_begin=head_begin, section_heads=identity.shard.heads)


async def in_thread(threads: Executor, function: Callable[..., T], *args: Any) -> T:
    """Run `function` in a thread. A cancellation waits for its end, so that no thread writes into freed memory.

    Raises `StoreUnavailableError` where the threads are shut down before its turn.
    """
    try:
        call = threads.submit(function, *args)
    except RuntimeError as error:
        raise StoreUnavailableError("the store was closed; open it again") from error
    return await finish(asyncio.wrap_future(call), on_cancel=call.cancel)


async def run_all(work: Sequence[Awaitable[None]]) -> None:
    """Await all of `work` at once; the first failure cancels the rest and is raised as it is, not in a group."""
    try:
        async with asyncio.TaskGroup() as group:
            for item in work:
                group.create_task(_await(item))
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None


async def _await(item: Awaitable[None]) -> None:
    await item
