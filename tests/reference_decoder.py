"""A slow decoder of bitstream v1, written from `docs/FORMAT.md` in its order. It imports nothing of `kvstore_s3`.

Bytes and what they are expected to be go in; a list of bit patterns, or a `Fault` with its number, comes out.
"""

from __future__ import annotations

import base64
import binascii
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NoReturn

import reference_cachegen
import reference_lossless
import reference_scalable
import xxhash
import zstandard
from blake3 import blake3
from reference_calibration import Calibration, RefusedError

TRUNCATED, BAD_MAGIC, UNSUPPORTED_VERSION, UNSUPPORTED_FEATURE, BAD_HEADER, BAD_INDEX = 1, 2, 3, 4, 5, 6
HEADER_CHECKSUM, SECTION_CHECKSUM, WRONG_NAMESPACE, WRONG_KEY, WRONG_SHARD, WRONG_LAYOUT = 7, 8, 9, 10, 11, 12
BAD_PAYLOAD, TRAILING_BYTES = 13, 14

LOSSLESS, SCALABLE, CACHEGEN = 1, 2, 3
NO_CALIBRATION = bytes(32)


class Fault(Exception):  # noqa: N818
    """A refusal. `code` is a number of the table "Faults"."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(f"{message} [{code}]")
        self.code = code


def refuse(code: int, message: str) -> NoReturn:
    raise Fault(code, message)


# Identity and units

ITEM_BYTES = {1: 2, 2: 2, 3: 4, 4: 1, 5: 1}
"""Dtype id -> bytes of a value."""


@dataclass(frozen=True)
class Expected:
    """The identity of an object: what its reader knows before it reads.

    `first_position`, that of the chunk's first token, is None where the reader does not know it.
    """

    namespace: bytes
    key: bytes
    layer_begin: int
    layer_end: int
    head_begin: int
    head_end: int
    tokens: int
    head_dim: int
    dtype: int
    first_position: int | None = None

    @property
    def heads(self) -> int:
        return self.head_end - self.head_begin

    @property
    def ranges(self) -> tuple[int, int, int, int]:
        return self.layer_begin, self.layer_end, self.head_begin, self.head_end

    def values(self, layers: int, kinds: int) -> int:
        return layers * kinds * self.tokens * self.heads * self.head_dim


# The fixed header

DIGEST_BYTES = {1: 16, 2: 32, 3: 16}
AUTHENTICATOR_BYTES = {0: 0, 1: 32, 2: 64}
FIXED = struct.Struct("<8sHBBBBHIIIHH4HQ32s32s32s")


def align(length: int) -> int:
    return (length + 15) // 16 * 16


def header_length_of(sections: int, digest_id: int, authenticator_id: int) -> int:
    digest = DIGEST_BYTES[digest_id]
    return align(144 + sections * (12 + digest)) + digest + AUTHENTICATOR_BYTES[authenticator_id]


def read_prefix(data: bytes) -> int:
    """Steps 1 to 8: the length of the header, from its first 24 bytes."""
    if len(data) < 24:
        refuse(TRUNCATED, "no prefix")
    if data[0:8] != b"\x89KVS3\r\n\x1a":
        refuse(BAD_MAGIC, "magic")
    if int.from_bytes(data[8:10], "little") != 1:
        refuse(UNSUPPORTED_VERSION, "version")
    digest_id, authenticator_id = data[12], data[13]
    count, length, flags = struct.unpack("<HII", data[14:24])
    if digest_id not in DIGEST_BYTES or authenticator_id not in AUTHENTICATOR_BYTES or flags != 0:
        refuse(UNSUPPORTED_FEATURE, "digest, authenticator or flags")
    if authenticator_id != 0 and digest_id != 2:
        refuse(BAD_HEADER, "an authenticator over short digests")
    if not 1 <= count <= 4096:
        refuse(BAD_HEADER, "number of sections")
    if length != header_length_of(count, digest_id, authenticator_id):
        refuse(BAD_HEADER, "header length")
    if len(data) < length:
        refuse(TRUNCATED, "header")
    return length


# Digests


def binding(expected: Expected) -> bytes:
    material = expected.namespace + expected.key + struct.pack("<4H", *expected.ranges)
    return blake3(material, derive_key_context="kvstore-s3 2026-11-21 bitstream v1 binding").digest()


def header_digest(expected: Expected, header: bytes, size: int) -> bytes:
    return blake3(b"\xff\xff\xff\xff" + header, key=binding(expected)).digest()[:size]


def section_digest(expected: Expected, number: int, entry: bytes, stored: bytes, digest_id: int) -> bytes:
    if digest_id == 3:
        value = xxhash.xxh3_128_intdigest(binding(expected) + struct.pack("<I", number) + entry + stored, seed=0)
        return value.to_bytes(16, "big")
    return blake3(struct.pack("<I", number) + entry + stored, key=binding(expected)).digest()[: DIGEST_BYTES[digest_id]]


def authenticator_message(data: bytes) -> bytes:
    """What a keyed authenticator is taken over."""
    end = read_prefix(data) - AUTHENTICATOR_BYTES[data[13]]
    return b"kvstore-s3 v1 authenticator\0\0\0\0\0" + data[:end]


# The header as a whole


@dataclass(frozen=True)
class Section:
    level: int
    parts: int
    codec: int
    layer_begin: int
    layer_end: int
    offset: int
    length: int
    entry: bytes = b""
    digest: bytes = b""

    @property
    def end(self) -> int:
        return self.offset + align(self.length)


def read_calibration_digest(data: bytes) -> bytes:
    """The field of the fixed header."""
    return data[112:144]


def read_header(
    data: bytes,
    expected: Expected,
    profiles: frozenset[int] = frozenset({LOSSLESS}),
    calibrations: Mapping[bytes, Calibration] = {},
) -> list[Section]:
    """Steps 1 to 18: the verified section index. `calibrations` are those at hand, by digest."""
    length = read_prefix(data)
    fixed = FIXED.unpack(data[:144])
    profile, dtype, digest_id, authenticator_id, count = fixed[2:7]
    tokens, head_dim, reserved, *ranges = fixed[9:16]
    object_length, namespace, key, calibration = fixed[16:20]
    if namespace != expected.namespace:
        refuse(WRONG_NAMESPACE, "namespace")
    if key != expected.key:
        refuse(WRONG_KEY, "key")
    if tuple(ranges) != expected.ranges:
        refuse(WRONG_SHARD, "shard")
    size = DIGEST_BYTES[digest_id]
    end = length - AUTHENTICATOR_BYTES[authenticator_id] - size
    if header_digest(expected, data[:end], size) != data[end : end + size]:
        refuse(HEADER_CHECKSUM, "header digest")
    if profile not in profiles or dtype not in ITEM_BYTES or reserved != 0:
        refuse(UNSUPPORTED_FEATURE, "profile, dtype or reserved field")
    if calibration != NO_CALIBRATION and (profile != SCALABLE or calibration not in calibrations):
        refuse(UNSUPPORTED_FEATURE, "calibration")
    if (tokens, head_dim, dtype) != (expected.tokens, expected.head_dim, expected.dtype):
        refuse(WRONG_LAYOUT, "tokens, head dim or dtype")
    index_end = 144 + count * (12 + size)
    if any(data[index_end:end]):
        refuse(BAD_HEADER, "padding of the index")
    sections = read_index(data[144:index_end], count, size, length)
    check_index(sections, profile, expected)
    if sections[-1].end != object_length:
        refuse(BAD_INDEX, "object length")
    return sections


# The section index


def read_index(index: bytes, count: int, size: int, offset: int) -> list[Section]:
    sections = []
    for number in range(count):
        start = number * (12 + size)
        entry, digest = index[start : start + 12], index[start + 12 : start + 12 + size]
        level, parts, codec, flags, layer_begin, layer_end, length = struct.unpack("<BBBBHHI", entry)
        if flags != 0 or parts not in (1, 2, 3):
            refuse(UNSUPPORTED_FEATURE, "flags or parts of a section")
        sections.append(Section(level, parts, codec, layer_begin, layer_end, offset, length, entry, digest))
        offset = sections[-1].end
    return sections


def check_index(sections: list[Section], profile: int, expected: Expected) -> None:
    most = 3 if profile == SCALABLE else 1
    numbers = [section.level for section in sections]
    if numbers != sorted(numbers) or sorted(set(numbers)) != list(range(max(numbers) + 1)) or max(numbers) >= most:
        refuse(BAD_INDEX, "levels")
    divisions = [
        [(section.parts, section.layer_begin, section.layer_end) for section in sections if section.level == level]
        for level in range(max(numbers) + 1)
    ]
    if any(division != divisions[0] for division in divisions):
        refuse(BAD_INDEX, "levels divide the layers in different ways")
    if not divides(divisions[0], expected):
        refuse(BAD_INDEX, "the sections do not divide the shard")
    for section in sections:
        kinds = 2 if section.parts == 3 else 1
        raw = expected.values(section.layer_end - section.layer_begin, kinds) * ITEM_BYTES[expected.dtype]
        if not 1 <= section.length <= min(raw, 2**32 - 16):
            refuse(BAD_INDEX, "length of a section")


def divides(division: list[tuple[int, int, int]], expected: Expected) -> bool:
    """Whether every layer's K and V are there once, in order."""
    covered = []
    while division:
        (parts, begin, end), division = division[0], division[1:]
        if parts == 1 and division and division[0] == (2, begin, end):
            division = division[1:]
        elif parts != 3:
            return False
        if not expected.layer_begin <= begin < end <= expected.layer_end:
            return False
        covered += range(begin, end)
    return covered == list(range(expected.layer_begin, expected.layer_end))


