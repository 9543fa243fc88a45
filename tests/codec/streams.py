"""Streams of the scalable codec for tests: random tables, components, and the slow encoder's answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import reference_calibration
from crafted_scalable import chain, encode_integers
from hypothesis import strategies as st

from kvstore_s3 import _native
from kvstore_s3.codec.tables import STEPS, TableSet, uncalibrated_tables

IMPLEMENTATIONS = _native.implementations()
Floats = npt.NDArray[np.float32]
Classes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Encoded:
    states: bytes
    words: list[bytes]
    escapes: bytes


def encode(tables: TableSet, classes: Classes, y: Floats, levels: int, implementation: str) -> Encoded:
    return Encoded(*_native.scalable_encode(tables.native, classes, y, levels=levels, implementation=implementation))


def decode(
    tables: TableSet, classes: Classes, stream: Encoded, tokens: int, *, read: int, levels: int, implementation: str
) -> tuple[int, Floats]:
    """The fault and y. Checks that nothing around y was written."""
    guarded = np.full((tokens + 2, len(classes)), np.float32(-77))
    y = guarded[1:-1]
    fault = _native.scalable_decode(
        tables.native,
        classes,
        stream.states,
        stream.words[:read],
        stream.escapes,
        y,
        object_levels=levels,
        implementation=implementation,
    )
    assert (guarded[[0, -1]] == -77).all()
    return fault, y


def quantised(tables: TableSet, classes: Classes, y: Floats) -> list[list[int]]:
    """q2 by token and component, before what cannot be expressed is cut."""
    clipped = np.clip(np.nan_to_num(y, nan=-np.inf, posinf=np.inf, neginf=-np.inf), -32404, 32404)
    return [[int(number) for number in row] for row in np.rint(clipped.astype(np.float64))]


def expected_numbers(tables: TableSet, classes: Classes, y: Floats) -> npt.NDArray[np.int64]:
    """q0, q1 and q2 [level, token, component] that an object can hold."""
    rows = quantised(tables, classes, y)
    chains = [[chain(q, int(k), tables.first) for q, k in zip(row, classes, strict=True)] for row in rows]
    return np.moveaxis(np.array(chains, np.int64), 2, 0)


def expected_values(tables: TableSet, classes: Classes, y: Floats, level: int) -> Floats:
    """What a decoder of the levels up to this one gives, in the same float operations."""
    numbers = expected_numbers(tables, classes, y)[level].astype(np.float32)
    return (numbers - np.sign(numbers) * tables.shift[level][classes]) * np.float32(STEPS[level])


def slowly_encoded(tables: TableSet, classes: Classes, y: Floats, levels: int) -> Encoded:
    of = reference_calibration.Tables(
        list(tables.first),
        tables.base.tolist(),
        [[[(c1, c2) for c1, c2 in contexts] for contexts in level] for level in tables.refine.tolist()],
        tables.shift.tolist(),
    )
    coded = encode_integers(quantised(tables, classes, y), classes.tolist(), of.check(), levels)
    return Encoded(
        np.array(coded.states, "<u4").tobytes(),
        [np.array(words, "<u2").tobytes() for words in coded.words],
        np.array(coded.escapes, "<i2").tobytes(),
    )


def draw_values(rng: np.random.Generator, classes: Classes, tokens: int, tail: float = 3.0) -> Floats:
    """Values of about the deviations that the classes name; a small `tail` makes outliers."""
    deviation = 2.0 ** ((classes.astype(np.float64) - 13) / 4)
    return (rng.standard_t(tail, (tokens, len(classes))) * deviation).astype(np.float32)


def draw_tables(rng: np.random.Generator) -> TableSet:
    """Tables that are sound and otherwise anything: symbols without a slot, frequencies of 4095, narrow thresholds."""
    first = tuple(int(number) for number in np.sort(rng.integers(1, 49, 3))[::-1])
    base = np.zeros((48, 256), np.uint16)
    refine = np.zeros((2, 48, 4, 2), np.uint16)
    shift = rng.uniform(0, 0.5, (3, 48)).astype(np.float32)
    for k in range(first[0], 48):
        symbols = np.append(rng.choice(255, rng.integers(1, 60), replace=False), 255)
        shares = rng.dirichlet(np.full(len(symbols), rng.choice([0.01, 0.3, 5.0])))
        counts = 1 + np.floor(shares * (4096 - len(symbols))).astype(np.int64)
        counts[np.argmax(counts)] += 4096 - counts.sum()
        base[k, symbols] = counts
    for level in (1, 2):
        for k in range(first[level], 48):
            for context in range(4):
                refine[level - 1, k, context] = np.sort(rng.choice(np.arange(1, 4096), 2, replace=False))
        if rng.random() < 0.3:
            refine[level - 1, first[level] :] = (1, 2) if rng.random() < 0.5 else (4094, 4095)
    tables = TableSet((first[0], first[1], first[2]), base, refine, shift)
    tables.check()
    return tables


@st.composite
def streams(draw: st.DrawFn) -> tuple[TableSet, Classes, Floats]:
    """Tables, classes and y of all shapes: one lane, partial blocks, one token, nothing coded, escapes."""
    rng = np.random.Generator(np.random.PCG64(draw(st.integers(0, 2**32))))
    count = draw(st.sampled_from([1, 2, 7, 31, 32, 33, 40, 63, 64, 65, 100]))
    tokens = draw(st.sampled_from([1, 2, 3, 8, 33]))
    tables = draw_tables(rng) if draw(st.booleans()) else uncalibrated_tables()
    lowest, highest = sorted(draw(st.tuples(st.integers(0, 47), st.integers(0, 47))))
    classes = rng.integers(lowest, highest + 1, count).astype(np.uint8)
    y = draw_values(rng, classes, tokens, tail=draw(st.sampled_from([0.7, 3.0, 30.0])))
    return tables, classes, y


def everywhere(answers: Sequence[object]) -> bool:
    """Whether all implementations said the same."""
    return all(answer == answers[0] for answer in answers)
