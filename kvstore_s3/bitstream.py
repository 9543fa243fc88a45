"""Bitstream v1: header, section index, checksums. Pure: bytes in, dataclasses out. `docs/FORMAT.md` is the authority.

An object is `fixed header | section index | padding | header digest | authenticator | sections`, every part a multiple
of 16 bytes. Sizes of buffers never come from these bytes alone: a reader states the `Identity` it expects, and an
object that does not fit it is refused with a `DamagedObjectError`.
"""

from __future__ import annotations

import base64
import binascii
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NoReturn

from blake3 import blake3

from kvstore_s3.errors import BitstreamFault, DamagedObjectError, InvalidArgumentError
from kvstore_s3.layout import DTYPES, KVLayout, Shard

Bytes = bytes | bytearray | memoryview

MAGIC = b"\x89KVS3\r\n\x1a"
VERSION = 1
ALIGNMENT = 16
PROFILES = {"lossless": 1}
DIGEST_SIZES = {1: 16, 2: 32}
"""Digest id -> bytes of a digest: BLAKE3 cut to 128 bits, BLAKE3 whole."""
AUTHENTICATOR_SIZES = {0: 0, 1: 32, 2: 64}
"""Authenticator id -> its bytes: none, keyed BLAKE3, Ed25519. A reader without the key skips it."""
PARTS_K, PARTS_V, PARTS_KV = 1, 2, 3
MAX_SECTIONS = 4096
MAX_TOKENS = 65536
HINT_NAME = "kvs3-index"
"""Name of the user metadata entry that carries a `SectionTable`, so that the first range read needs no header."""
MAX_HINT_CHARS = 1900

_BINDING_CONTEXT = "kvstore-s3 2026-11-21 bitstream v1 binding"
_FIXED = struct.Struct("<8sHBBBBHIIHHHHHHI32s32s32sQ")
_ENTRY = struct.Struct("<BBBBHHI")
_PREFIX_LENGTH = 20  # magic .. header length: what a hint repeats
_HEADER_NUMBER = 0xFFFFFFFF
assert _FIXED.size == 144
assert _ENTRY.size == 12


@dataclass(frozen=True, slots=True)
class Identity:
    """What a reader knows before it reads: whose bytes these must be, and how much they may decode to.

    `namespace` and `key` are 32-byte digests, `tokens` the tokens in the chunk.
    """

    namespace: bytes
    key: bytes
    shard: Shard
    layout: KVLayout
    tokens: int

    def raw_bytes(self, layers: int, parts: int) -> int:
        """Uncompressed bytes of `layers` layers of this shard; `parts` is K, V or both."""
        halves = 2 if parts == PARTS_KV else 1
        return layers * halves * self.tokens * self.shard.heads * self.layout.head_dim * self.layout.itemsize

    def binding(self) -> bytes:
        """The 32-byte key of every digest in the object, so that the right bytes under a wrong name fail."""
        shard = self.shard
        ranges = struct.pack("<4H", shard.layer_begin, shard.layer_end, shard.head_begin, shard.head_end)
        return blake3(self.namespace + self.key + ranges, derive_key_context=_BINDING_CONTEXT).digest()


@dataclass(frozen=True, slots=True)
class Section:
    """One entry of the index. `length` is the payload's; it occupies `stored_length` bytes from `offset` on."""

    level: int
    parts: int
    codec: int
    layer_begin: int
    layer_end: int
    offset: int
    length: int

    @property
    def stored_length(self) -> int:
        return _align(self.length)

    @property
    def end(self) -> int:
        return self.offset + self.stored_length

    @property
    def layers(self) -> int:
        return self.layer_end - self.layer_begin

    def entry(self) -> bytes:
        return _ENTRY.pack(self.level, self.parts, self.codec, 0, self.layer_begin, self.layer_end, self.length)


@dataclass(frozen=True, slots=True)
class SectionTable:
    """Where the sections lie: what planning needs. From a hint it is a claim that the header must confirm."""

    header_length: int
    sections: tuple[Section, ...]

    @property
    def object_length(self) -> int:
        return self.sections[-1].end


