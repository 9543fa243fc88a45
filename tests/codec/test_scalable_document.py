"""The document, the native coder and the two slow ones written from the document say the same, bit for bit."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import numpy as np
import reference_decoder as reference
from crafted_scalable import chain, draw_integers, encode_integers, make_calibration, make_tables
from golden_files import OBJECTS, read_object
from golden_objects import identity_from_json
from hypothesis import given, settings
from hypothesis import strategies as st
from object_decoder import to_reference
from reference_calibration import Tables, read_calibration, uncalibrated_tables
from reference_scalable import Decoder, Head, Section, Stream, decode, reconstruct
from test_golden_scalable import assert_close

from kvstore_s3 import _native
from kvstore_s3.codec import tables as package_tables
from kvstore_s3.codec.calibration import SPANS, Calibration
from kvstore_s3.codec.rotation import STYLES, Rotation
from kvstore_s3.codec.scalable import decode_scalable, encode_scalable
from kvstore_s3.layout import DTYPES, KVLayout

ROOT = Path(__file__).parent.parent.parent
NAMESPACE = bytes(range(32))


# The document


def test_the_document_has_the_uncalibrated_tables_of_the_package() -> None:
    found, expected = uncalibrated_tables(), package_tables.uncalibrated_tables()
    assert tuple(found.first) == expected.first
    np.testing.assert_array_equal(found.base, expected.base)
    np.testing.assert_array_equal(found.refine, expected.refine)
    np.testing.assert_array_equal(np.array(found.shift, np.float32), expected.shift)


def test_the_byte_dumps_in_the_document_are_the_sections_of_the_golden_example() -> None:
    text = (ROOT / "docs" / "format-scalable.md").read_text(encoding="utf-8")
    data, identity = (
        read_object("scalable-example"),
        identity_from_json(OBJECTS["objects"]["scalable-example"]["identity"]),
    )
    expected = to_reference(identity)
    sections = reference.read_header(data, expected, frozenset({reference.SCALABLE}))
    for number, section in enumerate(sections):
        block = re.search(rf"```level {number}\n(.*?)```", text, re.DOTALL)
        assert block is not None
        dump = b"".join(bytes.fromhex(line[:24]) for line in block[1].splitlines())
        assert dump == reference.read_payload(data, number, section, expected)


# The entropy coder, both ways


def native_tables(tables: Tables) -> _native.ScalableTables:
    arrays = (np.array(tables.base, np.uint16), np.array(tables.refine, np.uint16), np.array(tables.shift, np.float32))
    return _native.ScalableTables(np.array(tables.first, np.uint8), *arrays)


@st.composite
def streams(draw: st.DrawFn) -> tuple[Tables, list[int], list[list[int]], int]:
    """Tables, classes, q2 by token and component, and levels."""
    first = sorted(draw(st.lists(st.integers(1, 48), min_size=3, max_size=3)), reverse=True)
    tables = make_tables(first) if draw(st.booleans()) else uncalibrated_tables()
    count, tokens = draw(st.sampled_from([1, 3, 31, 32, 33, 70])), draw(st.integers(1, 6))
    classes = draw(st.lists(st.integers(0, 47), min_size=count, max_size=count))
    q2 = draw_integers(f"{draw(st.integers(0, 1000))}", classes, tokens)
    for _ in range(draw(st.integers(0, 4))):
        token, component = draw(st.integers(0, tokens - 1)), draw(st.integers(0, count - 1))
        q2[token][component] = draw(st.integers(-32404, 32404))
    return tables, classes, q2, draw(st.integers(1, 3))


@settings(deadline=None, max_examples=60)
@given(streams())
def test_the_native_coder_and_the_slow_ones_write_and_read_the_same(
    drawn: tuple[Tables, list[int], list[list[int]], int],
) -> None:
    tables, classes, q2, levels = drawn
    slow = encode_integers(q2, classes, tables, levels)
    native, of = native_tables(tables), np.array(classes, np.uint8)
    for implementation in _native.implementations():
        options = {"levels": levels, "implementation": implementation}
        states, words, escapes = _native.scalable_encode(native, of, np.array(q2, np.float32), **options)
        assert states == struct.pack(f"<{len(slow.states)}I", *slow.states)
        assert words == [struct.pack(f"<{len(level)}H", *level) for level in slow.words]
        assert escapes == struct.pack(f"<{len(slow.escapes)}h", *slow.escapes)
    head = Head(True, 0, levels, 0, 0, [], [], tables)
    decoder = Decoder(Stream(classes, [], [], slow.states, slow.words[0], slow.escapes, {}), head, len(q2))
    for level in range(levels):
        if level == 0:
            decoder.decode_base()
        else:
            decoder.decode_refinement(level, slow.words[level])
        assert decoder.q == [
            [chain(q, number, tables.first)[level] for q, number in zip(row, classes, strict=True)] for row in q2
        ]
        expected = reconstruct(decoder.q, level, decoder.stream, tables)
        for implementation in _native.implementations():
            y = np.full((len(q2), len(classes)), np.nan, np.float32)
            options = {"object_levels": levels, "implementation": implementation}
            assert _native.scalable_decode(native, of, states, words[: level + 1], escapes, y, **options) == 0
            np.testing.assert_allclose(y, expected, rtol=2e-7, atol=0)


# Sections, both modes


@st.composite
def rotations(draw: st.DrawFn, dim: int, layers: int) -> Rotation:
    style = draw(st.sampled_from(STYLES if dim >= 2 else STYLES[:1]))
    if style == "none":
        return Rotation.none(layers)
    pairs = draw(st.integers(1, dim // 2))
    rotated = draw(st.lists(st.integers(0, 1), min_size=layers, max_size=layers))
    return Rotation(style, (10.0 ** -np.arange(pairs)).astype(np.float32), np.array(rotated, np.uint8))


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_the_reference_decoder_reads_what_the_package_codes(data: st.DataObject) -> None:
    layers, heads, dim = (
        data.draw(st.integers(1, 3)),
        data.draw(st.integers(1, 3)),
        data.draw(st.sampled_from([1, 2, 5, 8])),
    )
    tokens, first = data.draw(st.integers(1, 20)), data.draw(st.sampled_from([0, 20, 2**20]))
    dtype = data.draw(st.sampled_from(["bfloat16", "float16", "float32"]))
    rotation = data.draw(rotations(dim, layers))
    span = data.draw(st.sampled_from([None, *SPANS]))
    artefact = (
        None
        if span is None
        else make_calibration(
            str(data.draw(st.integers(0, 99))),
            namespace=NAMESPACE,
            span=span,
            layers=layers,
            kv_heads=heads,
            dim=dim,
            layer_group=layers,
            components=data.draw(st.integers(1, 40)),
            rotary=rotation.style,
            frequencies=rotation.inverse_frequencies.tolist(),
            rotated=rotation.rotated.tolist(),
        )
    )
    calibration = artefact and Calibration.from_bytes(artefact, KVLayout(layers, heads, dim, dtype), NAMESPACE)
    rng = np.random.Generator(np.random.PCG64(data.draw(st.integers(0, 2**32))))
    floats = rng.normal(size=(layers, 2, tokens, heads, dim)) * 2.0 ** rng.integers(-3, 3, (1, 1, 1, 1, dim))
    bits = to_bits(floats.astype(np.float32), dtype)
    for _ in range(data.draw(st.integers(0, 3))):
        bits.reshape(-1)[data.draw(st.integers(0, bits.size - 1))] = to_bits(np.array([np.nan], np.float32), dtype)[0]
    coded = encode_scalable(
        bits, dtype, layer_begin=0, first_position=first, calibration=calibration or None, rotation=rotation
    )
    for levels in (1, 2, 3):
        out = np.zeros_like(bits)
        payloads = [(codec_id, memoryview(payload)) for codec_id, payload in coded[:levels]]
        place = {"layer_begin": 0, "head_begin": 0, "section_heads": heads, "first_position": first}
        decode_scalable(payloads, out, dtype, calibration=calibration or None, **place)
        if coded[0][0] != 3:
            np.testing.assert_array_equal(out, bits)
            continue
        section = Section(layers, tokens, heads, dim, DTYPES[dtype].id, 3, 0, 0, first)
        known = read_calibration(artefact) if artefact else None
        expected = decode([payload for _, payload in coded[:levels]], section, known)
        assert_close(out, expected.astype(out.dtype), dtype)


def to_bits(values: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "float16":
        return values.astype(np.float16).view(np.uint16)
    wide = values.view(np.uint32)
    return wide.copy() if dtype == "float32" else (wide >> 16).astype(np.uint16)
