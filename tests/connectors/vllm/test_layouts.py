"""Pages of GPU kernels, without a GPU: against a plain statement of where each value lies in memory."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore_s3.connectors.vllm.layouts import LAYOUTS, gather_blocks, scatter_blocks, view_layers

SHAPE: dict[str, int] = {"layers": 2, "blocks": 5, "heads": 3, "block_tokens": 4, "head_dim": 8}
SIZES = {"L": 2, "B": 5, "H": 3, "N": 4, "C": 16}


def place(layout: str, where: dict[str, int]) -> int:
    """Where a value lies in memory, one axis after the other, outermost first."""
    offset = 0
    for axis in layout:
        offset = offset * SIZES[axis] + where[axis]
    return offset


def storage() -> torch.Tensor:
    """Every element another bit pattern."""
    return torch.arange(2 * 5 * 3 * 4 * 16, dtype=torch.int16).view(torch.bfloat16)


def bits(values: torch.Tensor) -> torch.Tensor:
    return values.contiguous().view(torch.int16)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_block_is_gathered_from_where_its_layout_says(layout: str):
    memory, block_ids = storage(), [3, 0]
    caches = view_layers(memory, layout, **SHAPE)
    for layer, cache in enumerate(caches):
        out = torch.empty(2, 8, 3, 8, dtype=torch.bfloat16)
        gather_blocks(cache, block_ids, out=out)
        for half, token, head, dim in itertools.product(range(2), range(8), range(3), range(8)):
            where = {"L": layer, "B": block_ids[token // 4], "H": head, "N": token % 4, "C": half * 8 + dim}
            assert bits(out)[half, token, head, dim] == bits(memory)[place(layout, where)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_scattered_lies_where_the_layout_says_and_nothing_else_is_touched(layout: str):
    memory = torch.zeros(2 * 5 * 3 * 4 * 16, dtype=torch.int16).view(torch.bfloat16)
    kv = torch.arange(1, 1 + 2 * 8 * 3 * 8, dtype=torch.int16).view(2, 8, 3, 8).view(torch.bfloat16)
    scatter_blocks(view_layers(memory, layout, **SHAPE)[1], [4, 2], kv=kv)
    expected = torch.zeros(2 * 5 * 3 * 4 * 16, dtype=torch.int16)
    for half, token, head, dim in itertools.product(range(2), range(8), range(3), range(8)):
        where = {"L": 1, "B": [4, 2][token // 4], "H": head, "N": token % 4, "C": half * 8 + dim}
        expected[place(layout, where)] = bits(kv)[half, token, head, dim]
    assert torch.equal(bits(memory), expected)


def reference_flash_attention(cache: torch.Tensor, block: int, slot: int) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V [kv heads, head dim] of one slot, as FlashAttention's NHD view of a cache has them."""
    keys, values = cache.transpose(1, 2).split(cache.shape[-1] // 2, dim=-1)
    return keys[block, slot], values[block, slot]


def reference_flash_infer(cache: torch.Tensor, block: int, slot: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of FlashInfer's HND view."""
    keys, values = cache.split(cache.shape[-1] // 2, dim=-1)
    return keys[block, :, slot], values[block, :, slot]


@pytest.mark.parametrize("reference", [reference_flash_attention, reference_flash_infer])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_kernels_find_each_token_where_it_was_scattered(layout: str, reference: Any):
    caches = view_layers(torch.zeros(2 * 5 * 3 * 4 * 16), layout, **SHAPE)
    kv = torch.randn(2, 8, 3, 8)
    scatter_blocks(caches[0], [1, 3], kv=kv)
    for token in range(8):
        keys, values = reference(caches[0], [1, 3][token // 4], token % 4)
        assert torch.equal(keys, kv[0, token])
        assert torch.equal(values, kv[1, token])


@given(
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2]),
    heads=st.integers(1, 3),
    block_tokens=st.sampled_from([1, 16, 32]),
    head_dim=st.sampled_from([8, 64]),
    block_ids=st.lists(st.integers(0, 6), min_size=1, max_size=5, unique=True),
)
@settings(max_examples=60, deadline=None)
def test_what_is_scattered_is_gathered_bit_by_bit(
    layout: str, dtype: torch.dtype, heads: int, block_tokens: int, head_dim: int, block_ids: list[int]
):
    shape = {"layers": 3, "blocks": 7, "heads": heads, "block_tokens": block_tokens, "head_dim": head_dim}
    size = 3 * 7 * heads * block_tokens * 2 * head_dim
    memory = torch.randint(0, 256, (size * dtype.itemsize,), dtype=torch.uint8).view(dtype)
    before = memory.view(torch.uint8).clone()
    cache = view_layers(memory, layout, **shape)[1]
    kv_shape = (2, len(block_ids) * block_tokens, heads, head_dim)
    old, out = torch.empty(kv_shape, dtype=dtype), torch.empty(kv_shape, dtype=dtype)
    gather_blocks(cache, block_ids, out=old)
    kv = torch.randint(0, 256, (*kv_shape[:3], head_dim * dtype.itemsize), dtype=torch.uint8).view(dtype)
    scatter_blocks(cache, block_ids, kv=kv)
    gather_blocks(cache, block_ids, out=out)
    assert torch.equal(out.view(torch.uint8), kv.view(torch.uint8))
    scatter_blocks(cache, block_ids, kv=old)
    assert torch.equal(memory.view(torch.uint8), before)


@pytest.mark.engine
@pytest.mark.parametrize("layout", LAYOUTS)
def test_views_are_those_that_vllm_makes(layout: str):
    interface = pytest.importorskip("vllm.v1.kv_cache_interface", reason="needs the engine environment")
    known = interface.KVCacheLayout
    assert {each.name for each in known} == set(LAYOUTS)
    spec = interface.FullAttentionSpec(block_size=4, num_kv_heads=3, head_size=8, dtype=torch.bfloat16)
    strides = interface.compute_layout_strides(spec, 5, 2, known[layout])
    ours = view_layers(storage(), layout, **SHAPE)
    for layer, cache in enumerate(ours):
        assert cache.storage_offset() * 2 == layer * strides[0]
        assert [step * 2 for step in cache.stride()[:3]] == list(strides[1:4])
