"""Time to first token in a simulator: what the planner makes of changing links, and how loads share one.

    python benchmarks/streaming.py [--seeds 200]

Replays bandwidth traces (steady, step, burst, collapse) against one load, and Poisson arrivals of mixed loads against
one link. Nothing is measured in time: the same seeds give the same figures on any machine. docs/planner.md explains the
tables; results/streaming.json and .svg keep them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from record import RESULTS, record
from streaming_links import TRACES, Link, make_link
from streaming_plot import draw
from streaming_shared import compare_sharing
from streaming_single import LEVEL_BITS, LOSSLESS_BITS, Job, Outcome, make_job, policies

Policy = Callable[[Link, Job], Outcome]
RATES = {False: (2e8, 5e9), True: (1e8, 2e9)}
"""Slowest and fastest first rate of a link, bytes/s, without and with a deadline: both sides of break-even."""


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument(
        "--seeds", type=int, default=200, help="loads for each trace; arrivals are ten times as many"
    )
    seeds = arguments.parse_args().seeds
    result = {
        "seeds": seeds,
        "lossless": compare_policies(seeds, LOSSLESS_BITS, deadline=False),
        "levels": compare_policies(seeds, LEVEL_BITS, deadline=True),
        "sharing": compare_sharing(seeds * 10),
    }
    print_single("lossless, no deadline", result["lossless"])
    print_single("three levels, deadline", result["levels"])
    print_sharing(result["sharing"])
    (RESULTS / "streaming.svg").write_text(draw(result), encoding="ascii")
    record("streaming", result, "numpy")


def compare_policies(seeds: int, bits: tuple[float, ...], *, deadline: bool) -> dict[str, Any]:
    """Trace -> policy -> figures. All policies meet the same links and jobs."""
    return {trace: _compare(trace, seeds, bits, deadline=deadline) for trace in TRACES}


def _compare(trace: str, seeds: int, bits: tuple[float, ...], *, deadline: bool) -> dict[str, Any]:
    outcomes: dict[str, list[Outcome]] = {name: [] for name in policies(len(bits))}
    jobs = []
    for seed in range(seeds):
        generator = np.random.default_rng([seed, list(TRACES).index(trace)])
        job = make_job(generator, bits, deadline=deadline)
        link = make_link(trace, generator, *RATES[deadline])
        jobs.append(job)
        for name, policy in policies(len(bits)).items():
            outcomes[name].append(policy(link, job))
    best = outcomes["offline optimum"]
    return {name: _summarise(jobs, found, best) for name, found in outcomes.items()}


def _summarise(jobs: list[Job], found: list[Outcome], best: list[Outcome]) -> Mapping[str, float]:
    times = np.array([outcome.ttft_s for outcome in found])
    of_recompute = times / [job.prefill(0) for job in jobs]
    figures = {
        "mean_s": times.mean(),
        "p95_s": np.percentile(times, 95),
        "mean_of_optimum": times.mean() / np.mean([outcome.ttft_s for outcome in best]),
        "slower_than_recompute": np.mean(of_recompute > 1.05),
        "p99_of_recompute": np.percentile(of_recompute, 99),
    }
    if jobs[0].deadline_s is not None:
        figures["met"] = np.mean([outcome.meets(job) for outcome, job in zip(found, jobs, strict=True)])
        figures["level"] = np.mean([np.mean(outcome.levels) for outcome in found])
    return {name: round(float(figure), 4) for name, figure in figures.items()}


def print_single(title: str, traces: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    for trace, rows in traces.items():
        levels = f" {'in time':>8} {'level':>6}" if "level" in next(iter(rows.values())) else ""
        print(f"\n{title}, {trace}")
        print(
            f"{'policy':24} {'mean s':>8} {'p95 s':>8} {'x optimum':>10} {'> recompute':>11} {'p99 of it':>10}{levels}"
        )
        for name, row in rows.items():
            line = f"{name:24} {row['mean_s']:8.3f} {row['p95_s']:8.3f} {row['mean_of_optimum']:10.3f}"
            line += f" {row['slower_than_recompute']:11.1%} {row['p99_of_recompute']:10.2f}"
            print(line + (f" {row['met']:8.1%} {row['level']:6.2f}" if "level" in row else ""))


def print_sharing(rows: list[dict[str, Any]]) -> None:
    print("\nadded time to first token")
    print(f"{'engine':10} {'link used':>9} {'order':24} {'mean s':>8} {'p95 s':>8} {'worst s':>8} {'gain':>6}")
    for row in rows:
        print(
            f"{row['engine']:10} {row['utilisation']:9.0%} {row['order']:24} {row['mean_s']:8.3f} {row['p95_s']:8.3f} "
            f"{row['worst_s']:8.2f} {row['gain_over_equal_shares']:6.2f}"
        )


if __name__ == "__main__":
    main()
