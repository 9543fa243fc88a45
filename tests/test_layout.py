"""KVLayout: shapes and RoPE of real families from both spellings of a config, and refusals by name."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from kvstore_s3.errors import InvalidArgumentError, UnsupportedModelError
from kvstore_s3.families import FAMILIES
from kvstore_s3.layout import DTYPES, KVLayout, Shard, dtype_name

ASSETS = Path(os.environ.get("KVSTORE_S3_TEST_ASSETS", Path(__file__).resolve().parents[2] / "shared"))

SIZES = {"num_hidden_layers": 4, "num_attention_heads": 8, "hidden_size": 256, "torch_dtype": "bfloat16"}
LLAMA = {"model_type": "llama", **SIZES, "num_key_value_heads": 2, "rope_theta": 500000.0, "rope_scaling": None}
LLAMA3_SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


def config_of(model_type: str, **fields: Any) -> dict[str, Any]:
    return {"model_type": model_type, **SIZES, "num_key_value_heads": 2, **fields}


def layout_of(model_type: str, **fields: Any) -> KVLayout:
    return KVLayout.from_config(config_of(model_type, **fields))


def test_a_llama_config_gives_its_shape_dtype_and_rope() -> None:
    layout = KVLayout.from_config(LLAMA)
    assert layout == KVLayout(4, 2, 32, "bfloat16", rope={"rope_type": "default", "rope_theta": 500000})
    assert layout.full_shard == Shard(0, 4, 0, 2)
    assert layout.bytes_per_token == 4 * 2 * 2 * 32 * 2


@pytest.mark.parametrize(
    ("model_type", "head_dim"),
    [("llama", 32), ("gemma", 256), ("qwen3", 128), ("qwen2", 32), ("glm", 128), ("seed_oss", 128), ("gpt_neox", 32)],
)
def test_a_missing_head_dim_is_what_the_family_assumes(model_type: str, head_dim: int) -> None:
    assert layout_of(model_type).head_dim == head_dim


def test_a_stated_head_dim_wins() -> None:
    assert layout_of("qwen3", head_dim=64).head_dim == 64
    assert layout_of("gemma", head_dim=64).head_dim == 64


def test_families_without_grouped_heads_have_as_many_kv_heads_as_query_heads() -> None:
    assert layout_of("gpt_neox").kv_heads == 8
    without = {name: value for name, value in LLAMA.items() if name != "num_key_value_heads"}
    assert KVLayout.from_config(without).kv_heads == 8
    gpt2 = {"model_type": "gpt2", "n_layer": 3, "n_head": 4, "n_embd": 64, "torch_dtype": "float32"}
    assert KVLayout.from_config(gpt2) == KVLayout(3, 4, 16, "float32")


def test_missing_kv_heads_are_refused_where_the_family_does_not_fall_back_to_query_heads() -> None:
    with pytest.raises(
        UnsupportedModelError, match="qwen2: num_key_value_heads must be a positive integer, found None"
    ):
        layout_of("qwen2", num_key_value_heads=None)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({}, {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}),
        ({"rope_theta": 10000}, {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}),
        ({"rope_theta": 1e6, "rope_scaling": {}}, {"rope_parameters": {"rope_theta": 1000000}}),
        (
            {"rope_theta": 5e5, "rope_scaling": {**LLAMA3_SCALING, "type": "llama3"}},
            {"rope_parameters": {**LLAMA3_SCALING, "rope_theta": 500000}},
        ),
        (
            {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_parameters": {"rope_type": "linear", "factor": 2, "rope_theta": 1e4, "partial_rotary_factor": 1.0}},
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0}, "max_position_embeddings": 32768},
            {"rope_parameters": {**YARN, "rope_theta": 10000.0, "mscale": None}},
        ),
        (
            {"rope_theta": 1e4, "partial_rotary_factor": 0.4},
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.4}},
        ),
        (
            {"layer_types": ["full_attention"] * 4},
            {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
        ),
    ],
)
def test_both_spellings_of_rope_give_one_layout(old: dict[str, Any], new: dict[str, Any]) -> None:
    assert layout_of("llama", **old).to_json() == layout_of("llama", **new).to_json()


def test_every_rope_parameter_counts() -> None:
    base = layout_of("llama", rope_theta=5e5, rope_scaling=LLAMA3_SCALING)
    for name in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
        assert layout_of("llama", rope_theta=5e5, rope_scaling={**LLAMA3_SCALING, name: 3}) != base
    assert layout_of("llama", rope_theta=4e5, rope_scaling=LLAMA3_SCALING) != base
    assert layout_of("llama", rope_theta=5e5, rope_scaling={**LLAMA3_SCALING, "attention_factor": 0.5}) != base


def test_gpt_neox_names_of_rope_are_read() -> None:
    layout = layout_of("gpt_neox", rotary_pct=0.5, rotary_emb_base=20000)
    assert layout.rope == {"rope_type": "default", "rope_theta": 20000, "partial_rotary_factor": 0.5}


def test_the_text_config_of_a_multimodal_model_counts() -> None:
    text = {**LLAMA, "torch_dtype": None}
    layout = KVLayout.from_config({"model_type": "llava", "text_config": text, "dtype": "float16", "hidden_size": 7})
    assert layout == KVLayout.from_config(LLAMA, dtype="float16")


def test_a_flat_multimodal_config_is_that_of_its_text_model() -> None:
    scaling = {"type": "mrope", "mrope_section": [16, 24, 24]}
    flat = config_of("qwen2_vl", rope_theta=1e6, rope_scaling=scaling, use_sliding_window=False, sliding_window=32768)
    rope = {"rope_type": "axial", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    nested = {"model_type": "qwen2_vl", "text_config": config_of("qwen2_vl_text", rope_parameters=rope)}
    assert KVLayout.from_config(flat) == KVLayout.from_config(nested)
    assert KVLayout.from_config(flat).rope["mrope_section"] == (16, 24, 24)


WINDOW = "sliding_window is"
REFUSED: list[tuple[str, dict[str, Any]]] = [
    (f"mistral: {WINDOW} 4096", config_of("mistral", sliding_window=4096)),
    (f"mistral: {WINDOW} 4096", config_of("mistral")),
    (f"mistral: {WINDOW} 4096", config_of("mistral", sliding_window=4096, use_sliding_window=False)),
    (f"phi3: {WINDOW} 2047", config_of("phi3", sliding_window=2047)),
    (f"starcoder2: {WINDOW} 4096", config_of("starcoder2", sliding_window=4096)),
    (f"qwen2: {WINDOW} 131072", config_of("qwen2", sliding_window=131072, use_sliding_window=True)),
    (
        "qwen2: layer_types has sliding_attention",
        config_of("qwen2", layer_types=["full_attention", "sliding_attention"]),
    ),
    (f"gemma2: {WINDOW} 4096", config_of("gemma2", sliding_window=4096)),
    (f"gemma3_text: {WINDOW} 512", config_of("gemma3_text", sliding_window=512)),
    (
        "gemma3: layer_types has sliding_attention",
        {"model_type": "gemma3", "text_config": config_of("gemma3_text", layer_types=["sliding_attention"])},
    ),
    ("gpt_oss: layer_types has sliding_attention", config_of("gpt_oss", layer_types=["sliding_attention"] * 4)),
    ("llama4: attention_chunk_size is 8192", {"model_type": "llama4", "text_config": {"attention_chunk_size": 8192}}),
    ("llama4_text: attention_chunk_size is 8192", config_of("llama4_text", attention_chunk_size=8192)),
    ("phi3: RoPE type 'longrope'", config_of("phi3", rope_scaling={"type": "longrope", "short_factor": [1.0]})),
    ("phi3: RoPE type 'su'", config_of("phi3", rope_scaling={"type": "su", "short_factor": [1.0]})),
    ("phi3: RoPE type 'longrope'", config_of("phi3", rope_scaling={"type": "yarn", "short_factor": [1.0]})),
    ("llama: RoPE type 'dynamic'", config_of("llama", rope_scaling={"type": "dynamic", "factor": 2.0})),
    ("llama: RoPE type 'spiral' is not known", config_of("llama", rope_scaling={"type": "spiral"})),
    ("llama: RoPE type 'mrope' is not known", config_of("llama", rope_scaling={"type": "mrope"})),
    (
        "olmo2: RoPE differs between layers",
        config_of("olmo2", rope_parameters={"full_attention": {}, "sliding_attention": {}}),
    ),
    ("deepseek_v3: kv_lora_rank is 512", config_of("deepseek_v3", kv_lora_rank=512)),
    ("deepseek_v2: kv_lora_rank is 512", config_of("deepseek_v2", kv_lora_rank=512, q_lora_rank=None)),
    ("mamba: the config has state_size", {"model_type": "mamba", "state_size": 16, "conv_kernel": 4}),
    ("jamba: the config has mamba_d_state", config_of("jamba", mamba_d_state=16)),
    ("qwen3_next: the config has linear_num_key_heads", config_of("qwen3_next", linear_num_key_heads=16)),
    ("qwen3_5_text: layer_types has linear_attention", config_of("qwen3_5_text", layer_types=["linear_attention"])),
    ("lfm2: the config has conv_L_cache", config_of("lfm2", conv_L_cache=3)),
    ("nemotron_h: the config has hybrid_override_pattern", config_of("nemotron_h", hybrid_override_pattern="M-M*")),
    ("rwkv: .*not known", {"model_type": "rwkv", "attention_hidden_size": 64}),
    ("t5: is_encoder_decoder is True", {"model_type": "t5", "is_encoder_decoder": True}),
    ("bart: .*is_encoder_decoder", config_of("bart", is_encoder_decoder=True)),
    ("gpt2: add_cross_attention", config_of("gpt2", add_cross_attention=True)),
    ("mllama: cross_attention_layers", {"model_type": "mllama", "text_config": {"cross_attention_layers": [3, 8]}}),
    ("paligemma: this multimodal model", {"model_type": "paligemma", "text_config": config_of("gemma")}),
    ("bert: .*not known to keep full attention", config_of("bert")),
    ("gemma: use_bidirectional_attention", config_of("gemma", use_bidirectional_attention=True)),
    ("llama: is_causal is False", config_of("llama", is_causal=False)),
    ("gemma3n_text: num_kv_shared_layers is 10", config_of("gemma3n_text", num_kv_shared_layers=10)),
    ("openelm: .*not known", config_of("openelm", num_kv_heads=[3, 4])),
    ("llama: num_key_value_heads differs between layers", config_of("llama", num_key_value_heads=[2, 4, 2, 4])),
    ("llama: num_hidden_layers must be a positive integer, found None", config_of("llama", num_hidden_layers=None)),
    ("llama: hidden size 250 is no multiple of 8", config_of("llama", hidden_size=250)),
    ("ministral3: the config has no RoPE parameters", config_of("ministral3")),
    ("no model_type", SIZES),
]


@pytest.mark.parametrize(("reason", "config"), REFUSED, ids=[reason for reason, _ in REFUSED])
def test_a_model_whose_cache_cannot_be_cut_is_refused_by_name(reason: str, config: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        KVLayout.from_config(config)


@pytest.mark.parametrize(
    "config",
    [
        config_of("mistral", sliding_window=None),
        config_of("qwen2", sliding_window=32768, use_sliding_window=False),
        config_of("qwen3", layer_types=["full_attention"] * 4, sliding_window=None, max_window_layers=28),
        config_of("qwen2_moe", sliding_window=0),
    ],
    ids=["mistral without", "qwen2 switched off", "qwen3 all full", "qwen2_moe zero"],
)
def test_a_window_that_is_off_is_no_reason_to_refuse(config: dict[str, Any]) -> None:
    assert KVLayout.from_config(config).attention == "full"


def test_the_kv_dtype_comes_from_the_caller_else_from_the_config() -> None:
    assert KVLayout.from_config(LLAMA, dtype=torch.float16).dtype == "float16"
    assert KVLayout.from_config(LLAMA, dtype="float8_e4m3fn").dtype == "float8_e4m3fn"
    assert KVLayout.from_config({**LLAMA, "dtype": "torch.float32"}).dtype == "float32"
    assert [dtype_name(getattr(torch, name)) for name in DTYPES] == list(DTYPES)


def test_a_missing_or_unknown_dtype_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="pass dtype="):
        KVLayout.from_config({**LLAMA, "torch_dtype": None})
    with pytest.raises(InvalidArgumentError, match="'int8' is unknown"):
        KVLayout.from_config(LLAMA, dtype=torch.int8)


def test_what_is_no_config_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="not str"):
        KVLayout.from_config("llama")


def test_a_layout_survives_json() -> None:
    layout = layout_of("smollm3", rope_scaling=YARN)
    assert layout.rope["no_rope_layers"] == (1, 1, 1, 0)
    assert KVLayout.from_json(layout.to_json()) == layout


def test_a_layout_cannot_be_changed_through_what_it_was_made_of() -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4}
    layout = KVLayout(1, 1, 8, "float16", rope=rope)
    rope["rope_theta"] = 5.0
    assert layout.rope["rope_theta"] == 10000
    with pytest.raises(TypeError):
        layout.rope["rope_theta"] = 5.0  # type: ignore[index]
    assert {layout: 1}[dataclasses.replace(layout)] == 1


@pytest.mark.parametrize(
    "fields",
    [
        {"layers": 0},
        {"layers": True},
        {"kv_heads": 1025},
        {"head_dim": 64.0},
        {"dtype": "int8"},
        {"dtype": ["bfloat16"]},
        {"rope": None},
        {"rope": {}},
        {"rope": {"rope_type": "default", "x": float("nan")}},
        {"rope": {"rope_type": "default", "x": {"y": 1}}},
        {"rope": {"rope_type": "default", "x": [[1]]}},
        {"rope": {"rope_type": "default", 7: 1}},
        {"surprise": 1},
    ],
    ids=str,
)
def test_a_layout_of_wrong_values_is_refused(fields: dict[str, Any]) -> None:
    document = {**KVLayout(1, 1, 8, "float16").to_json(), **fields}
    with pytest.raises(InvalidArgumentError):
        KVLayout.from_json(document)


@pytest.mark.parametrize("name", ["books8M", "stories260K"])
def test_a_saved_model_has_one_layout_as_file_and_as_config_object(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    directory = ASSETS / "models" / name
    if not directory.is_dir():
        pytest.skip(f"no {directory}")
    config = transformers.AutoConfig.from_pretrained(directory)
    document = KVLayout.from_config(config).to_json()
    assert document == KVLayout.from_config(transformers.PretrainedConfig.get_config_dict(directory)[0]).to_json()
    assert document["rope"] == {"rope_type": "default", "rope_theta": 10000}


ROPE_STATED = {"rope_theta": 1e6, "rope_scaling": YARN}


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_a_family_is_read_as_transformers_reads_it(model_type: str) -> None:
    """Silent fields take the config class's own defaults, and transformers keeps a plain cache in every layer."""
    transformers = pytest.importorskip("transformers")
    fields = config_of(model_type, num_attention_heads=4, sliding_window=None)
    if FAMILIES[model_type].theta is None:
        fields |= ROPE_STATED
    config = transformers.AutoConfig.for_model(**fields)
    assert KVLayout.from_config(config).to_json() == KVLayout.from_config(fields).to_json()
    layers = transformers.DynamicCache(config=config).layers
    assert [type(layer).__name__ for layer in layers] == ["DynamicLayer"] * 4


