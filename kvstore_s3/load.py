"""What a load is made of: chunks that were found, the checks and the decoding of what was read, work in threads."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from kvstore_s3.bitstream import (
    PARTS_K,
    PARTS_KV,
    PROFILES,
    Header,
    Identity,
    SectionTable,
)
from kvstore_s3.codec.base import Bits
from kvstore_s3.codec.registry import codec_for
from kvstore_s3.errors import BitstreamFault, DamagedObjectError, ObjectNotFoundError, StoreUnavailableError
from kvstore_s3.objectstore.awaiting import finish
from kvstore_s3.quality import quality_of
from kvstore_s3.transfer.ranges import Band, BandRange, count_levels, group_levels

if TYPE_CHECKING:
    from kvstore_s3.codec.calibration import Calibration

T = TypeVar("T")

LOST = (DamagedObjectError, ObjectNotFoundError)
"""What ends a hit instead of failing it."""


class MissingCalibrationError(DamagedObjectError):
    """An object names a calibration that is not at hand. That was logged once, so nobody need say it of each object."""

    def __init__(self, digest: bytes) -> None:
        name = digest.hex()[:16]
        super().__init__(BitstreamFault.UNSUPPORTED_FEATURE, f"it was coded with calibration {name}, not at hand")


@dataclass(frozen=True, slots=True)
class StoredChunk:
    """One object that a lookup found.

    `first_token` is the position of its first token in the prompt. `header` is None where only the hint in its metadata
    was read so far.
    """

    object_key: str
    identity: Identity
    table: SectionTable
    header: Header | None
    first_token: int

    def quality(self, levels: int) -> str:
        """The quality that a reader of `levels` levels gets of this object."""
        return quality_of(self.table.profile, min(levels, count_levels(self.table)))

    @property
    def calibrated(self) -> bool | None:
        """Whether a scalable object was coded with a calibration; None: of another profile, or not known yet."""
        if self.header is None or self.table.profile != PROFILES["scalable"]:
            return None
        return self.header.calibration is not None


def decode_band(
    header: Header,
    first_token: int,
    calibration: Calibration | None,
    band: Band,
    pieces: Sequence[tuple[BandRange, memoryview]],
    out: Bits,
) -> None:
    """Verify and decode the sections in `pieces`, which hold whole sections of `band`, into `out`."""
    payloads: dict[int, memoryview] = {}
    for part, data in pieces:
        for number in part.sections:
            section = header.table.sections[number]
            payloads[number] = header.verify(number, data[section.offset - part.start : section.end - part.start])
    for numbers in group_levels(header.table, list(payloads)):
        place = header.table.sections[numbers[0]]
        target = out[place.layer_begin - band.layer_begin : place.layer_end - band.layer_begin]
        decode_section(header, numbers, [payloads[n] for n in numbers], target, first_token, calibration)


def decode_section(
    header: Header,
    numbers: Sequence[int],
    payloads: Sequence[memoryview],
    out: Bits,
    first_token: int | None,
    calibration: Calibration | None,
) -> None:
    """Decode verified payloads of one place, base first, into `out` [layers of the section, 2, tokens, heads, dim].

    `first_token` None believes what a scalable object says of its own position.
    """
    sections = [header.table.sections[number] for number in numbers]
    base, identity = sections[0], header.identity
    dtype = identity.layout.dtype
    if base.parts != PARTS_KV:
        out = out[:, 0:1] if base.parts == PARTS_K else out[:, 1:2]
    if header.table.profile == PROFILES["scalable"]:
        from kvstore_s3.codec.scalable import decode_scalable  # brings torch, which verifying alone does without

        decode_scalable(
            [(section.codec, payload) for section, payload in zip(sections, payloads, strict=True)],
            out,
            dtype,
            layer_begin=base.layer_begin,
            head_begin=0,
            section_heads=identity.shard.heads,
            first_position=first_token,
            calibration=calibration,
            first_head=identity.shard.head_begin,
            object_levels=header.table.sections[-1].level + 1,
        )
        return
    codec = codec_for(base.codec, dtype, cachegen=header.table.profile == PROFILES["cachegen"])
    codec.decode(payloads[0], out, head_begin=0, section_heads=identity.shard.heads)


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