# Sections


def decode(
    data: bytes,
    expected: Expected,
    profiles: frozenset[int] = frozenset({LOSSLESS}),
    calibrations: Mapping[bytes, Calibration] = {},
    levels: int = 3,
) -> list[int]:
    """Steps 1 to 24: the bit patterns of the shard, in the order [layer][K or V][token][head][dim].

    `levels`: how many of them to read.
    """
    sections = read_header(data, expected, profiles, calibrations)
    if len(data) != sections[-1].end:
        refuse(TRUNCATED if len(data) < sections[-1].end else TRAILING_BYTES, "object length")
    planes: dict[tuple[int, int], list[int]] = {}
    for group in group_levels(sections):
        payloads = []
        for number, section in group[:levels]:
            payloads.append(read_payload(data, number, section, expected))
            check_codec(section, group[0][1].codec, data[10], expected)
        base, digest = group[0][1], read_calibration_digest(data)
        if base.codec == 3:
            values = decode_scalable(payloads, base, len(group), calibrations.get(digest), expected)
        else:
            values = decode_alone(payloads, base, expected)
        kinds = {1: [0], 2: [1], 3: [0, 1]}[base.parts]
        size = expected.values(1, 1)
        for layer in range(base.layer_begin, base.layer_end):
            for kind in kinds:
                planes[layer, kind], values = values[:size], values[size:]
    return [value for _, plane in sorted(planes.items()) for value in plane]


