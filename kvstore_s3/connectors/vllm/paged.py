"""The engine's paged KV cache as one object: all layers in order, their packing, reads and writes of whole ranges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from vllm._custom_ops import cpu_attn_reshape_and_cache
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from kvstore_s3.connectors.vllm.pages import PACKINGS, Packing, read_tokens, recognise, write_blocks
from kvstore_s3.connectors.vllm.plans import TokenRange
from kvstore_s3.errors import UnsupportedModelError

if TYPE_CHECKING:
    from kvstore_s3.layout import KVLayout


@dataclass(frozen=True, slots=True)
class PagedCache:
    """One cache for each layer, [blocks, kv heads, block tokens, 2 * head dim], in layer order."""

    layers: tuple[torch.Tensor, ...]
    packing: Packing

    @classmethod
    def adopt(cls, caches: Mapping[str, torch.Tensor], layout: KVLayout, block_tokens: int) -> PagedCache:
        """Take over the caches that vLLM registers, by layer name. Raises `UnsupportedModelError` for other shapes."""
        numbered = sorted(
            ((extract_layer_index(name), cache) for name, cache in _by_layer(caches)), key=lambda item: item[0]
        )
        layers = tuple(cache for _, cache in numbered)
        if [number for number, _ in numbered] != list(range(layout.layers)):
            raise UnsupportedModelError(
                f"vLLM keeps KV for layers {sorted(caches)}, the model has {layout.layers} layers"
            )
        shape = (layout.kv_heads, block_tokens, 2 * layout.head_dim)
        for cache in layers:
            if tuple(cache.shape[1:]) != shape or not cache.is_contiguous() or _name(cache.dtype) != layout.dtype:
                raise UnsupportedModelError(
                    f"vLLM's KV cache is {list(cache.shape)} of {cache.dtype}, contiguous: {cache.is_contiguous()}; "
                    f"expected [blocks, {', '.join(map(str, shape))}] of {layout.dtype}, contiguous"
                )
        return cls(layers, find_packing(layout, block_tokens))

    @property
    def block_tokens(self) -> int:
        return self.layers[0].shape[2]

    def read(self, tokens: TokenRange, block_ids: Sequence[int]) -> torch.Tensor:
        """Copy `tokens`, which lie in `block_ids`, out: canonical [layers, 2, tokens, kv heads, head dim]."""
        return read_tokens(self.layers, block_ids, self.packing, begin=tokens.begin, end=tokens.end)

    def write(self, layer_begin: int, kv: torch.Tensor, block_ids: Sequence[int]) -> None:
        """Fill whole `block_ids`, layers from `layer_begin` on, with `kv` [layers, 2, tokens, kv heads, head dim]."""
        for layer, values in enumerate(kv, start=layer_begin):
            write_blocks(self.layers[layer], block_ids, self.packing, kv=values)


def find_packing(layout: KVLayout, block_tokens: int) -> Packing:
    """Find out how the engine packs a page, by letting its own kernel write one and comparing every bit.

    Raises `UnsupportedModelError` where no known packing fits.
    """
    dtype = getattr(torch, layout.dtype)
    isa = _get_attn_isa(dtype, block_tokens, layout.head_dim)
    keys, values = torch.randn((2, block_tokens, 1, layout.head_dim), generator=torch.Generator().manual_seed(0)).to(
        dtype
    )
    page = torch.zeros((1, 1, block_tokens, 2 * layout.head_dim), dtype=dtype)
    key_half, value_half = page.view(1, 1, 2 * block_tokens, layout.head_dim).chunk(2, dim=2)
    cpu_attn_reshape_and_cache(keys, values, key_half, value_half, torch.arange(block_tokens), isa)
    packing = recognise(page[0], keys, values)
    if packing is None:
        known = ", ".join(known.name for known in PACKINGS)
        raise UnsupportedModelError(f"the CPU's page packing for {isa!r} is not understood (known: {known})")
    return packing


def _by_layer(caches: Mapping[str, Any]) -> list[tuple[str, torch.Tensor]]:
    for name, cache in caches.items():
        if not isinstance(cache, torch.Tensor) or cache.dim() != 4:
            raise UnsupportedModelError(f"vLLM's KV cache of {name} is no tensor of 4 dimensions")
    return list(caches.items())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
