"""The data path beside its peers, in one run: bytes over http and TLS, lookups, integrity, many streams, local disk.

    python benchmarks/io_bench.py [--rounds 5] [--directory DIR]       or: make bench-io

What is counted is the client's CPU time, user and system, per GB; the client is kept on one core and the server on
another. Two servers: byte_server.cpp, which only moves bytes, and a real MinIO. Every client lands its bytes in buffers
that are there already; curl, which throws them away, is the limit. The rounds of the clients take turns; figures are
medians over the rounds, with the least and the most. Results: results/io.json and results/io.svg.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import tiers
from io_bytes import cost, measure_endpoint
from io_plot import Panel, draw_bars
from io_servers import build_byte_server, byte_server, choose_cores, make_certificate, minio
from io_store import run_alone
from record import RESULTS, record

OURS, LIMIT = "kvstore_s3", "curl"
LATENCY_MS = 20
LOOKUP_GOALS = {"lookup of 64 chunks": 45.0, "lookup of 512 chunks": 100.0}
DISK_GOALS = {"read": 0.08, "write": 0.10}
PACKAGES = ("aiobotocore", "aiofiles", "awscrt", "boto3", "crc32c", "minio", "obstore", "torch")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to measure")
    arguments = parser.parse_args()
    rounds, began = arguments.rounds, time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="kvstore-s3-bench-") as folder:
        result = measure(Path(folder), rounds)
    result["disk"] = tiers.measure(arguments.directory, mib=512, rounds=min(rounds, 3))
    verdicts = judge(result)
    print_verdicts(verdicts)
    draw(result)
    client, server = choose_cores()
    setup = {"client_core": client, "server_core": server, "latency_ms": LATENCY_MS, "rounds": rounds}
    taken = {"seconds": round(time.perf_counter() - began)}
    record("io", {**setup, **taken, "goals": verdicts, **result}, *PACKAGES)


def measure(folder: Path, rounds: int) -> dict[str, Any]:
    program, tls = build_byte_server(folder)
    result: dict[str, Any] = {"bytes": []}
    with byte_server(program) as endpoint:
        result["bytes"] += measure_endpoint(endpoint, rounds)
        result |= run_alone("integrity", endpoint, 60)
        result |= run_alone("streams", endpoint, 3)
    if tls:
        with byte_server(program, tls=make_certificate(folder)) as endpoint:
            result["bytes"] += measure_endpoint(endpoint, rounds)
    with ExitStack() as stack:
        server = stack.enter_context(minio())
        if server is not None:
            result["bytes"] += measure_endpoint(server, max(rounds - 2, 1))
    with byte_server(program, latency_ms=LATENCY_MS) as endpoint:
        result |= run_alone("lookup", endpoint, rounds)
    return result


def judge(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each goal beside what was found."""
    verdicts = []
    for row in result["bytes"]:
        ours = row["clients"].get(OURS)
        if ours is None:
            continue
        name = f"{row['name']}, {row['server']}"
        verdicts.append(_verdict(name, cost(ours), row["goal"], "CPU ms" if row["small"] else "CPU-s/GB"))
        if row["work"] == "get" and LIMIT in row["clients"] and not row["small"]:
            share = ours["mb_s"] / row["clients"][LIMIT]["mb_s"]
            verdicts.append(_verdict(name, round(share, 3), 0.9, "of curl's MB/s", least=True))
    for name, goal in LOOKUP_GOALS.items():
        verdicts.append(_verdict(f"{name} at {LATENCY_MS} ms", result[name]["ms"], goal, "ms"))
    for verb, goal in DISK_GOALS.items():
        verdicts.append(
            _verdict(f"NVMe, cold {verb}", result["disk"]["rows"][verb]["ours"]["cpu_s_per_gb"], goal, "CPU-s/GB")
        )
    streams = result["64 streams at once"]
    verdicts.append(_verdict("integrity", result["integrity"]["paired_share"], 0.02, "of a load's time"))
    verdicts.append(_verdict("64 streams at once", streams["ratio"], 1.2, "of one stream's CPU-s/GB"))
    budget = streams["slab_budget"] / 2**20
    verdicts.append(_verdict("64 streams at once", streams["most_slab_bytes"] / 2**20, budget, "MiB of slabs"))
    return verdicts


def _verdict(name: str, found: float, goal: float, unit: str, *, least: bool = False) -> dict[str, Any]:
    met = found >= goal if least else found <= goal
    return {"row": name, "found": found, "goal": goal, "unit": unit, "met": met}


def print_verdicts(verdicts: list[dict[str, Any]]) -> None:
    print(f"\n{'':58}{'found':>10}{'goal':>8}")
    for verdict in verdicts:
        mark = "" if verdict["met"] else "   NOT MET"
        print(f"{verdict['row']:58}{verdict['found']:10.3f}{verdict['goal']:8g} {verdict['unit']}{mark}")


def draw(result: Mapping[str, Any]) -> None:
    panels = []
    for row in result["bytes"]:
        bars = {name: cost(found) for name, found in row["clients"].items()}
        notes = {name: f"({found['mb_s']} MB/s)" for name, found in row["clients"].items()}
        unit = "CPU ms per request" if row["small"] else "CPU seconds per GB"
        panels.append(Panel(row["name"], f"{unit}, {row['server']}", bars, notes, row["goal"]))
    for name, goal in LOOKUP_GOALS.items():
        found = result[name]
        bars = {OURS: found["ms"], "aiobotocore": found["aiobotocore_ms"], "one by one": found["one_by_one_ms"]}
        panels.append(Panel(name, f"ms at {LATENCY_MS} ms of latency", bars, {}, goal))
    for verb, goal in DISK_GOALS.items():
        rows = {OURS if name == "ours" else name: row for name, row in result["disk"]["rows"][verb].items()}
        bars = {name: row["cpu_s_per_gb"] for name, row in rows.items()}
        notes = {name: f"({row['mb_per_s']} MB/s)" for name, row in rows.items()}
        panels.append(Panel(f"NVMe, cold {verb}", "CPU seconds per GB, 8 MiB pieces", bars, notes, goal))
    path = RESULTS / "io.svg"
    path.write_text(draw_bars(panels, "Bytes between an S3 server and a buffer: less is better", OURS, LIMIT))
    print(f"kept in {path.relative_to(RESULTS.parent.parent)}")


if __name__ == "__main__":
    main()
