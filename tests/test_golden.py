"""Every golden object decodes to the same bits with both decoders; every golden error is refused with its number."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import reference_decoder as reference
import zstandard
from blake3 import blake3
from golden_faults import make_all_errors
from golden_files import ERRORS, OBJECTS, load_calibrations, read_artefact, read_error, read_object
from golden_objects import MAC_KEY, Golden, as_bytes, identity_from_json, make_all
from golden_scalable import calibrations_of, make_all_scalable
from golden_scalable_faults import make_all_scalable_errors
from object_decoder import decode_object, to_reference

from kvstore_s3.bitstream import HINT_NAME, PROFILES, decode_hint, encode_hint, parse_header
from kvstore_s3.codec import arithmetic
from kvstore_s3.errors import BitstreamFault, DamagedObjectError, InvalidArgumentError

TESTS = Path(__file__).parent
DECODABLE = [name for name, entry in OBJECTS["objects"].items() if entry["values_blake3"]]

each_object = pytest.mark.parametrize("name", OBJECTS["objects"])
each_decodable = pytest.mark.parametrize("name", DECODABLE)
each_error = pytest.mark.parametrize("name", ERRORS)


@pytest.fixture(scope="module")
def remade() -> dict[str, Golden]:
    return {golden.name: golden for golden in make_all() + make_all_scalable()}


def require_coder() -> None:
    """Skip where the extra `cachegen`, or what compiles it, is missing."""
    try:
        arithmetic.require_coder()
    except InvalidArgumentError as error:
        pytest.skip(str(error))


@each_object
def test_a_golden_object_is_the_committed_one(name: str) -> None:
    assert blake3(read_object(name)).hexdigest() == OBJECTS["objects"][name]["blake3"]


@each_decodable
def test_both_decoders_find_the_same_bits_in_a_golden_object(name: str, remade: dict[str, Golden]) -> None:
    entry = OBJECTS["objects"][name]
    identity, profile, values = identity_from_json(entry["identity"]), entry["profile"], remade[name].values
    assert values is not None
    assert blake3(as_bytes(values)).hexdigest() == entry["values_blake3"]
    found = reference.decode(read_object(name), to_reference(identity), frozenset({PROFILES[profile]}))
    assert found == values.reshape(-1).tolist()
    if profile == "cachegen":
        require_coder()
    assert np.array_equal(decode_object(read_object(name), identity, frozenset({profile})), values)


@each_object
def test_the_encoder_makes_a_golden_object_again(name: str, remade: dict[str, Golden]) -> None:
    found = ".".join(map(str, zstandard.ZSTD_VERSION))
    if "planes" in OBJECTS["objects"][name]["codecs"] and found != OBJECTS["zstd"]:
        pytest.skip(f"zstd {found} may choose other bytes than {OBJECTS['zstd']}, which made this object")
    assert remade[name].data == read_object(name)


@each_object
def test_both_decoders_read_the_same_index_from_header_and_hint(name: str) -> None:
    entry, data = OBJECTS["objects"][name], read_object(name)
    identity = identity_from_json(entry["identity"])
    header = parse_header(data, identity, profiles=frozenset(PROFILES), calibrations=None)
    table = header.table
    assert table == decode_hint(entry["hint"], identity, profiles=frozenset(PROFILES))
    assert encode_hint(table) == entry["hint"]
    assert len(HINT_NAME) + len(entry["hint"]) <= 2000
    expected, profiles = to_reference(identity), frozenset(PROFILES.values())
    calibrations = {header.calibration: None} if header.calibration else {}
    rows = [
        (
            section.level,
            section.parts,
            section.codec,
            section.layer_begin,
            section.layer_end,
            section.offset,
            section.end,
        )
        for section in table.sections
    ]
    for sections in (
        reference.read_header(data, expected, profiles, calibrations),
        reference.read_hint(entry["hint"], expected, profiles),
    ):
        assert rows == [(s.level, s.parts, s.codec, s.layer_begin, s.layer_end, s.offset, s.end) for s in sections]


def test_the_authenticator_is_over_everything_before_it() -> None:
    data = read_object("authenticated")
    assert data[13] == 1
    end = reference.read_prefix(data)
    assert blake3(reference.authenticator_message(data), key=MAC_KEY).digest() == data[end - 32 : end]


@each_error
def test_both_decoders_refuse_a_golden_error_with_its_number(name: str) -> None:
    data, entry = read_error(name), ERRORS[name]
    identity = identity_from_json(entry["identity"])
    first, profiles = entry["first_position"], frozenset({"lossless", entry["profile"]})
    known = calibrations_of(read_artefact(entry["calibration"]) if entry["calibration"] else None)
    with pytest.raises(reference.Fault) as fault:
        reference.decode(data, to_reference(identity, first), frozenset(PROFILES[one] for one in profiles), known)
    assert fault.value.code == entry["code"]
    with pytest.raises(DamagedObjectError) as refused:
        decode_object(data, identity, profiles, calibrations=load_calibrations(entry["calibration"]), first_token=first)
    assert (refused.value.code, refused.value.code.name) == (entry["code"], entry["fault"])


def test_every_fault_has_a_golden_error() -> None:
    assert {entry["code"] for entry in ERRORS.values()} == {int(fault) for fault in BitstreamFault}


def test_the_golden_errors_are_those_of_the_script() -> None:
    assert {error.name: error.code for error in make_all_errors() + make_all_scalable_errors()} == {
        name: entry["code"] for name, entry in ERRORS.items()
    }
    assert {path.stem for path in (TESTS / "golden_errors").glob("*.kvs3")} == set(ERRORS)
    assert {path.stem for path in (TESTS / "golden").glob("*.kvs3")} == set(OBJECTS["objects"])


def test_the_format_document_names_every_golden_object_and_every_fault() -> None:
    text = (TESTS.parent / "docs" / "FORMAT.md").read_text(encoding="utf-8")
    assert [name for name in OBJECTS["objects"] if f"`{name}.kvs3`" not in text] == []
    assert [fault.name for fault in BitstreamFault if f"| {int(fault)} | {fault.name} |" not in text] == []


def test_the_digests_of_the_worked_example_are_in_the_format_document() -> None:
    text = (TESTS.parent / "docs" / "FORMAT.md").read_text(encoding="utf-8")
    data, expected = (
        read_object("raw-bf16"),
        to_reference(identity_from_json(OBJECTS["objects"]["raw-bf16"]["identity"])),
    )
    assert reference.binding(expected).hex() in text
    assert reference.section_digest(expected, 0, data[0x90:0x9C], data[0xC0:], 1) == data[0x9C:0xAC]
    assert reference.section_digest(expected, 0, data[0x90:0x9C], data[0xC0:], 3).hex() in text


def test_the_byte_dump_in_the_format_document_is_the_golden_object() -> None:
    text = (TESTS.parent / "docs" / "FORMAT.md").read_text(encoding="utf-8")
    data = read_object("raw-bf16")
    for start in range(0, len(data), 16):
        assert f"{start:04x}  {data[start : start + 16].hex(' ')}" in text
