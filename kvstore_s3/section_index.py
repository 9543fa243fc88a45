"""Which sections an object has and where they lie, and the hint that repeats it in user metadata. Pure.

`docs/FORMAT.md` is the authority. The index is checked against an `Identity`: a reader's own layout bounds every
length, so that no buffer is ever as large as hostile bytes ask for.
"""

from __future__ import annotations

import base64
import binascii
import struct
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NoReturn

from blake3 import blake3

from kvstore_s3.errors import BitstreamFault, DamagedObjectError, InvalidArgumentError
from kvstore_s3.layout import KVLayout, Shard

VERSION = 1
ALIGNMENT = 16
PROFILES = {"lossless": 1, "scalable": 2, "cachegen": 3}
LOSSLESS = frozenset({"lossless"})
MAX_LEVELS = {1: 1, 2: 3, 3: 1}
"""Profile id -> most levels: a scalable object has its base and up to two enhancements, the others have one level."""
DIGEST_SIZES = {1: 16, 2: 32, 3: 16}
"""Digest id -> bytes of a digest: BLAKE3 cut to 128 bits, BLAKE3 whole, XXH3-128 under a header of id 1."""
AUTHENTICATOR_SIZES = {0: 0, 1: 32, 2: 64}
"""Authenticator id -> its bytes: none, keyed BLAKE3, Ed25519. A reader without the key skips it."""
PARTS_K, PARTS_V, PARTS_KV = 1, 2, 3
MAX_SECTIONS = 4096
MAX_SECTION_BYTES = 2**32 - ALIGNMENT
"""So that a section with its padding still fits 32 bits."""
MAX_TOKENS = 65536
HINT_NAME = "kvs3-index"
"""Name of the user metadata entry that carries a `SectionTable`, so that the first range read needs no header."""
MAX_HINT_CHARS = 1900

FIXED_BYTES = 144
ENTRY = struct.Struct("<BBBBHHI")
_HINT = struct.Struct("<BBHI")
_HINT_ENTRY = struct.Struct("<BBHI")
_BINDING_CONTEXT = "kvstore-s3 2026-11-21 bitstream v1 binding"

Entry = tuple[int, int, int, int, int, int, int]
"""Level, parts, codec, flags, layer begin, layer end, length: one entry of the index without its digest."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What a reader knows before it reads: whose bytes these must be, and how much they may decode to.

    `namespace` and `key` are 32-byte digests, `tokens` the tokens in the chunk. Raises `InvalidArgumentError` where
    they cannot be.
    """

    namespace: bytes
    key: bytes
    shard: Shard
    layout: KVLayout
    tokens: int

    def __post_init__(self) -> None:
        if len(self.namespace) != 32 or len(self.key) != 32:
            raise InvalidArgumentError("namespace and chunk key are digests of 32 bytes")
        if not 1 <= self.tokens <= MAX_TOKENS:
            raise InvalidArgumentError(f"a chunk of {self.tokens} tokens; 1 to {MAX_TOKENS} are allowed")
        if self.shard.layer_end > self.layout.layers or self.shard.head_end > self.layout.kv_heads:
            raise InvalidArgumentError(
                f"shard {self.shard.name} lies outside the model's {self.layout.full_shard.name}"
            )

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
        return align(self.length)

    @property
    def end(self) -> int:
        return self.offset + self.stored_length

    @property
    def layers(self) -> int:
        return self.layer_end - self.layer_begin

    def entry(self) -> bytes:
        return ENTRY.pack(self.level, self.parts, self.codec, 0, self.layer_begin, self.layer_end, self.length)


@dataclass(frozen=True, slots=True)
class SectionTable:
    """Where the sections lie: what planning needs. From a hint it is a claim that the header must confirm."""

    header_length: int
    sections: tuple[Section, ...]
    profile: int = PROFILES["lossless"]

    @property
    def object_length(self) -> int:
        return self.sections[-1].end

    def check_object_length(self, found: int) -> None:
        """Refuse an object of `found` bytes that is shorter or longer than its header and sections."""
        check_length("the object", found, self.object_length)


