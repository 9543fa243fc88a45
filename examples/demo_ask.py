"""The second half of the demo, a process of its own: answer one question with the store, and without it.

    python demo_ask.py MODEL STORE DOCUMENT QUESTION

Prints one JSON document. The runs with the store come first, so that whatever a first run costs counts against them;
of their times the middle one is reported, since another program can easily get in the way of so short a time.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer
from transformers.generation.streamers import BaseStreamer

from kvstore_s3.connectors.transformers import PrefixCache

NEW_TOKENS = 24
WARM_RUNS = 5


class FirstToken(BaseStreamer):  # type: ignore[misc]
    """Notes when the first token was there. `generate` puts the prompt first, then token by token."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.puts = 0
        self.seconds = 0.0

    def put(self, value: torch.Tensor) -> None:
        self.puts += 1
        if self.puts == 2:
            self.seconds = time.perf_counter() - self.started

    def end(self) -> None:
        """Nothing is held back."""


def main(model: str, store: str, document: str, question: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompt = encode(tokenizer, Path(document).read_text() + question)
    with PrefixCache.open(model, store) as cache:
        answer(cache.generate, encode(tokenizer, "Something else, to load the kernels."), cache)
        runs = [answer(cache.generate, prompt, cache) for _ in range(WARM_RUNS)]
        reuse = cache.last
        cold, cold_seconds = answer(cache.model.generate, prompt, cache)
    assert reuse is not None
    result = {
        "text": tokenizer.decode(cold, skip_special_tokens=True),
        "tokens": len(cold),
        "identical": all(torch.equal(cold, warm) for warm, _ in runs),
        "prompt_tokens": reuse.prompt_tokens,
        "loaded_tokens": reuse.loaded_tokens,
        "load_seconds": reuse.load_seconds,
        "warm_seconds": statistics.median(seconds for _, seconds in runs),
        "cold_seconds": cold_seconds,
    }
    print(json.dumps(result))


def encode(tokenizer: Any, text: str) -> torch.Tensor:
    """Token ids [1, n] of a request, through the model's chat template where it has one."""
    chat = tokenizer.chat_template is not None
    if chat:
        turns = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids: torch.Tensor = tokenizer(text, return_tensors="pt", add_special_tokens=not chat)["input_ids"]
    return ids


def answer(generate: Any, prompt: torch.Tensor, cache: PrefixCache) -> tuple[torch.Tensor, float]:
    """Return the new tokens, and the seconds until the first of them."""
    prompt = prompt.to(cache.model.device)
    clock = FirstToken()
    tokens = generate(prompt, max_new_tokens=NEW_TOKENS, do_sample=False, streamer=clock)
    return tokens[0, prompt.shape[1] :], clock.seconds


if __name__ == "__main__":
    main(*sys.argv[1:])
