"""Bits per value on the KV of real models. The aim is 10.6, everything included; below 10.5 is reached."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from kvstore_s3.codec.base import Bits
from kvstore_s3.codec.registry import encode_section

ASSETS = Path(os.environ.get("KVSTORE_S3_TEST_ASSETS", Path(__file__).parent.parent.parent.parent / "shared"))
CHUNK, GROUP = 256, 4


def model_kv(model: object, token_ids: list[int]) -> Bits:
    import torch

    with torch.inference_mode():
        cache = model(torch.tensor([token_ids]), use_cache=True).past_key_values  # type: ignore[operator]
    layers = [torch.stack([layer.keys[0], layer.values[0]]).transpose(1, 2) for layer in cache.layers]
    return torch.stack(layers).to(torch.bfloat16).contiguous().view(torch.uint16).numpy()


def load_model(name: str) -> object:
    import torch
    from transformers import AutoModelForCausalLM

    if not (ASSETS / "models" / name).is_dir():
        pytest.skip(f"model {name} is not in {ASSETS / 'models'} (KVSTORE_S3_TEST_ASSETS)")
    return AutoModelForCausalLM.from_pretrained(ASSETS / "models" / name, dtype=torch.bfloat16)


def bits_per_value(kv: Bits) -> float:
    coded = values = 0
    for token in range(0, kv.shape[2] // CHUNK * CHUNK, CHUNK):
        for layer in range(0, kv.shape[0], GROUP):
            section = kv[layer : layer + GROUP, :, token : token + CHUNK]
            codec_id, payload = encode_section(section, "bfloat16")
            assert codec_id == 1
            coded += len(payload)
            values += section.size
    return 8 * coded / values


@pytest.mark.parametrize("text", ["kjb.txt", "shakes.txt", "union.txt"])
def test_books8m_takes_at_most_10_point_45_bits_a_value(text: str) -> None:
    from tokenizers import Tokenizer

    model = load_model("books8M")
    tokenizer = Tokenizer.from_file(str(ASSETS / "models" / "books8M" / "tokenizer.json"))
    token_ids = tokenizer.encode((ASSETS / "text" / text).read_text()[:8000]).ids[:1024]
    assert bits_per_value(model_kv(model, token_ids)) < 10.45


def test_stories260k_takes_at_most_10_point_45_bits_a_value() -> None:
    token_ids = np.random.Generator(np.random.PCG64(5)).integers(3, 512, 512).tolist()
    assert bits_per_value(model_kv(load_model("stories260K"), token_ids)) < 10.45


@pytest.mark.parametrize("head_dim", [32, 80])
def test_a_llama_with_random_weights_takes_at_most_10_point_5_bits_a_value(head_dim: int) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(head_dim)
    config = transformers.LlamaConfig(
        vocab_size=500,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    assert bits_per_value(model_kv(model, torch.randint(3, 500, (512,)).tolist())) < 10.5
