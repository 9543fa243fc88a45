"""Between transformers' cache (per layer K and V of [1, heads, tokens, dim]) and the canonical layout."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import DynamicCache, PretrainedConfig


def build_cache(config: PretrainedConfig, kv: torch.Tensor | None, devices: Sequence[torch.device]) -> DynamicCache:
    """Return a cache that holds `kv` [layers, 2, tokens, kv_heads, head_dim], or an empty one.

    Layer by layer, so that each layer's KV goes to the device of that layer.
    """
    cache = DynamicCache(config=config)
    if kv is None or kv.shape[2] == 0:
        return cache
    for layer, (values, device) in enumerate(zip(kv, devices, strict=True)):
        keys, values = values.to(device).transpose(1, 2).unsqueeze(1)
        cache.update(keys, values, layer)
    return cache


def read_cache(cache: DynamicCache, begin: int, end: int) -> torch.Tensor:
    """Copy tokens `begin` to `end` out of `cache` as [layers, 2, tokens, kv_heads, head_dim] on the CPU."""
    first = cache.layers[0].keys
    shape = (len(cache.layers), 2, end - begin, first.shape[1], first.shape[3])
    kv = torch.empty(shape, dtype=first.dtype)
    for out, layer in zip(kv, cache.layers, strict=True):
        out[0] = layer.keys[0, :, begin:end].transpose(0, 1)
        out[1] = layer.values[0, :, begin:end].transpose(0, 1)
    return kv
