"""Packing of pages, without an engine: against a plain, slow statement of each order."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore_s3.connectors.vllm.pages import PACKINGS, Packing, Pages, recognise

VEC, AMX, NEON = PACKINGS


def position(order: str, token: int, dim: int, tokens: int, dims: int) -> int:
    """Where a value lies in a half page, one axis after the other, as the order says it."""
    left = {"t": token, "d": dim}
    sizes = {"t": tokens, "d": dims}
    place, stride = 0, 1
    for word in reversed(order.split()):
        axis, size = word[0], int(word[1:] or sizes[word[0]])
        place += left[axis] % size * stride
        left[axis] //= size
        sizes[axis] //= size
        stride *= size
    return place


def packed_slowly(packing: Packing, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """A page [heads, tokens, 2 * dims] from keys and values [tokens, heads, dims], value by value."""
    tokens, heads, dims = keys.shape
    page = torch.zeros(heads, 2 * tokens * dims, dtype=keys.dtype)
    for head in range(heads):
        for token in range(tokens):
            for dim in range(dims):
                page[head, position(packing.keys, token, dim, tokens, dims)] = keys[token, head, dim]
                place = tokens * dims + position(packing.values, token, dim, tokens, dims)
                page[head, place] = values[token, head, dim]
    return page.view(heads, tokens, 2 * dims)


def any_bits(*shape: int) -> torch.Tensor:
    """bfloat16 with every bit pattern, NaN payloads and signed zeros among them."""
    return torch.randint(-(2**15), 2**15, shape, dtype=torch.int16).view(torch.bfloat16)


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return torch.equal(left.contiguous().view(torch.int16), right.contiguous().view(torch.int16))


@pytest.mark.parametrize("packing", PACKINGS, ids=lambda packing: packing.name)
def test_a_page_is_unpacked_as_its_order_says(packing: Packing):
    keys, values = any_bits(32, 2, 16), any_bits(32, 2, 16)
    out = torch.empty(2, 32, 2, 16, dtype=torch.bfloat16)
    Pages([packed_slowly(packing, keys, values)[None]], packing).read([0], out=out[None])
    assert same_bits(out[0], keys)
    assert same_bits(out[1], values)


@pytest.mark.parametrize("packing", PACKINGS, ids=lambda packing: packing.name)
def test_a_page_is_packed_as_its_order_says(packing: Packing):
    kv = any_bits(2, 32, 2, 16)
    cache = torch.zeros(1, 2, 32, 32, dtype=torch.bfloat16)
    Pages([cache], packing).write([0], kv=kv[None])
    assert same_bits(cache[0], packed_slowly(packing, kv[0], kv[1]))


@given(
    packing=st.sampled_from(PACKINGS),
    block_tokens=st.sampled_from([16, 32, 64]),
    heads=st.integers(1, 3),
    head_dim=st.sampled_from([16, 32, 80]),
    block_ids=st.lists(st.integers(0, 6), min_size=1, max_size=5, unique=True),
)
@settings(max_examples=40, deadline=None)
def test_what_is_written_is_read_back_and_no_other_block_is_touched(
    packing: Packing, block_tokens: int, heads: int, head_dim: int, block_ids: list[int]
):
    cache = any_bits(7, heads, block_tokens, 2 * head_dim)
    before = cache.clone()
    kv = any_bits(2, len(block_ids) * block_tokens, heads, head_dim)
    pages = Pages([cache], packing)
    pages.write(block_ids, kv=kv[None])
    out = torch.empty_like(kv)
    pages.read(block_ids, out=out[None])
    assert same_bits(out, kv)
    others = [block for block in range(7) if block not in block_ids]
    assert same_bits(cache[others], before[others])


@given(begin=st.integers(0, 100), length=st.integers(1, 100), packing=st.sampled_from(PACKINGS))
@settings(max_examples=40, deadline=None)
def test_a_token_range_is_read_wherever_it_begins_and_ends(begin: int, length: int, packing: Packing):
    block_tokens, end = 32, begin + length
    whole = any_bits(3, 2, 7 * block_tokens, 2, 16)
    caches = [torch.zeros(9, 2, block_tokens, 32, dtype=torch.bfloat16) for _ in range(3)]
    table = [5, 3, 8, 1, 0, 7, 2]
    pages = Pages(caches, packing)
    pages.write(table, kv=whole)
    spanned = table[begin // block_tokens : -(-end // block_tokens)]
    assert same_bits(pages.read_tokens(spanned, begin=begin, end=end), whole[:, :, begin:end])


def test_blocks_that_do_not_span_the_range_are_refused():
    with pytest.raises(ValueError, match="do not span"):
        Pages([torch.zeros(4, 1, 16, 32)], VEC).read_tokens([0], begin=0, end=17)


@pytest.mark.parametrize("packing", PACKINGS, ids=lambda packing: packing.name)
def test_a_packing_is_recognised_by_what_it_does(packing: Packing):
    keys, values = torch.randn(32, 1, 32).bfloat16(), torch.randn(32, 1, 32).bfloat16()
    assert recognise(packed_slowly(packing, keys, values), keys, values) == packing


def test_an_unknown_packing_is_not_recognised():
    keys, values = torch.randn(32, 1, 32).bfloat16(), torch.randn(32, 1, 32).bfloat16()
    unknown = Packing("unknown", keys="t d", values="t d")
    assert recognise(packed_slowly(unknown, keys, values), keys, values) is None


def test_a_page_that_a_packing_does_not_divide_is_not_recognised_as_it():
    keys, values = torch.randn(24, 1, 24).bfloat16(), torch.randn(24, 1, 24).bfloat16()
    assert recognise(torch.zeros(1, 24, 48, dtype=torch.bfloat16), keys, values) is None


def test_the_order_of_arm_is_that_of_its_matrix_instruction():
    """BFMMLA takes K as 8 tokens of 4 dims and V as 2 dims of 4 tokens: written out, as no x86 machine can run it."""
    tokens, dims = 16, 8
    keys, values = any_bits(tokens, 1, dims), any_bits(tokens, 1, dims)
    page = torch.zeros(1, tokens, 2 * dims, dtype=torch.bfloat16)
    flat = page.view(-1)
    for token, dim in itertools.product(range(tokens), range(dims)):
        group, pair, odd = token // 8, token % 8 // 2, token % 2
        flat[group * (dims // 4) * 32 + dim // 4 * 32 + pair * 8 + odd * 4 + dim % 4] = keys[token, 0, dim]
        place = dim // 2 * (tokens // 4) * 8 + token // 4 * 8 + dim % 2 * 4 + token % 4
        flat[tokens * dims + place] = values[token, 0, dim]
    assert recognise(page, keys, values) == NEON


def test_a_page_takes_some_layers_of_those_that_are_there():
    caches = [torch.zeros(2, 1, 32, 32, dtype=torch.bfloat16) for _ in range(3)]
    pages, kv = Pages(caches, AMX), any_bits(1, 2, 32, 1, 16)
    pages.write([1], kv=kv, layer=2)
    assert same_bits(pages.read_tokens([1], begin=32, end=64)[2], kv[0])
    assert not any(cache.any() for cache in caches[:2])
    assert not caches[2][0].any()


@pytest.mark.parametrize("number", [-1, 4])
def test_a_block_that_is_not_there_is_refused(number: int):
    pages = Pages([torch.zeros(4, 1, 16, 32)], VEC)
    with pytest.raises(ValueError, match="no block of that number"):
        pages.write([0, number], kv=torch.zeros(1, 2, 32, 1, 16))
