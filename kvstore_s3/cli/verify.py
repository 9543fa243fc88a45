"""Verify or decode one stored object, section by section, in bounded memory. Used by check and stat."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from kvstore_s3.bitstream import (
    HINT_NAME,
    PARTS_KV,
    PROFILES,
    Header,
    Identity,
    decode_hint,
    parse_header,
    read_header_length,
)
from kvstore_s3.cli.inventory import ObjectName, fits_layout
from kvstore_s3.errors import BitstreamFault, DamagedObjectError
from kvstore_s3.load import decode_section
from kvstore_s3.namespace import Namespace
from kvstore_s3.objectstore.base import ObjectInfo, ObjectStore
from kvstore_s3.transfer.buffers import SlabPool
from kvstore_s3.transfer.ranges import group_levels

if TYPE_CHECKING:
    from kvstore_s3.codec.calibration import Calibration

_HEADER_GUESS = 4096
_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32}


def expect_identity(name: ObjectName, namespace: Namespace) -> Identity:
    """What the object must be, by its name alone. Raises `DamagedObjectError` where the name fits no layout."""
    if name.key is None or name.shard is None or not fits_layout(name.shard, namespace):
        shard = "no shard" if name.shard is None else name.shard.name
        whole = namespace.layout.full_shard.name
        raise DamagedObjectError(BitstreamFault.WRONG_SHARD, f"its name says {shard}, the model has {whole}")
    return Identity(namespace.digest, name.key, name.shard, namespace.layout, namespace.chunk_tokens)


async def read_header(objects: ObjectStore, info: ObjectInfo, identity: Identity) -> Header:
    """Read and verify an object's header, of any profile, its length and the index in its metadata."""
    data = bytearray(min(_HEADER_GUESS, info.size))
    await objects.get_range(info.key, 0, memoryview(data))
    length = read_header_length(data)
    if length > len(data):
        data = bytearray(min(length, info.size))
        await objects.get_range(info.key, 0, memoryview(data))
    header = parse_header(data, identity, profiles=PROFILES, calibrations=None)
    expected = header.table.object_length
    if info.size != expected:
        fault = BitstreamFault.TRUNCATED if info.size < expected else BitstreamFault.TRAILING_BYTES
        raise DamagedObjectError(fault, f"it has {info.size} bytes, its header says {expected}")
    await _check_hint(objects, info, header)
    return header


async def verify_sections(objects: ObjectStore, info: ObjectInfo, header: Header, slabs: SlabPool) -> None:
    """Read and verify every section, one at a time. Raises `DamagedObjectError` at the first that is not as saved."""
    for number, section in enumerate(header.table.sections):
        async with slabs.lease(section.stored_length) as buffer:
            await objects.get_range(info.key, section.offset, buffer)
            await asyncio.to_thread(header.verify, number, buffer)


async def decode_sections(
    objects: ObjectStore, info: ObjectInfo, header: Header, slabs: SlabPool, calibration: Calibration | None
) -> None:
    """Read, verify and decode every section, all levels of one place at a time. Raises as `verify_sections`.

    `calibration` is the one that the header names.
    """
    sections = header.table.sections
    for numbers in group_levels(header.table, range(len(sections))):
        async with slabs.lease(sum(sections[number].stored_length for number in numbers)) as buffer:
            stored, begin = [], 0
            for number in numbers:
                stored.append(buffer[begin : begin + sections[number].stored_length])
                begin += sections[number].stored_length
                await objects.get_range(info.key, sections[number].offset, stored[-1])
            await asyncio.to_thread(_decode, header, numbers, stored, calibration)


async def _check_hint(objects: ObjectStore, info: ObjectInfo, header: Header) -> None:
    headed = await objects.head(info.key)
    hint = headed.metadata.get(HINT_NAME) if headed else None
    if hint is not None and decode_hint(hint, header.identity, profiles=PROFILES) != header.table:
        raise DamagedObjectError(BitstreamFault.BAD_INDEX, "the index in its metadata is not that of its header")


def _decode(
    header: Header, numbers: Sequence[int], stored: Sequence[memoryview], calibration: Calibration | None
) -> None:
    payloads = [header.verify(number, data) for number, data in zip(numbers, stored, strict=True)]
    identity, section = header.identity, header.table.sections[numbers[0]]
    layout = identity.layout
    shape = (section.layers, 2, identity.tokens, identity.shard.heads, layout.head_dim)
    out = np.empty(shape, dtype=_BITS[layout.itemsize])
    try:
        decode_section(header, numbers, payloads, out, None, calibration)
    except DamagedObjectError as error:
        half = "" if section.parts == PARTS_KV else " (K or V)"
        raise DamagedObjectError(error.code, f"section {numbers[0]}{half} does not decode: {error}") from error
