"""A model that is a formula, and the pages it writes: every KV value is known exactly, so that a wrong one is found.

A token's KV is a function of all tokens up to it (and of salt and weights), its layer, head and dim. Pages are packed
by vLLM's own kernel, not by the code under test.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from vllm._custom_ops import cpu_attn_reshape_and_cache
from vllm.platforms import current_platform
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

_MASK = (1 << 64) - 1
VOCABULARY = 1000
_POISON, _SPOILT = -0x2B, 0x7B
"""Bits that the formula never gives."""


@dataclass(frozen=True)
class Shape:
    """What the formula's model keeps. `dtype` is any of KV's; fp8 only `on_device`."""

    layers: int = 2
    heads: int = 2
    head_dim: int = 32
    block_tokens: int = 32
    dtype: torch.dtype = torch.bfloat16
    on_device: bool = False
    """Whether pages are a GPU's: each token's K and V side by side."""

    @property
    def bits(self) -> type[np.signedinteger[Any]]:
        return {1: np.int8, 2: np.int16, 4: np.int32}[self.dtype.itemsize]

    @property
    def is_fp8(self) -> bool:
        return self.dtype.itemsize == 1

    @property
    def model_dtype(self) -> torch.dtype:
        """What the model computes in."""
        return torch.bfloat16 if self.is_fp8 else self.dtype

    @property
    def page_dtype(self) -> torch.dtype:
        """What vLLM says that pages are made of."""
        return torch.uint8 if self.is_fp8 else self.dtype

    @property
    def page_values(self) -> int:
        return self.block_tokens * 2 * self.head_dim


def extend_prefix(prefix: int, token: int) -> int:
    """The number that stands for a token prefix and one more token."""
    mixed = ((prefix ^ (token + 1)) * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) & _MASK
    return mixed ^ (mixed >> 29)


def prefixes_of(tokens: Sequence[int], salt: str | None, weights: int) -> list[int]:
    """Numbers of all prefixes, that of no token first."""
    numbers = [zlib.crc32(repr((salt, weights)).encode()) + 1]
    for token in tokens:
        numbers.append(extend_prefix(numbers[-1], token))
    return numbers


def next_token(prefix: int) -> int:
    """What the model answers after a prefix."""
    return (prefix >> 13) % VOCABULARY


class Formula:
    """Pages as they must be. Where each value lies in a page is learnt from vLLM's own kernel."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        size = (shape.layers, shape.heads, 2, 1, shape.head_dim)
        self._factors = np.random.default_rng(3).integers(1, 1 << 62, size, dtype=np.uint64) | np.uint64(1)
        self._kv_of, self._token_of, self._dim_of = find_places(shape)
        self.page = lru_cache(maxsize=4096)(self._page)
        self.mask = lru_cache(maxsize=None)(self._mask)

    def values(self, prefixes: Sequence[int]) -> torch.Tensor:
        """Canonical KV of the last token of each prefix, [layers, 2, tokens, heads, head_dim]."""
        bits = torch.from_numpy(self._bits(prefixes)).permute(0, 2, 3, 1, 4).contiguous()
        return bits.view(self.shape.dtype)

    def _bits(self, prefixes: Sequence[int]) -> np.ndarray[Any, Any]:
        """[layers, heads, K or V, tokens, head_dim]"""
        mixed = np.array(prefixes, dtype=np.uint64)[:, None] * self._factors >> np.uint64(33)
        if self.shape.bits is np.int8:
            return (mixed & np.uint64(0x87) | np.uint64(0x38)).astype(np.uint8).view(np.int8)
        if self.shape.bits is np.int16:
            return (mixed & np.uint64(0x81FF) | np.uint64(0x3C00)).astype(np.uint16).view(np.int16)
        return (mixed & np.uint64(0x7FFFFF) | np.uint64(0x3F000000)).astype(np.uint32).view(np.int32)

    def _page(self, prefixes: tuple[int, ...]) -> np.ndarray[Any, Any]:
        """The bits of a block that holds the last tokens of these prefixes, [layers, heads, values of a page]."""
        missing = self.shape.block_tokens - len(prefixes)
        bits = np.pad(self._bits(prefixes), [(0, 0), (0, 0), (0, 0), (0, missing), (0, 0)])
        return bits[:, :, self._kv_of, self._token_of, self._dim_of]

    def _mask(self, begin: int, end: int) -> np.ndarray[Any, Any]:
        """Which values of a page belong to the block's tokens `begin` to `end`."""
        return (self._token_of >= begin) & (self._token_of < end)


