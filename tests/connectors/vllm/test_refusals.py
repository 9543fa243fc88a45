"""What the connector refuses when the engine starts, and which requests it leaves alone."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs the engine environment: make test-engine")
pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]

import torch  # noqa: E402
from vllm.engine.arg_utils import EngineArgs  # noqa: E402
from vllm.v1.kv_cache_interface import (  # noqa: E402
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVQuantMode,
    MLAAttentionSpec,
    SlidingWindowSpec,
)

from kvstore_s3.config import load_settings  # noqa: E402
from kvstore_s3.connectors.vllm.options import Options  # noqa: E402
from kvstore_s3.connectors.vllm.refusals import (  # noqa: E402
    REQUEST_REASONS,
    check_engine,
    check_load_mode,
    ineligible_reason,
    make_namespace,
)
from kvstore_s3.errors import UnsupportedModelError  # noqa: E402
from kvstore_s3.namespace import Namespace  # noqa: E402

SHAPE: dict[str, Any] = {"block_size": 128, "num_kv_heads": 4, "head_size": 64, "dtype": torch.bfloat16}
FULL = FullAttentionSpec(**SHAPE)


@pytest.fixture(scope="module")
def config(llama: Path) -> Any:
    """What vLLM makes of the command line, for the small Llama; tests change it and put it back."""
    return EngineArgs(
        model=str(llama), skip_tokenizer_init=True, dtype="bfloat16", max_model_len=512
    ).create_engine_config()


def caches(*specs: Any) -> KVCacheConfig:
    groups = [KVCacheGroupSpec([f"model.layers.{number}.self_attn.attn"], spec) for number, spec in enumerate(specs)]
    return KVCacheConfig(num_blocks=8, kv_cache_tensors=[], kv_cache_groups=groups)


@pytest.mark.parametrize(
    ("section", "name", "value", "named"),
    [
        ("parallel_config", "pipeline_parallel_size", 2, "pipeline_parallel_size is 2"),
        ("scheduler_config", "async_scheduling", True, "async scheduling is on"),
    ],
)
def test_loads_by_layer_need_steps_that_do_not_overlap(
    config: Any, monkeypatch: pytest.MonkeyPatch, section: str, name: str, value: object, named: str
):
    by_layer = Options.parse({"store": "file:///x", "load_mode": "by-layer"}, load_settings())
    check_load_mode(config, by_layer)
    monkeypatch.setattr(getattr(config, section), name, value)
    with pytest.raises(UnsupportedModelError, match=named):
        check_load_mode(config, by_layer)
    check_load_mode(config, Options.parse({"store": "file:///x"}, load_settings()))


def test_a_plain_engine_is_accepted(config: Any):
    check_engine(config, caches(FULL))


@pytest.mark.parametrize(
    ("section", "name", "value", "named"),
    [
        ("parallel_config", "tensor_parallel_size", 3, "tensor_parallel_size is 3, which does not divide the 4 KV"),
        ("parallel_config", "decode_context_parallel_size", 2, "decode_context_parallel_size is 2"),
        ("parallel_config", "prefill_context_parallel_size", 2, "prefill_context_parallel_size is 2"),
        (None, "speculative_config", SimpleNamespace(method="eagle"), "speculative decoding by 'eagle'"),
        (None, "speculative_config", SimpleNamespace(method="draft_model"), "speculative decoding by 'draft_model'"),
        ("cache_config", "kv_cache_dtype_skip_layers", ["1"], "kv_cache_dtype_skip_layers"),
        ("model_config", "hf_overrides", {"rope_theta": 1}, "hf_overrides"),
        ("model_config", "hf_config_path", "/elsewhere", "hf_config_path"),
        ("load_config", "load_format", "dummy", "load_format is 'dummy'"),
        ("model_config", "dtype", torch.float32, "model computes in torch.float32"),
    ],
)
def test_an_engine_that_is_not_supported_is_refused_by_name(
    config: Any, monkeypatch: pytest.MonkeyPatch, section: str | None, name: str, value: object, named: str
):
    monkeypatch.setattr(getattr(config, section) if section else config, name, value)
    with pytest.raises(UnsupportedModelError, match=named):
        check_engine(config, caches(FULL))


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("parallel_config", "tensor_parallel_size", 2),
        ("parallel_config", "tensor_parallel_size", 8),
        ("parallel_config", "pipeline_parallel_size", 2),
        (None, "speculative_config", SimpleNamespace(method="ngram")),
        (None, "speculative_config", SimpleNamespace(method="suffix")),
    ],
)
def test_engines_of_these_shapes_are_accepted(
    config: Any, monkeypatch: pytest.MonkeyPatch, section: str | None, name: str, value: object
):
    monkeypatch.setattr(getattr(config, section) if section else config, name, value)
    check_engine(config, caches(FULL))


@pytest.mark.parametrize(
    ("specs", "named"),
    [
        ((FULL, SlidingWindowSpec(**SHAPE, sliding_window=512)), "hybrid: 2 groups of FullAttentionSpec, Sliding"),
        ((SlidingWindowSpec(**SHAPE, sliding_window=512),), "SlidingWindowSpec"),
        ((FullAttentionSpec(**SHAPE, sliding_window=512),), "sliding window"),
        ((MLAAttentionSpec(**{**SHAPE, "num_kv_heads": 1}),), "MLAAttentionSpec"),
        ((FullAttentionSpec(**{**SHAPE, "dtype": torch.int8}),), "quantised with scales of its own"),
        ((FullAttentionSpec(**SHAPE, kv_quant_mode=KVQuantMode.FP8_PER_TOKEN_HEAD),), "quantised with scales of its"),
        ((FullAttentionSpec(**SHAPE, state_content_bytes=256),), "packs its pages in a way of its own"),
    ],
)
def test_a_cache_that_is_not_supported_is_refused_by_name(config: Any, specs: tuple[Any, ...], named: str):
    with pytest.raises(UnsupportedModelError, match=named):
        check_engine(config, caches(*specs))


def test_all_reasons_are_told_at_once(config: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(config.parallel_config, "tensor_parallel_size", 3)
    with pytest.raises(UnsupportedModelError, match=r"tensor_parallel_size is 3.*hybrid"):
        check_engine(config, caches(FULL, SlidingWindowSpec(**SHAPE, sliding_window=512)))


def test_the_namespace_is_that_of_the_model_directory(config: Any, llama: Path):
    made = make_namespace(config, caches(FULL), 256)
    assert made.digest == Namespace.from_model(llama, dtype=torch.bfloat16).digest
    assert make_namespace(config, caches(FULL), 128).digest != made.digest


def test_fp8_kv_is_a_namespace_of_its_own_that_names_its_dtype(config: Any, monkeypatch: pytest.MonkeyPatch):
    plain = make_namespace(config, caches(FULL), 256)
    fp8 = caches(FullAttentionSpec(**{**SHAPE, "dtype": torch.uint8}, kv_quant_mode=KVQuantMode.FP8_PER_TENSOR))
    found = {}
    for name in ("fp8", "fp8_e4m3", "fp8_e5m2"):
        monkeypatch.setattr(config.cache_config, "cache_dtype", name)
        check_engine(config, fp8)
        found[name] = make_namespace(config, fp8, 256)
    assert found["fp8"].layout.dtype == "float8_e4m3fn"
    assert found["fp8_e5m2"].layout.dtype == "float8_e5m2"
    assert found["fp8"].digest == found["fp8_e4m3"].digest
    assert len({plain.digest, *(namespace.digest for namespace in found.values())}) == 3


def test_fp8_kv_of_a_model_in_another_dtype_is_another_namespace(config: Any, monkeypatch: pytest.MonkeyPatch):
    fp8 = caches(FullAttentionSpec(**{**SHAPE, "dtype": torch.uint8}))
    monkeypatch.setattr(config.cache_config, "cache_dtype", "fp8")
    bfloat16 = make_namespace(config, fp8, 256)
    monkeypatch.setattr(config.model_config, "dtype", torch.float16)
    assert make_namespace(config, fp8, 256).digest != bfloat16.digest


def test_weights_quantised_on_loading_are_another_namespace(config: Any, monkeypatch: pytest.MonkeyPatch):
    plain = make_namespace(config, caches(FULL), 256)
    monkeypatch.setattr(config.model_config, "quantization", "fp8")
    assert make_namespace(config, caches(FULL), 256).digest != plain.digest


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"lora_request": object()}, "lora-unknown"),
        ({"mm_features": [object()]}, "multimodal"),
        ({"prompt_token_ids": None}, "embeds"),
        ({"prompt_embeds": object()}, "embeds"),
        ({"resumable": True}, "other-input"),
        ({"pooling_params": object()}, "other-input"),
        ({"skip_reading_prefix_cache": True}, "other-input"),
        ({}, None),
    ],
)
def test_requests_whose_kv_is_not_named_by_their_tokens_are_left_alone(change: dict[str, Any], reason: str | None):
    assert ineligible_reason(a_request(**change)) == reason
    assert reason is None or reason in REQUEST_REASONS


def test_a_request_with_an_adapter_is_served_where_adapters_are_told_apart():
    assert ineligible_reason(a_request(lora_request=object()), adapters=True) is None


def a_request(**change: Any) -> Any:
    return SimpleNamespace(
        **{
            "lora_request": None,
            "mm_features": [],
            "prompt_token_ids": [1],
            "prompt_embeds": None,
            "resumable": False,
            "pooling_params": None,
            "skip_reading_prefix_cache": False,
            **change,
        }
    )


def test_a_hybrid_model_is_refused_when_the_engine_starts(run_engine: Any, tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    gemma = transformers.Gemma3TextConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=6,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        sliding_window=128,
        layer_types=["sliding_attention"] * 5 + ["full_attention"],
        dtype="bfloat16",
    )
    transformers.Gemma3ForCausalLM(gemma).to(torch.bfloat16).save_pretrained(tmp_path / "gemma")
    run = run_engine([[[1] * 300]], model=tmp_path / "gemma", store=f"file://{tmp_path}/store", fails=True)
    assert run.code != 0
    assert run.log_lines("KVStoreS3Connector does not support this engine yet: the KV cache is hybrid")


def test_a_model_with_latent_attention_is_refused_when_the_engine_starts(run_engine: Any, tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    deepseek = transformers.DeepseekV2Config(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        kv_lora_rank=512,
        q_lora_rank=None,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        first_k_dense_replace=2,
        max_position_embeddings=2048,
        dtype="bfloat16",
    )
    transformers.DeepseekV2ForCausalLM(deepseek).to(torch.bfloat16).save_pretrained(tmp_path / "deepseek")
    run = run_engine([[[1] * 300]], model=tmp_path / "deepseek", store=f"file://{tmp_path}/store", fails=True)
    assert run.code != 0
    assert run.log_lines("does not support this engine yet: the model uses multi-head latent attention (MLA)")


def test_all_that_hides_what_the_model_is_is_refused_when_the_engine_starts(run_engine: Any, tmp_path: Path):
    engine: dict[str, Any] = {"hf_overrides": {"rope_theta": 500000.0}, "load_format": "dummy"}
    run = run_engine([[[1] * 300]], store=f"file://{tmp_path}/store", fails=True, **engine)
    assert run.code != 0
    assert run.log_lines("does not support this engine yet: hf_overrides change the model")
    assert run.log_lines("load_format is 'dummy'")
    assert not list(tmp_path.rglob("*.json")), "nothing was opened"


@pytest.mark.parametrize(
    ("store", "extra", "named"),
    [
        ("memory://", {}, "memory:// lives in one process"),
        ("file:///nowhere", {"chunk_token": 256}, "unknown key 'chunk_token'"),
        ("s3://bucket", {"aws_secret_access_key": "hunter2"}, "looks like a credential"),
    ],
)
def test_a_wrong_configuration_is_refused_before_anything_is_opened(
    config: Any, store: str, extra: dict[str, Any], named: str
):
    from vllm.config import KVTransferConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

    from kvstore_s3.connectors.vllm import KVStoreS3Connector
    from kvstore_s3.errors import InvalidArgumentError

    config.kv_transfer_config = KVTransferConfig(
        kv_connector="KVStoreS3Connector",
        kv_connector_module_path="kvstore_s3.connectors.vllm",
        kv_role="kv_both",
        kv_connector_extra_config={"store": store, **extra},
    )
    with pytest.raises(InvalidArgumentError, match=named):
        KVStoreS3Connector(config, KVConnectorRole.SCHEDULER, caches(FULL))
