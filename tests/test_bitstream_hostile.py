"""Bitstream v1 against whoever knows the binding, and so can make every digest hold; both decoders side by side."""

from __future__ import annotations

import base64
import struct
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import reference_decoder as reference
from bitstream_cases import ALL, ALL_IDS, DECODABLE, IDENTITY, MANIFEST, divisions, fault_of, raw_sections, read_golden
from crafted import FIELDS, Crafted, CraftedSection
from hypothesis import given, settings
from hypothesis import strategies as st
from object_decoder import decode_object, to_reference

from kvstore_s3.bitstream import (
    DIGEST_SIZES,
    MAX_HINT_CHARS,
    MAX_SECTIONS,
    PREFIX_LENGTH,
    Identity,
    Payload,
    build_object,
    decode_hint,
    encode_hint,
    parse_header,
    read_header_length,
)
from kvstore_s3.errors import BitstreamFault as Fault
from kvstore_s3.errors import DamagedObjectError
from kvstore_s3.layout import KVLayout, Shard

BIG = Identity(bytes(32), bytes(32), Shard(0, 4096, 0, 64), KVLayout(4096, 64, 512, "float32"), 65536)


# Headers and indices


def numbers(code: str) -> st.SearchStrategy[Any]:
    if code.endswith("s"):
        return st.binary(min_size=int(code[:-1]), max_size=int(code[:-1]))
    most = 256 ** struct.calcsize("<" + code) - 1
    return st.integers(0, 4) | st.integers(0, most) | st.sampled_from([most, most - 15, most // 2])


FIELD_VALUES = st.lists(st.sampled_from(sorted(FIELDS)), max_size=2, unique=True).flatmap(
    lambda names: st.fixed_dictionaries({name: numbers(FIELDS[name]) for name in names})
)
SECTIONS = st.lists(
    st.builds(
        CraftedSection,
        level=st.integers(0, 3) | st.integers(0, 255),
        parts=st.integers(0, 4),
        codec=st.integers(0, 3) | st.integers(0, 255),
        layers=st.tuples(st.integers(0, 5), st.integers(0, 5)) | st.tuples(numbers("H"), numbers("H")),
        data=st.binary(max_size=80),
        flags=st.sampled_from([0, 0, 0, 1, 128]),
        length=st.none() | numbers("I"),
    ),
    max_size=6,
)


@settings(max_examples=500, deadline=None)
@given(
    fields=FIELD_VALUES,
    sections=st.none() | SECTIONS,
    digest_id=st.sampled_from(sorted(DIGEST_SIZES)),
    authenticator=st.sampled_from([0, 32, 64]),
)
def test_hostile_headers_get_the_same_answer_from_both_decoders(
    fields: dict[str, object], sections: list[CraftedSection] | None, digest_id: int, authenticator: int
) -> None:
    sections = raw_sections(IDENTITY) if sections is None else sections
    data = Crafted(IDENTITY, sections, fields, digest_id=digest_id, authenticator=bytes(authenticator)).object()
    found = fault_of(decode_object, data, IDENTITY)
    assert found == fault_of(reference.decode, data, to_reference(IDENTITY))


@st.composite
def nearly_right_sections(draw: st.DrawFn) -> list[CraftedSection]:
    """A right division of one to three levels, of which at most one field of one section is wrong."""
    division = draw(divisions(IDENTITY.shard))
    sections = [
        CraftedSection(level, parts, draw(st.integers(0, 2)), (begin, end), draw(st.binary(min_size=1, max_size=64)))
        for level in range(draw(st.integers(1, 3)))
        for parts, begin, end in division
    ]
    number = draw(st.integers(0, len(sections) - 1))
    name, value = draw(
        st.one_of(
            st.tuples(st.just("level"), st.integers(0, 3)),
            st.tuples(st.just("parts"), st.integers(0, 4)),
            st.tuples(st.just("layers"), st.tuples(st.integers(0, 5), st.integers(0, 5))),
            st.tuples(st.just("length"), st.integers(0, 200)),
        )
    )
    sections[number] = replace(sections[number], **{name: value})
    return sections


@settings(max_examples=500, deadline=None)
@given(nearly_right_sections(), st.integers(1, 3))
def test_nearly_right_indices_get_the_same_answer_from_both_decoders(
    sections: list[CraftedSection], profile: int
) -> None:
    data = Crafted(IDENTITY, sections, {"profile": profile}).object()
    found = fault_of(parse_header, data, IDENTITY, profiles=ALL)
    assert found == fault_of(reference.read_header, data, to_reference(IDENTITY), ALL_IDS)
    assert found in {0, Fault.BAD_INDEX, Fault.UNSUPPORTED_FEATURE}


@pytest.mark.parametrize("name", [name for name in DECODABLE if MANIFEST[name]["profile"] == "lossless"])
@settings(max_examples=25, deadline=None)
@given(draw=st.data())
def test_hostile_payloads_get_the_same_answer_from_both_decoders(name: str, draw: st.DataObject) -> None:
    data, identity = read_golden(name)
    sections = []
    table = parse_header(data, identity, profiles=ALL).table
    for section in table.sections:
        payload = bytearray(data[section.offset : section.offset + section.length])
        for at in draw.draw(st.lists(st.integers(0, min(len(payload), 200) - 1), max_size=2)):
            payload[at] = draw.draw(st.integers(0, 255))
        cut = draw.draw(st.sampled_from([0, 0, 0, 1, 4]))
        kept = bytes(payload[: max(1, len(payload) - cut)])
        layers = (section.layer_begin, section.layer_end)
        sections.append(CraftedSection(section.level, section.parts, section.codec, layers, kept))
    bad = Crafted(identity, sections, {"profile": table.profile}).object()
    found, expected = fault_of(decode_object, bad, identity, ALL), to_reference(identity)
    assert found in {0, Fault.TRUNCATED, Fault.BAD_PAYLOAD}
    assert found == fault_of(reference.decode, bad, expected, ALL_IDS)
    if not found:
        assert reference.decode(bad, expected, ALL_IDS) == decode_object(bad, identity, ALL).reshape(-1).tolist()


# Hints


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60) | st.binary(max_size=60).map(lambda raw: base64.urlsafe_b64encode(raw).decode("ascii")))
def test_any_hint_gets_the_same_answer_from_both_decoders(text: str) -> None:
    expected = to_reference(IDENTITY)
    assert fault_of(decode_hint, text, IDENTITY) == fault_of(reference.read_hint, text, expected) != 0