def find_places(shape: Shape) -> tuple[np.ndarray[Any, Any], ...]:
    """For each value of a head's page: whether it is K or V, its token and its dim.

    Of a CPU's pages, vLLM's kernel tells; what a GPU's are is vLLM's interface.
    """
    if shape.on_device:
        token, kv, dim = np.indices((shape.block_tokens, 2, shape.head_dim)).reshape(3, -1)
        return kv, token, dim
    current_platform.import_kernels()
    isa = _get_attn_isa(shape.dtype, shape.block_tokens, shape.head_dim)
    block, dims = shape.block_tokens, shape.head_dim
    kv, token, dim = torch.meshgrid(torch.arange(2), torch.arange(block), torch.arange(dims), indexing="ij")
    places = []
    for code in (kv, token, dim):  # each up to 256, which every dtype holds exactly
        keys, values = code.to(shape.dtype)[:, :, None]
        page = torch.zeros((1, 1, 2 * block, dims), dtype=shape.dtype)
        halves = page.chunk(2, dim=2)
        cpu_attn_reshape_and_cache(keys.contiguous(), values.contiguous(), *halves, torch.arange(block), isa)
        places.append(page.flatten().to(torch.int64).numpy())
    return tuple(places)


def as_bits(tensor: torch.Tensor, shape: Shape) -> np.ndarray[Any, Any]:
    """The same memory as integers, for NaN is not equal to itself."""
    return tensor.view({np.int8: torch.int8, np.int16: torch.int16}.get(shape.bits, torch.int32)).numpy()


@dataclass
class RankPages:
    """One rank's KV cache, and what it must hold: `_shadow` follows every write that is allowed, and only those."""

    formula: Formula
    blocks: int
    layers: slice
    heads: slice
    tensor: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        shape = self.formula.shape
        self._layer_count = self.layers.stop - self.layers.start
        size = (self._layer_count, self.blocks, self.heads.stop - self.heads.start, shape.block_tokens)
        self.tensor = torch.zeros((*size, 2 * shape.head_dim), dtype=shape.page_dtype)
        self._pages = as_bits(self.tensor, shape).reshape(*size[:3], -1)
        self._shadow = self._pages.copy()
        self._held = np.zeros((self._layer_count, self.blocks), dtype=np.int64)
        self._open: dict[str, tuple[int, ...]] = {}

    def poison(self, blocks: Sequence[int]) -> None:
        """Fresh blocks hold no one's KV, not even by accident."""
        self._pages[:, blocks] = self._shadow[:, blocks] = self.formula.shape.bits(_POISON)
        self._held[:, blocks] = 0

    def open_to_load(self, request_id: str, blocks: Sequence[int]) -> None:
        """From now on these blocks may be written by the connector."""
        assert request_id not in self._open, f"{request_id} is loaded twice at once"
        self._open[request_id] = tuple(blocks)
        self._held[:, blocks] = 0

    def close_to_load(self, request_id: str) -> None:
        """The connector has said that it is done: what it writes from now on is an error."""
        blocks = list(self._open.pop(request_id))
        self._shadow[:, blocks] = self._pages[:, blocks]

    @property
    def loading(self) -> set[str]:
        return set(self._open)

    def check_untouched(self, when: str) -> None:
        """No block was written by anybody but the model and the loads that may."""
        if np.array_equal(self._pages, self._shadow):
            return
        touched = np.unique(np.nonzero((self._pages != self._shadow).any(axis=(0, 2, 3)))[0])
        stray = sorted(set(touched.tolist()) - {block for blocks in self._open.values() for block in blocks})
        assert not stray, f"{when}: blocks {stray} were written by a load that had ended, or never had them"

    def wrong_blocks(self, layer: int, table: Sequence[int], prefixes: Sequence[int], tokens: int) -> Iterable[int]:
        """Of the blocks that are said to hold the first `tokens` tokens, those that do not, in one layer."""
        size = self.formula.shape.block_tokens
        for index in range(-(-tokens // size)):
            begin, end = index * size, min((index + 1) * size, tokens)
            block = table[index]
            if self._held[layer, block] == _held(prefixes[end]):
                continue
            page = self.formula.page(tuple(prefixes[begin + 1 : end + 1]))[self.layers, self.heads][layer]
            mask = self.formula.mask(0, end - begin)
            if np.array_equal(self._pages[layer, block][:, mask], page[:, mask]):
                self._held[layer, block] = _held(prefixes[end])
            else:
                yield block

    def write(self, layer: int, table: Sequence[int], prefixes: Sequence[int], begin: int, end: int) -> None:
        """The model computes tokens `begin` to `end` of a request, in one layer of the rank."""
        size = self.formula.shape.block_tokens
        for index in range(begin // size, -(-end // size)):
            first, last = index * size, min((index + 1) * size, end)
            page = self.formula.page(tuple(prefixes[first + 1 : last + 1]))[self.layers, self.heads][layer]
            mask = self.formula.mask(max(begin - first, 0), last - first)
            block = table[index]
            for pages in (self._pages, self._shadow):
                pages[layer, block][:, mask] = page[:, mask]
            self._held[layer, block] = _held(prefixes[last])

    def spoil(self, layer: int, table: Sequence[int], begin: int, end: int) -> None:
        """What the model computes from wrong KV is wrong."""
        size = self.formula.shape.block_tokens
        for index in range(begin // size, -(-end // size)):
            first = index * size
            mask = self.formula.mask(max(begin - first, 0), min(size, end - first))
            for pages in (self._pages, self._shadow):
                pages[layer, table[index]][:, mask] = self.formula.shape.bits(_SPOILT)
            self._held[layer, table[index]] = 0


def _held(prefix: int) -> int:
    return prefix >> 1
