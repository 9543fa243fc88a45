"""Objects made field by field, right or wrong, with digests that hold: what someone who knows the format can write.

Written from `docs/FORMAT.md` and apart from `kvstore_s3.bitstream`, whose tests it feeds.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

from blake3 import blake3
from xxhash import xxh3_128_digest

from kvstore_s3.bitstream import Identity
from kvstore_s3.layout import DTYPES

FIELDS = {
    "magic": "8s",
    "version": "H",
    "profile": "B",
    "dtype": "B",
    "digest_id": "B",
    "authenticator_id": "B",
    "section_count": "H",
    "header_length": "I",
    "flags": "I",
    "tokens": "I",
    "head_dim": "H",
    "reserved": "H",
    "layer_begin": "H",
    "layer_end": "H",
    "head_begin": "H",
    "head_end": "H",
    "object_length": "Q",
    "namespace": "32s",
    "key": "32s",
    "calibration": "32s",
}
"""The fixed header: name -> struct code."""

DIGEST_SIZES = {1: 16, 2: 32, 3: 16}


@dataclass(frozen=True)
class CraftedSection:
    """A payload and what the index says of it; `length`, `padding` and `digest` are the honest ones unless given."""

    level: int = 0
    parts: int = 3
    codec: int = 0
    layers: tuple[int, int] = (0, 1)
    data: bytes = b""
    flags: int = 0
    length: int | None = None
    padding: bytes | None = None
    digest: bytes | None = None

    @property
    def entry(self) -> bytes:
        length = len(self.data) if self.length is None else self.length
        return struct.pack("<BBBBHHI", self.level, self.parts, self.codec, self.flags, *self.layers, length)

    @property
    def stored(self) -> bytes:
        return self.data + (bytes(-len(self.data) % 16) if self.padding is None else self.padding)


@dataclass(frozen=True)
class Crafted:
    """An object under `identity`. `fields` replaces any field of the fixed header, before the digests are taken."""

    identity: Identity
    sections: Sequence[CraftedSection]
    fields: dict[str, object] = field(default_factory=dict)
    digest_id: int = 1
    index_padding: bytes | None = None
    mac_key: bytes | None = None
    authenticator: bytes = b""

    def header(self) -> bytes:
        """Fixed header, index, padding, digest and authenticator."""
        index = b"".join(
            section.entry + (section.digest or self._section_digest(number, section.entry + section.stored))
            for number, section in enumerate(self.sections)
        )
        padding = bytes(-(144 + len(index)) % 16) if self.index_padding is None else self.index_padding
        mac_size = 32 if self.mac_key else len(self.authenticator)
        length = 144 + len(index) + len(padding) + DIGEST_SIZES[self.digest_id] + mac_size
        head = self._fixed(length) + index + padding
        head += self._blake3(0xFFFFFFFF, head)
        if self.mac_key:
            return head + blake3(b"kvstore-s3 v1 authenticator" + bytes(5) + head, key=self.mac_key).digest()
        return head + self.authenticator

    def object(self) -> bytes:
        return self.header() + b"".join(section.stored for section in self.sections)

    def _fixed(self, header_length: int) -> bytes:
        identity, shard = self.identity, self.identity.shard
        values: dict[str, object] = {
            "magic": b"\x89KVS3\r\n\x1a",
            "version": 1,
            "profile": 1,
            "dtype": DTYPES[identity.layout.dtype].id,
            "digest_id": self.digest_id,
            "authenticator_id": 1 if self.mac_key else 2 if self.authenticator else 0,
            "section_count": len(self.sections),
            "header_length": header_length,
            "flags": 0,
            "tokens": identity.tokens,
            "head_dim": identity.layout.head_dim,
            "reserved": 0,
            "layer_begin": shard.layer_begin,
            "layer_end": shard.layer_end,
            "head_begin": shard.head_begin,
            "head_end": shard.head_end,
            "object_length": header_length + sum(len(section.stored) for section in self.sections),
            "namespace": identity.namespace,
            "key": identity.key,
            "calibration": bytes(32),
        }
        values.update(self.fields)
        return struct.pack("<" + "".join(FIELDS.values()), *(values[name] for name in FIELDS))

    def _section_digest(self, number: int, data: bytes) -> bytes:
        if self.digest_id == 3:
            return xxh3_128_digest(self._binding() + struct.pack("<I", number) + data)
        return self._blake3(number, data)

    def _blake3(self, number: int, data: bytes) -> bytes:
        return blake3(struct.pack("<I", number) + data, key=self._binding()).digest(DIGEST_SIZES[self.digest_id])

    def _binding(self) -> bytes:
        identity, shard = self.identity, self.identity.shard
        ranges = struct.pack("<4H", shard.layer_begin, shard.layer_end, shard.head_begin, shard.head_end)
        material = identity.namespace + identity.key + ranges
        return blake3(material, derive_key_context="kvstore-s3 2026-11-21 bitstream v1 binding").digest()
