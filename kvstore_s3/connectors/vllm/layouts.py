"""Pages of attention kernels that keep each token's K and V side by side, as FlashAttention, FlashInfer and Triton do.

Pure: no vLLM, any device. vLLM gives each layer's cache as [blocks, kv heads, block tokens, 2 * head dim], K in the
first half of the last axis and V in the second, whatever the order in memory: that is in the strides. A layout is
spelled by its axes in memory, outermost first: L layer, B block, H kv head, N token, C content (K then V). What kernels
call HND ends in HNC, NHD in NHC.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

LAYOUTS = ("LBHNC", "LBNHC", "LHBNC", "BLHNC", "BLNHC", "BHLNC")
"""Orders in memory that vLLM 0.32 knows. With B outermost, a block of all layers is one piece."""


def page_strides(layout: str, sizes: dict[str, int]) -> dict[str, int]:
    """The distance in elements between neighbours along each axis, for a cache of `sizes` without gaps."""
    strides, step = {}, 1
    for axis in reversed(layout):
        strides[axis] = step
        step *= sizes[axis]
    return strides


def view_layers(
    storage: Tensor, layout: str, *, layers: int, blocks: int, heads: int, block_tokens: int, head_dim: int
) -> tuple[Tensor, ...]:
    """View flat `storage` as one [blocks, kv heads, block tokens, 2 * head dim] per layer, as vLLM registers them."""
    sizes = {"L": layers, "B": blocks, "H": heads, "N": block_tokens, "C": 2 * head_dim}
    strides = page_strides(layout, sizes)
    view = storage.as_strided([sizes[axis] for axis in "LBHNC"], [strides[axis] for axis in "LBHNC"])
    return view.unbind(0)


def gather_blocks(cache: Tensor, block_ids: Sequence[int], *, out: Tensor) -> None:
    """Copy the blocks of one layer into `out`, in the order of `block_ids`.

    `cache` is [blocks, kv heads, block tokens, 2 * head dim] of any strides; `out` is canonical,
    [2, len(block_ids) * block tokens, kv heads, head dim], contiguous, of the same dtype and device. Bits are kept.
    """
    pages = _split(cache).index_select(0, _index(cache, block_ids))
    _rows(out, cache, len(block_ids)).copy_(pages)


def scatter_blocks(cache: Tensor, block_ids: Sequence[int], *, kv: Tensor) -> None:
    """Copy canonical `kv` into whole blocks of one layer; shapes as in `gather_blocks`. No other block is touched."""
    _split(cache).index_copy_(0, _index(cache, block_ids), _rows(kv, cache, len(block_ids)))


def _split(cache: Tensor) -> Tensor:
    """The cache as [blocks, kv heads, block tokens, K or V, head dim]: a view."""
    blocks, heads, block_tokens, width = cache.shape
    return _as_bytes(cache).view(blocks, heads, block_tokens, 2, width // 2)


def _rows(kv: Tensor, cache: Tensor, count: int) -> Tensor:
    """Canonical KV as pages: a view of the same shape as `count` blocks of `_split`."""
    _, heads, block_tokens, _ = cache.shape
    return _as_bytes(kv).view(2, count, block_tokens, heads, -1).permute(1, 3, 2, 0, 4)


def _as_bytes(values: Tensor) -> Tensor:
    """fp8 as bytes: torch copies them by index on no device."""
    return values.view(torch.uint8) if values.itemsize == 1 else values


def _index(cache: Tensor, block_ids: Sequence[int]) -> Tensor:
    return torch.tensor(block_ids, dtype=torch.int64, device=cache.device)
