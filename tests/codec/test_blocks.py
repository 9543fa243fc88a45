"""Copies between arrays of any strides, against numpy's."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore_s3.codec.blocks import gather_blocks, scatter_blocks

Bits = npt.NDArray[Any]


@st.composite
def views(draw: st.DrawFn, shape: tuple[int, ...], dtype: type[np.generic]) -> Bits:
    """Zeros of `shape` whose axes lie in any order in memory, with room between items, or backwards."""
    order = draw(st.permutations(range(len(shape))))
    steps = [draw(st.sampled_from([1, 1, 1, 2, 3, -1])) for _ in shape]
    memory = np.zeros([shape[axis] * abs(steps[axis]) for axis in order], dtype)
    view = memory.transpose(np.argsort(order))
    return view[tuple(slice(None, None, step) for step in steps)]


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Bits, list[int], Bits]:
    """Blocks, the numbers of some of them, and rows for these."""
    axes = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 4, 7, 8, 16, 17]), max_size=4)))
    blocks, numbers = draw(st.integers(1, 4)), draw(st.lists(st.integers(0, 3), max_size=3, unique=True))
    numbers = [number for number in numbers if number < blocks]
    dtype = draw(st.sampled_from([np.uint8, np.uint16, np.uint32, np.uint64, np.complex128]))
    return draw(views((blocks, *axes), dtype)), numbers, draw(views((len(numbers), *axes), dtype))


def fill(view: Bits, seed: int) -> None:
    view[...] = np.random.default_rng(seed).integers(0, 251, view.shape).astype(view.dtype)


@given(pair=pairs())
@settings(max_examples=300, deadline=None)
def test_rows_are_scattered_as_numpy_would(pair: tuple[Bits, list[int], Bits]):
    blocks, numbers, rows = pair
    fill(blocks, 1)
    fill(rows, 2)
    expected = blocks.copy()
    expected[numbers] = rows
    around = memory_around(blocks)
    scatter_blocks(blocks, np.array(numbers, np.int64), rows)
    np.testing.assert_array_equal(blocks, expected)
    blocks[...] = 0
    assert np.array_equal(memory_around(blocks), around)


@given(pair=pairs())
@settings(max_examples=300, deadline=None)
def test_blocks_are_gathered_as_numpy_would(pair: tuple[Bits, list[int], Bits]):
    blocks, numbers, rows = pair
    fill(blocks, 1)
    gather_blocks(blocks, np.array(numbers, np.int64), rows)
    np.testing.assert_array_equal(rows, blocks[numbers])


def memory_around(view: Bits) -> Bits:
    """What lies between the items of a view; the view's own items as zeros."""
    kept = view.copy()
    view[...] = 0
    base = view.base if view.base is not None else view
    found = np.array(base, copy=True)
    view[...] = kept
    return found


def test_pages_as_large_as_an_engines_are_transposed_right():
    random = np.random.default_rng(3)
    rows = random.integers(0, 2**16, (2, 128, 4, 64), np.uint16)
    pages = np.zeros((5, 4, 64, 128), np.uint16)  # [blocks, heads, dim, tokens]
    scatter_blocks(pages.transpose(0, 3, 1, 2), np.array([4, 1]), rows)
    np.testing.assert_array_equal(pages[[4, 1]], rows.transpose(0, 2, 3, 1))
    back = np.zeros_like(rows)
    gather_blocks(pages.transpose(0, 3, 1, 2), np.array([4, 1]), back)
    np.testing.assert_array_equal(back, rows)


@pytest.mark.parametrize(
    ("blocks", "numbers", "rows"),
    [
        (np.zeros((2, 3), np.uint16), [0], np.zeros((1, 4), np.uint16)),
        (np.zeros((2, 3), np.uint16), [0], np.zeros((1, 3), np.uint8)),
        (np.zeros((2, 3), np.uint16), [0], np.zeros((1, 3, 1), np.uint16)),
        (np.zeros((2, 3), np.uint16), [0, 1], np.zeros((1, 3), np.uint16)),
        (np.zeros((2, 3), np.uint16), [2], np.zeros((1, 3), np.uint16)),
        (np.zeros((2, 3), np.uint16), [-1], np.zeros((1, 3), np.uint16)),
    ],
    ids=["other shape", "other items", "other axes", "fewer rows", "number too large", "negative number"],
)
def test_what_does_not_fit_is_refused(blocks: Bits, numbers: list[int], rows: Bits):
    with pytest.raises(ValueError, match="block"):
        scatter_blocks(blocks, np.array(numbers, np.int64), rows)
    with pytest.raises(ValueError, match="block"):
        gather_blocks(blocks, np.array(numbers, np.int64), rows)
    assert not blocks.any()


def test_memory_that_must_not_be_written_is_refused():
    blocks = np.zeros((2, 3), np.uint16)
    blocks.flags.writeable = False
    with pytest.raises(TypeError):
        scatter_blocks(blocks, np.array([0]), np.ones((1, 3), np.uint16))