@dataclass(frozen=True, slots=True)
class Header:
    """A header that was verified against an `Identity`."""

    identity: Identity
    table: SectionTable
    digests: tuple[bytes, ...]

    def verify(self, number: int, stored: Bytes) -> memoryview:
        """Check the stored bytes of section `number` and return its payload (without padding)."""
        section = self.table.sections[number]
        if len(stored) != section.stored_length:
            _refuse(
                BitstreamFault.TRUNCATED, f"section {number} has {len(stored)} bytes, expected {section.stored_length}"
            )
        digest = _digest(self.identity.binding(), number, section.entry(), stored, len(self.digests[number]))
        if digest != self.digests[number]:
            _refuse(BitstreamFault.SECTION_CHECKSUM, f"section {number} is not what was saved under this name")
        return memoryview(stored)[: section.length]


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
    identity: Identity, payloads: Sequence[Payload], *, profile: str = "lossless", digest_id: int = 1
) -> tuple[bytearray, SectionTable]:
    """Assemble one object. `payloads` come level by level, layers ascending, K before V where they are apart."""
    size = DIGEST_SIZES[digest_id]
    header_length = _header_length(len(payloads), size, 0)
    table = _place(
        header_length, [(p.level, p.parts, p.codec, p.layer_begin, p.layer_end, len(p.data)) for p in payloads]
    )
    _check_cover(table, identity)
    out = bytearray(table.object_length)
    binding = identity.binding()
    position = _FIXED.size
    for number, (section, payload) in enumerate(zip(table.sections, payloads, strict=True)):
        out[section.offset : section.offset + section.length] = payload.data
        stored = memoryview(out)[section.offset : section.end]
        entry = section.entry() + _digest(binding, number, section.entry(), stored, size)
        stored.release()
        out[position : position + len(entry)] = entry
        position += len(entry)
    out[: _FIXED.size] = _pack_fixed(identity, table, PROFILES[profile], digest_id)
    end = header_length - size
    out[end:header_length] = _digest(binding, _HEADER_NUMBER, b"", bytes(out[:end]), size)
    return out, table


def read_header_length(data: Bytes) -> int:
    """How long the header is, from its first 20 bytes or more; a lie is still bounded by the limits."""
    if len(data) < _PREFIX_LENGTH:
        _refuse(BitstreamFault.TRUNCATED, f"{len(data)} bytes are too few for a header")
    magic, version, _, _, digest_id, authenticator_id, count, length = struct.unpack_from("<8sHBBBBHI", data)
    if magic != MAGIC:
        _refuse(BitstreamFault.BAD_MAGIC, "not a kvstore_s3 object")
    if version != VERSION:
        _refuse(BitstreamFault.UNSUPPORTED_VERSION, f"format version {version}; this reader knows {VERSION}")
    if digest_id not in DIGEST_SIZES or authenticator_id not in AUTHENTICATOR_SIZES:
        _refuse(
            BitstreamFault.UNSUPPORTED_FEATURE,
            f"digest id {digest_id} or authenticator id {authenticator_id} is unknown",
        )
    if authenticator_id and digest_id != 2:
        _refuse(BitstreamFault.BAD_HEADER, "an authenticator calls for 256-bit digests")
    if not 1 <= count <= MAX_SECTIONS:
        _refuse(BitstreamFault.BAD_HEADER, f"{count} sections; 1 to {MAX_SECTIONS} are allowed")
    if length != _header_length(count, DIGEST_SIZES[digest_id], AUTHENTICATOR_SIZES[authenticator_id]):
        _refuse(BitstreamFault.BAD_HEADER, f"header length {length} does not fit {count} sections")
    return int(length)