REFUSED_TYPES = [
    "bamba",
    "bart",
    "bert",
    "cohere2",
    "deepseek_v2",
    "deepseek_v3",
    "falcon_mamba",
    "gemma2",
    "gemma3",
    "gemma3_text",
    "gemma3n_text",
    "gpt_neo",
    "gpt_oss",
    "jamba",
    "lfm2",
    "llama4",
    "llama4_text",
    "mamba",
    "mamba2",
    "minimax",
    "mistral",
    "mllama",
    "olmo3",
    "paligemma",
    "qwen3_next",
    "recurrent_gemma",
    "reformer",
    "rwkv",
    "t5",
    "whisper",
    "zamba2",
]


@pytest.mark.parametrize("model_type", REFUSED_TYPES)
def test_the_real_config_of_an_unsuitable_model_is_refused_by_name(model_type: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(model_type)
    for form in (config, config.to_dict()):
        with pytest.raises(UnsupportedModelError, match=model_type):
            KVLayout.from_config(form, dtype="bfloat16")


@pytest.mark.parametrize("model_type", ["gemma", "gpt2", "gpt_neox", "llama", "opt", "qwen2", "qwen3"])
def test_the_layout_is_the_shape_of_the_cache_that_transformers_fills(model_type: str) -> None:
    transformers = pytest.importorskip("transformers")
    fields = {**SIZES, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64}
    small = {"intermediate_size": 64, "ffn_dim": 64, "vocab_size": 64, "max_position_embeddings": 64}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.AutoConfig.for_model(model_type, **fields, **small, **special)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        cache = model(torch.tensor([[3, 4, 5]]), use_cache=True).past_key_values
    layout = KVLayout.from_config(config)
    assert [layer.keys.shape for layer in cache.layers] == [(1, layout.kv_heads, 3, layout.head_dim)] * layout.layers
