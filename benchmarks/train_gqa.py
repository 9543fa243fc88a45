"""Train a small Llama whose K and V are narrow beside the hidden state, to rank KV compression on.

    python benchmarks/train_gqa.py --corpus FOLDER --tokenizer DIR --out DIR [--minutes 50]

Small models with one KV head for every query head or two hide something: together, K and V of a layer are there as
wide as the hidden state they come from, or wider, so a transform finds redundancy that a large model with grouped
queries does not have. Here K and V of a layer have 2 x 2 x 64 = 256 numbers a token, two thirds of the hidden 384.

Every .txt file under `--corpus` is read; any 20 MB of prose will do. Debian's packages hold enough of it, once their
HTML is made plain text: `anarchism`, `jargon-text`, `fortunes`, `dict-foldoc`, `dict-devil`, `doc-debian`,
`debian-faq`, `debian-reference-en`, `debian-policy`, `developers-reference` and the tutorials of `python3.11-doc` are
25 MB. `--tokenizer` is any directory with a tokenizer.json, whose vocabulary becomes the model's.

A step is 3,072 tokens, as 3 windows of 1,024 or as 8 of 384, so that RoPE positions up to 1,024 are trained without
every step paying for long attention. The learning rate follows the time spent, not the steps made, and reaches zero
when `--minutes` are over, however loaded the machine is. Every `--save-minutes`, and at the end, the weights are put
into `--out` in bfloat16, each file by one rename, so that the directory can be used at any time. Matrix products run
in bfloat16 on float32 weights: on a CPU with AVX-512 BF16 more than twice as fast as float32.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

WINDOWS = {1024: 3, 384: 8}
LONG_SHARE = 0.4
CONTEXT = 4096
SEGMENT, HELD_OUT = 4096, 16
WARM_UP_STEPS = 60
SPLIT_SEED = 1
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")

Tokens = NDArray[np.int64]


def main() -> None:
    arguments = parse_arguments()
    disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    rng = np.random.default_rng(SPLIT_SEED)
    tokenizer = Tokenizer.from_file(str(arguments.tokenizer / "tokenizer.json"))
    train, held_out, characters = split(read_corpus(arguments.corpus, tokenizer, rng), tokenizer, rng)
    model = (
        LlamaForCausalLM.from_pretrained(arguments.start, dtype=torch.float32)
        if arguments.start
        else build_model(tokenizer.get_vocab_size(), arguments.intermediate)
    )
    print(f"{model.num_parameters() / 1e6:.2f} M parameters, {train.size / 1e6:.2f} M training tokens of ", end="")
    print(f"{characters:.2f} characters; {held_out.size} tokens held out", flush=True)
    fit(model, batches(train, np.random.default_rng(arguments.seed)), held_out, arguments)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--corpus", type=Path, required=True, help="folder of .txt files, searched recursively")
    parser.add_argument("--tokenizer", type=Path, required=True, help="directory with a tokenizer.json")
    parser.add_argument("--out", type=Path, required=True, help="directory for the model, in the Hugging Face layout")
    parser.add_argument("--start", type=Path, help="trained model to go on from; give another --seed then")
    parser.add_argument("--minutes", type=float, default=50.0, help="training time (default: 50)")
    parser.add_argument("--save-minutes", type=float, default=5.0, help="time between checkpoints (default: 5)")
    parser.add_argument("--intermediate", type=int, default=512, help="width of the MLP (default: 512)")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="peak of the cosine (default: 2e-3)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: 1)")
    parser.add_argument("--seed", type=int, default=1, help="of weights and windows, not of what is held out")
    return parser.parse_args()


def build_model(vocabulary: int, intermediate: int) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=384,
            intermediate_size=intermediate,
            num_hidden_layers=8,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=1,
        )
    )


def read_corpus(folder: Path, tokenizer: Tokenizer, rng: np.random.Generator) -> Tokens:
    """All documents as one stream of token ids, in random order."""
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in sorted(folder.rglob("*.txt"))]
    if not texts:
        raise SystemExit(f"expected .txt files under {folder}, found none; give --corpus a folder of prose")
    rng.shuffle(texts)
    return np.concatenate([np.array(encoding.ids, dtype=np.int64) for encoding in tokenizer.encode_batch(texts)])


def split(stream: Tokens, tokenizer: Tokenizer, rng: np.random.Generator) -> tuple[Tokens, Tokens, float]:
    """The training stream, held-out rows of 1,025 tokens, and characters per token of those.

    What is held out comes from all over the corpus, in segments so long that little of it is next to training text.
    """
    segments = stream[: stream.size // SEGMENT * SEGMENT].reshape(-1, SEGMENT)
    if len(segments) < 4 * HELD_OUT:
        raise SystemExit(f"expected {4 * HELD_OUT * SEGMENT} tokens or more, found {stream.size}; give more text")
    chosen = np.zeros(len(segments), dtype=bool)
    chosen[rng.choice(len(segments), HELD_OUT, replace=False)] = True
    longest = max(WINDOWS)
    held_out = segments[chosen][:, : SEGMENT // (longest + 1) * (longest + 1)].reshape(-1, longest + 1)
    characters = sum(len(tokenizer.decode(row.tolist())) for row in held_out)
    return segments[~chosen].reshape(-1), held_out, characters / held_out.size


def batches(train: Tokens, rng: np.random.Generator) -> Iterator[torch.Tensor]:
    """Windows of one length, with the token after each, at random places of the stream: int64 [windows, length + 1]."""
    while True:
        length = max(WINDOWS) if rng.random() < LONG_SHARE else min(WINDOWS)
        starts = rng.integers(0, train.size - length, WINDOWS[length])
        yield torch.from_numpy(np.stack([train[start : start + length + 1] for start in starts]))


def next_token_losses(model: LlamaForCausalLM, rows: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in nats of every token but the first of each row: float32 [rows, length - 1]."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    return cross_entropy(logits.float().transpose(1, 2), rows[:, 1:], reduction="none")


def fit(
    model: LlamaForCausalLM, steps: Iterator[torch.Tensor], held_out: Tokens, arguments: argparse.Namespace
) -> None:
    optimizer = build_optimizer(model, arguments.learning_rate)
    started = saved = time.monotonic()
    recent: list[float] = []
    tokens = 0
    for step, rows in enumerate(steps):
        spent = time.monotonic() - started
        share = spent / (60 * arguments.minutes)
        if share >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, share, arguments.learning_rate)
        loss = next_token_losses(model, rows).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        recent.append(loss.item())
        tokens += rows.numel() - len(rows)
        if step % 50 == 49:
            print(f"{spent / 60:5.1f} min  step {step + 1:5}  {tokens / 1e6:5.2f} M tokens  loss {np.mean(recent):.3f}")
            recent.clear()
        if time.monotonic() - saved >= 60 * arguments.save_minutes:
            save(model, arguments.tokenizer, arguments.out)
            saved = time.monotonic()
            report(model, held_out[::4])
    save(model, arguments.tokenizer, arguments.out)
    print(f"{step} steps, {tokens / 1e6:.2f} M tokens")
    report(model, held_out)


def build_optimizer(model: LlamaForCausalLM, learning_rate: float) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    gains = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98), fused=True)


def rate_at(step: int, share: float, peak: float) -> float:
    """Learning rate once `share` of the time is spent: a linear start, then a half cosine to zero."""
    return peak * min(1.0, (step + 1) / WARM_UP_STEPS) * (1 + math.cos(math.pi * share)) / 2


@torch.inference_mode()
def report(model: LlamaForCausalLM, held_out: Tokens) -> None:
    """Print the held-out loss, and that of the last 128 of 1,024 positions with all of the context and with 256."""
    model.eval()
    parts = torch.split(torch.from_numpy(held_out), 3)
    whole = torch.cat([next_token_losses(model, rows) for rows in parts])
    near = torch.cat([next_token_losses(model, rows[:, -257:]) for rows in parts])
    model.train()
    late, cut = whole[:, -128:].mean(), near[:, -128:].mean()
    print(f"      held out: {whole.mean():.3f} nats a token; late {late:.3f}, with 256 tokens of context {cut:.3f}")


def save(model: LlamaForCausalLM, tokenizer: Path, out: Path) -> None:
    """Put the model, in bfloat16, and the tokenizer's files into `out`, each file whole or not at all."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{out.name}.", dir=out.parent) as folder:
        copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
        for name in TOKENIZER_FILES:
            if (tokenizer / name).exists():
                shutil.copyfile(tokenizer / name, Path(folder) / name)
        for path in Path(folder).iterdir():
            os.replace(path, out / path.name)


if __name__ == "__main__":
    main()
