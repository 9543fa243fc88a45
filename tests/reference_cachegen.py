"""A slow decoder of codec 5, in the order of docs/format-cachegen.md. It shares no code with the package."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import numpy as np

LARGEST = {"bfloat16": 0x7F7F0000, "float16": 0x477FE000, "float32": 0x7F7FFFFF}
HALF = 1 << 31
QUARTER = 1 << 30


def decode(payload: bytes, dtype: str, shape: tuple[int, int, int, int, int]) -> np.ndarray:
    """float32 values [layers, kinds, tokens, heads, dim], already rounded to the dtype."""
    values = np.empty(shape, np.float32)
    position = 0
    for layer in range(shape[0]):
        for kind in range(shape[1]):
            position = decode_plane(payload, position, values[layer, kind])
    assert position == len(payload)
    largest = np.uint32(LARGEST[dtype]).view(np.float32)
    return round_to(np.clip(values, -largest, largest), dtype)


def decode_plane(payload: bytes, position: int, out: np.ndarray) -> int:
    tokens, heads, dim = out.shape

    def take(form: str, count: int) -> tuple[int, ...]:
        nonlocal position
        fields = struct.unpack_from(f"<{count}{form}", payload, position)
        position += struct.calcsize(f"<{count}{form}")
        return fields

    (bins,) = take("B", 1)
    scales = [bfloat16(bits) for bits in take("H", tokens)]
    anchor_tokens = list(range(0, tokens, 10))
    others = [token for token in range(tokens) if token % 10]
    for head in range(heads):
        for token in anchor_tokens:
            step = scales[token] / np.float32(127)
            out[token, head] = [np.float32(number) * step for number in take("b", dim)]
    if not others:
        return position
    most = bins // 2 - 1
    cdfs = [[[0, *take("H", bins - 2), 65536] for _ in range(dim)] for _ in range(heads)]
    width = max(1, 65536 // tokens)
    runs = [range(begin, min(begin + width, dim)) for begin in range(0, dim, width)]
    lengths = take("I", heads * len(runs))
    for head in range(heads):
        for number, run in enumerate(runs):
            length = lengths[head * len(runs) + number]
            stream = payload[position : position + length]
            position += length
            tables = (cdfs[head][channel] for channel in run for _ in others)
            symbols = decode_stream(stream, tables)
            for channel in run:
                for token in others:
                    step = scales[token] / np.float32(most)
                    anchor = out[token - token % 10, head, channel]
                    with np.errstate(over="ignore"):
                        out[token, head, channel] = anchor + np.float32(next(symbols) - most) * step
    return position


def decode_stream(stream: bytes, tables: Iterator[list[int]]) -> Iterator[int]:
    bits = bits_of(stream)
    low, high, value = 0, 2 * HALF - 1, 0
    for _ in range(32):
        value = 2 * value + next(bits)
    for cdf in tables:
        span = high - low + 1
        count = ((value - low + 1) * 65536 - 1) // span
        symbol = next(s for s in range(len(cdf) - 1) if cdf[s] <= count < cdf[s + 1])
        high = low + span * cdf[symbol + 1] // 65536 - 1
        low = low + span * cdf[symbol] // 65536
        yield symbol
        while True:
            if high < HALF or low >= HALF:
                drop = HALF if low >= HALF else 0
            elif low >= QUARTER and high < 3 * QUARTER:
                drop = QUARTER
            else:
                break
            low, high, value = 2 * (low - drop), 2 * (high - drop) + 1, 2 * (value - drop) + next(bits)


def bits_of(stream: bytes) -> Iterator[int]:
    for octet in stream:
        for place in range(7, -1, -1):
            yield octet >> place & 1
    while True:
        yield 0


def bfloat16(bits: int) -> np.float32:
    return np.uint32(bits << 16).view(np.float32)


def round_to(values: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "float32":
        return values
    if dtype == "float16":
        return values.astype(np.float16).astype(np.float32)
    bits = values.view(np.uint32).astype(np.uint64)
    below = bits & 0xFFFF
    up = (below > 0x8000) | ((below == 0x8000) & ((bits >> 16 & 1) == 1))
    return (((bits >> 16) + up) << 16).astype(np.uint32).view(np.float32)
