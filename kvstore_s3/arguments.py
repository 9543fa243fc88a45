"""What callers of a store hand in, checked before it is used. All raise `InvalidArgumentError`."""

from __future__ import annotations

import torch

from kvstore_s3.bitstream import Identity
from kvstore_s3.device_save import DeviceKV
from kvstore_s3.errors import InvalidArgumentError
from kvstore_s3.hits import Hit
from kvstore_s3.layout import Shard
from kvstore_s3.namespace import Namespace


def check_shard(shard: Shard | None, namespace: Namespace) -> Shard:
    """The rectangle that a store holds: `shard`, or the whole model."""
    full = namespace.layout.full_shard
    if shard is not None and (shard.layer_end > full.layer_end or shard.head_end > full.head_end):
        raise InvalidArgumentError(f"shard {shard.name} lies outside the model's {full.name}")
    return shard or full


def check_boundary(first_token: int, namespace: Namespace) -> None:
    """Whether a chunk begins at `first_token`."""
    if first_token < 0 or first_token % namespace.chunk_tokens:
        raise InvalidArgumentError(
            f"first_token {first_token} is not a multiple of chunk_tokens {namespace.chunk_tokens}"
        )


def check_hit(hit: Hit, namespace: Namespace) -> None:
    """A hit of another store's namespace would decode to that model's KV, or into the wrong places."""
    found = [tile.identity for chunk in hit.chunks for tile in chunk.tiles]
    expected = [
        Identity(namespace.digest, identity.key, identity.shard, namespace.layout, namespace.chunk_tokens)
        for identity in found
    ]
    if hit.chunk_tokens != namespace.chunk_tokens or found != expected:
        raise InvalidArgumentError("this hit is of another namespace; look the tokens up in the store that loads them")


def check_values(kv: torch.Tensor | DeviceKV, namespace: Namespace, shard: Shard) -> None:
    """Whether `kv` [layers, 2, tokens, heads, dim] is KV of `shard`."""
    if not isinstance(kv, DeviceKV) and not (
        isinstance(kv, torch.Tensor) and kv.layout == torch.strided and not kv.is_meta
    ):
        raise InvalidArgumentError(f"kv must be a dense tensor with values, not {kv!r:.80}")
    layout = namespace.layout
    expected = (shard.layers, 2, shard.heads, layout.head_dim)
    shape = tuple(kv.shape)
    if len(shape) != 5 or (*shape[:2], *shape[3:]) != expected:
        wanted = f"[{shard.layers}, 2, tokens, {shard.heads}, {layout.head_dim}]"
        whose = "this namespace's layout" if shard == layout.full_shard else f"that of rank {shard.name}"
        raise InvalidArgumentError(f"kv has shape {list(shape)}; {whose} is {wanted}")
    if kv.dtype != getattr(torch, layout.dtype):
        raise InvalidArgumentError(f"kv is {kv.dtype}; this namespace holds {layout.dtype}")
