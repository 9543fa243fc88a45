"""Which models PrefixCache takes: those whose cache can be cut and that are the namespace's. It names the reason."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from kvstore_s3 import KVLayout, Namespace, connect
from kvstore_s3.connectors.transformers import PrefixCache
from kvstore_s3.errors import InvalidArgumentError, UnsupportedModelError

SHAPE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": None,
}
LINEAR: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_hidden_layers": 4,
}
MLA: dict[str, Any] = {
    "head_dim": 8,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 16,
}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "Mistral with a window": ("MistralConfig", {"sliding_window": 32}, "sliding"),
    "Qwen2 with a window": ("Qwen2Config", {"use_sliding_window": True, "max_window_layers": 1}, "sliding"),
    "Gemma 2": ("Gemma2Config", {}, "sliding"),
    "Gemma 3": ("Gemma3TextConfig", {}, "sliding"),
    "Qwen3-Next": ("Qwen3NextConfig", LINEAR, "linear"),
    "Mamba": ("MambaConfig", {"state_size": 4}, "linear|cache"),
    "DeepSeek V3 (MLA)": ("DeepseekV3Config", MLA, "latent attention"),
    "T5": ("T5Config", {"d_model": 32, "d_ff": 32, "d_kv": 8, "num_layers": 2, "num_heads": 4}, "encoder-decoder"),
    "dynamic RoPE": ("LlamaConfig", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
    "bidirectional Gemma": ("GemmaConfig", {"use_bidirectional_attention": True}, "bidirectional"),
}


def make(name: str, fields: dict[str, Any]) -> Any:
    config = getattr(transformers, name)(**(SHAPE | fields))
    automatic = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return automatic.from_config(config).eval()


def open_with(model: Any, **fields: Any) -> None:
    shape = {"layers": 3, "kv_heads": 2, "head_dim": 16, "dtype": "float32"}
    rope = {"rope": {"rope_type": "default", "rope_theta": 10000.0}}
    layout = KVLayout(**(shape | rope | fields.pop("layout", {})))
    namespace = Namespace(model="tiny", revision="1", layout=layout, **fields)
    with connect("memory://", namespace) as store:
        PrefixCache(model, store)


@pytest.mark.parametrize("case", REFUSED)
def test_an_architecture_whose_cache_cannot_be_cut_is_refused_by_name(case):
    name, fields, reason = REFUSED[case]
    model = make(name, fields)
    with pytest.raises(UnsupportedModelError, match=reason) as refusal:
        open_with(model)
    assert type(model).__name__ in str(refusal.value)


def test_a_window_in_the_config_that_the_model_does_not_use_is_no_reason():
    model = make("Qwen2Config", {"use_sliding_window": False, "sliding_window": 32})
    open_with(model)


@pytest.mark.parametrize(
    ("differing", "named"),
    [
        ({"layers": 4}, "layers is 3 in the model, 4 in the namespace"),
        ({"kv_heads": 4}, "kv_heads"),
        ({"head_dim": 32}, "head_dim"),
        ({"dtype": "bfloat16"}, "dtype is float32 in the model, bfloat16"),
        ({"rope": {"rope_type": "default", "rope_theta": 500000.0}}, "rope"),
    ],
)
def test_a_model_that_is_not_the_namespaces_is_refused(llama, differing, named):
    with pytest.raises(InvalidArgumentError, match=named):
        open_with(llama, layout=differing)


def test_what_is_no_causal_language_model_is_refused():
    with pytest.raises(InvalidArgumentError, match="Linear"):
        open_with(torch.nn.Linear(2, 2))


class AdapterLayer(torch.nn.Module):
    """Has what an adapter's layer has: the layer that it stands for, and the names of the active adapters."""

    active_adapters = ("tuned",)

    def __init__(self, base_layer: torch.nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return 2 * self.base_layer(hidden)


def test_an_adapter_is_refused_unless_the_namespace_names_one(llama):
    adapted = copy.deepcopy(llama)
    attention = adapted.model.layers[0].self_attn
    attention.k_proj = AdapterLayer(attention.k_proj)
    with pytest.raises(UnsupportedModelError, match="adapter"):
        open_with(adapted)
    open_with(adapted, lora="digest of the adapter")


def test_an_adapter_that_comes_later_is_noticed(llama, namespace_of, draw_tokens):
    model = copy.deepcopy(llama)
    with connect("memory://", namespace_of(model)) as store:
        cache = PrefixCache(model, store)
        attention = model.model.layers[0].self_attn
        attention.k_proj = AdapterLayer(attention.k_proj)
        for verb in (cache.generate, cache.prefill, cache.warm):
            with pytest.raises(UnsupportedModelError, match="adapter"):
                verb(draw_tokens(1, 100))


def test_weights_quantised_while_loading_are_refused_unless_the_namespace_says_so(llama):
    quantised = copy.deepcopy(llama)
    quantised.hf_quantizer = object()
    with pytest.raises(UnsupportedModelError, match="quantised"):
        open_with(quantised)
    open_with(quantised, variant="int8 while loading")
