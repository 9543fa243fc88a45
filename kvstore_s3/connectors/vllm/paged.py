"""The engine's paged KV cache as one object: all layers in order, their packing, reads and writes of whole ranges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.models.utils import extract_layer_index

from kvstore_s3.connectors.vllm.pages import PACKINGS, Packing, Pages, recognise
from kvstore_s3.connectors.vllm.plans import TokenRange
from kvstore_s3.connectors.vllm.prefault import populate
from kvstore_s3.errors import UnsupportedModelError

if TYPE_CHECKING:
    from kvstore_s3.layout import KVLayout, Shard


_CACHE_DTYPES = {"float8_e4m3fn": "fp8_e4m3", "float8_e5m2": "fp8_e5m2"}
"""What vLLM calls the KV dtypes that it keeps as bytes. Others are the model's own, "auto"."""


@dataclass(frozen=True, slots=True)
class PagedCache:
    """The caches of the layers that this process holds, in layer order.

    Each is [blocks, kv heads, block tokens, 2 * head dim], of the layout's dtype. The first is that of layer
    `layer_begin`: layers are counted as the model counts them.
    """

    layers: tuple[torch.Tensor, ...]
    packing: Packing
    layer_begin: int = 0
    pages: Pages = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "pages", Pages(self.layers, self.packing))

    @classmethod
    def adopt(
        cls,
        caches: Mapping[str, torch.Tensor],
        layout: KVLayout,
        block_tokens: int,
        *,
        shard: Shard | None = None,
        model_dtype: torch.dtype | None = None,
    ) -> PagedCache:
        """Take over the caches that vLLM registers, by layer name.

        `shard` is what this rank holds (None: all); `model_dtype` what the model computes in, where that is not the
        layout's dtype. Raises `UnsupportedModelError` for other layers, shapes and dtypes, and unknown packings.
        """
        shard = shard or layout.full_shard
        dtype = getattr(torch, layout.dtype)
        layers = tuple(
            _checked(name, cache, (shard.heads, block_tokens, 2 * layout.head_dim), dtype)
            for name, cache in in_layer_order(caches, layout, shard)
        )
        return cls(layers, find_packing(layout, block_tokens, model_dtype or dtype), shard.layer_begin)

    @property
    def layer_end(self) -> int:
        """One past the last layer, as the model counts them."""
        return self.layer_begin + len(self.layers)

    @property
    def block_tokens(self) -> int:
        return self.layers[0].shape[2]

    def read(self, tokens: TokenRange, block_ids: Sequence[int]) -> torch.Tensor:
        """Copy `tokens`, which lie in `block_ids`, out: canonical [layers, 2, tokens, kv heads, head dim]."""
        return self.pages.read_tokens(block_ids, begin=tokens.begin, end=tokens.end)

    def write(self, layer_begin: int, kv: torch.Tensor, block_ids: Sequence[int]) -> None:
        """Fill whole `block_ids`, from the model's layer `layer_begin` on.

        `kv` is [layers, 2, tokens, kv heads, head dim]; this process must hold all those layers.
        """
        if not self.layer_begin <= layer_begin <= layer_begin + len(kv) <= self.layer_end:
            raise ValueError(
                f"layers {layer_begin} to {layer_begin + len(kv)} are not all among {self.layer_begin} to "
                f"{self.layer_end}, which this process holds"
            )
        self.pages.write(block_ids, kv=kv, layer=layer_begin - self.layer_begin)

    def populate(self, tokens: int) -> None:
        """Have memory behind as many blocks as the first `tokens` take, which the engine gives out from block 0 on."""
        for layer in self.layers:
            blocks = min(len(layer), 1 + -(-tokens // self.block_tokens))
            populate(layer.data_ptr(), layer[:blocks].nbytes)


def find_packing(layout: KVLayout, block_tokens: int, model_dtype: torch.dtype) -> Packing:
    """Find out how the engine packs a page, by letting its own kernel write one and comparing every bit.

    Raises `UnsupportedModelError` where no known packing fits.
    """
    from vllm._custom_ops import cpu_attn_reshape_and_cache
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa  # of no use on a GPU

    dtype, cache_dtype = getattr(torch, layout.dtype), _CACHE_DTYPES.get(layout.dtype, "auto")
    isa = _get_attn_isa(model_dtype, block_tokens, layout.head_dim, cache_dtype)
    kept = _exact_values((2, block_tokens, 1, layout.head_dim)).to(dtype)
    keys, values = kept.to(model_dtype)
    page = torch.zeros((1, 1, block_tokens, 2 * layout.head_dim), dtype=dtype)
    stored = page.view(torch.uint8) if cache_dtype != "auto" else page
    key_half, value_half = stored.view(1, 1, 2 * block_tokens, layout.head_dim).chunk(2, dim=2)
    slots = torch.arange(block_tokens)
    cpu_attn_reshape_and_cache(keys, values, key_half, value_half, slots, isa, kv_cache_dtype=cache_dtype)
    packing = recognise(page[0], kept[0], kept[1])
    if packing is None:
        known = ", ".join(known.name for known in PACKINGS)
        raise UnsupportedModelError(
            f"the CPU's page packing for {isa!r} and {layout.dtype} is not understood (known: {known})"
        )
    return packing


def _exact_values(shape: tuple[int, ...]) -> torch.Tensor:
    """Random values that every KV dtype holds exactly, fp8 with a scale of 1 too: +-(4..7) * 2 ** (-4..2)."""
    seeded = torch.Generator().manual_seed(0)
    digits = torch.randint(4, 8, shape, generator=seeded) * (2 * torch.randint(0, 2, shape, generator=seeded) - 1)
    return torch.ldexp(digits.float(), torch.randint(-4, 3, shape, generator=seeded))


def in_layer_order(caches: Mapping[str, Any], layout: KVLayout, shard: Shard) -> list[tuple[str, Any]]:
    """vLLM's caches and their names. Raises `UnsupportedModelError` where they are not those of the shard's layers."""
    numbered = sorted(((extract_layer_index(name), name) for name in caches), key=lambda item: item[0])
    if [number for number, _ in numbered] != list(range(shard.layer_begin, shard.layer_end)):
        raise UnsupportedModelError(
            f"vLLM keeps KV for the layers {sorted(caches)}; this rank should hold layers {shard.layer_begin} to "
            f"{shard.layer_end - 1} of the model's {layout.layers} layers"
        )
    return [(name, caches[name]) for _, name in numbered]


def _checked(name: str, cache: Any, shape: tuple[int, int, int], dtype: torch.dtype) -> torch.Tensor:
    """Return the cache with its elements typed. vLLM keeps fp8 as plain bytes."""
    if not isinstance(cache, torch.Tensor) or cache.dim() != 4:
        raise UnsupportedModelError(f"vLLM's KV cache of {name} is no tensor of 4 dimensions")
    as_bytes = dtype.itemsize == 1 and cache.dtype == torch.uint8
    if tuple(cache.shape[1:]) != shape or not cache.is_contiguous() or not (as_bytes or cache.dtype == dtype):
        raise UnsupportedModelError(
            f"vLLM's KV cache is {list(cache.shape)} of {cache.dtype}, contiguous: {cache.is_contiguous()}; "
            f"expected [blocks, {', '.join(map(str, shape))}] of {dtype}, contiguous"
        )
    return cache.view(dtype)