def group_levels(sections: list[Section]) -> list[list[tuple[int, Section]]]:
    """Sections of the same layers and parts, level by level, each with its number."""
    count = sum(section.level == 0 for section in sections)
    numbered = list(enumerate(sections))
    return [numbered[place::count] for place in range(count)]


def read_payload(data: bytes, number: int, section: Section, expected: Expected) -> bytes:
    stored = data[section.offset : section.end]
    if section_digest(expected, number, section.entry, stored, data[12]) != section.digest:
        refuse(SECTION_CHECKSUM, f"section {number}")
    if any(stored[section.length :]):
        refuse(BAD_PAYLOAD, f"padding of section {number}")
    return stored[: section.length]


def check_codec(section: Section, base_codec: int, profile: int, expected: Expected) -> None:
    """Step 23. `base_codec`: that of level 0 of the same layers."""
    if section.level > 0:
        known = section.codec == (3 if base_codec == 3 else 4)
    elif section.codec == 3:
        known = profile == SCALABLE and expected.dtype <= 3 and section.parts == 3
    elif section.codec == 5:
        known = profile == CACHEGEN and expected.dtype <= 3
    else:
        known = section.codec in (0, 2) or (section.codec == 1 and expected.dtype == 1)
    if not known:
        refuse(UNSUPPORTED_FEATURE, f"codec {section.codec}")


