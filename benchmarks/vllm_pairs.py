"""Engines beside each other, asked in turn: what saving costs a cold prompt, and when loading by layer wins."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from vllm_hits import PROMPT, WARM_UP, fill, summarise
from vllm_model import CHUNK_TOKENS, PROMPT_TOKENS, random_tokens
from vllm_process import Engine, running_engine
from vllm_stores import Store

PROMPTS_IN_A_ROW = 2
TAILS = (8, 264, 776)
"""Tokens behind the stored prefix that are to be computed."""


def measure_saving(store: Store, model: Path, rounds: int, prefix: str) -> dict[str, Any]:
    """Cold prompts one after the other, with and without saves; the next engine's turn comes when all is stored.

    Engines that are alike differ by some percent, each for as long as it lives. So there are two without a connector:
    ratios are to the mean of both, and `alone_ratio` is that of the two to each other.

    `first_token`: of each prompt. `in_a_row`: of the whole sequence, in which the saves of one prompt run beside the
    prefill of the next. Nothing must be under `prefix` yet.
    """
    kinds = {"alone": None, "saving": store.ours(prefix), "alone too": None}
    times: dict[str, list[list[float]]] = {name: [] for name in kinds}
    with _side_by_side(store, model, kinds) as engines:
        for number in range(rounds):
            names = list(engines) if number % 2 else list(reversed(engines))
            for name in names:
                seeds = range(100 + number * PROMPTS_IN_A_ROW, 100 + (number + 1) * PROMPTS_IN_A_ROW)
                answers = engines[name].ask(*[random_tokens(PROMPT_TOKENS, seed) for seed in seeds])
                times[name].append([answer.ms for answer in answers])
                if name == "saving":
                    chunks = (number + 1) * PROMPTS_IN_A_ROW * (PROMPT_TOKENS // CHUNK_TOKENS)
                    stored = store.await_chunks(f"{prefix}/", chunks)
    firsts = {name: [ms for sequence in rows for ms in sequence] for name, rows in times.items()}
    rows = {name: [sum(sequence) for sequence in sequences] for name, sequences in times.items()}
    found = {
        "prompts_in_a_row": PROMPTS_IN_A_ROW,
        "chunks_expected": chunks,
        "chunks_stored": stored,
        "first_token": {name: summarise(values) for name, values in firsts.items()},
        "in_a_row": {name: summarise(values) for name, values in rows.items()},
        "first_token_ratio": _paired(firsts["saving"], _means(firsts["alone"], firsts["alone too"])),
        "in_a_row_ratio": _paired(rows["saving"], _means(rows["alone"], rows["alone too"])),
        "alone_ratio": _paired(rows["alone too"], rows["alone"]),
    }
    print(f"saving: {found['in_a_row_ratio']['median']:.3f} of a cold sequence, {stored} of {chunks} chunks stored")
    return found


def measure_layers(store: Store, model: Path, repeats: int) -> dict[str, Any]:
    """Hits of several lengths, loaded before the first step and layer by layer beside it.

    The engines only read, so that no tail is stored.
    """
    if not store.chunk_sizes("hits/"):
        fill(store, model, nvme_tier_dir=store.folder / "nvme")  # as hits do, which may come later
    modes = {mode: store.ours("hits", role="kv_consumer", load_mode=mode) for mode in ("async", "by-layer")}
    times: dict[int, dict[str, list[float]]] = {tail: {mode: [] for mode in modes} for tail in TAILS}
    with _side_by_side(store, model, modes) as engines:
        for number in range(repeats):
            for tail in TAILS:
                kept = PROMPT[: PROMPT_TOKENS - tail]
                prompt = [*kept, *random_tokens(tail, 1000 + number)]
                for mode in list(engines) if number % 2 else list(reversed(engines)):
                    answer = engines[mode].ask(prompt)[0]
                    if answer.cached == len(kept) // CHUNK_TOKENS * CHUNK_TOKENS:
                        times[tail][mode].append(answer.ms)
    return {str(tail): _compare(tail, found) for tail, found in times.items()}


def _compare(tail: int, times: Mapping[str, list[float]]) -> dict[str, Any]:
    if not all(times.values()):
        print(f"{tail} tokens to compute: a mode did not hit")
        return {mode: len(values) for mode, values in times.items()}
    found: dict[str, Any] = {mode: summarise(values) for mode, values in times.items()}
    found["by_layer_over_async"] = round(found["by-layer"]["ms"] / found["async"]["ms"], 3)
    print(f"{tail} tokens to compute: by-layer {found['by-layer']['ms']:.1f} ms, async {found['async']['ms']:.1f} ms")
    return found


def _means(one: list[float], other: list[float]) -> list[float]:
    return [(left + right) / 2 for left, right in zip(one, other, strict=True)]


def _paired(ours: list[float], others: list[float]) -> dict[str, float]:
    ratios = [mine / other for mine, other in zip(ours, others, strict=True)]
    return {"median": round(median(ratios), 3), "least": round(min(ratios), 3), "most": round(max(ratios), 3)}


@contextmanager
def _side_by_side(
    store: Store, model: Path, connectors: Mapping[str, Mapping[str, Any] | None]
) -> Iterator[dict[str, Engine]]:
    """Warm engines without a prefix cache of their own; who is not asked waits without computing."""
    environment, engines = store.environment(), dict[str, Engine]()
    with ExitStack() as stack:
        for name, connector in connectors.items():
            log = store.folder / f"beside-{name.replace(' ', '-')}.log"
            engine = running_engine(
                model, connector=connector, environment=environment, log=log, enable_prefix_caching=False
            )
            engines[name] = stack.enter_context(engine)
        for engine in engines.values():
            engine.ask(WARM_UP)
        yield engines
