"""Which models have a KV cache that can be cut at any token, and its shape, from a config.json. Pure; no engine.

A family is listed once its cache was compared with what transformers allocates. What is not listed is refused: a
window or a state hidden in code would give wrong values, not an error. The table holds what a family's config class
assumes where a config.json is silent, so that the raw file and the parsed config give one layout.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypedDict

from kvstore_s3.errors import UnsupportedModelError


@dataclass(frozen=True, slots=True)
class Family:
    """What a model type assumes where its config is silent.

    `head_dim` None: hidden size / heads. `kv_heads` "stated": the config must say; "heads": as many as query heads;
    "always": as many as query heads, of hidden size / heads each, whatever the config says. `window` is the sliding
    window of a silent config; with `window_switch`, a window counts only while `use_sliding_window` is true. `rope`
    False: no RoPE. `theta` None: the config must give RoPE parameters. `rope_every`: each n-th layer is not rotated
    unless `no_rope_layers` says otherwise.
    """

    head_dim: int | None = None
    kv_heads: str = "stated"
    theta: float | None = 10000.0
    partial: float = 1.0
    rope: bool = True
    rope_every: int | None = None
    multimodal_rope: bool = False
    window: int | None = None
    window_switch: bool = False


class Shape(TypedDict):
    """The counts of a layout."""

    layers: int
    kv_heads: int
    head_dim: int


_UNKNOWN = Family()
_QWEN = Family(window_switch=True)
_QWEN_VL = Family(theta=1e6, multimodal_rope=True, window_switch=True)
_WITHOUT_ROPE = Family(kv_heads="always", rope=False)

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "apertus": Family(kv_heads="heads", theta=None),
        "arcee": Family(kv_heads="heads"),
        "bitnet": Family(theta=5e5),
        "bloom": _WITHOUT_ROPE,
        "cohere": Family(kv_heads="heads", theta=5e5),
        "ernie4_5": Family(head_dim=128, theta=5e5),
        "gemma": Family(head_dim=256),
        "glm": Family(head_dim=128, partial=0.5),
        "glm4": Family(head_dim=128, partial=0.5),
        "glm4_moe": Family(partial=0.5),
        "gpt2": _WITHOUT_ROPE,
        "gpt_neox": Family(kv_heads="always", partial=0.25),
        "granite": Family(kv_heads="heads"),
        "granitemoe": Family(kv_heads="heads"),
        "helium": Family(head_dim=128, theta=1e5),
        "llama": Family(kv_heads="heads"),
        "mistral": Family(window=4096),
        "mixtral": Family(theta=1e6),
        "ministral3": Family(head_dim=128, theta=None),
        "nemotron": Family(kv_heads="heads", partial=0.5),
        "olmo": Family(kv_heads="heads"),
        "olmo2": Family(kv_heads="heads"),
        "olmoe": Family(kv_heads="heads"),
        "opt": _WITHOUT_ROPE,
        "persimmon": Family(kv_heads="always", partial=0.5),
        "phi": Family(kv_heads="heads", partial=0.5),
        "phi3": Family(kv_heads="heads"),
        "phimoe": Family(theta=1e6),
        "qwen2": _QWEN,
        "qwen2_moe": _QWEN,
        "qwen2_vl_text": _QWEN_VL,
        "qwen2_5_vl_text": _QWEN_VL,
        "qwen3": Family(head_dim=128, window_switch=True),
        "qwen3_moe": _QWEN,
        "qwen3_vl_text": Family(head_dim=128, theta=5e5, multimodal_rope=True),
        "qwen3_vl_moe_text": Family(theta=5e5, multimodal_rope=True),
        "seed_oss": Family(head_dim=128),
        "smollm3": Family(theta=2e6, window_switch=True, rope_every=4),
        "stablelm": Family(partial=0.25),
        "starcoder2": Family(),
    }
)

_MULTIMODAL = frozenset(
    {
        "idefics3",
        "internvl",
        "llava",
        "llava_next",
        "llava_onevision",
        "mistral3",
        "qwen2_5_vl",
        "qwen2_vl",
        "qwen3_vl",
        "qwen3_vl_moe",
        "smolvlm",
    }
)
"""Outer model types around a causal text model. Images must enter the chunk keys as extra keys."""

_RECURRENT_FIELD = re.compile(
    r"(^|_)(ssm|mamba|rwkv|lru|recurrent|conv|linear_(num|key|value|conv|attn))(_|$)", re.IGNORECASE
)
"""Names that only configs with a recurrent state or linear attention have."""

_RECURRENT_NAMES = frozenset(
    {
        "state_size",
        "layers_block_type",
        "hybrid_override_pattern",
        "attn_layer_indices",
        "block_types",
        "attn_type_list",
    }
)

_REFUSED_WHEN_SET = {
    "is_encoder_decoder": "an encoder-decoder attends to the whole input, so no prefix of it stands alone",
    "add_cross_attention": "cross-attention layers keep the KV of another input",
    "cross_attention_layers": "cross-attention layers keep the KV of another input",
    "kv_lora_rank": "multi-head latent attention (MLA) keeps one latent instead of K and V, which is not supported",
    "attention_chunk_size": "chunked attention forgets tokens, so the cache cannot be cut at any token",
    "num_kv_shared_layers": "layers that share KV are not supported",
    "use_bidirectional_attention": "bidirectional attention lets earlier KV depend on later tokens",
    "per_layer_config": "layers of different shapes are not supported",
}


def select_text_config(config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Return the model type and the config of the language model: `text_config` where the model is multimodal."""
    outer = config.get("model_type")
    if not isinstance(outer, str) or not outer:
        raise UnsupportedModelError("the config has no model_type; use the config.json of a transformers model")
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        return (f"{outer}_text" if f"{outer}_text" in FAMILIES else outer), config
    refuse_by_fields(text, outer)
    inner = text.get("model_type")
    if outer not in _MULTIMODAL or not isinstance(inner, str):
        raise UnsupportedModelError(
            f"{outer}: this multimodal model (text model {inner!r}) is not known to have a cache that can be cut"
        )
    return inner, text


