"""Pages of attention kernels that keep each token's K and V side by side, as FlashAttention, FlashInfer and Triton do.

Pure: no vLLM, any device. vLLM gives each layer's cache as [blocks, kv heads, block tokens, 2 * head dim], K in the
first half of the last axis and V in the second, whatever the order in memory: that is in the strides. A layout is
spelled by its axes in memory, outermost first: L layer, B block, H kv head, N token, C content (K then V). What kernels
call HND ends in HNC, NHD in NHC.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvstore_s3.device_pages import gather_blocks, scatter_blocks

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LAYOUTS", "gather_blocks", "page_strides", "scatter_blocks", "view_layers"]

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