def encode_hint(table: SectionTable) -> str | None:
    """The table as ASCII for user metadata; None where it is too long, and readers read the header first."""
    raw = _HINT.pack(VERSION, table.profile, 0, table.header_length) + b"".join(
        _HINT_ENTRY.pack(section.level << 4 | section.parts, section.codec, section.layers, section.length)
        for section in table.sections
    )
    text = base64.urlsafe_b64encode(raw).decode("ascii")
    return text if len(text) <= MAX_HINT_CHARS else None


def decode_hint(text: str, expected: Identity, *, profiles: Collection[str] = LOSSLESS) -> SectionTable:
    """Parse a hint. It is unverified: only a header that gives the same table makes it true.

    A `DamagedObjectError` says that the hint cannot be used, not that the object is damaged: read the header instead.
    """
    raw = _decode_base64(text)
    version, profile, reserved, header_length = _HINT.unpack_from(raw)
    if version != VERSION:
        refuse(BitstreamFault.UNSUPPORTED_VERSION, f"hint version {version}; this reader knows {VERSION}")
    check_profile(profile, profiles)
    if reserved:
        refuse(BitstreamFault.UNSUPPORTED_FEATURE, "a reserved bit of the hint is set")
    entries = list(_expand_entries(raw[_HINT.size :], expected.shard))
    if header_length not in _possible_header_lengths(len(entries)):
        refuse(BitstreamFault.BAD_INDEX, f"header length {header_length} does not fit {len(entries)} sections")
    return build_table(header_length, profile, entries, expected)


def build_table(header_length: int, profile: int, entries: Iterable[Entry], expected: Identity) -> SectionTable:
    """Place `entries` one after the other behind the header; refuse what does not divide the expected shard."""
    sections = []
    offset = header_length
    for level, parts, codec, flags, layer_begin, layer_end, length in entries:
        if flags or parts not in (PARTS_K, PARTS_V, PARTS_KV):
            refuse(BitstreamFault.UNSUPPORTED_FEATURE, f"parts {parts} or flags {flags:#x} of a section are unknown")
        sections.append(Section(level, parts, codec, layer_begin, layer_end, offset, length))
        offset = sections[-1].end
    table = SectionTable(header_length, tuple(sections), profile)
    _check_cover(table, expected)
    return table


def check_profile(profile: int, accepted: Collection[str]) -> None:
    """Refuse a profile that the caller did not ask for: nothing lossy by accident."""
    if profile not in {PROFILES[name] for name in accepted}:
        refuse(BitstreamFault.UNSUPPORTED_FEATURE, f"profile id {profile} is not one of {sorted(accepted)}")


def check_length(what: str, found: int, expected: int) -> None:
    """Refuse bytes that are not exactly as many as expected."""
    if found != expected:
        fault = BitstreamFault.TRUNCATED if found < expected else BitstreamFault.TRAILING_BYTES
        refuse(fault, f"{what} has {found} bytes, expected {expected}")