def decode_alone(payloads: list[bytes], base: Section, expected: Expected) -> list[int]:
    kinds = 2 if base.parts == 3 else 1
    layers = base.layer_end - base.layer_begin
    for nothing in payloads[1:]:
        if nothing != b"\0":
            refuse(BAD_PAYLOAD, "codec 4 is one zero byte")
    if base.codec == 0:
        return decode_raw(payloads[0], expected.values(layers, kinds), ITEM_BYTES[expected.dtype])
    if base.codec == 1:
        return decode_lossless(payloads[0], layers, kinds, expected)
    if base.codec == 5:
        return decode_cachegen(payloads[0], layers, kinds, expected)
    return decode_planes(payloads[0], layers * kinds, expected)


# Codec 0


def decode_raw(payload: bytes, values: int, item: int) -> list[int]:
    if len(payload) != values * item:
        refuse(TRUNCATED if len(payload) < values * item else BAD_PAYLOAD, "raw payload")
    return [int.from_bytes(payload[start : start + item], "little") for start in range(0, len(payload), item)]


# Codec 2


def decode_planes(payload: bytes, rows: int, expected: Expected) -> list[int]:
    """`rows`: layers times K and V."""
    item, tokens, dim = ITEM_BYTES[expected.dtype], expected.tokens, expected.head_dim
    planes = list(split_planes(payload, expected.heads * item, rows * tokens * dim))
    values = []
    for row in range(rows):
        for token in range(tokens):
            for head in range(expected.heads):
                for component in range(dim):
                    at = (row * tokens + token) * dim + component
                    octets = bytes(planes[head * item + position][at] for position in range(item))
                    values.append(int.from_bytes(octets, "little"))
    return values


def split_planes(payload: bytes, count: int, values: int) -> Iterator[bytes]:
    lengths = read_lengths(payload, count)
    start = 4 * count
    for length in lengths:
        coded = payload[start : start + length]
        yield coded if length == values else decompress(coded, values)
        start += length


def read_lengths(payload: bytes, count: int) -> tuple[int, ...]:
    if len(payload) < 4 * count:
        refuse(TRUNCATED, "table of lengths")
    lengths = struct.unpack(f"<{count}I", payload[: 4 * count])
    if 4 * count + sum(lengths) != len(payload):
        refuse(TRUNCATED if 4 * count + sum(lengths) > len(payload) else BAD_PAYLOAD, "lengths")
    return lengths


def decompress(frame: bytes, values: int) -> bytes:
    try:
        parameters = zstandard.get_frame_parameters(frame)
        if parameters.content_size != values or parameters.dict_id != 0:
            refuse(BAD_PAYLOAD, "size of a plane")
        decompressor = zstandard.ZstdDecompressor().decompressobj()
        plane = decompressor.decompress(frame)
    except zstandard.ZstdError as error:
        refuse(BAD_PAYLOAD, str(error))
    if len(plane) != values or not decompressor.eof or decompressor.unused_data:
        refuse(BAD_PAYLOAD, "a plane that is not one frame")
    return plane


# Codec 1: docs/format-lossless.md


