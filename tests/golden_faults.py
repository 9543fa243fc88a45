"""The golden errors, as code: for every fault, bytes to be refused with it. `golden/regenerate.py` writes them."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import zstandard
from crafted import Crafted, CraftedSection
from golden_objects import as_bytes, make_identity, make_values

from kvstore_s3.bitstream import Identity
from kvstore_s3.codec.lossless import LosslessCodec
from kvstore_s3.errors import BitstreamFault as Fault
from kvstore_s3.layout import Shard


@dataclass(frozen=True)
class GoldenError:
    """`data`, read as the object of `identity`, must be refused with `code`.

    `profile` is the one that the reader asks for; `calibration` the golden object whose calibration it has at hand.
    """

    name: str
    code: Fault
    identity: Identity
    data: bytes
    profile: str = "lossless"
    calibration: str | None = None
    first_position: int | None = None


_IDENTITY = make_identity("errors", Shard(0, 2, 0, 1), dtype="float16", tokens=2, head_dim=4, layers=4, kv_heads=2)
_WIDE = replace(_IDENTITY, tokens=16)
_VALUES = as_bytes(make_values(_IDENTITY, "errors"))
_HALF = len(_VALUES) // 2
_SOUND = (CraftedSection(layers=(0, 1), data=_VALUES[:_HALF]), CraftedSection(layers=(1, 2), data=_VALUES[_HALF:]))


def make_all_errors() -> list[GoldenError]:
    makers = (_headers, _features, _indices, _names, _damage, _xxh3_damage, _payloads, _lossless)
    return [error for maker in makers for error in maker()]


def _object(sections: Sequence[CraftedSection] = _SOUND, **fields: object) -> bytes:
    return Crafted(_IDENTITY, sections, fields).object()


def _error(name: str, code: Fault, data: bytes, identity: Identity = _IDENTITY) -> GoldenError:
    return GoldenError(name, code, identity, data)


def _headers() -> Iterator[GoldenError]:
    yield _error("empty", Fault.TRUNCATED, b"")
    yield _error("truncated-prefix", Fault.TRUNCATED, _object()[:23])
    yield _error("truncated-header", Fault.TRUNCATED, _object()[:100])
    yield _error("truncated-object", Fault.TRUNCATED, _object()[:-1])
    yield _error("trailing-byte", Fault.TRAILING_BYTES, _object() + b"\0")
    yield _error("text-mode-magic", Fault.BAD_MAGIC, _object(magic=b"\x89KVS3\n\x1a\0"))
    yield _error("version-0", Fault.UNSUPPORTED_VERSION, _object(version=0))
    yield _error("version-2", Fault.UNSUPPORTED_VERSION, _object(version=2))
    yield _error("no-sections", Fault.BAD_HEADER, _object(section_count=0))
    yield _error("too-many-sections", Fault.BAD_HEADER, _object(section_count=4097, header_length=144 + 4097 * 28 + 28))
    yield _error("header-too-long", Fault.BAD_HEADER, _object(header_length=2**32 - 16))
    yield _error("header-too-short", Fault.BAD_HEADER, _object(header_length=208))
    yield _error(
        "index-padding", Fault.BAD_HEADER, Crafted(_IDENTITY, _SOUND, index_padding=b"\0\0\0\0\0\0\0\1").object()
    )
    for digest_id, name in ((1, "authenticator-over-short-digests"), (3, "authenticator-over-xxh3-digests")):
        fields: dict[str, object] = {"authenticator_id": 1}
        signed = Crafted(_IDENTITY, _SOUND, fields, digest_id=digest_id, authenticator=bytes(32))
        yield _error(name, Fault.BAD_HEADER, signed.object())


def _features() -> Iterator[GoldenError]:
    unknown = Fault.UNSUPPORTED_FEATURE
    yield _error("digest-0", unknown, _object(digest_id=0))
    yield _error("digest-4", unknown, _object(digest_id=4))
    yield _error("authenticator-3", unknown, _object(authenticator_id=3))
    yield _error("flag", unknown, _object(flags=1))
    yield _error("high-flag", unknown, _object(flags=1 << 31))
    yield _error("profile-0", unknown, _object(profile=0))
    yield _error("profile-not-asked-for", unknown, _object(profile=2))
    yield _error("profile-cachegen", unknown, _object(profile=3))
    yield _error("dtype-0", unknown, _object(dtype=0))
    yield _error("dtype-6", unknown, _object(dtype=6))
    yield _error("reserved-field", unknown, _object(reserved=4))
    yield _error("calibration", unknown, _object(calibration=b"\1" + bytes(31)))
    yield _error("section-flag", unknown, _object([replace(_SOUND[0], flags=1), _SOUND[1]]))
    yield _error("parts-0", unknown, _object([replace(_SOUND[0], parts=0), _SOUND[1]]))
    yield _error("parts-4", unknown, _object([replace(_SOUND[0], parts=4), _SOUND[1]]))
    yield _error("codec-255", unknown, _object([_SOUND[0], replace(_SOUND[1], codec=255)]))
    yield _error("codec-5-in-a-lossless-object", unknown, _object([_SOUND[0], replace(_SOUND[1], codec=5)]))
    yield _error("codec-of-another-dtype", unknown, _object([_SOUND[0], replace(_SOUND[1], codec=1)]))


def _indices() -> Iterator[GoldenError]:
    first, second = _SOUND
    part = replace(first, data=first.data[: _HALF // 2])
    bad = Fault.BAD_INDEX
    yield _error("first-level-1", bad, _object([replace(first, level=1), replace(second, level=1)]))
    yield _error(
        "two-levels-lossless", bad, _object([first, second, replace(first, level=1), replace(second, level=1)])
    )
    yield _error("levels-descend", bad, _object([replace(first, level=1), second]))
    yield _error("layer-missing-at-the-end", bad, _object([first]))
    yield _error("layer-missing-at-the-start", bad, _object([second]))
    yield _error("layers-out-of-order", bad, _object([second, first]))
    yield _error("layers-overlap", bad, _object([replace(first, layers=(0, 2)), second]))
    yield _error("layers-beyond-the-shard", bad, _object([first, replace(second, layers=(1, 3))]))
    yield _error("layers-backwards", bad, _object([first, replace(second, layers=(1, 0)), second]))
    yield _error("no-layers", bad, _object([first, replace(second, layers=(1, 1)), second]))
    yield _error("k-without-v", bad, _object([replace(part, parts=1), second]))
    yield _error("v-before-k", bad, _object([replace(part, parts=2), replace(part, parts=1), second]))
    wide = replace(part, parts=2, layers=(0, 2))
    yield _error("v-of-other-layers", bad, _object([replace(part, parts=1), wide]))
    yield _error("larger-than-its-values", bad, _object([first, replace(second, data=second.data + b"\0")]))
    yield _error("largest-length", bad, _object([first, replace(second, length=2**32 - 1)]))
    yield _error("empty-section", bad, _object([first, replace(second, data=b"")]))
    yield _error("object-length", bad, _object(object_length=len(_object()) + 16))
    yield _error("largest-object-length", bad, _object(object_length=2**64 - 1))


def _names() -> Iterator[GoldenError]:
    layout, other = _IDENTITY.layout, bytes(range(32))
    yield _error("wrong-namespace", Fault.WRONG_NAMESPACE, _object(), replace(_IDENTITY, namespace=other))
    yield _error("wrong-key", Fault.WRONG_KEY, _object(), replace(_IDENTITY, key=other))
    yield _error("wrong-layers", Fault.WRONG_SHARD, _object(), replace(_IDENTITY, shard=Shard(2, 4, 0, 1)))
    yield _error("wrong-heads", Fault.WRONG_SHARD, _object(), replace(_IDENTITY, shard=Shard(0, 2, 1, 2)))
    yield _error("wrong-tokens", Fault.WRONG_LAYOUT, _object(), replace(_IDENTITY, tokens=4))
    yield _error(
        "wrong-head-dim", Fault.WRONG_LAYOUT, _object(), replace(_IDENTITY, layout=replace(layout, head_dim=8))
    )
    brain = replace(layout, dtype="bfloat16")
    yield _error("wrong-dtype", Fault.WRONG_LAYOUT, _object(), replace(_IDENTITY, layout=brain))
    # Whoever renames an object and mends its key in the header, but not the digest that is bound to the key.
    renamed = replace(_IDENTITY, key=other)
    yield _error("renamed", Fault.HEADER_CHECKSUM, _patch(_object(), 80, other), renamed)


def _damage() -> Iterator[GoldenError]:
    sound = _object()
    yield _error("index-flipped", Fault.HEADER_CHECKSUM, _patch(sound, 152, b"\x55"))
    yield _error("header-digest-flipped", Fault.HEADER_CHECKSUM, _patch(sound, 208, bytes([sound[208] ^ 1])))
    yield _error("payload-flipped", Fault.SECTION_CHECKSUM, _patch(sound, len(sound) - 1, bytes([sound[-1] ^ 0x80])))
    yield _error(
        "sections-swapped", Fault.SECTION_CHECKSUM, sound[: -2 * _HALF] + sound[-_HALF:] + sound[-2 * _HALF : -_HALF]
    )
    foreign = Crafted(replace(_IDENTITY, key=bytes(range(32))), _SOUND).object()
    taken = replace(_SOUND[0], digest=foreign[156:172])  # an attacker takes a section with its digest along
    yield _error("section-of-another-object", Fault.SECTION_CHECKSUM, _object([taken, _SOUND[1]]))


def _xxh3_damage() -> Iterator[GoldenError]:
    """The same under digest id 3."""
    bad, crafted = Fault.SECTION_CHECKSUM, Crafted(_IDENTITY, _SOUND, digest_id=3)
    sound, first, second = crafted.object(), len(crafted.header()), len(crafted.header()) + _HALF
    # Before there was a digest id 3, this was an unknown one: now its sections have the wrong kind of digest.
    yield _error("digest-3", bad, _object(digest_id=3))
    yield _error("xxh3-under-digest-1", bad, Crafted(_IDENTITY, _SOUND, {"digest_id": 1}, digest_id=3).object())
    yield _error("xxh3-payload-flipped", bad, _patch(sound, first, bytes([sound[first] ^ 1])))
    yield _error("xxh3-last-bit-flipped", bad, _patch(sound, len(sound) - 1, bytes([sound[-1] ^ 0x80])))
    yield _error("xxh3-sections-swapped", bad, sound[:first] + sound[second:] + sound[first:second])
    yield _error("xxh3-digest-reversed", bad, _with_digest(sound[156:172][::-1]))
    other = replace(_IDENTITY, key=bytes(range(32)))
    foreign = Crafted(other, _SOUND, digest_id=3).object()
    yield _error("xxh3-section-of-another-object", bad, _with_digest(foreign[156:172]))
    yield _error("xxh3-wrong-key", Fault.WRONG_KEY, sound, other)
    yield _error("xxh3-renamed", Fault.HEADER_CHECKSUM, _patch(sound, 80, other.key), other)
    yield _error("xxh3-index-flipped", Fault.HEADER_CHECKSUM, _patch(sound, 156, bytes([sound[156] ^ 1])))
    padded = replace(_SOUND[0], data=_SOUND[0].data[:-3], padding=b"\0\0\1")
    yield _error("xxh3-padding", Fault.BAD_PAYLOAD, Crafted(_IDENTITY, [padded, _SOUND[1]], digest_id=3).object())


def _with_digest(digest: bytes) -> bytes:
    """An object of digest id 3 whose header holds, with another digest of its first section."""
    return Crafted(_IDENTITY, [replace(_SOUND[0], digest=digest), _SOUND[1]], digest_id=3).object()


def _payloads() -> Iterator[GoldenError]:
    first, second = _SOUND
    padded = replace(first, data=first.data[:-3], padding=b"\0\0\1")
    yield _error("section-padding", Fault.BAD_PAYLOAD, _object([padded, second]))
    yield _error("raw-too-short", Fault.TRUNCATED, _object([first, replace(second, data=second.data[:-1])]))
    count = _WIDE.tokens * 2 * _WIDE.layout.head_dim
    frame = _compress(bytes(count))
    skippable = struct.pack("<II", 0x184D2A50, count) + bytes(8)
    for name, code, low, high, claim in (
        ("planes-too-long", Fault.TRUNCATED, frame, frame, 1),
        ("planes-too-short", Fault.BAD_PAYLOAD, frame, frame + b"\0", -1),
        ("planes-huge", Fault.TRUNCATED, frame, frame, 2**32 - 1 - len(frame)),
        ("plane-not-a-frame", Fault.BAD_PAYLOAD, frame, b"no frame", 0),
        ("plane-empty", Fault.BAD_PAYLOAD, frame, b"", 0),
        ("plane-of-two-frames", Fault.BAD_PAYLOAD, frame, frame + frame, 0),
        ("plane-of-another-size", Fault.BAD_PAYLOAD, frame, _compress(bytes(count - 1)), 0),
        ("plane-skippable", Fault.BAD_PAYLOAD, frame, skippable, 0),
        ("plane-frame-cut", Fault.BAD_PAYLOAD, frame, frame[:-1], 0),
    ):
        payload = struct.pack("<2I", len(low), len(high) + claim) + low + high
        yield _error(name, code, _wide_object(payload), _WIDE)
    yield _error("planes-table-short", Fault.TRUNCATED, _wide_object(bytes(7)), _WIDE)


def _lossless() -> Iterator[GoldenError]:
    layout = replace(_WIDE.layout, dtype="bfloat16")
    identity = replace(_WIDE, layout=layout, shard=Shard(0, 2, 0, 2), tokens=64)
    good = LosslessCodec().encode(make_values(identity, "errors"))
    for name, code, payload in (
        ("lossless-table-short", Fault.TRUNCATED, good[:7]),
        ("lossless-cut", Fault.TRUNCATED, good[:-4]),
        ("lossless-too-long", Fault.BAD_PAYLOAD, good + bytes(4)),
        ("lossless-lengths-huge", Fault.TRUNCATED, b"\xff\xff\xff\xff" + good[4:]),
        ("lossless-mode-2", Fault.BAD_PAYLOAD, _patch(good, 8, b"\2")),
        ("lossless-words", Fault.BAD_PAYLOAD, _patch(good, 12, bytes([good[12] ^ 1]))),
        ("lossless-state", Fault.BAD_PAYLOAD, _patch(good, 20, b"\0\0\0\0")),
    ):
        section = CraftedSection(codec=1, layers=(0, 2), data=payload)
        yield _error(name, code, Crafted(identity, [section]).object(), identity)


def _wide_object(planes: bytes) -> bytes:
    """One raw section, then `planes` as a section of codec 2, with values enough to have room for any payload."""
    values = as_bytes(make_values(_WIDE, "errors"))
    raw = CraftedSection(layers=(0, 1), data=values[: len(values) // 2])
    return Crafted(_WIDE, [raw, CraftedSection(layers=(1, 2), codec=2, data=planes)]).object()


def _compress(plane: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=3).compress(plane)


def _patch(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]