def refuse_by_fields(config: Mapping[str, Any], model_type: str) -> None:
    """Raise `UnsupportedModelError` if the config shows a cache that cannot be cut into prefix chunks."""
    for name, why in _REFUSED_WHEN_SET.items():
        if config.get(name):
            raise UnsupportedModelError(f"{model_type}: {name} is {config[name]!r}; {why}")
    if config.get("is_causal") is False:
        raise UnsupportedModelError(f"{model_type}: is_causal is False; earlier KV would depend on later tokens")
    _refuse_layer_types(config.get("layer_types"), model_type)
    for name, value in config.items():
        if value and (name in _RECURRENT_NAMES or _RECURRENT_FIELD.search(name)):
            raise UnsupportedModelError(
                f"{model_type}: the config has {name} = {value!r}, so it has layers with a recurrent state, "
                "linear attention or convolution: their state cannot be cut at any token"
            )


def find_family(config: Mapping[str, Any], model_type: str) -> Family:
    """Return the family of a text model.

    Raises `UnsupportedModelError` if its type is not listed, or if it attends to a sliding window only.
    """
    family = FAMILIES.get(model_type)
    _refuse_window(config, model_type, family or _UNKNOWN)
    if family is None:
        raise UnsupportedModelError(
            f"{model_type}: this model type is not known to keep full attention in every layer; if it does, give "
            f"KVLayout field by field. Known are {', '.join(FAMILIES)}"
        )
    return family


def read_shape(config: Mapping[str, Any], model_type: str, family: Family) -> Shape:
    """Return `layers`, `kv_heads` and `head_dim`. Raises `UnsupportedModelError` if the config does not tell."""
    heads = _read_count(config, model_type, "num_attention_heads", "n_head")
    return {
        "layers": _read_count(config, model_type, "num_hidden_layers", "n_layer"),
        "kv_heads": _read_kv_heads(config, model_type, family, heads),
        "head_dim": _read_head_dim(config, model_type, family, heads),
    }


def read_rotated_layers(config: Mapping[str, Any], family: Family, layers: int) -> list[int] | None:
    """Return a 1 for each layer with RoPE and a 0 for each without, or None for families that rotate all layers."""
    if family.rope_every is None:
        return None
    stated = config.get("no_rope_layers")
    if stated is not None:
        return list(stated)
    every = config.get("no_rope_layer_interval") or family.rope_every
    return [int((layer + 1) % every != 0) for layer in range(layers)]


def _read_kv_heads(config: Mapping[str, Any], model_type: str, family: Family, heads: int) -> int:
    if family.kv_heads == "always":
        return heads
    if family.kv_heads == "heads" and config.get("num_key_value_heads") is None:
        return heads
    return _read_count(config, model_type, "num_key_value_heads")


def _read_head_dim(config: Mapping[str, Any], model_type: str, family: Family, heads: int) -> int:
    if config.get("head_dim") is not None and family.kv_heads != "always":
        return _read_count(config, model_type, "head_dim")
    if family.head_dim is not None:
        return family.head_dim
    hidden = _read_count(config, model_type, "hidden_size", "n_embd", "n_embed")
    if hidden % heads:
        raise UnsupportedModelError(
            f"{model_type}: hidden size {hidden} is no multiple of {heads} heads, and there is no head_dim"
        )
    return hidden // heads


def _read_count(config: Mapping[str, Any], model_type: str, *names: str) -> int:
    value = next((config[name] for name in names if config.get(name) is not None), None)
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    if isinstance(value, (list, tuple)):
        raise UnsupportedModelError(
            f"{model_type}: {names[0]} differs between layers ({value!r}), which is not supported"
        )
    raise UnsupportedModelError(
        f"{model_type}: {names[0]} must be a positive integer, found {value!r}; write it into the config"
    )


def _refuse_layer_types(layer_types: object, model_type: str) -> None:
    if layer_types is None:
        return
    kinds = set(layer_types) if isinstance(layer_types, (list, tuple)) else {layer_types}
    if kinds - {"full_attention"}:
        found = ", ".join(sorted(str(kind) for kind in kinds - {"full_attention"}))
        raise UnsupportedModelError(
            f"{model_type}: layer_types has {found}; only full attention keeps a cache that can be cut at any token"
        )


def _refuse_window(config: Mapping[str, Any], model_type: str, family: Family) -> None:
    window = config.get("sliding_window", family.window)
    if family.window_switch and not config.get("use_sliding_window"):
        return
    if window:
        raise UnsupportedModelError(
            f"{model_type}: sliding_window is {window!r}; a window forgets tokens, "
            "so the cache cannot be cut at any token"
        )
