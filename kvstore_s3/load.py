"""The load pipeline: range reads, checks and decoding of one hit, band of layers by band of layers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from kvstore_s3.bitstream import PARTS_K, PARTS_KV, Header, Identity, Section, SectionTable, parse_header
from kvstore_s3.codec.base import Bits
from kvstore_s3.codec.registry import codec_for
from kvstore_s3.errors import BitstreamFault, DamagedObjectError, ObjectNotFoundError, StoreUnavailableError
from kvstore_s3.objectstore.awaiting import finish
from kvstore_s3.objectstore.base import ObjectStore
from kvstore_s3.transfer.buffers import BufferBudget
from kvstore_s3.transfer.ranges import Band, band_range, has_boundaries

T = TypeVar("T")

log = logging.getLogger("kvstore_s3")


@dataclass(frozen=True, slots=True)
class StoredChunk:
    """One object that a lookup found. `header` is None where only the hint in its metadata was read so far."""

    object_key: str
    identity: Identity
    table: SectionTable
    header: Header | None


async def read_band(
    chunks: list[StoredChunk],
    count: int,
    band: Band,
    out: Bits,
    *,
    objects: ObjectStore,
    buffers: BufferBudget,
    slots: asyncio.Semaphore,
    threads: Executor,
    on_lost: Callable[[Identity, Exception], None],
) -> int:
    """Read `band` of the first `count` chunks into `out` [layers of the band, 2, tokens, heads, dim].

    Returns how many are good: a damaged or vanished object ends the prefix, and `on_lost` hears of it. The values after
    the prefix are undefined. Headers that were read are kept in `chunks`, so that later bands need not read them again.
    Store failures are raised.
    """
    good = count
    tokens = out.shape[2] // count

    async def read(index: int) -> None:
        nonlocal good
        chunk = chunks[index]
        async with slots:
            if index >= good:
                return
            target = out[:, :, index * tokens : (index + 1) * tokens]
            try:
                header = await _read_chunk(chunk, band, target, objects, buffers, threads)
                chunks[index] = replace(chunk, table=header.table, header=header)
            except (DamagedObjectError, ObjectNotFoundError) as error:
                good = min(good, index)
                on_lost(chunk.identity, error)

    await run_all([read(index) for index in range(count)])
    return good


async def _read_chunk(
    chunk: StoredChunk, band: Band, out: Bits, objects: ObjectStore, buffers: BufferBudget, threads: Executor
) -> Header:
    found = band_range(chunk.table, band)
    start = found.start if chunk.header else 0
    async with buffers.lease(found.end - start) as buffer:
        await objects.get_range(chunk.object_key, start, buffer)
        header = await in_thread(threads, decode_range, chunk, found.sections, band.layer_begin, start, buffer, out)
    if header.table == chunk.table:
        return header
    if not has_boundaries(header.table, band):
        raise DamagedObjectError(BitstreamFault.BAD_INDEX, "the object's sections are not those in its metadata")
    corrected = replace(chunk, table=header.table, header=header)  # the hint was wrong; the header is verified
    return await _read_chunk(corrected, band, out, objects, buffers, threads)


def decode_range(
    chunk: StoredChunk, sections: range, first_layer: int, start: int, data: memoryview, out: Bits
) -> Header:
    """Verify and decode `sections` out of `data`, the object's bytes from `start` on; return the verified header.

    Where the chunk's header is not known yet, `start` is 0 and `data` begins with it; if its table is not the chunk's,
    `sections` were planned from a wrong hint, and nothing is decoded.
    """
    header = chunk.header or parse_header(data, chunk.identity)
    if header.table != chunk.table:
        return header
    for number in sections:
        section = header.table.sections[number]
        payload = header.verify(number, data[section.offset - start : section.end - start])
        target = out[section.layer_begin - first_layer : section.layer_end - first_layer]
        decode_section(section, payload, target, chunk.identity)
    return header


def decode_section(section: Section, payload: memoryview, out: Bits, identity: Identity) -> None:
    """Decode a verified payload into `out` [layers of the section, 2, tokens, heads, dim]."""
    if section.parts != PARTS_KV:
        out = out[:, 0:1] if section.parts == PARTS_K else out[:, 1:2]
    codec = codec_for(section.codec, identity.layout.dtype)
    codec.decode(payload, out, head_begin=0, section_heads=identity.shard.heads)


async def in_thread(threads: Executor, function: Callable[..., T], *args: Any) -> T:
    """Run `function` in a thread. A cancellation waits for its end, so that no thread writes into freed memory."""
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
