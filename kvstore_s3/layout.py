"""KVLayout: the shape of a model's KV cache, and Shard: one rank's rectangle of it.

Canonical layout of KV in this package: `[layer][K or V][token][kv head][dim]`, C order, engine-neutral.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

from kvstore_s3.errors import InvalidArgumentError, UnsupportedModelError
from kvstore_s3.families import (
    Family,
    find_family,
    read_rotated_layers,
    read_shape,
    refuse_by_fields,
    select_text_config,
)
from kvstore_s3.rope import NO_ROPE, freeze_rope, normalize_rope


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
    rope: Mapping[str, Any] = field(default_factory=lambda: NO_ROPE, hash=False)

    def __post_init__(self) -> None:
        for name, limit in _LIMITS.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= limit:
                raise InvalidArgumentError(f"{name} must be an integer from 1 to {limit}, not {value!r}")
        if not isinstance(self.dtype, str) or self.dtype not in DTYPES:
            raise InvalidArgumentError(f"KV dtype {self.dtype!r} is unknown; use one of {', '.join(DTYPES)}")
        if self.attention != "full":
            raise UnsupportedModelError(
                f"attention kind {self.attention!r} cannot be cut into prefix chunks; only 'full' can"
            )
        object.__setattr__(self, "rope", freeze_rope(self.rope))

    @classmethod
    def from_config(cls, config: Any, *, dtype: Any = None) -> KVLayout:
        """Return the layout of a transformers config object, or of the parsed dict of a config.json.

        `dtype` is the KV element type: a torch dtype or its name; None takes the config's own. The config of the
        language model counts where the model is multimodal. Raises `UnsupportedModelError`, naming the reason, for
        models whose cache cannot be cut at any token, for model types not in `families.FAMILIES` (give the fields
        yourself there), and for shapes that the config does not tell; `InvalidArgumentError` for dtypes.
        """
        document = config if isinstance(config, Mapping) else _to_dict(config)
        refuse_by_fields(document, str(document.get("model_type")))
        model_type, text = select_text_config(document)
        refuse_by_fields(text, model_type)
        family = find_family(text, model_type)
        shape = read_shape(text, model_type, family)
        return cls(
            **shape,
            dtype=dtype_name(dtype) if dtype is not None else _config_dtype(text, document),
            rope=_read_rope(text, model_type, family, shape["layers"]),
        )

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


def dtype_name(dtype: Any) -> str:
    """Return the name of a KV dtype, a key of `DTYPES`, for a torch dtype or a name such as "bfloat16"."""
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise InvalidArgumentError(f"KV dtype {name!r} is unknown; use one of {', '.join(DTYPES)}")
    return name


def _to_dict(config: Any) -> Mapping[str, Any]:
    to_dict = getattr(config, "to_dict", None)
    document = to_dict() if callable(to_dict) else None
    if not isinstance(document, Mapping):
        raise InvalidArgumentError(
            f"give a transformers config or the dict of a config.json, not {type(config).__name__}"
        )
    return document


def _config_dtype(*configs: Mapping[str, Any]) -> str:
    for config in configs:
        dtype = config.get("dtype") or config.get("torch_dtype")
        if dtype is not None:
            return dtype_name(dtype)
    raise InvalidArgumentError('the config names no dtype; pass dtype=, such as dtype="bfloat16"')


def _read_rope(text: Mapping[str, Any], model_type: str, family: Family, layers: int) -> Mapping[str, Any]:
    if not family.rope:
        return NO_ROPE
    rope = normalize_rope(
        text, model_type, theta=family.theta, partial=family.partial, multimodal=family.multimodal_rope
    )
    rotated = read_rotated_layers(text, family, layers)
    return rope if rotated is None else freeze_rope({**rope, "no_rope_layers": rotated})