def decode_lossless(payload: bytes, layers: int, kinds: int, expected: Expected) -> list[int]:
    read_lengths(payload, expected.heads)
    shape = reference_lossless.Shape(layers, kinds, expected.tokens, expected.heads, expected.head_dim)
    try:
        values = reference_lossless.decode(payload, shape)
    except reference_lossless.RefusedError as refused:
        refuse(BAD_PAYLOAD, str(refused))
    return [value for _, value in sorted(values.items())]


# Codec 3: docs/format-scalable.md


def scalable_section(base: Section, levels: int, expected: Expected) -> reference_scalable.Section:
    """What its reader knows of a section. `levels`: those of the object."""
    return reference_scalable.Section(
        layers=base.layer_end - base.layer_begin,
        tokens=expected.tokens,
        heads=expected.heads,
        dim=expected.head_dim,
        dtype=expected.dtype,
        levels=levels,
        layer_begin=base.layer_begin,
        head_begin=expected.head_begin,
        first_position=expected.first_position,
    )


def decode_scalable(
    payloads: list[bytes], base: Section, levels: int, calibration: Calibration | None, expected: Expected
) -> list[int]:
    section = scalable_section(base, levels, expected)
    try:
        return [int(value) for value in reference_scalable.decode(payloads, section, calibration).reshape(-1)]
    except reference_scalable.ShortError as refused:
        refuse(TRUNCATED, str(refused))
    except RefusedError as refused:
        refuse(BAD_PAYLOAD, str(refused))


# Codec 5: docs/format-cachegen.md


def decode_cachegen(payload: bytes, layers: int, kinds: int, expected: Expected) -> list[int]:
    name = {1: "bfloat16", 2: "float16", 3: "float32"}[expected.dtype]
    shape = (layers, kinds, expected.tokens, expected.heads, expected.head_dim)
    values = reference_cachegen.decode(payload, name, shape)
    return [int(value) for value in reference_scalable.round_to(values, expected.dtype).reshape(-1)]


# The hint


def read_hint(text: str, expected: Expected, profiles: frozenset[int] = frozenset({LOSSLESS})) -> list[Section]:
    """The index as the object's user metadata claims it."""
    try:
        raw = base64.urlsafe_b64decode(text.encode("ascii"))
    except (UnicodeEncodeError, binascii.Error):
        refuse(BAD_INDEX, "base64")
    if len(text) > 1900 or base64.urlsafe_b64encode(raw) != text.encode("ascii"):
        refuse(BAD_INDEX, "base64")
    if len(raw) < 16 or len(raw) % 8 != 0:
        refuse(BAD_INDEX, "length of the hint")
    version, profile, reserved, header_length = struct.unpack("<BBHI", raw[:8])
    if version != 1:
        refuse(UNSUPPORTED_VERSION, "version")
    if profile not in profiles or reserved != 0:
        refuse(UNSUPPORTED_FEATURE, "profile or reserved field")
    count = len(raw) // 8 - 1
    kinds = [(1, 0), (2, 0), (2, 1), (2, 2), (3, 0)]
    if header_length not in [header_length_of(count, digest, authenticator) for digest, authenticator in kinds]:
        refuse(BAD_INDEX, "header length")
    sections = list(expand_hint(raw[8:], header_length, expected))
    check_index(sections, profile, expected)
    return sections


def expand_hint(raw: bytes, offset: int, expected: Expected) -> Iterator[Section]:
    layer, last = expected.layer_begin, 0
    for packed, codec, layers, length in struct.iter_unpack("<BBHI", raw):
        level, parts = packed >> 4, packed & 15
        if parts not in (1, 2, 3):
            refuse(UNSUPPORTED_FEATURE, "parts")
        layer = layer if level == last else expected.layer_begin
        section = Section(level, parts, codec, layer, layer + layers, offset, length)
        yield section
        offset, last = section.end, level
        layer += 0 if parts == 1 else layers
