"""KVLayout: the shape of a model's KV cache, and Shard: one rank's rectangle of it.

Canonical layout of KV in this package: `[layer][K or V][token][kv head][dim]`, C order, engine-neutral.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

from kvstore_s3.errors import InvalidArgumentError, UnsupportedModelError


class DType(NamedTuple):
    """A KV element type: `id` in the bitstream, `itemsize` in bytes."""

    id: int
    name: str
    itemsize: int


DTYPES: Mapping[str, DType] = MappingProxyType(
    {
        dtype.name: dtype
        for dtype in (
            DType(1, "bfloat16", 2),
            DType(2, "float16", 2),
            DType(3, "float32", 4),
            DType(4, "float8_e4m3fn", 1),
            DType(5, "float8_e5m2", 1),
        )
    }
)

_LIMITS = {"layers": 4096, "kv_heads": 1024, "head_dim": 4096}
"""Largest values that a layout may have: far beyond any model, small enough that sizes never overflow."""


@dataclass(frozen=True, slots=True)
class Shard:
    """Layer range x KV-head range, half open. Its name is the last part of an object key."""

    layer_begin: int
    layer_end: int
    head_begin: int
    head_end: int

    def __post_init__(self) -> None:
        if not (0 <= self.layer_begin < self.layer_end and 0 <= self.head_begin < self.head_end):
            raise InvalidArgumentError(f"empty or negative shard {self}; give half-open ranges of layers and heads")

    @property
    def name(self) -> str:
        return f"l{self.layer_begin}-{self.layer_end}.h{self.head_begin}-{self.head_end}"

    @property
    def layers(self) -> int:
        return self.layer_end - self.layer_begin

    @property
    def heads(self) -> int:
        return self.head_end - self.head_begin

    @classmethod
    def parse(cls, name: str) -> Shard:
        match = re.fullmatch(r"l(\d{1,4})-(\d{1,4})\.h(\d{1,4})-(\d{1,4})", name, re.ASCII)
        if match is None:
            raise InvalidArgumentError(f"{name!r} is not a shard name such as 'l0-32.h0-8'")
        shard = cls(*(int(group) for group in match.groups()))
        if shard.name != name:
            raise InvalidArgumentError(f"{name!r} is not the canonical name {shard.name!r} of that shard")
        return shard


@dataclass(frozen=True, slots=True)
class KVLayout:
    """What a model keeps per token.

    `dtype` is the KV element type's name, a key of `DTYPES`. `attention` is "full": the only kind whose cache can be
    cut at any token. `rope` holds the normalised RoPE parameters, {"rope_type": "none"} for a model without RoPE.
    """

    layers: int
    kv_heads: int
    head_dim: int
    dtype: str
    attention: str = "full"
    rope: Mapping[str, Any] = field(default_factory=lambda: {"rope_type": "none"}, hash=False)

    def __post_init__(self) -> None:
        for name, limit in _LIMITS.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= limit:
                raise InvalidArgumentError(f"{name} must be an integer from 1 to {limit}, not {value!r}")
        if self.dtype not in DTYPES:
            raise InvalidArgumentError(f"KV dtype {self.dtype!r} is unknown; use one of {', '.join(DTYPES)}")
        if self.attention != "full":
            raise UnsupportedModelError(
                f"attention kind {self.attention!r} cannot be cut into prefix chunks; only 'full' can"
            )
        object.__setattr__(self, "rope", freeze_rope(self.rope))

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize

    @property
    def full_shard(self) -> Shard:
        return Shard(0, self.layers, 0, self.kv_heads)

    @property
    def bytes_per_token(self) -> int:
        """Uncompressed bytes of K and V of one token over all layers and heads."""
        return self.layers * 2 * self.kv_heads * self.head_dim * self.itemsize

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON values: the layout's part of the namespace."""
        return {
            "layers": self.layers,
            "kv_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "dtype": self.dtype,
            "attention": self.attention,
            "rope": {name: list(value) if isinstance(value, tuple) else value for name, value in self.rope.items()},
        }

    @classmethod
    def from_json(cls, document: object) -> KVLayout:
        """Read what `to_json` gave. Raises `InvalidArgumentError` for missing, unknown or wrong fields."""
        names = {"layers", "kv_heads", "head_dim", "dtype", "attention", "rope"}
        if not isinstance(document, Mapping) or set(document) != names:
            raise InvalidArgumentError(f"a layout is an object with the fields {sorted(names)}, not {document!r}")
        return cls(**document)


def freeze_rope(rope: object) -> Mapping[str, Any]:
    """Return RoPE parameters as a read-only mapping of numbers, strings, bools and tuples of numbers."""
    if not isinstance(rope, Mapping) or not isinstance(rope.get("rope_type"), str):
        raise InvalidArgumentError(f"rope must be a mapping that has a 'rope_type', not {rope!r}")
    return MappingProxyType({name: _freeze_rope_value(name, rope[name]) for name in sorted(rope)})


def _freeze_rope_value(name: str, value: object) -> object:
    if isinstance(value, (list, tuple)):
        return tuple(_freeze_rope_value(name, item) for item in value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise InvalidArgumentError(
        f"rope parameter {name!r} must be a finite number, a string, a bool or a list, not {value!r}"
    )
