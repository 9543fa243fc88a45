"""The engine's paged KV cache on a GPU: its layers as they lie in memory, in any order of their axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from kvstore_s3.connectors.vllm.paged import in_layer_order
from kvstore_s3.connectors.vllm.plans import TokenRange
from kvstore_s3.device_pages import PagedMemory
from kvstore_s3.device_save import DeviceKV
from kvstore_s3.errors import UnsupportedModelError

if TYPE_CHECKING:
    from kvstore_s3.codec.device.encoder import DeviceEncoder
    from kvstore_s3.device_load import Device
    from kvstore_s3.layout import KVLayout, Shard


def engine_device(caches: Mapping[str, Any]) -> Device | None:
    """The GPU that holds the engine's caches; None: the host does."""
    first = next(iter(caches.values()), None)
    return first.device if isinstance(first, torch.Tensor) and first.device.type != "cpu" else None


@dataclass(frozen=True, slots=True, eq=False)
class DeviceCache:
    """The caches of the layers that this process holds, in layer order, the first that of the model's `layer_begin`.

    Each is [blocks, kv heads, block tokens, 2 * head dim] of one form: see `device_pages`. Kernels may work on smaller
    blocks than the scheduler counts in: a block of `block_tokens` is then several neighbours.
    """

    layers: tuple[torch.Tensor, ...]
    block_tokens: int
    layer_begin: int = 0

    @classmethod
    def adopt(
        cls, caches: Mapping[str, Any], layout: KVLayout, block_tokens: int, *, shard: Shard | None = None
    ) -> DeviceCache:
        """Take over the caches that vLLM registers, by layer name. `shard` is what this rank holds (None: all).

        Raises `UnsupportedModelError` for other layers, shapes, dtypes and orders than are understood.
        """
        shard = shard or layout.full_shard
        dtype = getattr(torch, layout.dtype)
        layers = tuple(
            _checked(name, cache, (shard.heads, block_tokens, 2 * layout.head_dim), dtype)
            for name, cache in in_layer_order(caches, layout, shard)
        )
        forms = {(cache.shape, cache.stride(), cache.device) for cache in layers}
        if len(forms) > 1:
            raise UnsupportedModelError(f"vLLM's KV caches lie in {len(forms)} ways; expected all layers alike")
        return cls(layers, block_tokens, shard.layer_begin)

    @property
    def layer_end(self) -> int:
        """One past the last layer, as the model counts them."""
        return self.layer_begin + len(self.layers)

    def memory(self, block_ids: Sequence[int], layer_begin: int, layer_end: int) -> PagedMemory:
        """Whole `block_ids` in the model's layers `layer_begin` to `layer_end`, which this process must hold."""
        if not self.layer_begin <= layer_begin < layer_end <= self.layer_end:
            raise ValueError(
                f"layers {layer_begin} to {layer_end} are not all among {self.layer_begin} to {self.layer_end}, which "
                "this process holds"
            )
        caches = self.layers[layer_begin - self.layer_begin : layer_end - self.layer_begin]
        parts = self.block_tokens // caches[0].shape[2]
        return PagedMemory.of(caches, [block * parts + part for block in block_ids for part in range(parts)])

    def read_later(self, tokens: TokenRange, block_ids: Sequence[int], encoder: DeviceEncoder) -> DeviceKV:
        """The KV of `tokens`, which lie in `block_ids` once the calling thread's queue has come here.

        Raises `DeviceError`.
        """
        size, first = self.block_tokens, tokens.begin // self.block_tokens

        def find(begin: int, end: int) -> tuple[PagedMemory, int]:
            begin, end = tokens.begin + begin, tokens.begin + end
            blocks = block_ids[begin // size - first : -(-end // size) - first]
            return self.memory(blocks, self.layer_begin, self.layer_end), begin % size

        _, heads, _, width = self.layers[0].shape
        shape = (len(self.layers), 2, tokens.end - tokens.begin, heads, width // 2)
        return DeviceKV(encoder, find, shape, self.layers[0].dtype, after=encoder.mark_current())


def _checked(name: str, cache: Any, shape: tuple[int, int, int], dtype: torch.dtype) -> torch.Tensor:
    """The cache as [blocks, kv heads, block tokens, 2 * head dim], elements typed. vLLM keeps fp8 as plain bytes."""
    heads, block_tokens, width = shape
    expected = f"[blocks, {heads}, {block_tokens} tokens or a part of them, {width}] of {dtype}, the last axis dense"
    if not isinstance(cache, torch.Tensor):
        raise UnsupportedModelError(f"vLLM's KV cache of {name} is {type(cache).__name__}; expected {expected}")
    if cache.dim() == 3 and heads == 1:  # a latent cache says nothing of heads
        cache = cache.unsqueeze(1)
    as_bytes = dtype.itemsize == 1 and cache.dtype == torch.uint8
    fits = cache.dim() == 4 and (cache.shape[1], cache.shape[3]) == (heads, width) and cache.stride(3) == 1
    if not fits or block_tokens % cache.shape[2] or not (as_bytes or cache.dtype == dtype):
        raise UnsupportedModelError(
            f"vLLM's KV cache of {name} is {list(cache.shape)} of {cache.dtype}, strides {list(cache.stride())}; "
            f"expected {expected}"
        )
    typed: torch.Tensor = cache.view(dtype)
    return typed
