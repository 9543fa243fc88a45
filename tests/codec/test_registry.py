from __future__ import annotations

import numpy as np
import pytest
from codec.sections import draw_normal, draw_random

from kvstore_s3.codec.registry import codec_for, encode_section
from kvstore_s3.errors import BitstreamFault, DamagedObjectError
from kvstore_s3.layout import DTYPES

RNG = np.random.Generator(np.random.PCG64(3))
SHAPE = (2, 2, 64, 2, 16)
WIDTHS = {1: np.uint8, 2: np.uint16, 4: np.uint32}


@pytest.mark.parametrize(("dtype", "codec_id"), [("bfloat16", 1), ("float16", 2), ("float32", 2), ("float8_e4m3fn", 2)])
def test_each_dtype_is_coded_by_the_codec_that_suits_it(dtype: str, codec_id: int) -> None:
    bits = (draw_normal(RNG, SHAPE) & 0x7F80) >> 8
    values = bits.astype(WIDTHS[DTYPES[dtype].itemsize])
    chosen, payload = encode_section(values, dtype)
    assert chosen == codec_id
    assert len(payload) < values.nbytes


@pytest.mark.parametrize("dtype", DTYPES)
def test_random_bits_are_stored_raw_in_exactly_their_size(dtype: str) -> None:
    width = WIDTHS[DTYPES[dtype].itemsize]
    values = RNG.integers(0, np.iinfo(width).max, SHAPE, width, endpoint=True)
    assert encode_section(values, dtype) == (0, values.tobytes())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("draw", [draw_normal, draw_random])
def test_what_was_chosen_decodes_to_the_values(dtype: str, draw: object) -> None:
    values = draw(RNG, SHAPE).astype(WIDTHS[DTYPES[dtype].itemsize])  # type: ignore[operator]
    codec_id, payload = encode_section(values, dtype)
    out = np.zeros_like(values)
    codec_for(codec_id, dtype).decode(memoryview(payload), out, head_begin=0, section_heads=2)
    np.testing.assert_array_equal(out, values)


@pytest.mark.parametrize(("codec_id", "dtype"), [(1, "float16"), (1, "float32"), (3, "bfloat16"), (255, "bfloat16")])
def test_an_unknown_codec_or_one_of_another_dtype_is_refused(codec_id: int, dtype: str) -> None:
    with pytest.raises(DamagedObjectError) as caught:
        codec_for(codec_id, dtype)
    assert caught.value.code == BitstreamFault.UNSUPPORTED_FEATURE


@pytest.mark.parametrize(("change", "code"), [(-1, BitstreamFault.TRUNCATED), (1, BitstreamFault.BAD_PAYLOAD)])
def test_a_raw_payload_of_another_length_is_refused(change: int, code: BitstreamFault) -> None:
    values = draw_normal(RNG, SHAPE)
    payload = memoryview(bytes(values.nbytes + change))
    with pytest.raises(DamagedObjectError) as caught:
        codec_for(0, "bfloat16").decode(payload, np.zeros_like(values), head_begin=0, section_heads=2)
    assert caught.value.code == code
