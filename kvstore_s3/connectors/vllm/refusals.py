"""What the connector cannot do right yet, refused by name when the engine starts; and the namespace of what it can."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import FullAttentionSpec

from kvstore_s3.connectors.vllm.options import Options
from kvstore_s3.errors import InvalidArgumentError, UnsupportedModelError
from kvstore_s3.hub import find_model_directory
from kvstore_s3.namespace import Namespace

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

_KV_DTYPES = ("bfloat16", "float16", "float32")
"""KV dtypes that are what the model computed, without scales."""

_WEIGHTS_AS_STORED = ("auto", "hf", "safetensors", "pt", "npcache", "fastsafetensors", "runai_streamer")
"""Load formats that give the model the weights that lie in its directory, which the namespace's digest covers."""


def check_engine(config: VllmConfig, kv_cache: KVCacheConfig) -> None:
    """Raise `UnsupportedModelError` with every reason for which this engine cannot use the connector."""
    reasons = [*_parallel_reasons(config), *_model_reasons(config), *_cache_reasons(config, kv_cache)]
    if reasons:
        raise UnsupportedModelError(
            "KVStoreS3Connector does not support this engine yet: " + "; ".join(reasons) + ". "
            "Change that, or start vLLM without --kv-transfer-config"
        )


def check_store(options: Options) -> None:
    """Refuse a store that the engine's processes cannot share. Raises `InvalidArgumentError`."""
    if options.store.startswith("memory:"):
        raise InvalidArgumentError(
            "memory:// lives in one process, and an engine has several; use file:///dir or s3://bucket/prefix"
        )


def make_namespace(config: VllmConfig, kv_cache: KVCacheConfig, chunk_tokens: int) -> Namespace:
    """The namespace of the engine's model: what any engine makes of the same directory and KV dtype.

    A hub id is resolved to its directory first, so that the weights' content counts and not the name it came by.
    """
    model = config.model_config
    directory = find_model_directory(model.model, commit=model.revision)
    dtype = kv_cache.kv_cache_groups[0].kv_cache_spec.dtype
    return Namespace.from_model(directory, dtype=dtype, chunk_tokens=chunk_tokens, variant=_variant(model))


def ineligible_reason(request: Request) -> str | None:
    """Why this request is neither saved nor loaded: its KV depends on more than model, token ids and salt."""
    if request.lora_request is not None:
        return "a LoRA adapter"
    if request.mm_features:
        return "multimodal inputs"
    if request.prompt_token_ids is None or request.prompt_embeds is not None:
        return "prompt embeddings"
    if request.resumable:
        return "a prompt that arrives in parts"
    if request.pooling_params is not None:
        return "pooling"
    return None


def _parallel_reasons(config: VllmConfig) -> Iterator[str]:
    parallel = config.parallel_config
    for name in (
        "tensor_parallel_size",
        "pipeline_parallel_size",
        "prefill_context_parallel_size",
        "decode_context_parallel_size",
    ):
        if getattr(parallel, name) > 1:
            yield f"{name} is {getattr(parallel, name)} (only 1 is supported)"
    if config.speculative_config is not None:
        yield "speculative decoding is on"
    if not current_platform.is_cpu():
        yield f"pages of the {current_platform.device_name} backend are not unpacked yet (only the CPU's are)"


def _model_reasons(config: VllmConfig) -> Iterator[str]:
    model = config.model_config
    if model.use_mla:
        yield "the model uses multi-head latent attention (MLA)"
    if model.hf_overrides:
        yield "hf_overrides change the model beyond what its directory says (write them into its config.json)"
    load_format = str(config.load_config.load_format)
    if load_format not in _WEIGHTS_AS_STORED:
        yield f"load_format is {load_format!r}, so the weights are not those in the model's directory"


def _cache_reasons(config: VllmConfig, kv_cache: KVCacheConfig) -> Iterator[str]:
    groups = kv_cache.kv_cache_groups
    if len(groups) != 1:
        kinds = sorted({type(group.kv_cache_spec).__name__ for group in groups})
        yield f"the KV cache is hybrid: {len(groups)} groups of {', '.join(kinds)}"
        return
    spec = groups[0].kv_cache_spec
    if type(spec) is not FullAttentionSpec:
        yield f"the KV cache is of kind {type(spec).__name__} (only full attention in every layer is supported)"
        return
    if spec.sliding_window is not None or spec.attention_chunk_size is not None or spec.non_causal:
        yield "attention is windowed, chunked or not causal (a sliding window, for one)"
    if spec.head_size_v != spec.head_size:
        yield f"keys have {spec.head_size} dims and values {spec.head_size_v}"
    yield from _dtype_reasons(config, spec)


def _dtype_reasons(config: VllmConfig, spec: FullAttentionSpec) -> Iterator[str]:
    name = str(spec.dtype).removeprefix("torch.")
    if name not in _KV_DTYPES or spec.kv_quant_mode:
        yield f"the KV cache is quantised (kv_cache_dtype {config.cache_config.cache_dtype!r}, kept as {name})"
    elif spec.dtype != config.model_config.dtype:
        yield f"the KV cache is {name} but the model computes in {config.model_config.dtype}"


def _variant(model: Any) -> str | None:
    """Name what changes KV at run time: weights quantised on loading, which the directory does not show."""
    if model.quantization is None or getattr(model.hf_config, "quantization_config", None) is not None:
        return None
    return f"vllm quantization={model.quantization}"
