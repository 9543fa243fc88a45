from __future__ import annotations

import json
import os
import shutil
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import reference_cachegen
from codec.sections import decode_guarded
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore_s3.codec import arithmetic
from kvstore_s3.codec.base import Bits
from kvstore_s3.codec.cachegen import DTYPES, CacheGenCodec, from_float, published_bins, to_float
from kvstore_s3.codec.registry import codec_for, encode_cachegen_section
from kvstore_s3.config import find_tools_of_this_environment
from kvstore_s3.errors import BitstreamFault, DamagedObjectError, InvalidArgumentError

try:
    arithmetic.require_coder()
except InvalidArgumentError as error:
    pytest.skip(str(error), allow_module_level=True)

GOLDEN = Path(__file__).parent.parent / "golden" / "cachegen"
INDEX = json.loads((GOLDEN / "index.json").read_text())
WIDTHS = {"bfloat16": np.dtype(np.uint16), "float16": np.dtype(np.uint16), "float32": np.dtype(np.uint32)}


def draw(shape: tuple[int, ...], dtype: str, seed: int = 0) -> Bits:
    """Normal values; scale and mean differ in each channel."""
    rng = np.random.Generator(np.random.PCG64(seed))
    layers, kinds, _, heads, dim = shape
    scale = 2.0 ** rng.uniform(-4, 4, (layers, kinds, 1, heads, dim))
    return from_float(((rng.normal(size=shape) + rng.normal(size=scale.shape)) * scale).astype(np.float32), dtype)


def decode(payload: bytes, shape: tuple[int, ...], dtype: str, head_begin: int = 0, section_heads: int = 0) -> Bits:
    codec = CacheGenCodec(dtype)
    heads = section_heads or shape[3]
    return decode_guarded(codec, payload, shape, WIDTHS[dtype], head_begin=head_begin, section_heads=heads)


def floats(bits: Bits, dtype: str) -> np.ndarray:
    return to_float(bits.reshape(-1, 1, 1), dtype).reshape(bits.shape)


@st.composite
def sections(draw_from: st.DrawFn) -> tuple[str, tuple[tuple[int, ...], ...], Bits]:
    """dtype, bins and bit patterns of all kinds, at most some thousand values."""
    dtype = draw_from(st.sampled_from(DTYPES))
    layers, kinds, tokens, heads, dim = (draw_from(st.integers(1, most)) for most in (2, 2, 45, 3, 9))
    bins = tuple(tuple(draw_from(st.sampled_from([4, 16, 32, 128])) for _ in range(kinds)) for _ in range(layers))
    values = draw((layers, kinds, tokens, heads, dim), dtype, draw_from(st.integers(0, 2**32)))
    rng = np.random.Generator(np.random.PCG64(draw_from(st.integers(0, 2**32))))
    tiny, large = draw_from(st.sampled_from([(1.0, 1.0), (1e-42, 1e4), (0.0, 1.0), (1e-30, 3e4)]))
    factors = rng.choice(np.array([1, tiny, large], np.float32), (1, kinds, tokens, 1, 1))
    return dtype, bins, from_float(floats(values, dtype) * factors, dtype)


@settings(max_examples=60, deadline=None)
@given(sections())
def test_a_decoder_written_from_the_document_gives_the_same_bits(section: tuple[str, tuple, Bits]) -> None:
    dtype, bins, values = section
    payload = CacheGenCodec(dtype, bins).encode(values)
    expected = reference_cachegen.decode(payload, dtype, values.shape)
    np.testing.assert_array_equal(floats(decode(payload, values.shape, dtype), dtype), expected)


@settings(max_examples=60, deadline=None)
@given(sections(), st.data())
def test_a_range_of_heads_is_decoded_alone(section: tuple[str, tuple, Bits], data: st.DataObject) -> None:
    dtype, bins, values = section
    heads = values.shape[3]
    begin = data.draw(st.integers(0, heads - 1))
    end = data.draw(st.integers(begin + 1, heads))
    payload = CacheGenCodec(dtype, bins).encode(values)
    shape = (*values.shape[:3], end - begin, values.shape[4])
    whole = decode(payload, values.shape, dtype)
    np.testing.assert_array_equal(decode(payload, shape, dtype, begin, heads), whole[:, :, :, begin:end])