def align(length: int) -> int:
    """Round up to the alignment of all parts of an object."""
    return -(-length // ALIGNMENT) * ALIGNMENT


def refuse(fault: BitstreamFault, message: str) -> NoReturn:
    raise DamagedObjectError(fault, message)


def header_length_of(sections: int, digest_id: int, authenticator_id: int) -> int:
    """Bytes of a header: fixed part, index padded to the alignment, digest, authenticator."""
    digest_size = DIGEST_SIZES[digest_id]
    index_end = align(FIXED_BYTES + sections * (ENTRY.size + digest_size))
    return index_end + digest_size + AUTHENTICATOR_SIZES[authenticator_id]


def _possible_header_lengths(sections: int) -> set[int]:
    plain = {header_length_of(sections, digest_id, 0) for digest_id in DIGEST_SIZES}
    return plain | {header_length_of(sections, 2, authenticator_id) for authenticator_id in AUTHENTICATOR_SIZES}


def _decode_base64(text: str) -> bytes:
    """Undo `encode_hint`'s base64; its length is looked at first, so that a hostile one costs nothing."""
    if len(text) > MAX_HINT_CHARS:
        refuse(BitstreamFault.BAD_INDEX, f"an index of {len(text)} characters in the metadata")
    try:
        raw = base64.b64decode(text.encode("ascii"), altchars=b"-_", validate=True)
    except (UnicodeEncodeError, binascii.Error):
        refuse(BitstreamFault.BAD_INDEX, "the index in the metadata is not base64")
    if len(raw) < _HINT.size + _HINT_ENTRY.size or (len(raw) - _HINT.size) % _HINT_ENTRY.size:
        refuse(BitstreamFault.BAD_INDEX, f"the index in the metadata has {len(raw)} bytes")
    if base64.urlsafe_b64encode(raw).decode("ascii") != text:
        refuse(BitstreamFault.BAD_INDEX, "the index in the metadata is not canonical base64")
    return raw


def _expand_entries(raw: bytes, shard: Shard) -> Iterator[Entry]:
    """A hint's entries count layers; where they begin follows from the shard and from their order."""
    layer, current = shard.layer_begin, 0
    for packed, codec, layers, length in _HINT_ENTRY.iter_unpack(raw):
        level, parts = packed >> 4, packed & 15
        if level != current:
            layer, current = shard.layer_begin, level
        yield level, parts, codec, 0, layer, layer + layers, length
        layer += layers if parts != PARTS_K else 0


def _check_cover(table: SectionTable, expected: Identity) -> None:
    """Levels ascend from 0; each divides the shard's layers in the same way; no section is larger than its values."""
    levels = [list(group) for _, group in groupby(table.sections, key=lambda section: section.level)]
    most = MAX_LEVELS[table.profile]
    if not levels or len(levels) > most or [level[0].level for level in levels] != list(range(len(levels))):
        refuse(
            BitstreamFault.BAD_INDEX, f"levels must be 0 to at most {most - 1}, in order, in profile {table.profile}"
        )
    _check_division(levels[0], expected.shard)
    if any(_division(level) != _division(levels[0]) for level in levels[1:]):
        refuse(BitstreamFault.BAD_INDEX, "levels divide the layers in different ways")
    for section in table.sections:
        limit = min(expected.raw_bytes(section.layers, section.parts), MAX_SECTION_BYTES)
        if not 1 <= section.length <= limit:
            refuse(BitstreamFault.BAD_INDEX, f"a section of {section.length} bytes; 1 to {limit} are allowed")


def _check_division(sections: Sequence[Section], shard: Shard) -> None:
    """Layer ranges follow each other from the shard's first layer to its last; a K is followed by its V."""
    layer = shard.layer_begin
    key: Section | None = None
    for section in sections:
        if section.layer_begin != layer or not layer < section.layer_end <= shard.layer_end:
            refuse(BitstreamFault.BAD_INDEX, f"layers {section.layer_begin}-{section.layer_end}, expected {layer} on")
        if (section.parts == PARTS_V) != (key is not None) or (key and key.layer_end != section.layer_end):
            refuse(BitstreamFault.BAD_INDEX, "a V section follows the K section of the same layers, and nothing else")
        key = section if section.parts == PARTS_K else None
        layer = section.layer_begin if key else section.layer_end
    if layer != shard.layer_end:
        refuse(BitstreamFault.BAD_INDEX, f"layers end at {layer}, expected {shard.layer_end}")


def _division(sections: Sequence[Section]) -> list[tuple[int, int, int]]:
    return [(section.parts, section.layer_begin, section.layer_end) for section in sections]
