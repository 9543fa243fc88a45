"""Many clients, few documents that everybody asks about and many that hardly anybody does: throughput and waiting."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from vllm_model import random_tokens
from vllm_process import EngineFailedError, running_engine
from vllm_stores import OFFLOADING, Store, offloading

DOCUMENTS, CLIENTS, TURNS = 200, 8, 2
DOCUMENT_TOKENS, QUESTION_TOKENS, ANSWER_TOKENS = 512, 32, 8
EXPONENT = 1.0
BLOCKS = 64
"""Blocks of 128 tokens that the engine has for KV: all clients' conversations fit, and few documents beside them."""
ALONE, EMPTY, FILLED = "no connector", "kvstore_s3, empty store", "kvstore_s3, filled store"


def measure(store: Store, model: Path, conversations: int) -> dict[str, Any]:
    """The same documents in the same order for every way; other questions for the filled store."""
    ours, environment = store.ours("zipf"), store.environment()
    ways: list[tuple[str, dict[str, Any] | None, dict[str, str], int]] = [
        (ALONE, None, {}, 1),
        (EMPTY, ours, environment, 1),
        (FILLED, ours, environment, 2),
    ]
    ways += [(name, offloading(name, store.folder / "offload"), {}, 1) for name in OFFLOADING]
    rows: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    for name, connector, variables, seed in ways:
        try:
            rows[name] = _serve(store, model, connector, variables, make_workload(conversations, seed))
        except EngineFailedError as error:
            skipped[name] = str(error)
            print(f"{name}: does not run here, {error}")
            continue
        _print_row(name, rows[name])
    return {
        "documents": DOCUMENTS,
        "clients": CLIENTS,
        "turns": TURNS,
        "conversations": conversations,
        "exponent": EXPONENT,
        "document_tokens": DOCUMENT_TOKENS,
        "kv_tokens_of_the_engine": BLOCKS * 128,
        "rows": rows,
        "skipped": skipped,
    }


def make_workload(conversations: int, seed: int) -> dict[str, Any]:
    """Conversations about documents drawn by Zipf's law. `seed` changes the questions, not the documents."""
    weights = 1.0 / np.arange(1, DOCUMENTS + 1) ** EXPONENT
    drawn = np.random.default_rng(0).choice(DOCUMENTS, conversations, p=weights / weights.sum()).tolist()
    return {
        "do": "serve",
        "clients": CLIENTS,
        "answer_tokens": ANSWER_TOKENS,
        "documents": {str(number): random_tokens(DOCUMENT_TOKENS, 10_000 + number) for number in set(drawn)},
        "conversations": [
            {"document": number, "questions": _questions(seed, place)} for place, number in enumerate(drawn)
        ],
    }


def _questions(seed: int, place: int) -> list[list[int]]:
    return [random_tokens(QUESTION_TOKENS, 1_000_000 * seed + 10 * place + turn) for turn in range(TURNS)]


def _serve(
    store: Store,
    model: Path,
    connector: Mapping[str, Any] | None,
    variables: Mapping[str, str],
    workload: Mapping[str, Any],
) -> dict[str, Any]:
    with running_engine(
        model,
        connector=connector,
        environment=variables,
        log=store.folder / "zipf.log",
        num_gpu_blocks_override=BLOCKS,
        max_num_seqs=2 * CLIENTS,
    ) as engine:
        engine.ask(random_tokens(100, seed=2))
        found = engine.tell(workload)
        store.settle("zipf/")
    return _summarise(found)


def _summarise(found: Mapping[str, Any]) -> dict[str, Any]:
    requests = found["requests"]
    waits = [request["ttft_ms"] for request in requests]
    prompts = sum(request["prompt"] for request in requests)
    return {
        "requests": len(requests),
        "seconds": round(found["seconds"], 2),
        "requests_per_s": round(len(requests) / found["seconds"], 3),
        "ttft_mean_ms": round(float(np.mean(waits)), 1),
        "ttft_median_ms": round(float(np.median(waits)), 1),
        "ttft_p95_ms": round(float(np.percentile(waits, 95)), 1),
        "prompt_tokens": prompts,
        "not_computed": round(sum(request["cached"] for request in requests) / prompts, 3),
    }


def _print_row(name: str, row: Mapping[str, Any]) -> None:
    print(
        f"{name:30}{row['requests_per_s']:8.2f} requests/s, time to first token "
        f"{row['ttft_mean_ms']:8.0f} ms mean, {row['ttft_p95_ms']:8.0f} ms p95, {row['not_computed']:.0%} not computed"
    )
