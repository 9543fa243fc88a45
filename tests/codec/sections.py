"""Sections to test codecs with, and a decoder that watches the memory around `out`."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from kvstore_s3.codec.base import Bits, Codec

SPECIAL = np.array(
    [0x0000, 0x8000, 0x7F80, 0xFF80, 0x7FC0, 0xFFC1, 0x7F81, 0x0001, 0x8001, 0x007F, 0x7F7F, 0xFF7F, 0x0080], np.uint16
)
CANARY = 0xA5


def to_bfloat16(values: np.ndarray) -> Bits:
    with np.errstate(over="ignore"):
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def draw_normal(rng: np.random.Generator, shape: tuple[int, ...]) -> Bits:
    """Normal values; scale and mean differ in each component."""
    layers, kinds, _, heads, dim = shape
    scale = 2.0 ** rng.uniform(-20, 20, (layers, kinds, 1, heads, dim))
    mean = rng.normal(size=scale.shape) * rng.choice([0, 1, 10])
    return to_bfloat16((rng.normal(size=shape) + mean) * scale)


def draw_special(rng: np.random.Generator, shape: tuple[int, ...]) -> Bits:
    values = draw_normal(rng, shape)
    chosen = rng.random(shape) < rng.choice([0.01, 0.3, 1.0])
    values[chosen] = rng.choice(SPECIAL, int(chosen.sum()))
    return values


def draw_outliers(rng: np.random.Generator, shape: tuple[int, ...]) -> Bits:
    values = rng.normal(size=shape)
    return to_bfloat16(np.where(rng.random(shape) < 0.02, values * 1e30, values))


def draw_constant(rng: np.random.Generator, shape: tuple[int, ...]) -> Bits:
    return np.full(shape, rng.integers(0, 65536), np.uint16)


def draw_random(rng: np.random.Generator, shape: tuple[int, ...]) -> Bits:
    return rng.integers(0, 65536, shape, dtype=np.uint16)


KINDS_OF_VALUES = (draw_normal, draw_special, draw_outliers, draw_constant, draw_random)


@st.composite
def sections(draw: st.DrawFn, most_tokens: int = 300) -> Bits:
    """bfloat16 sections of all shapes and kinds of values, at most some ten thousand values."""
    dim = draw(st.sampled_from([1, 2, 5, 8, 16, 24, 32, 64, 72, 80, 128]))
    tokens = draw(st.integers(1, most_tokens))
    planes = max(1, 20_000 // (dim * tokens))
    kinds = draw(st.integers(1, 2))
    layers = draw(st.integers(1, max(1, min(4, planes // kinds))))
    heads = draw(st.integers(1, max(1, min(4, planes // (kinds * layers)))))
    kind_of_values = draw(st.sampled_from(KINDS_OF_VALUES))
    rng = np.random.Generator(np.random.PCG64(draw(st.integers(0, 2**32))))
    return kind_of_values(rng, (layers, kinds, tokens, heads, dim))


def decode_guarded(
    codec: Codec, payload: bytes, shape: tuple[int, ...], dtype: np.dtype, *, head_begin: int, section_heads: int
) -> Bits:
    """Decode into the middle of a larger strided array and assert that nothing around it was touched."""
    layers, kinds, tokens, heads, dim = shape
    whole = np.full((layers + 2, kinds, tokens + 2, heads + 2, dim), 0, dtype)
    whole.view(np.uint8)[:] = CANARY
    inner = (slice(1, -1), slice(None), slice(1, -1), slice(1, -1))
    try:
        codec.decode(memoryview(payload), whole[inner], head_begin=head_begin, section_heads=section_heads)
    finally:
        outside = np.ones(whole.shape, bool)
        outside[inner] = False
        assert (whole.view(np.uint8).reshape(*whole.shape, -1)[outside] == CANARY).all()
    return whole[inner].copy()