@st.composite
def nearly_right_hints(draw: st.DrawFn) -> bytes:
    """A right hint in which up to two bytes are replaced."""
    division = draw(divisions(IDENTITY.shard)) * draw(st.integers(1, 3))
    level, rows = -1, []
    for parts, begin, end in division:
        level += begin == IDENTITY.shard.layer_begin and parts != 2
        most = IDENTITY.raw_bytes(end - begin, parts)
        rows.append((level << 4 | parts, draw(st.integers(0, 255)), end - begin, draw(st.integers(1, most))))
    ids = draw(st.sampled_from([(1, 0), (2, 0), (2, 1), (2, 2), (1, 1)]))
    head = (1, draw(st.integers(1, 2)), 0, reference.header_length_of(len(rows), *ids))
    raw = bytearray(b"".join(struct.pack("<BBHI", *row) for row in [head, *rows]))
    for at in draw(st.lists(st.integers(0, len(raw) - 1), max_size=2)):
        raw[at] = draw(st.integers(0, 4) | st.integers(0, 255))
    return bytes(raw)


@settings(max_examples=500, deadline=None)
@given(nearly_right_hints())
def test_nearly_right_hints_get_the_same_answer_from_both_decoders(raw: bytes) -> None:
    text = base64.urlsafe_b64encode(raw).decode("ascii")
    found = fault_of(decode_hint, text, IDENTITY, profiles=ALL)
    assert found == fault_of(reference.read_hint, text, to_reference(IDENTITY), ALL_IDS)
    if not found:
        table = decode_hint(text, IDENTITY, profiles=ALL)
        most = len(table.sections) * (IDENTITY.raw_bytes(3, 3) + 16)
        assert table.object_length <= table.header_length + most
        assert encode_hint(table) == text


