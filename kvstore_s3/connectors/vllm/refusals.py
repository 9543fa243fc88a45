"""What the connector cannot do right yet, refused by name when the engine starts; and the namespace of what it can."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
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

_FP8 = {"fp8": torch.float8_e4m3fn, "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
"""KV dtypes of one byte with one scale for all that a layer keeps, fixed when the weights are loaded."""

_DRAFTS_WITHOUT_KV = ("ngram", "suffix")
"""Ways to guess tokens that look at token ids alone."""

REQUEST_REASONS = {
    "lora-unknown": "a LoRA adapter whose content is not known for sure",
    "multimodal": "images or other inputs beside tokens",
    "embeds": "prompt embeddings",
    "other-input": "a prompt in parts, a pooled output or log-probabilities of the prompt",
}
"""Why single requests are left alone: label of the metric, and what such a request comes with."""

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


def check_load_mode(config: VllmConfig, options: Options) -> None:
    """Refuse loads by layer where a step begins before the one before it has ended. Raises `UnsupportedModelError`.

    What such a step computes, after a load by layer has failed, would rest on KV that is not there.
    """
    if options.load_mode != "by-layer":
        return
    stages = config.parallel_config.pipeline_parallel_size
    if stages > 1 or config.scheduler_config.async_scheduling:
        why = f"pipeline_parallel_size is {stages}" if stages > 1 else "async scheduling is on"
        raise UnsupportedModelError(
            f"KVStoreS3Connector: load_mode 'by-layer' does not go with steps that overlap, and {why}; use load_mode "
            "'async', its default"
        )


def check_store(options: Options) -> None:
    """Refuse a store that the engine's processes cannot share. Raises `InvalidArgumentError`."""
    if options.store.startswith("memory:"):
        raise InvalidArgumentError(
            "memory:// lives in one process, and an engine has several; use file:///dir or s3://bucket/prefix"
        )


def make_namespace(config: VllmConfig, kv_cache: KVCacheConfig, chunk_tokens: int) -> Namespace:
    """The namespace of the engine's model: what any engine makes of the same directory and KV dtype.

    A hub id is resolved to its directory first, so that the weights' content counts and not the name it came by. It is
    one namespace for all ranks: each of them has a part of its KV.
    """
    model = config.model_config
    directory = find_model_directory(model.model, commit=model.revision)
    return Namespace.from_model(
        directory, dtype=kv_dtype(config, kv_cache), chunk_tokens=chunk_tokens, variant=_variant(config, kv_cache)
    )


def kv_dtype(config: VllmConfig, kv_cache: KVCacheConfig) -> torch.dtype:
    """What an element of the KV cache is. vLLM says "bytes" for fp8."""
    kept: torch.dtype = kv_cache.kv_cache_groups[0].kv_cache_spec.dtype
    return _FP8.get(config.cache_config.cache_dtype, kept) if kept == torch.uint8 else kept


def ineligible_reason(request: Request, *, adapters: bool = False) -> str | None:
    """Why this request is neither saved nor loaded, a key of `REQUEST_REASONS`; None where it may be both.

    `adapters`: the caller tells LoRA adapters apart by their content; else such requests are left alone, too.
    """
    if request.lora_request is not None and not adapters:
        return "lora-unknown"
    if request.mm_features:
        return "multimodal"
    if request.prompt_token_ids is None or request.prompt_embeds is not None:
        return "embeds"
    if request.resumable or request.pooling_params is not None or request.skip_reading_prefix_cache:
        return "other-input"
    return None


def _parallel_reasons(config: VllmConfig) -> Iterator[str]:
    parallel = config.parallel_config
    for name in ("prefill_context_parallel_size", "decode_context_parallel_size"):
        if getattr(parallel, name) > 1:
            yield f"{name} is {getattr(parallel, name)} (only 1 is supported)"
    ranks, heads = parallel.tensor_parallel_size, config.model_config.get_total_num_kv_heads()
    if max(ranks, heads) % min(ranks, heads):
        yield f"tensor_parallel_size is {ranks}, which does not divide the {heads} KV heads, nor they it"
    speculative = config.speculative_config
    if speculative is not None and speculative.method not in _DRAFTS_WITHOUT_KV:
        yield (
            f"speculative decoding by {speculative.method!r} may keep KV of its own "
            f"(only {' and '.join(_DRAFTS_WITHOUT_KV)} are supported)"
        )
    if not (current_platform.is_cpu() or current_platform.is_cuda()):
        yield f"pages of the {current_platform.device_name} backend are not unpacked yet (those of CPU and CUDA are)"


def _model_reasons(config: VllmConfig) -> Iterator[str]:
    model = config.model_config
    if model.use_mla:
        yield "the model uses multi-head latent attention (MLA)"
    if model.hf_overrides:
        yield "hf_overrides change the model beyond what its directory says (write them into its config.json)"
    if model.hf_config_path and model.hf_config_path != model.model:
        yield "hf_config_path takes the model's config from another place than its weights (put both in one directory)"
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
    if spec.state_content_bytes is not None:
        yield "the attention backend packs its pages in a way of its own (state_content_bytes is set)"
    yield from _dtype_reasons(config, spec)


def _dtype_reasons(config: VllmConfig, spec: FullAttentionSpec) -> Iterator[str]:
    cache, name = config.cache_config, str(spec.dtype).removeprefix("torch.")
    if cache.kv_cache_dtype_skip_layers:
        yield f"kv_cache_dtype_skip_layers keeps some layers in another dtype: {cache.kv_cache_dtype_skip_layers}"
    if cache.cache_dtype in _FP8 and spec.dtype == torch.uint8:
        return
    if spec.kv_quant_mode or name not in _KV_DTYPES:
        yield (
            f"the KV cache is quantised with scales of its own (kv_cache_dtype {cache.cache_dtype!r}, kept as {name}; "
            f"{', '.join(_FP8)} are supported)"
        )
    elif spec.dtype != config.model_config.dtype:
        yield f"the KV cache is {name} but the model computes in {config.model_config.dtype}"


def _variant(config: VllmConfig, kv_cache: KVCacheConfig) -> str | None:
    """Name what changes KV at run time and the directory does not show: weights or KV quantised by the engine.

    Scales of an fp8 KV cache are the checkpoint's, which the digest of the weights covers, or 1. vLLM 0.32 computes
    none at run time but per token, which is refused.
    """
    model, parts = config.model_config, []
    if model.quantization is not None and getattr(model.hf_config, "quantization_config", None) is None:
        parts.append(f"quantization={model.quantization}")
    if kv_cache.kv_cache_groups[0].kv_cache_spec.dtype == torch.uint8:
        parts.append(f"fp8 KV of {str(model.dtype).removeprefix('torch.')}")
    return f"vllm {', '.join(parts)}" if parts else None