def parse_header(data: Bytes, expected: Identity) -> Header:
    """Parse and verify the header at the start of `data` (which may go on with sections)."""
    length = read_header_length(data)
    if len(data) < length:
        _refuse(BitstreamFault.TRUNCATED, f"{len(data)} bytes, but the header alone has {length}")
    header = bytes(memoryview(data)[:length])
    fixed = _FIXED.unpack_from(header)
    (_, _, profile, dtype, digest_id, authenticator_id, count, _, tokens, *ranges, head_dim) = fixed[:14]
    reserved, flags, namespace, key, calibration, object_length = fixed[14:]
    _check_features(profile, dtype, reserved, flags, calibration)
    _check_identity(expected, namespace, key, tuple(ranges), (tokens, head_dim, dtype))
    size = DIGEST_SIZES[digest_id]
    end = length - size - AUTHENTICATOR_SIZES[authenticator_id]
    if _digest(expected.binding(), _HEADER_NUMBER, b"", header[:end], size) != header[end : end + size]:
        _refuse(BitstreamFault.HEADER_CHECKSUM, "the header is not what was saved under this name")
    stride = _ENTRY.size + size
    starts = range(_FIXED.size, _FIXED.size + count * stride, stride)
    table = _parse_table(length, [header[start : start + _ENTRY.size] for start in starts], expected)
    if any(header[_FIXED.size + count * stride : end]):
        _refuse(BitstreamFault.BAD_HEADER, "padding after the index is not zero")
    if table.object_length != object_length:
        _refuse(BitstreamFault.BAD_INDEX, f"sections end at {table.object_length}, the header says {object_length}")
    return Header(expected, table, tuple(header[start + _ENTRY.size : start + stride] for start in starts))


def encode_hint(table: SectionTable) -> str | None:
    """The table as ASCII for user metadata; None where it is too long, and readers read the header first."""
    fixed = struct.pack("<BI", VERSION, table.header_length)
    raw = fixed + b"".join(section.entry() for section in table.sections)
    text = base64.urlsafe_b64encode(raw).decode("ascii")
    return text if len(text) <= MAX_HINT_CHARS else None


def decode_hint(text: str, expected: Identity) -> SectionTable:
    """Parse a hint. It is unverified: only a header that gives the same table makes it true."""
    try:
        raw = base64.b64decode(text.encode("ascii"), altchars=b"-_", validate=True)
    except (UnicodeEncodeError, binascii.Error):
        _refuse(BitstreamFault.BAD_INDEX, "the index in the metadata is not base64")
    if len(text) > MAX_HINT_CHARS or len(raw) < 5 + _ENTRY.size or (len(raw) - 5) % _ENTRY.size:
        _refuse(BitstreamFault.BAD_INDEX, "the index in the metadata has an impossible length")
    version, header_length = struct.unpack_from("<BI", raw)
    if version != VERSION:
        _refuse(BitstreamFault.UNSUPPORTED_VERSION, f"format version {version}; this reader knows {VERSION}")
    entries = [raw[start : start + _ENTRY.size] for start in range(5, len(raw), _ENTRY.size)]
    lengths = {
        _header_length(len(entries), DIGEST_SIZES[digest_id], size)
        for digest_id in DIGEST_SIZES
        for size in AUTHENTICATOR_SIZES.values()
    }
    if header_length not in lengths:
        _refuse(BitstreamFault.BAD_INDEX, f"header length {header_length} does not fit {len(entries)} sections")
    return _parse_table(header_length, entries, expected)


