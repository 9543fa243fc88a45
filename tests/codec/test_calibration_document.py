"""The calibration artefact: the package and the reader written from the document take and refuse the same files."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
from crafted_scalable import make_calibration, pack_safetensors
from reference_calibration import RefusedError, read_calibration, read_safetensors

from kvstore_s3.codec.calibration import SPANS, Calibration
from kvstore_s3.errors import InvalidArgumentError
from kvstore_s3.layout import KVLayout

NAMESPACE = bytes(range(32))
LAYOUT = KVLayout(3, 2, 4, "bfloat16")
SOUND = make_calibration(
    "artefact",
    namespace=NAMESPACE,
    span="group",
    layers=3,
    kv_heads=2,
    dim=4,
    layer_group=2,
    components=9,
    rotary="halves",
    frequencies=[1.0, 0.5],
    rotated=[1, 0, 1],
)


def changed(metadata: dict[str, str] | None = None, **tensors: np.ndarray | None) -> bytes:
    """The sound artefact with other metadata or tensors; dots in names are written `__`, None leaves one out."""
    found_metadata, found = read_safetensors(SOUND)
    for name, tensor in tensors.items():
        found.pop(name.replace("__", "."), None)
        if tensor is not None:
            found[name.replace("__", ".")] = tensor
    return pack_safetensors(found, found_metadata | (metadata or {}))


def tensor(name: str) -> np.ndarray:
    return read_safetensors(SOUND)[1][name].copy()


def altered(name: str, place: object, value: float) -> np.ndarray:
    found = tensor(name)
    found[place] = value
    return found


def patched_header(**entries: object) -> bytes:
    size = int.from_bytes(SOUND[:8], "little")
    header = json.loads(SOUND[8 : 8 + size])
    header["mean"] |= entries
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + SOUND[8 + size :]


def with_a_tensor_of(dtype: str, size: int) -> bytes:
    """The sound artefact and a tensor of one number of a dtype that it has no use for."""
    begin = int.from_bytes(SOUND[:8], "little")
    header = json.loads(SOUND[8 : 8 + begin])
    end = len(SOUND) - 8 - begin
    header["more"] = {"dtype": dtype, "shape": [1], "data_offsets": [end, end + size]}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + SOUND[8 + begin :] + bytes(size)


SOUND_AGAIN = Calibration.from_bytes(SOUND, LAYOUT, NAMESPACE).to_bytes()

WRONG = {
    "empty": b"",
    "cut in its header": SOUND[:100],
    "cut in its tensors": SOUND[:-1],
    "a header that is no JSON": SOUND[:8] + b"!" + SOUND[9:],
    "a header length beyond the file": b"\xff" * 8 + SOUND[8:],
    "a tensor beyond the file": patched_header(data_offsets=[2**40, 2**40 + 192]),
    "a tensor of another size than its place": patched_header(shape=[3, 2, 2, 5]),
    "another format": changed({"format": "kvstore-s3 calibration 2"}),
    "an unknown span": changed({"span": "layer"}),
    "an unknown rotary": changed({"rotary": "thirds"}),
    "no layers to a group": changed({"layer_group": "0"}),
    "a group larger than the model": changed({"layer_group": "4"}),
    "a layer group in words": changed({"layer_group": "two"}),
    "a layer group with a zero in front": changed({"layer_group": "02"}),
    "a layer group and a line's end": changed({"layer_group": "2\n"}),
    "no mean": changed(mean=None),
    "a mean that is not finite": changed(mean=altered("mean", (0, 0, 0, 0), np.nan)),
    "a mean of another dtype": changed(mean=tensor("mean").astype(np.float16)),
    "a mean of another shape": changed(mean=tensor("mean")[:2]),
    "no classes of one unit": changed(classes__1__1=None),
    "class 48": changed(classes__0__0=altered("classes.0.0", 0, 48)),
    "more components than numbers": changed(classes__0__0=np.zeros(33, np.uint8)),
    "scales of another number": changed(synthesis_scale__0__0=np.ones(8, np.float32)),
    "an infinite scale": changed(synthesis_scale__0__0=altered("synthesis_scale.0.0", 0, np.inf)),
    "no synthesis": changed(synthesis__0__1=None),
    "no analysis": changed(analysis__0__1=None),
    "a synthesis of another shape": changed(synthesis__0__1=tensor("synthesis.0.1").T.copy()),
    "no frequencies": changed(inverse_frequencies=None),
    "too many frequencies": changed(inverse_frequencies=np.ones(3, np.float32)),
    "a frequency that is not finite": changed(inverse_frequencies=np.array([1, np.inf], np.float32)),
    "rotated layers of another number": changed(rotated=np.ones(2, np.uint8)),
    "a layer rotated twice": changed(rotated=np.full(3, 2, np.uint8)),
    "first in another order": changed(first=np.array([5, 9, 13], np.uint8)),
    "first of 0": changed(first=np.array([13, 9, 0], np.uint8)),
    "first of 49": changed(first=np.array([49, 9, 5], np.uint8)),
    "frequencies that do not sum to 4096": changed(base=altered("base", (20, 0), 1)),
    "no slot for the escape": changed(base=altered("base", (13, slice(120, 256)), 0)),
    "a class that is not coded with frequencies": changed(base=altered("base", (12, 255), 4096)),
    "c1 of 0": changed(refine=altered("refine", (0, 20, 0, 0), 0)),
    "c2 of 4096": changed(refine=altered("refine", (1, 20, 3, 1), 4096)),
    "c1 beside c2": changed(refine=altered("refine", (1, 20, 3, 1), tensor("refine")[1, 20, 3, 0])),
    "a class that is not refined with thresholds": changed(refine=altered("refine", (0, 8, 0, 1), 1)),
    "a shift above a half": changed(shift=altered("shift", (0, 0), 0.75)),
    "a shift below 0": changed(shift=altered("shift", (2, 47), -0.25)),
    "a shift that is not a number": changed(shift=altered("shift", (2, 47), np.nan)),
}


def test_both_readers_take_the_sound_artefact_and_ignore_what_they_do_not_know() -> None:
    for data in (SOUND, changed({"note": "1"}, more=np.zeros(3, np.float32))):
        ours, theirs = Calibration.from_bytes(data, LAYOUT, NAMESPACE), read_calibration(data)
        assert (ours.span, ours.layer_group) == (SPANS[theirs.span], theirs.layer_group)
        assert sorted(ours.units) == sorted(theirs.units)
        for place, unit in ours.units.items():
            np.testing.assert_array_equal(unit.classes, theirs.units[place].classes)
            np.testing.assert_array_equal(unit.synthesis, theirs.units[place].synthesis)


def test_a_tensor_of_a_dtype_that_numpy_does_not_have_is_ignored() -> None:
    data = with_a_tensor_of("BF16", 2)
    assert Calibration.from_bytes(data, LAYOUT, NAMESPACE).to_bytes() == SOUND_AGAIN
    assert read_calibration(data).span == read_calibration(SOUND).span


@pytest.mark.parametrize("what", WRONG)
def test_both_readers_refuse_an_artefact_with(what: str) -> None:
    with pytest.raises(RefusedError):
        read_calibration(WRONG[what])
    with pytest.raises(InvalidArgumentError):
        Calibration.from_bytes(WRONG[what], LAYOUT, NAMESPACE)


def test_an_artefact_that_the_package_writes_is_read_as_it_is() -> None:
    again = Calibration.from_bytes(SOUND, LAYOUT, NAMESPACE).to_bytes()
    assert read_safetensors(again)[0] == read_safetensors(SOUND)[0]
    for name, found in read_safetensors(again)[1].items():
        np.testing.assert_array_equal(found, tensor(name))
