"""The model and the prompts of the vLLM benchmarks: random weights, random tokens. What they say does not matter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import transformers

VOCABULARY = 32000
PROMPT_TOKENS = 1800
CHUNK_TOKENS = 256


def write_model(path: Path, *, small: bool = False) -> Path:
    """A Llama with 16 layers, hidden size 1024, 16 heads, 4 KV heads of 64 dims, bf16: 309 M parameters.

    `small`: 4 layers, hidden size 256, to try the benchmarks out.
    """
    torch.manual_seed(11)
    hidden, layers, heads = (256, 4, 4) if small else (1024, 16, 16)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=4096,
        dtype="bfloat16",
    )
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return path


def random_tokens(count: int, seed: int) -> list[int]:
    found: list[int] = np.random.default_rng(seed).integers(0, VOCABULARY, count).tolist()
    return found


def whole_chunks(tokens: int) -> int:
    """How many tokens of a prompt lie in whole chunks."""
    return tokens // CHUNK_TOKENS * CHUNK_TOKENS
