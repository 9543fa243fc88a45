"""Bitstream v1: header, digests, whole objects. Pure: bytes in, dataclasses out. `docs/FORMAT.md` is the authority.

An object is `fixed header | section index | padding | header digest | authenticator | sections`, every part a multiple
of 16 bytes. Sizes of buffers never come from these bytes alone: a reader states the `Identity` it expects, and an
object that does not fit it is refused with a `DamagedObjectError`.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from blake3 import blake3
from xxhash import xxh3_128

from kvstore_s3.errors import BitstreamFault, DamagedObjectError, InvalidArgumentError
from kvstore_s3.layout import DTYPES
from kvstore_s3.section_index import (
    ALIGNMENT,
    AUTHENTICATOR_SIZES,
    DIGEST_SIZES,
    ENTRY,
    FIXED_BYTES,
    HINT_NAME,
    LOSSLESS,
    MAX_HINT_CHARS,
    MAX_SECTIONS,
    MAX_TOKENS,
    PARTS_K,
    PARTS_KV,
    PARTS_V,
    PROFILES,
    VERSION,
    Identity,
    Section,
    SectionTable,
    build_table,
    check_length,
    check_profile,
    decode_hint,
    encode_hint,
    header_length_of,
    refuse,
)

__all__ = [
    "ALIGNMENT",
    "AUTHENTICATOR_SIZES",
    "DIGEST_SIZES",
    "HINT_NAME",
    "MAGIC",
    "MAX_HINT_CHARS",
    "MAX_SECTIONS",
    "MAX_TOKENS",
    "PARTS_K",
    "PARTS_KV",
    "PARTS_V",
    "PREFIX_LENGTH",
    "PROFILES",
    "VERSION",
    "Header",
    "Identity",
    "Payload",
    "Section",
    "SectionTable",
    "build_object",
    "decode_hint",
    "encode_hint",
    "parse_header",
    "read_header_length",
]

Bytes = bytes | bytearray | memoryview

MAGIC = b"\x89KVS3\r\n\x1a"
PREFIX_LENGTH = 24
"""Bytes that tell how long the header is."""

_PREFIX = struct.Struct("<8sHBBBBHII")
_FIXED = struct.Struct("<8sHBBBBHIIIHHHHHHQ32s32s32s")
_HEADER_NUMBER = 0xFFFFFFFF
_XXH3 = 3
"""The digest id whose section digests are XXH3-128: against accidents, at a fifth of the price of BLAKE3."""
_NO_CALIBRATION = bytes(32)
assert (_PREFIX.size, _FIXED.size) == (PREFIX_LENGTH, FIXED_BYTES)


class _Fixed(NamedTuple):
    """The fixed header, field by field as `_FIXED` packs it."""

    magic: bytes
    version: int
    profile: int
    dtype: int
    digest_id: int
    authenticator_id: int
    section_count: int
    header_length: int
    flags: int
    tokens: int
    head_dim: int
    reserved: int
    layer_begin: int
    layer_end: int
    head_begin: int
    head_end: int
    object_length: int
    namespace: bytes
    key: bytes
    calibration: bytes


@dataclass(frozen=True, slots=True)
class Header:
    """A header that was verified against an `Identity`.

    `digest_id` says what `digests`, those of the sections, are; `calibration` is the digest of the calibration that its
    codecs need, None for none.
    """

    identity: Identity
    table: SectionTable
    digest_id: int
    digests: tuple[bytes, ...]
    calibration: bytes | None = None

    def verify(self, number: int, stored: Bytes) -> memoryview:
        """Check the stored bytes of section `number` and return its payload (without padding)."""
        section = self.table.sections[number]
        check_length(f"section {number}", len(stored), section.stored_length)
        digest = _section_digest(self.digest_id, self.identity.binding(), number, section.entry(), stored)
        if digest != self.digests[number]:
            refuse(BitstreamFault.SECTION_CHECKSUM, f"section {number} is not what was saved under this name")
        view = memoryview(stored)
        if any(view[section.length :]):
            refuse(BitstreamFault.BAD_PAYLOAD, f"the padding of section {number} is not zero")
        return view[: section.length]


@dataclass(frozen=True, slots=True)
class Payload:
    """One coded section on its way into an object; its place and its number follow from its order."""

    level: int
    parts: int
    codec: int
    layer_begin: int
    layer_end: int
    data: Bytes


def build_object(
    identity: Identity,
    payloads: Sequence[Payload],
    *,
    profile: str = "lossless",
    digest_id: int = _XXH3,
    calibration: bytes | None = None,
) -> tuple[bytearray, SectionTable]:
    """Assemble one object. `payloads` come level by level, layers ascending, K before V where they are apart.

    `digest_id` 2 is for objects that will be signed; readers take all. `calibration` is the digest of the calibration
    that the payloads need: for profile "scalable" alone. Raises `InvalidArgumentError` where they do not divide the
    shard, or are larger than their values uncompressed.
    """
    _check_calibration(calibration, profile)
    views = [memoryview(payload.data).cast("B") for payload in payloads]
    table = _plan_object(identity, payloads, [len(view) for view in views], profile, digest_id)
    size = DIGEST_SIZES[digest_id]
    out = bytearray(table.object_length)
    binding = identity.binding()
    position = FIXED_BYTES
    with memoryview(out) as target:
        target[:FIXED_BYTES] = _FIXED.pack(*_fixed_header(identity, table, digest_id, calibration or _NO_CALIBRATION))
        for number, (section, view) in enumerate(zip(table.sections, views, strict=True)):
            target[section.offset : section.offset + section.length] = view
            with target[section.offset : section.end] as stored:
                entry = section.entry() + _section_digest(digest_id, binding, number, section.entry(), stored)
            target[position : position + len(entry)] = entry
            position += len(entry)
        end = table.header_length - size
        target[end : end + size] = _blake3(binding, _HEADER_NUMBER, b"", bytes(target[:end]), size)
    return out, table


def read_header_length(data: Bytes) -> int:
    """How long the header is, from its first `PREFIX_LENGTH` bytes or more; a lie is still bounded by the limits."""
    if len(data) < PREFIX_LENGTH:
        refuse(BitstreamFault.TRUNCATED, f"{len(data)} bytes are too few for a header")
    magic, version, _, _, digest_id, authenticator_id, count, length, flags = _PREFIX.unpack_from(data)
    if magic != MAGIC:
        refuse(BitstreamFault.BAD_MAGIC, "not a kvstore_s3 object")
    if version != VERSION:
        refuse(BitstreamFault.UNSUPPORTED_VERSION, f"format version {version}; this reader knows {VERSION}")
    if digest_id not in DIGEST_SIZES or authenticator_id not in AUTHENTICATOR_SIZES or flags:
        found = f"digest id {digest_id}, authenticator id {authenticator_id} or flags {flags:#x} are unknown"
        refuse(BitstreamFault.UNSUPPORTED_FEATURE, found)
    if authenticator_id and digest_id != 2:
        refuse(BitstreamFault.BAD_HEADER, "an authenticator calls for 256-bit digests")
    if not 1 <= count <= MAX_SECTIONS:
        refuse(BitstreamFault.BAD_HEADER, f"{count} sections; 1 to {MAX_SECTIONS} are allowed")
    if length != header_length_of(count, digest_id, authenticator_id):
        refuse(BitstreamFault.BAD_HEADER, f"header length {length} does not fit {count} sections")
    return int(length)


def parse_header(
    data: Bytes,
    expected: Identity,
    *,
    profiles: Collection[str] = LOSSLESS,
    calibrations: Collection[bytes] | None = (),
) -> Header:
    """Parse and verify the header at the start of `data` (which may go on with sections).

    `profiles` are those that the caller can use: nothing lossy unless it was asked for. `calibrations` are the digests
    of those that the caller has at hand; None: it will look at `Header.calibration` itself, and refuse an object whose
    calibration it lacks. What the header says of itself is believed only once its digest held; then an unknown feature
    is one of a newer writer, not damage.
    """
    length = read_header_length(data)
    if len(data) < length:
        refuse(BitstreamFault.TRUNCATED, f"{len(data)} bytes, but the header alone has {length}")
    header = bytes(memoryview(data)[:length])
    fixed = _Fixed._make(_FIXED.unpack_from(header))
    _check_name(fixed, expected)
    size = DIGEST_SIZES[fixed.digest_id]
    end = length - size - AUTHENTICATOR_SIZES[fixed.authenticator_id]
    if _blake3(expected.binding(), _HEADER_NUMBER, b"", header[:end], size) != header[end : end + size]:
        refuse(BitstreamFault.HEADER_CHECKSUM, "the header is not what was saved under this name")
    _check_features(fixed, profiles, calibrations)
    _check_layout(fixed, expected)
    return _parse_index(header[:end], fixed, size, expected)


def _parse_index(header: bytes, fixed: _Fixed, digest_size: int, expected: Identity) -> Header:
    stride = ENTRY.size + digest_size
    index_end = FIXED_BYTES + fixed.section_count * stride
    if any(header[index_end:]):
        refuse(BitstreamFault.BAD_HEADER, "padding after the index is not zero")
    starts = range(FIXED_BYTES, index_end, stride)
    entries = [ENTRY.unpack_from(header, start) for start in starts]
    table = build_table(fixed.header_length, fixed.profile, entries, expected)
    if table.object_length != fixed.object_length:
        found = f"sections end at {table.object_length}, the header says {fixed.object_length}"
        refuse(BitstreamFault.BAD_INDEX, found)
    digests = tuple(header[start + ENTRY.size : start + stride] for start in starts)
    return Header(expected, table, fixed.digest_id, digests, fixed.calibration if any(fixed.calibration) else None)


def _section_digest(digest_id: int, binding: bytes, number: int, entry: bytes, stored: Bytes) -> bytes:
    """Both kinds take the stored bytes where they lie, and let other threads run meanwhile."""
    if digest_id != _XXH3:
        return _blake3(binding, number, entry, stored, DIGEST_SIZES[digest_id])
    hasher = xxh3_128(binding + struct.pack("<I", number) + entry)
    hasher.update(stored)
    return hasher.digest()


def _blake3(binding: bytes, number: int, entry: bytes, data: Bytes, size: int) -> bytes:
    hasher = blake3(struct.pack("<I", number) + entry, key=binding)
    hasher.update(data)
    return hasher.digest(length=size)


def _plan_object(
    identity: Identity, payloads: Sequence[Payload], lengths: Sequence[int], profile: str, digest_id: int
) -> SectionTable:
    if profile not in PROFILES or digest_id not in DIGEST_SIZES:
        raise InvalidArgumentError(f"profile {profile!r} or digest id {digest_id} is unknown")
    if not 1 <= len(payloads) <= MAX_SECTIONS or any(not 0 <= payload.codec <= 255 for payload in payloads):
        raise InvalidArgumentError(f"{len(payloads)} payloads; 1 to {MAX_SECTIONS} with codec ids 0 to 255 are allowed")
    entries = [
        (payload.level, payload.parts, payload.codec, 0, payload.layer_begin, payload.layer_end, length)
        for payload, length in zip(payloads, lengths, strict=True)
    ]
    try:
        return build_table(header_length_of(len(entries), digest_id, 0), PROFILES[profile], entries, identity)
    except DamagedObjectError as error:
        raise InvalidArgumentError(f"these payloads make no object: {error}") from error


def _check_calibration(calibration: bytes | None, profile: str) -> None:
    if calibration is None:
        return
    if profile != "scalable" or len(calibration) != 32 or not any(calibration):
        raise InvalidArgumentError(
            f"a calibration of {len(calibration)} bytes in profile {profile!r}; scalable objects alone name one, by a "
            "digest of 32 bytes that are not all zero"
        )


def _fixed_header(identity: Identity, table: SectionTable, digest_id: int, calibration: bytes) -> _Fixed:
    shard, layout = identity.shard, identity.layout
    return _Fixed(
        magic=MAGIC,
        version=VERSION,
        profile=table.profile,
        dtype=DTYPES[layout.dtype].id,
        digest_id=digest_id,
        authenticator_id=0,
        section_count=len(table.sections),
        header_length=table.header_length,
        flags=0,
        tokens=identity.tokens,
        head_dim=layout.head_dim,
        reserved=0,
        layer_begin=shard.layer_begin,
        layer_end=shard.layer_end,
        head_begin=shard.head_begin,
        head_end=shard.head_end,
        object_length=table.object_length,
        namespace=identity.namespace,
        key=identity.key,
        calibration=calibration,
    )


def _check_name(fixed: _Fixed, expected: Identity) -> None:
    """Before the digest, which is keyed with the name: a swapped object is told by its name, not as damage."""
    shard = expected.shard
    if fixed.namespace != expected.namespace:
        refuse(BitstreamFault.WRONG_NAMESPACE, f"object of namespace {fixed.namespace.hex()[:16]}")
    if fixed.key != expected.key:
        refuse(BitstreamFault.WRONG_KEY, f"object of chunk {fixed.key.hex()[:16]}")
    ranges = (fixed.layer_begin, fixed.layer_end, fixed.head_begin, fixed.head_end)
    if ranges != (shard.layer_begin, shard.layer_end, shard.head_begin, shard.head_end):
        refuse(BitstreamFault.WRONG_SHARD, f"object of shard {ranges}, expected {shard.name}")


def _check_features(fixed: _Fixed, profiles: Collection[str], calibrations: Collection[bytes] | None) -> None:
    check_profile(fixed.profile, profiles)
    if fixed.dtype not in {known.id for known in DTYPES.values()}:
        refuse(BitstreamFault.UNSUPPORTED_FEATURE, f"dtype id {fixed.dtype} is unknown")
    if fixed.reserved:
        refuse(BitstreamFault.UNSUPPORTED_FEATURE, "a reserved bit of the header is set")
    if not any(fixed.calibration):
        return
    if fixed.profile != PROFILES["scalable"]:
        refuse(BitstreamFault.UNSUPPORTED_FEATURE, f"profile id {fixed.profile} goes with no calibration")
    if calibrations is not None and fixed.calibration not in calibrations:
        refuse(BitstreamFault.UNSUPPORTED_FEATURE, "the object was coded with a calibration that this reader lacks")


def _check_layout(fixed: _Fixed, expected: Identity) -> None:
    shape = (expected.tokens, expected.layout.head_dim, DTYPES[expected.layout.dtype].id)
    if (fixed.tokens, fixed.head_dim, fixed.dtype) != shape:
        found = f"tokens {fixed.tokens}, head dim {fixed.head_dim}, dtype id {fixed.dtype}; expected {shape}"
        refuse(BitstreamFault.WRONG_LAYOUT, found)