def _align(length: int) -> int:
    return -(-length // ALIGNMENT) * ALIGNMENT


def _header_length(sections: int, digest_size: int, authenticator_size: int) -> int:
    return _align(_FIXED.size + sections * (_ENTRY.size + digest_size)) + digest_size + authenticator_size


def _digest(binding: bytes, number: int, entry: bytes, data: Bytes, size: int) -> bytes:
    hasher = blake3(struct.pack("<I", number) + entry, key=binding)
    hasher.update(data)
    return hasher.digest(length=size)


def _pack_fixed(identity: Identity, table: SectionTable, profile: int, digest_id: int) -> bytes:
    shard, layout = identity.shard, identity.layout
    return _FIXED.pack(
        MAGIC,
        VERSION,
        profile,
        DTYPES[layout.dtype].id,
        digest_id,
        0,
        len(table.sections),
        table.header_length,
        identity.tokens,
        shard.layer_begin,
        shard.layer_end,
        shard.head_begin,
        shard.head_end,
        layout.head_dim,
        0,
        0,
        identity.namespace,
        identity.key,
        bytes(32),
        table.object_length,
    )


def _place(header_length: int, entries: Sequence[tuple[int, int, int, int, int, int]]) -> SectionTable:
    sections = []
    offset = header_length
    for level, parts, codec, layer_begin, layer_end, length in entries:
        sections.append(Section(level, parts, codec, layer_begin, layer_end, offset, length))
        offset = sections[-1].end
    return SectionTable(header_length, tuple(sections))


def _parse_table(header_length: int, entries: Sequence[bytes], expected: Identity) -> SectionTable:
    unpacked = [_ENTRY.unpack(entry) for entry in entries]
    if any(flags for _, _, _, flags, _, _, _ in unpacked):
        _refuse(BitstreamFault.UNSUPPORTED_FEATURE, "a reserved flag of a section is set")
    table = _place(header_length, [(level, parts, codec, a, b, n) for level, parts, codec, _, a, b, n in unpacked])
    _check_cover(table, expected)
    return table


def _check_features(profile: int, dtype: int, reserved: int, flags: int, calibration: bytes) -> None:
    if profile not in PROFILES.values():
        _refuse(BitstreamFault.UNSUPPORTED_FEATURE, f"profile id {profile} is unknown")
    if dtype not in {known.id for known in DTYPES.values()}:
        _refuse(BitstreamFault.UNSUPPORTED_FEATURE, f"dtype id {dtype} is unknown")
    if reserved or flags:
        _refuse(BitstreamFault.UNSUPPORTED_FEATURE, "a reserved bit of the header is set")
    if any(calibration):
        _refuse(BitstreamFault.UNSUPPORTED_FEATURE, "the object was coded with a calibration that this reader lacks")


def _check_identity(
    expected: Identity, namespace: bytes, key: bytes, ranges: tuple[int, ...], shape: tuple[int, int, int]
) -> None:
    shard, layout = expected.shard, expected.layout
    if namespace != expected.namespace:
        _refuse(BitstreamFault.WRONG_NAMESPACE, f"object of namespace {namespace.hex()[:16]}")
    if key != expected.key:
        _refuse(BitstreamFault.WRONG_KEY, f"object of chunk {key.hex()[:16]}")
    if ranges != (shard.layer_begin, shard.layer_end, shard.head_begin, shard.head_end):
        _refuse(BitstreamFault.WRONG_SHARD, f"object of shard {ranges}, expected {shard.name}")
    if shape != (expected.tokens, layout.head_dim, DTYPES[layout.dtype].id):
        _refuse(BitstreamFault.WRONG_LAYOUT, f"tokens, head dim and dtype id are {shape}, not those of the layout")


def _check_cover(table: SectionTable, expected: Identity) -> None:
    """Levels ascend from 0 without gaps; each covers the shard's layers in order, K and V together or K then V."""
    if not 1 <= expected.tokens <= MAX_TOKENS:
        raise InvalidArgumentError(f"a chunk of {expected.tokens} tokens; 1 to {MAX_TOKENS} are allowed")
    levels = [level for level, _ in groupby(section.level for section in table.sections)]
    if levels != list(range(len(levels))) or len(levels) > 3:
        _refuse(BitstreamFault.BAD_INDEX, f"levels {levels}; expected 0, 1, 2 in order")
    for level in levels:
        _check_level([section for section in table.sections if section.level == level], expected)


def _check_level(sections: Sequence[Section], expected: Identity) -> None:
    layer = expected.shard.layer_begin
    pending: Section | None = None
    for section in sections:
        if section.length > expected.raw_bytes(max(section.layers, 0), section.parts):
            _refuse(
                BitstreamFault.BAD_INDEX, f"a section of {section.length} bytes is larger than its values uncompressed"
            )
        if section.layer_begin != layer or not layer < section.layer_end <= expected.shard.layer_end:
            _refuse(BitstreamFault.BAD_INDEX, f"layers {section.layer_begin}-{section.layer_end}, expected {layer} on")
        if section.parts != (PARTS_V if pending else section.parts) or section.parts not in (1, 2, 3):
            _refuse(BitstreamFault.BAD_INDEX, f"parts {section.parts} out of order")
        if section.parts == PARTS_V and (pending is None or pending.layer_end != section.layer_end):
            _refuse(BitstreamFault.BAD_INDEX, "V without the K of the same layers before it")
        pending = section if section.parts == PARTS_K else None
        layer = section.layer_begin if pending else section.layer_end
    if pending or layer != expected.shard.layer_end:
        _refuse(BitstreamFault.BAD_INDEX, f"layers end at {layer}, expected {expected.shard.layer_end}")


def _refuse(fault: BitstreamFault, message: str) -> NoReturn:
    raise DamagedObjectError(fault, message)
