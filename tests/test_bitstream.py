"""Bitstream v1: what the encoder makes, under truncation, flips and swaps; both decoders side by side."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import reference_decoder as reference
from bitstream_cases import (
    ALL,
    ALL_IDS,
    DECODABLE,
    IDENTITY,
    SMALL,
    divisions,
    fault_of,
    raw_sections,
    read_golden,
)
from crafted import Crafted, CraftedSection
from golden_objects import as_bytes, make_values
from hypothesis import given, settings
from hypothesis import strategies as st
from object_decoder import decode_object, to_reference
from xxhash import xxh3_128

from kvstore_s3 import namespace
from kvstore_s3.bitstream import (
    DIGEST_SIZES,
    MAX_SECTIONS,
    PREFIX_LENGTH,
    PROFILES,
    VERSION,
    Identity,
    Payload,
    SectionTable,
    build_object,
    decode_hint,
    encode_hint,
    parse_header,
    read_header_length,
)
from kvstore_s3.errors import BitstreamFault as Fault
from kvstore_s3.errors import InvalidArgumentError
from kvstore_s3.layout import KVLayout, Shard

each_digest = pytest.mark.parametrize("digest_id", sorted(DIGEST_SIZES))
each_decodable = pytest.mark.parametrize("name", DECODABLE)
thorough = settings(max_examples=150, deadline=None)


# What an encoder makes, both decoders read


@st.composite
def written_objects(draw: st.DrawFn) -> tuple[Identity, list[Payload], str, int]:
    layers, heads = draw(st.integers(1, 9)), draw(st.integers(1, 4))
    dtype = draw(st.sampled_from(["bfloat16", "float16", "float32", "float8_e5m2"]))
    layer, head = draw(st.integers(0, layers - 1)), draw(st.integers(0, heads - 1))
    shard = Shard(layer, draw(st.integers(layer + 1, layers)), head, draw(st.integers(head + 1, heads)))
    layout = KVLayout(layers, heads, draw(st.integers(1, 6)), dtype)
    keys = draw(st.binary(min_size=64, max_size=64))
    identity = Identity(keys[:32], keys[32:], shard, layout, draw(st.integers(1, 5)))
    profile = draw(st.sampled_from(sorted(PROFILES)))
    payloads = []
    division = draw(divisions(shard))
    for level in range(draw(st.integers(1, 3)) if profile == "scalable" else 1):
        for parts, begin, end in division:
            most = identity.raw_bytes(end - begin, parts)
            data = draw(st.binary(min_size=1, max_size=min(most, 40)))
            payloads.append(Payload(level, parts, draw(st.integers(0, 255)), begin, end, data))
    return identity, payloads, profile, draw(st.sampled_from(sorted(DIGEST_SIZES)))


@thorough
@given(written_objects())
def test_an_object_reads_back_as_it_was_written(written: tuple[Identity, list[Payload], str, int]) -> None:
    identity, payloads, profile, digest_id = written
    data, table = build_object(identity, payloads, profile=profile, digest_id=digest_id)
    header = parse_header(data, identity, profiles=ALL)
    assert header.table == table
    table.check_object_length(len(data))
    assert read_header_length(data[:PREFIX_LENGTH]) == table.header_length
    for number, (section, payload) in enumerate(zip(table.sections, payloads, strict=True)):
        assert section.offset % 16 == 0
        assert header.verify(number, data[section.offset : section.end]) == payload.data
    hint = encode_hint(table)
    assert hint is not None
    assert decode_hint(hint, identity, profiles=ALL) == table
    sections = reference.read_header(bytes(data), to_reference(identity), ALL_IDS)
    assert [(s.offset, s.length) for s in sections] == [(s.offset, s.length) for s in table.sections]


@thorough
@given(written_objects())
def test_the_encoder_writes_what_the_document_says(written: tuple[Identity, list[Payload], str, int]) -> None:
    identity, payloads, profile, digest_id = written
    data, _ = build_object(identity, payloads, profile=profile, digest_id=digest_id)
    sections = [
        CraftedSection(p.level, p.parts, p.codec, (p.layer_begin, p.layer_end), bytes(p.data)) for p in payloads
    ]
    fields = {"profile": PROFILES[profile]}
    assert data == Crafted(identity, sections, fields, digest_id=digest_id).object()


# Accidents


@each_decodable
def test_an_object_cut_anywhere_is_truncated(name: str) -> None:
    data, identity = read_golden(name)
    assert {fault_of(decode_object, data[:length], identity, ALL) for length in range(len(data))} == {Fault.TRUNCATED}


@pytest.mark.parametrize("name", SMALL)
def test_the_reference_decoder_finds_an_object_cut_anywhere_truncated(name: str) -> None:
    data, identity = read_golden(name)
    expected = to_reference(identity)
    assert {fault_of(reference.decode, data[:length], expected) for length in range(len(data))} == {1}


def flips(data: bytes, mask: int) -> list[bytes]:
    return [data[:at] + bytes([data[at] ^ mask]) + data[at + 1 :] for at in range(len(data))]


@each_decodable
@pytest.mark.parametrize("mask", [0x01, 0x80, 0xFF])
def test_a_flip_in_any_byte_is_refused_except_in_the_authenticator(name: str, mask: int) -> None:
    data, identity = read_golden(name)
    length = read_header_length(data)
    authenticator = range(length - {0: 0, 1: 32}[data[13]], length)
    accepted = [at for at, bad in enumerate(flips(data, mask)) if not fault_of(decode_object, bad, identity, ALL)]
    assert accepted == list(authenticator)


@pytest.mark.parametrize("name", SMALL)
def test_every_flipped_bit_gets_the_same_number_from_both_decoders(name: str) -> None:
    data, identity = read_golden(name)
    expected = to_reference(identity)
    for mask in (1 << bit for bit in range(8)):
        for bad in flips(data, mask):
            assert fault_of(decode_object, bad, identity) == fault_of(reference.decode, bad, expected)


@thorough
@given(st.permutations(range(3)), st.sampled_from(sorted(DIGEST_SIZES)))
def test_sections_in_another_order_are_refused(order: list[int], digest_id: int) -> None:
    sections = raw_sections(IDENTITY)
    crafted = Crafted(IDENTITY, sections, digest_id=digest_id)
    data = crafted.header() + b"".join(sections[number].stored for number in order)
    assert fault_of(decode_object, data, IDENTITY) == (0 if order == [0, 1, 2] else Fault.SECTION_CHECKSUM)


@each_digest
@pytest.mark.parametrize(
    "other",
    [
        replace(IDENTITY, key=bytes(32)),
        replace(IDENTITY, namespace=bytes(32)),
        replace(IDENTITY, shard=Shard(1, 4, 2, 4)),
        replace(IDENTITY, shard=Shard(0, 3, 0, 2)),
    ],
    ids=["key", "namespace", "heads", "layers"],
)
def test_a_section_of_another_object_is_refused_even_with_equal_values(other: Identity, digest_id: int) -> None:
    ours, shift = raw_sections(IDENTITY), other.shard.layer_begin - IDENTITY.shard.layer_begin
    moved = [replace(s, layers=(s.layers[0] + shift, s.layers[1] + shift)) for s in ours]
    theirs = Crafted(other, moved, digest_id=digest_id).object()
    stride, start = 12 + DIGEST_SIZES[digest_id], 144
    digests = [theirs[start + 12 + stride * number : start + stride * (number + 1)] for number in range(3)]
    for number in range(3):
        taken = [replace(section, digest=digests[number]) if i == number else section for i, section in enumerate(ours)]
        assert fault_of(decode_object, Crafted(IDENTITY, taken, digest_id=digest_id).object(), IDENTITY) == 8


@each_digest
def test_a_flipped_bit_anywhere_in_a_long_section_is_refused(digest_id: int) -> None:
    identity = replace(IDENTITY, tokens=400)
    values = as_bytes(make_values(identity, "long"))
    data, table = build_object(identity, [Payload(0, 3, 0, 1, 4, values[:-3])], digest_id=digest_id)
    header, section = parse_header(data, identity), table.sections[0]
    stored = bytearray(data[section.offset : section.end])
    for at in range(0, len(stored), 61):
        stored[at] ^= 1 << at % 8
        assert fault_of(header.verify, 0, stored) == Fault.SECTION_CHECKSUM
        stored[at] ^= 1 << at % 8
    assert header.verify(0, stored) == data[section.offset : section.offset + section.length]


@each_digest
def test_a_digest_is_bound_to_the_number_and_the_entry_of_its_section(digest_id: int) -> None:
    ours = [replace(section, data=bytes(len(section.data))) for section in raw_sections(IDENTITY)]
    shorter = ours[0].data[:-1]
    sound = Crafted(IDENTITY, ours, digest_id=digest_id)
    end = 144 + 12 + DIGEST_SIZES[digest_id]
    digest = sound.header()[156:end]
    for number, section in ((1, ours[1]), (0, replace(ours[0], data=shorter)), (0, replace(ours[0], codec=2))):
        taken = [replace(section, digest=digest) if i == number else each for i, each in enumerate(ours)]
        bad = Crafted(IDENTITY, taken, digest_id=digest_id).object()
        assert fault_of(decode_object, bad, IDENTITY) == Fault.SECTION_CHECKSUM
        assert fault_of(reference.decode, bad, to_reference(IDENTITY)) == Fault.SECTION_CHECKSUM


def test_the_xxh3_of_the_digests_is_the_published_one() -> None:
    assert xxh3_128(b"").hexdigest() == "99aa06d3014798d86001c324468d497f"


def test_a_writer_takes_xxh3_and_its_objects_are_as_long_as_with_short_blake3() -> None:
    payloads = [Payload(0, 3, 0, layer, layer + 1, b"x") for layer in range(1, 4)]
    data, table = build_object(IDENTITY, payloads)
    assert data[12] == 3
    older, same = build_object(IDENTITY, payloads, digest_id=1)
    assert (len(data), table) == (len(older), same)
    assert encode_hint(table) == encode_hint(same)


@each_digest
def test_verifying_a_section_copies_nothing(digest_id: int) -> None:
    identity = replace(IDENTITY, tokens=20_000)
    data, table = build_object(identity, [Payload(0, 3, 0, 1, 4, bytes(1 << 20))], digest_id=digest_id)
    header, stored = parse_header(data, identity), memoryview(data)[table.header_length :]
    tracemalloc.start()
    try:
        payload = header.verify(0, stored)
        assert tracemalloc.get_traced_memory()[1] < 4096
    finally:
        tracemalloc.stop()
    assert payload.obj is data


@given(st.binary(max_size=600))
@thorough
def test_any_bytes_are_refused(data: bytes) -> None:
    for bad in (data, b"\x89KVS3\r\n\x1a\x01\x00" + data):
        found = fault_of(decode_object, bad, IDENTITY)
        assert found != 0
        assert found == fault_of(reference.decode, bad, to_reference(IDENTITY))


def test_the_namespace_states_the_version_of_the_bitstream() -> None:
    assert namespace.FORMAT == VERSION


# A caller's own mistakes


@pytest.mark.parametrize(
    "change",
    [
        {"namespace": b"short"},
        {"key": bytes(33)},
        {"tokens": 0},
        {"tokens": 65537},
        {"shard": Shard(0, 7, 0, 4)},
        {"shard": Shard(0, 6, 0, 5)},
    ],
    ids=str,
)
def test_an_identity_that_cannot_be_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError):
        replace(IDENTITY, **change)


@pytest.mark.parametrize(
    "payloads",
    [
        [],
        [Payload(0, 3, 0, 1, 3, b"x")],
        [Payload(0, 3, 0, 1, 4, b"")],
        [Payload(0, 3, 0, 1, 4, bytes(10_000))],
        [Payload(0, 3, 256, 1, 4, b"x")],
        [Payload(0, 4, 0, 1, 4, b"x")],
        [Payload(0, 1, 0, 1, 4, b"x")],
        [Payload(1, 3, 0, 1, 4, b"x")],
        [Payload(0, 3, 0, 1, 4, b"x"), Payload(1, 3, 0, 1, 4, b"x")],
        [Payload(0, 3, 0, 1, 4, b"x")] * (MAX_SECTIONS + 1),
    ],
)
def test_payloads_that_make_no_object_are_refused_before_anything_is_built(payloads: list[Payload]) -> None:
    with pytest.raises(InvalidArgumentError):
        build_object(IDENTITY, payloads)


@pytest.mark.parametrize("how", [{"profile": "small"}, {"digest_id": 0}, {"digest_id": 4}])
def test_unknown_profiles_and_digests_are_refused_by_the_encoder(how: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError):
        build_object(IDENTITY, [Payload(0, 3, 0, 1, 4, b"x")], **how)


CALIBRATION = bytes(range(32))


@pytest.mark.parametrize("profile", sorted(PROFILES))
def test_a_scalable_object_alone_names_a_calibration(profile: str) -> None:
    payloads = [Payload(0, 3, 0, 1, 4, b"x")]
    if profile == "scalable":
        data, _ = build_object(IDENTITY, payloads, profile=profile, calibration=CALIBRATION)
        assert data[112:144] == CALIBRATION
        assert parse_header(data, IDENTITY, profiles=ALL, calibrations=None).calibration == CALIBRATION
        assert parse_header(data, IDENTITY, profiles=ALL, calibrations={CALIBRATION}).calibration == CALIBRATION
        for at_hand in ({}, {"calibrations": ()}, {"calibrations": {bytes(31) + b"\1"}}):
            assert fault_of(parse_header, data, IDENTITY, profiles=ALL, **at_hand) == Fault.UNSUPPORTED_FEATURE
    else:
        with pytest.raises(InvalidArgumentError, match="scalable objects alone"):
            build_object(IDENTITY, payloads, profile=profile, calibration=CALIBRATION)
        section = CraftedSection(layers=(1, 4), data=b"x")
        crafted = Crafted(IDENTITY, [section], {"profile": PROFILES[profile], "calibration": CALIBRATION}).object()
        refused = fault_of(parse_header, crafted, IDENTITY, profiles=ALL, calibrations=None)
        assert refused == Fault.UNSUPPORTED_FEATURE


@pytest.mark.parametrize("calibration", [b"", bytes(32), bytes(31), bytes(range(33))])
def test_a_calibration_is_named_by_a_digest(calibration: bytes) -> None:
    with pytest.raises(InvalidArgumentError, match="digest of 32 bytes"):
        build_object(IDENTITY, [Payload(0, 3, 0, 1, 4, b"x")], profile="scalable", calibration=calibration)


def test_an_object_without_a_calibration_says_so() -> None:
    data, _ = build_object(IDENTITY, [Payload(0, 3, 0, 1, 4, b"x")], profile="scalable")
    assert parse_header(data, IDENTITY, profiles=ALL).calibration is None


def test_a_payload_may_be_any_contiguous_buffer() -> None:
    values = np.arange(24, dtype=np.uint16)
    payload = Payload(0, 3, 0, 1, 4, values.data)
    assert build_object(IDENTITY, [payload])[0] == build_object(IDENTITY, [replace(payload, data=values.tobytes())])[0]


def test_a_section_of_another_length_than_its_own_is_refused() -> None:
    data, identity = read_golden("raw-bf16")
    header = parse_header(data, identity)
    for stored, fault in ((data[192:223], Fault.TRUNCATED), (data[192:] + bytes(16), Fault.TRAILING_BYTES)):
        assert fault_of(header.verify, 0, stored) == fault
    assert bytes(header.verify(0, memoryview(bytearray(data[192:])))) == data[192:]


def test_an_object_of_another_length_than_its_own_is_refused() -> None:
    data, identity = read_golden("raw-bf16")
    table: SectionTable = parse_header(data, identity).table
    assert fault_of(table.check_object_length, 223) == Fault.TRUNCATED
    assert fault_of(table.check_object_length, 240) == Fault.TRAILING_BYTES
    assert fault_of(table.check_object_length, 224) == 0
