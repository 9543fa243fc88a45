"""An engine's blocks on a device: where values of a range of layers, tokens and heads lie, and copies to and from them.

Each layer's cache is [blocks, kv heads, block tokens, 2 * head dim] of any strides but the last, which is 1: K in the
first half of the last axis and V in the second. FlashAttention, FlashInfer and Triton keep theirs so, whatever the
order in memory; a latent cache (MLA) is this with one head, whose two halves are called K and V.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kvstore_s3.codec.device.pieces import Form, Target
from kvstore_s3.codec.device.requests import Deed
from kvstore_s3.codec.device.streams import working_on

Blocks = npt.NDArray[np.uint32]


@dataclass(frozen=True, slots=True, eq=False)
class PagedMemory:
    """Values [layers, 2, tokens, heads, dim] in whole blocks of `caches`, those of consecutive layers.

    `blocks` has the number of each block, in the order of their tokens; `heads` are those of the caches that belong to
    it.
    """

    caches: tuple[torch.Tensor, ...]
    blocks: Blocks
    heads: slice

    @classmethod
    def of(cls, caches: Sequence[torch.Tensor], block_ids: Sequence[int]) -> PagedMemory:
        """All heads of blocks `block_ids` of `caches`, one at least."""
        return cls(tuple(caches), np.array(block_ids, np.uint32), slice(0, caches[0].shape[1]))

    @property
    def shape(self) -> tuple[int, ...]:
        _, _, block_tokens, width = self.caches[0].shape
        return (len(self.caches), 2, len(self.blocks) * block_tokens, self.heads.stop - self.heads.start, width // 2)

    @property
    def dtype(self) -> torch.dtype:
        return self.caches[0].dtype

    def __getitem__(self, index: tuple[slice, ...]) -> PagedMemory:
        """A rectangle: slices of layers and heads, `memory[layers, :, :, heads]`. Tokens stay whole."""
        layers, kinds, tokens, heads = (*index, *[slice(None)] * (4 - len(index)))
        assert kinds == tokens == slice(None)
        begin, end, _ = heads.indices(self.heads.stop - self.heads.start)
        first = self.heads.start
        return replace(self, caches=self.caches[layers], heads=slice(first + begin, first + end))

    def target(self) -> Target:
        """For kernels."""
        first = self.caches[0]
        _, _, block_tokens, width = first.shape
        block, head, token, _ = first.stride()
        begin = head * self.heads.start
        planes = [
            [cache.data_ptr() + (begin + half * width // 2) * first.element_size() for half in (0, 1)]
            for cache in self.caches
        ]
        form = Form(width // 2, token, head, block_tokens, block)
        return Target(np.array(planes, np.uint64), form, self.blocks)

    def copy_from(self, values: torch.Tensor, layer_begin: int, halves: slice) -> Deed:
        """The deed that writes `values` [some layers, K or V or both, tokens, heads, dim] from `layer_begin` on."""
        return BlocksCopy(values, self[layer_begin : layer_begin + len(values),], halves)

    def gather(self, out: torch.Tensor) -> None:
        """Queue the copy into `out` [layers, 2, tokens, heads, dim], contiguous, of this device or page-locked."""
        index = _index_of(self.blocks, self.caches[0].device)
        for cache, values in zip(self.caches, out, strict=True):
            pages = _split(cache)[:, self.heads].index_select(0, index)
            _rows(values, len(self.blocks)).copy_(pages, non_blocking=True)


@dataclass(frozen=True, slots=True, eq=False)
class BlocksCopy:
    """Values [layers, K or V or both, tokens, heads, dim], of the host or the device, and the blocks they go to."""

    values: torch.Tensor
    to: PagedMemory
    halves: slice

    def queue(self) -> None:
        device = self.to.caches[0].device
        index = _index_of(self.to.blocks, device)
        for cache, values in zip(self.to.caches, self.values.to(device, non_blocking=True), strict=True):
            pages = _split(cache)[:, self.to.heads, :, self.halves]
            pages.index_copy_(0, index, _rows(values, len(self.to.blocks)))


def gather_blocks(cache: torch.Tensor, block_ids: Sequence[int], *, out: torch.Tensor) -> None:
    """Copy the blocks of one layer into `out`, in the order of `block_ids`.

    `cache` is [blocks, kv heads, block tokens, 2 * head dim] of any strides; `out` is canonical,
    [2, len(block_ids) * block tokens, kv heads, head dim], contiguous, of the same dtype and device. Bits are kept.
    """
    PagedMemory.of([cache], block_ids).gather(out[None])


def scatter_blocks(cache: torch.Tensor, block_ids: Sequence[int], *, kv: torch.Tensor) -> None:
    """Copy canonical `kv` into whole blocks of one layer; shapes as in `gather_blocks`. No other block is touched."""
    BlocksCopy(kv[None], PagedMemory.of([cache], block_ids), slice(0, 2)).queue()


def _split(cache: torch.Tensor) -> torch.Tensor:
    """The cache as [blocks, kv heads, block tokens, K or V, head dim]: a view."""
    blocks, heads, block_tokens, width = cache.shape
    return _as_bytes(cache).view(blocks, heads, block_tokens, 2, width // 2)


def _rows(values: torch.Tensor, blocks: int) -> torch.Tensor:
    """Canonical values of one layer as pages: a view [blocks, heads, block tokens, K or V, head dim]."""
    kinds, tokens, heads, dim = values.shape
    return _as_bytes(values).view(kinds, blocks, tokens // blocks, heads, dim).permute(1, 3, 2, 0, 4)


def _as_bytes(values: torch.Tensor) -> torch.Tensor:
    """fp8 as bytes: torch copies them by index on no device."""
    return values.view(torch.uint8) if values.itemsize == 1 else values


def _index_of(blocks: Blocks, device: torch.device) -> Any:
    index = torch.from_numpy(blocks.astype(np.int64))
    with working_on(device):
        return index.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else index
