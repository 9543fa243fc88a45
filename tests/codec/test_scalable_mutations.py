"""Payloads that someone changed, under digests that hold: both decoders refuse them alike, or read the same."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import reference_decoder as reference
from blake3 import blake3
from crafted import Crafted, CraftedSection
from golden_files import CALIBRATED, LOSSY, OBJECTS, load_calibrations, read_artefact, read_object
from golden_objects import identity_from_json
from golden_scalable import SCALABLE_TOO, calibrations_of
from hypothesis import given, settings
from hypothesis import strategies as st
from object_decoder import decode_object, to_reference
from reference_calibration import Calibration as ReferenceCalibration
from test_golden_scalable import assert_close, to_floats

from kvstore_s3.bitstream import Identity
from kvstore_s3.codec.base import Bits
from kvstore_s3.codec.calibration import Calibration
from kvstore_s3.errors import DamagedObjectError

PROFILES = frozenset({"lossless", "scalable"})
SMALL = [name for name in LOSSY if name != "scalable-uncalibrated"]


@dataclass(frozen=True)
class Sound:
    """A golden object taken apart, and what its readers have."""

    identity: Identity
    first_position: int
    sections: list[CraftedSection]
    digest: bytes
    ours: dict[bytes, Calibration]
    theirs: dict[bytes, ReferenceCalibration]

    def read_both(self, sections: list[CraftedSection], levels: int) -> tuple[Bits | int, Bits | int]:
        """What the package and the reference decoder make of it: values, or a fault."""
        data = Crafted(self.identity, sections, {"profile": 2, "calibration": self.digest}).object()
        first, expected = self.first_position, to_reference(self.identity, self.first_position)
        try:
            found: Bits | int = decode_object(
                data, self.identity, PROFILES, calibrations=self.ours, levels=levels, first_token=first
            ).reshape(-1)
        except DamagedObjectError as error:
            found = int(error.code)
        try:
            values = reference.decode(data, expected, SCALABLE_TOO, self.theirs, levels)
        except reference.Fault as fault:
            return found, fault.code
        return found, np.array(values, np.uint32 if expected.dtype == 3 else np.uint16)


def take_apart(name: str) -> Sound:
    entry, data = OBJECTS["objects"][name], read_object(name)
    identity = identity_from_json(entry["identity"])
    artefact = read_artefact(name) if name in CALIBRATED else None
    theirs = calibrations_of(artefact)
    expected = to_reference(identity)
    sections = [
        CraftedSection(
            level=section.level,
            codec=section.codec,
            layers=(section.layer_begin, section.layer_end),
            data=reference.read_payload(data, number, section, expected),
        )
        for number, section in enumerate(reference.read_header(data, expected, SCALABLE_TOO, theirs))
    ]
    digest = bytes(32) if artefact is None else blake3(artefact).digest()
    ours = load_calibrations(name) if artefact else {}
    return Sound(identity, entry["first_position"], sections, digest, ours, theirs)


SOUND = {name: take_apart(name) for name in SMALL}


@st.composite
def mutations(draw: st.DrawFn, data: bytes) -> bytes:
    """A few bytes changed, cut out or put in."""
    changed = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(changed)) | st.integers(0, min(64, len(changed))))
        new = draw(st.binary(max_size=5) | st.sampled_from([b"\0", b"\xff", b"\xff\xff\xff\xff", b"\0\0\x80\x7f"]))
        gone = draw(st.just(len(new)) | st.integers(0, 8))
        changed[at : at + gone] = new
    return bytes(changed[: draw(st.just(len(changed)) | st.integers(0, len(changed)))])


@pytest.mark.parametrize("name", SMALL)
@settings(deadline=None, max_examples=12)
@given(data=st.data())
def test_both_decoders_come_to_the_same_with_a_changed_payload(name: str, data: st.DataObject) -> None:
    sound = SOUND[name]
    sections = list(sound.sections)
    place = data.draw(st.integers(0, len(sections) - 1))
    old = sections[place]
    codec = data.draw(st.just(old.codec) | st.just(old.codec) | st.integers(0, 6).filter(lambda codec: codec != 1))
    payload = data.draw(mutations(old.data))
    sections[place] = CraftedSection(level=old.level, codec=codec, layers=old.layers, data=payload)
    levels = data.draw(st.integers(1, 3))
    found, expected = sound.read_both(sections, levels)
    if isinstance(found, int) or isinstance(expected, int):
        assert (found, payload.hex()) == (expected, payload.hex())
        return
    dtype = sound.identity.layout.dtype
    floats = to_floats(expected, dtype)
    tame = np.abs(floats) < 1e30
    if tame.all():  # else float32 and float64 overflow in different places
        assert_close(found, expected, dtype)
