"""RoPE parameters in one canonical spelling, so that one model gives one namespace. Pure.

Two spellings are read: `rope_parameters` (transformers 5: theta, type and scaling in one mapping) and the older
`rope_theta` + `rope_scaling` + `partial_rotary_factor`, with GPT-NeoX's `rotary_emb_base` and `rotary_pct`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from kvstore_s3.errors import InvalidArgumentError, UnsupportedModelError

NO_ROPE: Mapping[str, Any] = MappingProxyType({"rope_type": "none"})
"""A model without RoPE: learned positions or ALiBi."""

_STATIC_TYPES = {"default", "linear", "llama3", "yarn"}
"""Types whose rotation of a token depends on its own position alone."""

_LENGTH_DEPENDENT = {
    "dynamic": "its base grows with the prompt, so old keys would change",
    "longrope": "it switches factors when the prompt passes the original context, so old keys would change",
    "su": "it is an old name of longrope: old keys would change with the prompt's length",
}

_SCALED_TYPES = {"llama3", "yarn"}
"""Types that need `original_max_position_embeddings`; the model's own maximum where it is not given."""


def freeze_rope(rope: object) -> Mapping[str, Any]:
    """Return RoPE parameters as a read-only mapping of numbers, strings, bools and tuples of them, sorted by name.

    Floats without a fraction become ints (10000.0 and 10000 are one value). Raises `InvalidArgumentError`.
    """
    if not isinstance(rope, Mapping) or not isinstance(rope.get("rope_type"), str):
        raise InvalidArgumentError(f"rope must be a mapping that has a 'rope_type', not {rope!r}")
    if not all(isinstance(name, str) for name in rope):
        raise InvalidArgumentError(f"rope parameters have names of type str: {rope!r}")
    return MappingProxyType({name: _freeze_value(name, rope[name]) for name in sorted(rope)})


def normalize_rope(
    config: Mapping[str, Any], model_type: str, *, theta: float | None, partial: float, multimodal: bool
) -> Mapping[str, Any]:
    """Return the canonical RoPE parameters of a model's (text) config.

    `theta` and `partial` are what the model's family assumes where the config is silent (`theta` None: it must say),
    `multimodal` marks families that rotate by three axes. Raises `UnsupportedModelError` for types under which the
    keys of old tokens depend on the prompt's length, and for types and spellings that are not known.
    """
    rope = {name: value for name, value in _find_parameters(config, model_type).items() if value is not None}
    if theta is None and not rope:
        raise UnsupportedModelError(f"{model_type}: the config has no RoPE parameters; write them into it")
    kind = rope.pop("rope_type", None) or rope.get("type") or "default"
    rope.pop("type", None)
    rope["rope_type"] = _check_type(kind, model_type, multimodal=multimodal)
    rope["rope_theta"] = _first(rope.get("rope_theta"), config.get("rope_theta"), config.get("rotary_emb_base"), theta)
    if rope["rope_theta"] is None:
        raise UnsupportedModelError(f"{model_type}: the config has no rope_theta; write it into it")
    factor = rope.pop("partial_rotary_factor", None)
    factor = _first(factor, config.get("partial_rotary_factor"), config.get("rotary_pct"), partial)
    if factor != 1:
        rope["partial_rotary_factor"] = factor
    if rope["rope_type"] in _SCALED_TYPES:
        rope["original_max_position_embeddings"] = _original_length(config, rope, model_type)
    return freeze_rope(rope)


def _find_parameters(config: Mapping[str, Any], model_type: str) -> Mapping[str, Any]:
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(found, Mapping):
        raise UnsupportedModelError(f"{model_type}: RoPE parameters are a mapping, found {found!r}")
    nested = {name for name, value in found.items() if isinstance(value, Mapping)}
    if nested == set(found) == {"full_attention"}:
        return dict(found["full_attention"])
    if nested:
        raise UnsupportedModelError(
            f"{model_type}: RoPE differs between layers ({', '.join(sorted(nested))}), which is not supported"
        )
    return found


def _check_type(kind: object, model_type: str, *, multimodal: bool) -> str:
    if not isinstance(kind, str):
        raise UnsupportedModelError(f"{model_type}: the RoPE type is a string, found {kind!r}")
    if multimodal and kind in {"default", "mrope", "axial"}:  # spellings of one thing over the years
        return "mrope"
    if model_type in {"phi3", "phimoe"} and kind == "yarn":  # transformers reads it so for these families
        kind = "longrope"
    if kind in _LENGTH_DEPENDENT:
        raise UnsupportedModelError(
            f"{model_type}: RoPE type {kind!r} cannot be stored by prefix: {_LENGTH_DEPENDENT[kind]}"
        )
    if kind not in _STATIC_TYPES:
        raise UnsupportedModelError(f"{model_type}: RoPE type {kind!r} is not known; known are {sorted(_STATIC_TYPES)}")
    return kind


def _original_length(config: Mapping[str, Any], rope: Mapping[str, Any], model_type: str) -> int:
    name = "original_max_position_embeddings"
    length = _first(config.get(name), rope.get(name), config.get("max_position_embeddings"))
    if not isinstance(length, int):
        raise UnsupportedModelError(f"{model_type}: RoPE type {rope['rope_type']!r} needs {name}, found {length!r}")
    return length


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _freeze_value(name: str, value: object) -> object:
    if isinstance(value, (list, tuple)):
        return tuple(_freeze_scalar(name, item) for item in value)
    return _freeze_scalar(name, value)


def _freeze_scalar(name: str, value: object) -> object:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise InvalidArgumentError(
        f"rope parameter {name!r} must be a finite number, string or bool, or a list of them, not {value!r}"
    )
