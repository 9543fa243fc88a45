"""The golden objects of profile 2, at each number of levels: integers exactly, values up to their last bits."""

from __future__ import annotations

import numpy as np
import pytest
import reference_decoder as reference
from blake3 import blake3
from golden_files import CALIBRATED, LOSSY, OBJECTS, load_calibrations, read_artefact, read_object, read_values
from golden_objects import Golden, identity_from_json
from golden_scalable import SCALABLE_TOO, calibrations_of, decode_levels, digest_integers, make_all_scalable
from object_decoder import decode_object, to_reference

from kvstore_s3.bitstream import Identity, parse_header
from kvstore_s3.codec.base import Bits
from kvstore_s3.errors import BitstreamFault, DamagedObjectError

PROFILES = frozenset({"lossless", "scalable"})
LEVELS = [(name, level + 1) for name in LOSSY for level, _ in enumerate(OBJECTS["objects"][name]["integers_blake3"])]
SIGNIFICANT = {"bfloat16": 8, "float16": 11, "float32": 24}

each_lossy = pytest.mark.parametrize("name", LOSSY)
each_calibrated = pytest.mark.parametrize("name", CALIBRATED)
each_level = pytest.mark.parametrize(("name", "levels"), LEVELS)


@pytest.fixture(scope="module")
def remade() -> dict[str, Golden]:
    return {golden.name: golden for golden in make_all_scalable()}


def identity_of(name: str) -> Identity:
    return identity_from_json(OBJECTS["objects"][name]["identity"])


def expected_of(name: str) -> reference.Expected:
    return to_reference(identity_of(name), OBJECTS["objects"][name]["first_position"])


def artefact_of(name: str) -> bytes | None:
    return read_artefact(name) if name in CALIBRATED else None


def to_floats(bits: Bits, dtype: str) -> np.ndarray:
    """float64 of bit patterns."""
    values = (bits.astype(np.uint32) << 16).view(np.float32) if dtype == "bfloat16" else bits.view(dtype)
    with np.errstate(invalid="ignore"):  # signalling NaN
        return values.astype(np.float64)


def assert_close(found: Bits, expected: Bits, dtype: str) -> None:
    """Up to a unit of the last place, or what float32 sums of the largest value round; not finite: the same bits."""
    one, two = to_floats(found, dtype), to_floats(expected, dtype)
    finite = np.isfinite(two)
    with np.errstate(invalid="ignore"):
        unit = np.exp2(np.floor(np.log2(np.maximum(np.abs(two), 1e-30))) + 1 - SIGNIFICANT[dtype])
        bound = unit + 2.0**-20 * np.abs(two[finite]).max()
        assert np.all((np.abs(one - two) <= bound)[finite])
    assert np.array_equal(found[~finite], expected[~finite])


def stored_values(name: str, levels: int) -> Bits:
    width = "<u4" if identity_of(name).layout.dtype == "float32" else "<u2"
    return np.frombuffer(read_values(name, levels), width)


@each_lossy
def test_a_lossy_golden_object_and_its_calibration_can_be_made_again(name: str, remade: dict[str, Golden]) -> None:
    assert remade[name].data == read_object(name)
    assert remade[name].artefact == artefact_of(name)


@each_calibrated
def test_the_header_names_the_calibration_by_its_digest(name: str) -> None:
    header = parse_header(read_object(name), identity_of(name), profiles=PROFILES, calibrations=None)
    assert header.calibration == blake3(read_artefact(name)).digest()


@each_level
def test_the_reference_decoder_finds_the_integers_of_the_manifest(name: str, levels: int) -> None:
    found = digest_integers(read_object(name), expected_of(name), artefact_of(name), levels)
    assert found == OBJECTS["objects"][name]["integers_blake3"][levels - 1]


@each_level
def test_the_reference_decoder_comes_to_the_stored_values(name: str, levels: int) -> None:
    found = decode_levels(read_object(name), expected_of(name), artefact_of(name), levels)
    assert_close(found, stored_values(name, levels), identity_of(name).layout.dtype)


@each_level
def test_the_package_comes_to_the_stored_values(name: str, levels: int) -> None:
    identity = identity_of(name)
    found = decode_object(
        read_object(name),
        identity,
        PROFILES,
        calibrations=load_calibrations(name) if name in CALIBRATED else {},
        levels=levels,
        first_token=OBJECTS["objects"][name]["first_position"],
    )
    assert_close(found.reshape(-1), stored_values(name, levels), identity.layout.dtype)


@each_lossy
def test_a_lossy_object_is_refused_unless_it_is_asked_for(name: str) -> None:
    data, identity = read_object(name), identity_of(name)
    for decode in (lambda: parse_header(data, identity), lambda: decode_object(data, identity)):
        with pytest.raises(DamagedObjectError) as refused:
            decode()
        assert refused.value.code is BitstreamFault.UNSUPPORTED_FEATURE
    with pytest.raises(reference.Fault) as fault:
        reference.decode(data, to_reference(identity))
    assert fault.value.code == reference.UNSUPPORTED_FEATURE


@each_calibrated
def test_an_object_whose_calibration_is_not_at_hand_is_refused(name: str) -> None:
    data, identity = read_object(name), identity_of(name)
    with pytest.raises(DamagedObjectError) as refused:
        decode_object(data, identity, PROFILES)
    assert refused.value.code is BitstreamFault.UNSUPPORTED_FEATURE
    with pytest.raises(reference.Fault) as fault:
        reference.decode(data, expected_of(name), SCALABLE_TOO)
    assert fault.value.code == reference.UNSUPPORTED_FEATURE


def test_a_tensor_parallel_reader_uses_the_units_of_its_own_heads() -> None:
    identity = identity_of("scalable-head")
    assert (identity.shard.head_begin, identity.layout.kv_heads) == (1, 4)
    calibration = next(iter(calibrations_of(read_artefact("scalable-head")).values()))
    assert len({calibration.units[1, head].scale.tobytes() for head in range(4)}) == 4
