"""Which models are let in: those whose cache is, token by token, what the namespace says. Others are refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from kvstore_s3.errors import InvalidArgumentError, UnsupportedModelError
from kvstore_s3.families import FAMILIES, refuse_by_fields
from kvstore_s3.layout import KVLayout
from kvstore_s3.namespace import Namespace

LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
"""RoPE kinds whose keys change with the length of the whole sequence: a stored prefix fits no other length."""


def check_model(model: Any, namespace: Namespace) -> list[torch.device]:
    """Raise unless the model's KV can be stored under `namespace`; return the device of each layer's KV.

    Reads the configuration first, then runs one token through the model and looks at the cache that it leaves: what
    the model does decides, not what it claims. `UnsupportedModelError` names the reason; `InvalidArgumentError` says
    where model and namespace differ.
    """
    if not isinstance(model, PreTrainedModel) or not model.can_generate():
        raise InvalidArgumentError(f"expected a transformers model that generates text, not {type(model).__name__}")
    check_weights(model, namespace)
    _check_architecture(model)
    cache = _probe_cache(model)
    _check_layout(model, _measure_layout(model, cache) | _read_rope(model), namespace.layout)
    return [layer.keys.device for layer in cache.layers]


def check_weights(model: Any, namespace: Namespace) -> None:
    """Raise where the model in memory is visibly not the one on disk: an adapter, or quantised while loading.

    Cheap enough for every call, since an adapter can be loaded at any time.
    """
    adapted = getattr(model, "_hf_peft_config_loaded", False) or _has_adapter_layers(model)
    if adapted and namespace.lora is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has an adapter loaded, but the namespace names none: unload or merge it, "
            "or give a Namespace whose `lora` is a digest of the adapter"
        )
    if getattr(model, "hf_quantizer", None) is not None and namespace.variant is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} is quantised, which changes its KV, but the namespace does not say how: load it "
            "unquantised, or give a Namespace whose `variant` names the quantisation"
        )


def _has_adapter_layers(model: PreTrainedModel) -> bool:
    """Whether PEFT put its layers into the model, which it does in place: the model that it wraps has them too."""
    return any(hasattr(module, "active_adapters") and hasattr(module, "base_layer") for module in model.modules())


def _check_architecture(model: PreTrainedModel) -> None:
    config = model.config.get_text_config(decoder=True)
    name = type(model).__name__
    for described in (model.config, config):
        refuse_by_fields(described.to_dict(), name)
    rope = getattr(config, "rope_parameters", None)
    for kind in LENGTH_DEPENDENT_ROPE:
        if isinstance(rope, Mapping) and kind in (rope.get("rope_type"), rope.get("type")):
            raise UnsupportedModelError(f"{name} uses {kind!r} RoPE: its keys change with the length of the prompt")
    if not model._supports_default_dynamic_cache():
        raise UnsupportedModelError(f"{name} keeps a cache of its own kind, which cannot be cut into prefix chunks")
    for layer, kept in enumerate(DynamicCache(config=config).layers):
        if type(kept) is not DynamicLayer:
            raise UnsupportedModelError(_uncuttable(name, layer, kept))


def _uncuttable(name: str, layer: int, kept: object) -> str:
    kind = type(kept).__name__
    if "Linear" in kind:
        reason = "linear attention or a state space (recurrent state)"
    elif "Sliding" in kind:
        reason = "sliding-window or chunked attention (only a window is kept)"
    else:
        reason = "not full attention"
    return (
        f"{name}'s cache cannot be cut into prefix chunks: layer {layer} has {reason}, {kind}; only full attention can"
    )


@torch.no_grad()
def _probe_cache(model: PreTrainedModel) -> DynamicCache:
    """The cache that one token leaves."""
    name = type(model).__name__
    token = torch.zeros((1, 1), dtype=torch.long, device=model.device)
    cache: DynamicCache | None = getattr(model(input_ids=token, use_cache=True), "past_key_values", None)
    if cache is None or type(cache) is not DynamicCache:
        raise UnsupportedModelError(f"{name} keeps its KV in {type(cache).__name__}; only DynamicCache can be cut")
    for layer, kept in enumerate(cache.layers):
        if type(kept) is not DynamicLayer or kept.get_seq_length() != 1:
            raise UnsupportedModelError(_uncuttable(name, layer, kept))
    return cache


def _measure_layout(model: PreTrainedModel, cache: DynamicCache) -> dict[str, object]:
    keys = {(*layer.keys.shape, layer.keys.dtype) for layer in cache.layers}
    values = {(*layer.values.shape, layer.values.dtype) for layer in cache.layers}
    if len(keys | values) != 1:
        raise UnsupportedModelError(
            f"{type(model).__name__} keeps K and V of unequal shapes or dtypes ({len(keys | values)} kinds over its "
            "layers, such as MLA's); all must be equal"
        )
    _, heads, _, dim, dtype = keys.pop()
    return {"layers": len(cache.layers), "kv_heads": heads, "head_dim": dim, "dtype": str(dtype).removeprefix("torch.")}


def _read_rope(model: PreTrainedModel) -> dict[str, object]:
    """The RoPE parameters, where the model type is a listed one; of others, the layout was given by hand."""
    if model.config.get_text_config(decoder=True).model_type.removesuffix("_text") not in FAMILIES:
        return {}
    return {"rope": KVLayout.from_config(model.config, dtype=model.dtype).rope}


def _check_layout(model: PreTrainedModel, found: dict[str, object], layout: KVLayout) -> None:
    differing = [
        f"{name} is {_show(value)} in the model, {_show(getattr(layout, name))} in the namespace"
        for name, value in found.items()
        if value != getattr(layout, name)
    ]
    if differing:
        raise InvalidArgumentError(
            f"{type(model).__name__} is not the namespace's model: {'; '.join(differing)}. Load the model in the "
            "namespace's dtype, or make the namespace from this model with Namespace.from_model"
        )


def _show(value: object) -> object:
    return dict(value) if isinstance(value, Mapping) else value
