from __future__ import annotations

import struct

import numpy as np
import pytest
import zstandard
from codec.sections import decode_guarded
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore_s3.codec.base import Bits
from kvstore_s3.codec.planes import PlanesCodec
from kvstore_s3.errors import BitstreamFault, DamagedObjectError

CODEC = PlanesCodec()
SHAPE = (1, 2, 8, 1, 8)
VALUES = 128


def decode(
    payload: bytes, shape: tuple[int, ...], dtype: np.dtype, head_begin: int = 0, section_heads: int = 1
) -> Bits:
    return decode_guarded(CODEC, payload, shape, dtype, head_begin=head_begin, section_heads=section_heads)


def payload_of(plane: bytes) -> bytes:
    """One head of a 1-byte dtype."""
    return struct.pack("<I", len(plane)) + plane


@st.composite
def byte_sections(draw: st.DrawFn) -> Bits:
    dtype = draw(st.sampled_from([np.uint8, np.uint16, np.uint32]))
    shape = tuple(draw(st.integers(1, most)) for most in (3, 2, 20, 4, 16))
    rng = np.random.Generator(np.random.PCG64(draw(st.integers(0, 2**32))))
    most = draw(st.sampled_from([1, 7, np.iinfo(dtype).max]))
    return rng.integers(0, most, shape, dtype, endpoint=True)


@settings(max_examples=60, deadline=None)
@given(byte_sections(), st.data())
def test_every_dtype_comes_back_bit_for_bit_and_so_does_a_range_of_heads(values: Bits, data: st.DataObject) -> None:
    heads = values.shape[3]
    begin = data.draw(st.integers(0, heads - 1))
    shape = (*values.shape[:3], heads - begin, values.shape[4])
    out = decode(CODEC.encode(values), shape, values.dtype, begin, heads)
    np.testing.assert_array_equal(out, values[:, :, :, begin:])


def test_a_plane_that_zstd_cannot_shorten_is_stored() -> None:
    values = np.random.Generator(np.random.PCG64(1)).integers(0, 256, SHAPE, np.uint8)
    assert CODEC.encode(values) == payload_of(values.tobytes())


HUGE = zstandard.ZstdCompressor().compress(bytes(1 << 20))
NO_SIZE = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(VALUES))
SKIPPABLE = b"\x50\x2a\x4d\x18" + struct.pack("<I", 4) + bytes(4)
SOUND = zstandard.ZstdCompressor().compress(bytes(VALUES))


@pytest.mark.parametrize(
    ("payload", "code"),
    [
        (b"", BitstreamFault.TRUNCATED),
        (bytes(3), BitstreamFault.TRUNCATED),
        (payload_of(SOUND)[:-1], BitstreamFault.TRUNCATED),
        (payload_of(SOUND) + b"\0", BitstreamFault.BAD_PAYLOAD),
        (payload_of(SOUND + b"\0"), BitstreamFault.BAD_PAYLOAD),
        (payload_of(SOUND[:-1]), BitstreamFault.BAD_PAYLOAD),
        (payload_of(HUGE), BitstreamFault.BAD_PAYLOAD),
        (payload_of(NO_SIZE), BitstreamFault.BAD_PAYLOAD),
        (payload_of(SKIPPABLE), BitstreamFault.BAD_PAYLOAD),
        (payload_of(SOUND + SOUND), BitstreamFault.BAD_PAYLOAD),
        (payload_of(b""), BitstreamFault.BAD_PAYLOAD),
        (payload_of(b"no zstd frame"), BitstreamFault.BAD_PAYLOAD),
        (struct.pack("<I", 2**32 - 1), BitstreamFault.TRUNCATED),
    ],
    ids=[
        "empty",
        "no lengths",
        "short",
        "long",
        "bytes after the frame",
        "frame cut off",
        "frame that claims a mebibyte",
        "frame without a size",
        "skippable frame",
        "two frames",
        "no plane",
        "no frame",
        "length of 4 GiB",
    ],
)
def test_each_fault_has_its_code(payload: bytes, code: BitstreamFault) -> None:
    with pytest.raises(DamagedObjectError) as caught:
        decode(payload, SHAPE, np.dtype(np.uint8))
    assert caught.value.code == code


SAMPLE = np.random.Generator(np.random.PCG64(2)).normal(size=(1, 2, 32, 2, 8)).astype(np.float16).view(np.uint16)
SAMPLE_PAYLOAD = CODEC.encode(SAMPLE)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, len(SAMPLE_PAYLOAD) - 1), st.integers(0, 255)), max_size=4),
    st.integers(0, len(SAMPLE_PAYLOAD)),
)
def test_damaged_payloads_decode_to_something_or_are_refused(changes: list[tuple[int, int]], end: int) -> None:
    payload = bytearray(SAMPLE_PAYLOAD)
    for offset, octet in changes:
        payload[offset] = octet
    try:
        decode(bytes(payload[:end]), SAMPLE.shape, SAMPLE.dtype, section_heads=2)
    except DamagedObjectError as error:
        refused = error.code
    else:
        refused = BitstreamFault.BAD_PAYLOAD
    assert refused in (BitstreamFault.TRUNCATED, BitstreamFault.BAD_PAYLOAD)