def test_a_hint_holds_177_sections_and_a_longer_one_is_left_out() -> None:
    layout = KVLayout(200, 8, 128, "bfloat16")
    for layers, fits in ((126, True), (177, True), (178, False)):
        identity = Identity(bytes(32), bytes(32), Shard(0, layers, 0, 8), layout, 256)
        payloads = [Payload(0, 3, 1, layer, layer + 1, b"x") for layer in range(layers)]
        hint = encode_hint(build_object(identity, payloads)[1])
        assert (hint is not None) == fits
        assert hint is None or len(hint) <= MAX_HINT_CHARS


@pytest.mark.parametrize(
    "text", ["", "A", "====", "AQEAAMAAAAADAAEAIAAAAA", "AQEAAMAAAAADAAEAIAAAAB==", "é", "+/+/", "AQEA AMAA"]
)
def test_a_hint_that_is_not_canonical_base64_is_refused(text: str) -> None:
    with pytest.raises(DamagedObjectError, match="BAD_INDEX"):
        decode_hint(text, read_golden("raw-bf16")[1])


# Bounds


def peak_of(decode: Callable[..., object], *args: Any) -> int:
    tracemalloc.start()
    try:
        fault_of(decode, *args)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_header_that_claims_much_costs_no_more_than_its_own_bytes() -> None:
    layers = range(MAX_SECTIONS)
    claims = [CraftedSection(layers=(layer, layer + 1), length=2**32 - 16) for layer in layers]
    header = Crafted(BIG, claims, {"object_length": 2**63}).header()
    assert len(header) <= 180_464
    assert peak_of(parse_header, header, BIG) < 32 * len(header)
    assert peak_of(read_header_length, header[:PREFIX_LENGTH]) < 4096


@settings(max_examples=60, deadline=None)
@given(FIELD_VALUES, st.none() | SECTIONS)
def test_hostile_headers_allocate_no_more_than_the_layout_calls_for(
    fields: dict[str, object], sections: list[CraftedSection] | None
) -> None:
    data = Crafted(IDENTITY, raw_sections(IDENTITY) if sections is None else sections, fields).object()
    assert peak_of(decode_object, data, IDENTITY) < 16 * len(data) + 4 * IDENTITY.raw_bytes(3, 3) + 16384


@pytest.mark.parametrize("size", [2**62, 2**31])
def test_a_frame_that_claims_a_huge_size_is_refused_without_memory_for_it(size: int) -> None:
    identity = replace(IDENTITY, shard=Shard(1, 2, 0, 1), tokens=64)
    frame = b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", size) + b"\x01\x00\x00"
    data = struct.pack("<2I", len(frame), len(frame)) + 2 * frame
    bad = Crafted(identity, [CraftedSection(layers=(1, 2), codec=2, data=data)]).object()
    assert fault_of(decode_object, bad, identity) == Fault.BAD_PAYLOAD
    assert peak_of(decode_object, bad, identity) < 65536


def test_a_huge_hint_costs_nothing() -> None:
    text = "A" * 10_000_000
    assert fault_of(decode_hint, text, IDENTITY) == Fault.BAD_INDEX
    assert peak_of(decode_hint, text, IDENTITY) < 16384


def test_a_section_fits_32_bits_with_its_padding() -> None:
    identity = replace(BIG, shard=Shard(0, 1, 0, 64))
    assert identity.raw_bytes(1, 3) > 2**32
    for length, fault in ((2**32 - 16, 0), (2**32 - 15, Fault.BAD_INDEX)):
        raw = struct.pack("<BBHIBBHI", 1, 1, 0, 192, 3, 0, 1, length)
        assert fault_of(decode_hint, base64.urlsafe_b64encode(raw).decode(), identity) == fault