def test_anchors_are_within_half_of_a_127th_and_the_others_within_half_a_bin() -> None:
    shape, bins = (2, 2, 64, 2, 16), ((32, 16), (16, 8))
    values = draw(shape, "float32")
    decoded = floats(decode(CacheGenCodec("float32", bins).encode(values), shape, "float32"), "float32")
    true = floats(values, "float32")
    anchors = decoded[:, :, np.arange(64) // 10 * 10]
    is_anchor = (np.arange(64) % 10 == 0)[None, None, :, None, None]
    most = np.array(
        [[127 if anchor else each // 2 - 1 for each in kinds] for kinds in bins for anchor in (True, False)]
    )
    steps = most.reshape(2, 2, 2).swapaxes(1, 2)[:, :, None, None, None, :]
    coded = np.where(is_anchor, true, true - anchors)
    largest = np.abs(coded).max(axis=(3, 4), keepdims=True)
    bound = largest / np.where(is_anchor, steps[..., 0], steps[..., 1]) / 2
    assert (np.abs(decoded - true) <= bound * 1.01).all()


def test_long_sections_are_cut_into_several_streams() -> None:
    values = draw((1, 1, 9000, 1, 8), "bfloat16")
    payload = CacheGenCodec("bfloat16", ((8,),)).encode(values)
    expected = reference_cachegen.decode(payload, "bfloat16", values.shape)
    np.testing.assert_array_equal(floats(decode(payload, values.shape, "bfloat16"), "bfloat16"), expected)


def test_the_longest_chunk_has_a_stream_for_each_channel() -> None:
    values = draw((1, 1, 65536, 1, 2), "bfloat16")
    payload = CacheGenCodec("bfloat16", ((16,),)).encode(values)
    wrong = floats(decode(payload, values.shape, "bfloat16"), "bfloat16") - floats(values, "bfloat16")
    assert np.sqrt(np.mean(wrong**2)) < 0.1 * np.std(floats(values, "bfloat16"))


@pytest.mark.parametrize("name", INDEX)
def test_golden_payloads_are_written_and_decoded_bit_for_bit(name: str) -> None:
    dtype, shape = INDEX[name]["dtype"], tuple(INDEX[name]["shape"])
    values, payload, decoded = ((GOLDEN / f"{name}.{part}").read_bytes() for part in ("values", "payload", "decoded"))
    bits = np.frombuffer(values, WIDTHS[dtype]).reshape(shape)
    assert CacheGenCodec(dtype, tuple(map(tuple, INDEX[name]["bins"]))).encode(bits) == payload
    assert decode(payload, shape, dtype).tobytes() == decoded


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_values_stay_finite(dtype: str) -> None:
    values = np.full((1, 2, 12, 1, 4), np.inf, np.float32)
    values[:, :, 1::2] *= -1
    largest = from_float(values, dtype)
    codec_id, payload = encode_cachegen_section(largest, dtype, layer_begin=0, model_layers=32)
    out = np.empty_like(largest)
    codec_for(codec_id, dtype, cachegen=True).decode(memoryview(payload), out, head_begin=0, section_heads=1)
    assert np.isfinite(floats(out, dtype)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("token", [3, 10])
def test_a_section_with_a_value_that_is_not_finite_is_coded_exactly(dtype: str, special: float, token: int) -> None:
    values = floats(draw((1, 2, 300, 2, 16), dtype), dtype)
    values[0, 1, token, 1, 3] = special
    with np.errstate(invalid="ignore"):
        bits = values.astype(np.float16).view(np.uint16) if dtype == "float16" else values.view(np.uint32)
    bits = (bits >> 16).astype(np.uint16) if dtype == "bfloat16" else bits
    with pytest.raises(InvalidArgumentError, match="finite values alone"):
        CacheGenCodec(dtype, ((16, 16),)).encode(bits)
    codec_id, payload = encode_cachegen_section(bits, dtype, layer_begin=0, model_layers=32)
    out = np.empty_like(bits)
    codec_for(codec_id, dtype, cachegen=True).decode(memoryview(payload), out, head_begin=0, section_heads=2)
    assert codec_id != 5
    np.testing.assert_array_equal(out, bits)


def test_a_whole_chunk_is_coded_and_a_short_one_that_would_not_gain_is_exact() -> None:
    whole, short = draw((1, 2, 256, 2, 32), "bfloat16"), draw((1, 2, 16, 2, 32), "bfloat16")
    codec_id, payload = encode_cachegen_section(whole, "bfloat16", layer_begin=20, model_layers=32)
    assert codec_id == 5
    assert len(payload) < 0.4 * whole.nbytes
    codec_id, payload = encode_cachegen_section(short, "bfloat16", layer_begin=20, model_layers=32)
    assert codec_id in (0, 1)
    assert len(payload) <= short.nbytes


def test_fp8_is_coded_exactly() -> None:
    values = (draw((1, 2, 64, 2, 32), "bfloat16") >> 8).astype(np.uint8)
    codec_id, _ = encode_cachegen_section(values, "float8_e4m3fn", layer_begin=0, model_layers=32)
    assert codec_id in (0, 2)
    with pytest.raises(DamagedObjectError, match=r"codec 5 .cachegen. does not code float8_e4m3fn"):
        codec_for(5, "float8_e4m3fn", cachegen=True)


def test_objects_of_other_profiles_have_no_such_section() -> None:
    assert codec_for(5, "bfloat16", cachegen=True).name == "cachegen"
    with pytest.raises(DamagedObjectError, match=r"codec 5 .cachegen. does not code bfloat16 here"):
        codec_for(5, "bfloat16")


def test_bins_are_those_of_the_published_configuration() -> None:
    model = published_bins(0, 32, 32)
    assert [k for k, _ in model] == [32] * 10 + [16] * 22
    assert [v for _, v in model] == [32] * 2 + [16] * 30
    assert published_bins(8, 4, 32) == model[8:12]
    assert set(published_bins(0, 8, 8)) == {(32, 32)}


def test_bins_must_fit_the_section() -> None:
    values = draw((2, 2, 10, 1, 4), "bfloat16")
    with pytest.raises(InvalidArgumentError, match="do not fit a section"):
        CacheGenCodec("bfloat16", ((16, 16),)).encode(values)
    with pytest.raises(InvalidArgumentError, match="even number from 4 to 128, not 17"):
        CacheGenCodec("bfloat16", ((16, 17), (16, 16))).encode(values)


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 127), st.integers(1, 65536), st.integers(0, 2**32))
def test_every_symbol_has_a_frequency_and_they_sum_to_65536(alphabet: int, total: int, seed: int) -> None:
    rng = np.random.Generator(np.random.PCG64(seed))
    counts = rng.multinomial(total, rng.dirichlet(np.full(alphabet, 0.1)), 3)
    cdfs = arithmetic.cumulate(counts)
    assert arithmetic.ascends(cdfs)
    assert (cdfs[:, -1] == 0).all()


# One layer, K alone, 3 tokens, 1 head, dim 2, 4 bins: the worked example of the document.
EXAMPLE = (GOLDEN / "example.payload").read_bytes()
EXAMPLE_SHAPE = (1, 1, 3, 1, 2)
BINS, SCALES, ANCHORS, CDFS, LENGTH, STREAM = 0, 1, 7, 9, 17, 21


def changed(offset: int, *octets: int) -> bytes:
    return EXAMPLE[:offset] + bytes(octets) + EXAMPLE[offset + len(octets) :]


@pytest.mark.parametrize(
    ("payload", "code"),
    [
        (b"", BitstreamFault.TRUNCATED),
        (EXAMPLE[:SCALES], BitstreamFault.TRUNCATED),
        (EXAMPLE[: ANCHORS - 1], BitstreamFault.TRUNCATED),
        (EXAMPLE[: CDFS - 1], BitstreamFault.TRUNCATED),
        (EXAMPLE[: LENGTH - 1], BitstreamFault.TRUNCATED),
        (EXAMPLE[: STREAM - 1], BitstreamFault.TRUNCATED),
        (EXAMPLE[:STREAM], BitstreamFault.TRUNCATED),
        (changed(LENGTH, 2), BitstreamFault.TRUNCATED),
        (changed(LENGTH, 255, 255, 255, 255), BitstreamFault.TRUNCATED),
        (EXAMPLE + b"\0", BitstreamFault.BAD_PAYLOAD),
        (changed(BINS, 0), BitstreamFault.BAD_PAYLOAD),
        (changed(BINS, 2), BitstreamFault.BAD_PAYLOAD),
        (changed(BINS, 5), BitstreamFault.BAD_PAYLOAD),
        (changed(BINS, 130), BitstreamFault.BAD_PAYLOAD),
        (changed(SCALES, 0x80, 0x7F), BitstreamFault.BAD_PAYLOAD),
        (changed(SCALES, 0xC0, 0x7F), BitstreamFault.BAD_PAYLOAD),
        (changed(SCALES, 0x80, 0xBF), BitstreamFault.BAD_PAYLOAD),
        (changed(SCALES, 0x00, 0x80), BitstreamFault.BAD_PAYLOAD),
        (changed(SCALES, 0x7F, 0x0D), BitstreamFault.BAD_PAYLOAD),
        (changed(ANCHORS, 0x80), BitstreamFault.BAD_PAYLOAD),
        (changed(CDFS, 0, 0), BitstreamFault.BAD_PAYLOAD),
        (changed(CDFS, 1, 128, 1, 128), BitstreamFault.BAD_PAYLOAD),
        (changed(CDFS + 4, 9, 0, 8, 0), BitstreamFault.BAD_PAYLOAD),
        (changed(LENGTH, 0)[:STREAM], BitstreamFault.BAD_PAYLOAD),
        (changed(LENGTH, 17) + bytes(16), BitstreamFault.BAD_PAYLOAD),
    ],
    ids=[
        "empty",
        "no scales",
        "scales cut off",
        "anchors cut off",
        "CDFs cut off",
        "lengths cut off",
        "no stream",
        "stream cut off",
        "stream of 4 GiB",
        "bytes after the last plane",
        "no bins",
        "two bins",
        "odd bins",
        "too many bins",
        "infinite scale",
        "scale not a number",
        "negative scale",
        "scale minus zero",
        "scale below the least",
        "anchor of -128",
        "CDF from zero",
        "CDF that stands still",
        "CDF that falls",
        "empty stream",
        "stream longer than its symbols can be",
    ],
)
def test_each_fault_has_its_code(payload: bytes, code: BitstreamFault) -> None:
    with pytest.raises(DamagedObjectError) as caught:
        decode(payload, EXAMPLE_SHAPE, "float32")
    assert caught.value.code == code


def test_any_stream_decodes_to_some_values_as_the_document_says() -> None:
    for stream in (b"\0", b"\xff", b"\xff" * 12, struct.pack("<QI", 0x0123456789ABCDEF, 0xFEDCBA98)):
        payload = EXAMPLE[:LENGTH] + struct.pack("<I", len(stream)) + stream
        expected = reference_cachegen.decode(payload, "float32", EXAMPLE_SHAPE)
        np.testing.assert_array_equal(floats(decode(payload, EXAMPLE_SHAPE, "float32"), "float32"), expected)


SAMPLE = draw((1, 2, 32, 2, 8), "float16", 2)
SAMPLE_PAYLOAD = CacheGenCodec("float16", ((16, 8),)).encode(SAMPLE)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, len(SAMPLE_PAYLOAD) - 1), st.integers(0, 255)), max_size=4),
    st.one_of(st.just(len(SAMPLE_PAYLOAD)), st.integers(0, len(SAMPLE_PAYLOAD))),
)
def test_damaged_payloads_decode_to_something_finite_or_are_refused(changes: list[tuple[int, int]], end: int) -> None:
    payload = bytearray(SAMPLE_PAYLOAD)
    for offset, octet in changes:
        payload[offset] = octet
    try:
        out = decode(bytes(payload[:end]), SAMPLE.shape, "float16")
    except DamagedObjectError as error:
        refused = error.code
    else:
        refused = BitstreamFault.BAD_PAYLOAD
        assert end == len(payload)
        assert np.isfinite(floats(out, "float16")).all()
    assert refused in (BitstreamFault.TRUNCATED, BitstreamFault.BAD_PAYLOAD)


