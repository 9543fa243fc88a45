"""The angles by which K is turned back are those of the model, for every kind of RoPE that is undone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPTNeoXConfig, LlamaConfig, Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXRotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from kvstore_s3.codec.rotation import Rotation
from kvstore_s3.errors import InvalidArgumentError
from kvstore_s3.layout import KVLayout

SCALINGS: list[dict[str, Any]] = [
    {"rope_type": "default", "rope_theta": 10000.0},
    {"rope_type": "default", "rope_theta": 1e6},
    {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768},
    {
        "rope_type": "yarn",
        "rope_theta": 150000.0,
        "factor": 32.0,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
]


def layout_of(config: Any) -> KVLayout:
    return KVLayout.from_config(config, dtype="float32")


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: f"{scaling['rope_type']}-{scaling['rope_theta']:g}")
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_frequencies_are_those_of_transformers(scaling: dict[str, Any], head_dim: int) -> None:
    config = Qwen3Config(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_hidden_layers=2,
        head_dim=head_dim,
        max_position_embeddings=131072,
        rope_parameters=dict(scaling),
    )
    compute = ROPE_INIT_FUNCTIONS.get(scaling["rope_type"])
    expected = (
        compute(config, "cpu")[0] if compute else 1 / scaling["rope_theta"] ** (torch.arange(0, head_dim, 2) / head_dim)
    )
    rotation = Rotation.from_layout(layout_of(config))
    assert rotation.style == "halves"
    np.testing.assert_allclose(rotation.inverse_frequencies, expected.numpy(), rtol=2e-6)


def test_turning_k_back_leaves_what_the_model_had_before_the_rotation() -> None:
    config = LlamaConfig(hidden_size=128, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=1)
    positions = torch.arange(1000, 1040)[None]
    before = torch.randn(1, 1, 40, 64)
    cos, sin = LlamaRotaryEmbedding(config)(before, positions)
    after = apply_rotary_pos_emb(before, before, cos, sin)[1][0, 0].numpy()
    c, s = Rotation.from_layout(layout_of(config)).tables(1000, 40)
    first, second = after[:, :32], after[:, 32:]
    undone = np.concatenate([first * c + second * s, second * c - first * s], axis=1)
    np.testing.assert_allclose(undone, before[0, 0].numpy(), atol=2e-3)


def test_partial_rotary_turns_the_first_part_of_a_head() -> None:
    config = GPTNeoXConfig(hidden_size=128, num_attention_heads=2, num_hidden_layers=3, rotary_pct=0.25)
    rotation = Rotation.from_layout(layout_of(config))
    expected = GPTNeoXRotaryEmbedding(config).inv_freq.numpy()
    assert len(expected) == 8
    np.testing.assert_allclose(rotation.inverse_frequencies, expected, rtol=2e-6)


def test_layers_without_rope_are_left_as_they_are() -> None:
    rope = {"rope_type": "default", "rope_theta": 10000, "no_rope_layers": [1, 1, 0]}
    rotation = Rotation.from_layout(KVLayout(3, 2, 16, "bfloat16", rope=rope))
    assert rotation.select(1, 3).tolist() == [1, 0]


@pytest.mark.parametrize("kind", ["none", "mrope", "something new"])
def test_k_of_other_kinds_is_coded_as_it_is(kind: str) -> None:
    assert Rotation.from_layout(KVLayout(2, 2, 16, "bfloat16", rope={"rope_type": kind})).style == "none"


@pytest.mark.parametrize(
    ("rope", "named"),
    [
        ({"rope_type": "default"}, "rope_theta"),
        ({"rope_type": "linear", "rope_theta": 10000, "factor": 0}, "factor"),
        ({"rope_type": "default", "rope_theta": 10000, "partial_rotary_factor": 2}, "32 of 16"),
        ({"rope_type": "default", "rope_theta": 10000, "partial_rotary_factor": 0.2}, "3 of 16"),
        ({"rope_type": "yarn", "rope_theta": 1, "factor": 2, "original_max_position_embeddings": 9}, "rope_theta"),
        ({"rope_type": "default", "rope_theta": 10000, "no_rope_layers": [1]}, "no_rope_layers"),
        ({"rope_type": "default", "rope_theta": 10000, "no_rope_layers": [1, 2]}, "no_rope_layers"),
        ({"rope_type": "default", "rope_theta": 10000, "no_rope_layers": 1}, "no_rope_layers"),
    ],
)
def test_impossible_parameters_are_refused_by_name(rope: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidArgumentError, match=named):
        Rotation.from_layout(KVLayout(2, 2, 16, "bfloat16", rope=rope))