def test_a_payload_of_another_shape_is_refused() -> None:
    for shape in ((1, 2, 31, 2, 8), (1, 2, 32, 2, 7), (1, 2, 32, 3, 8), (2, 2, 32, 2, 8), (1, 1, 32, 2, 8)):
        with pytest.raises(DamagedObjectError):
            decode(SAMPLE_PAYLOAD, shape, "float16")


@pytest.mark.parametrize("missing", ["torchac", "ninja"])
def test_what_is_not_installed_is_named_with_what_to_do(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arithmetic._load_coder.cache_clear()
    if missing == "torchac":
        monkeypatch.setitem(sys.modules, "torchac", None)
    else:
        monkeypatch.setattr(shutil, "which", lambda name: None)
    try:
        with pytest.raises(InvalidArgumentError, match=rf"{missing}.*pip install 'kvstore-s3\[cachegen\]'"):
            decode(EXAMPLE, EXAMPLE_SHAPE, "float32")
    finally:
        monkeypatch.undo()
        arithmetic.require_coder()


def test_a_build_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    arithmetic._load_coder.cache_clear()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file" / "folder"))
    try:
        with pytest.raises(InvalidArgumentError, match=r"cannot be compiled: .*TORCH_EXTENSIONS_DIR"):
            arithmetic.require_coder()
    finally:
        monkeypatch.undo()
        arithmetic.require_coder()


def test_ninja_is_found_beside_a_python_that_is_not_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(Path(shutil.which("c++") or "/usr/bin/c++").parent / "nothing"))
    find_tools_of_this_environment()
    assert os.environ["PATH"].split(os.pathsep)[-1] == str(Path(sys.executable).parent)
    assert shutil.which("ninja") is not None
