"""Bytes from and to servers: every client in a process of its own, round by round in turn, on one core."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from io_client import CLIENTS
from io_servers import BUCKET, OBJECT, Endpoint

KiB, MiB = 1024, 1024 * 1024


@dataclass(frozen=True, slots=True)
class Row:
    """Work to be measured. `goal` is in CPU-seconds per GB, or in CPU milliseconds per request where `small`."""

    name: str
    work: str
    size: int
    count: int
    connections: int
    goal: float
    small: bool = False


GET = Row("GET, 8 MiB ranges, 8 connections", "get", 8 * MiB, 48, 8, 0.20)
GET_TLS = Row("GET over TLS 1.3, 8 MiB ranges, 8 connections", "get", 8 * MiB, 24, 8, 0.90)
PUT = Row("PUT with checksum, 8 MiB, 8 connections", "put", 8 * MiB, 24, 8, 0.32)
RANGE = Row("one 256 KiB range at a time", "get", 256 * KiB, 200, 1, 0.25, small=True)


def rows_for(endpoint: Endpoint) -> list[Row]:
    """A server that keeps what is PUT is slower, and gets less of it."""
    if endpoint.authority:
        return [GET_TLS]
    return [GET, PUT, RANGE] if endpoint.only_moves_bytes else [GET, replace(PUT, count=12), RANGE]


class Process:
    """A client's process: `measure` asks it for one round."""

    def __init__(self, name: str, endpoint: Endpoint, connections: int) -> None:
        job = {
            "url": endpoint.url,
            "host": urlsplit(endpoint.url).netloc,
            "secure": endpoint.authority is not None,
            "access_key": endpoint.access_key,
            "secret_key": endpoint.secret_key,
            "authority": endpoint.authority,
            "bucket": BUCKET,
            "key": OBJECT,
            "connections": connections,
        }
        command = [sys.executable, str(Path(__file__).parent / "io_client.py"), name, json.dumps(job)]
        environment = {**os.environ, **endpoint.environment()}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def wait_ready(self) -> bool:
        assert self.process.stdout is not None
        return bool(self.process.stdout.readline())

    def measure(self, row: Row) -> dict[str, float] | None:
        """None where the client failed; it said why."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        wanted = {"work": row.work, "count": row.count, "size": row.size, "connections": row.connections}
        try:
            self.process.stdin.write(json.dumps(wanted) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return None
        answer = self.process.stdout.readline()
        return json.loads(answer) if answer else None

    def end(self) -> None:
        try:
            self.process.communicate(timeout=10)  # closes stdin, which ends it
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()


@contextmanager
def clients(endpoint: Endpoint, names: Sequence[str]) -> Iterator[dict[str, Process]]:
    with ExitStack() as stack:
        started = {}
        for name in names:
            started[name] = Process(name, endpoint, 8)
            stack.callback(started[name].end)
        yield {name: process for name, process in started.items() if process.wait_ready()}


def measure_endpoint(endpoint: Endpoint, rounds: int, names: Sequence[str] = tuple(CLIENTS)) -> list[dict[str, Any]]:
    """All rows that this endpoint serves: for each client the medians over the rounds, and their spread."""
    found = []
    with clients(endpoint, names) as processes:
        for row in rows_for(endpoint):
            about = {"name": row.name, "work": row.work, "small": row.small, "goal": row.goal}
            found.append({**about, "server": endpoint.name, "clients": measure_row(row, processes, rounds)})
            report(row, found[-1])
    return found


def measure_row(row: Row, processes: Mapping[str, Process], rounds: int) -> dict[str, Any]:
    """One round to warm up, then rounds in which the clients take turns."""
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in processes}
    for number in range(rounds + 1):
        for name, process in processes.items():
            sample = process.measure(row)
            if sample is not None and number:
                samples[name].append(sample)
    return {name: _summarize(row, taken) for name, taken in samples.items() if taken}


def _summarize(row: Row, samples: Sequence[Mapping[str, float]]) -> dict[str, float]:
    gigabytes = row.size * row.count / 1e9
    costs = sorted(sample["cpu_s"] / gigabytes for sample in samples)
    speeds = sorted(gigabytes * 1e3 / sample["wall_s"] for sample in samples)
    summary = {
        "cpu_s_per_gb": round(statistics.median(costs), 4),
        "cpu_s_per_gb_least": round(costs[0], 4),
        "cpu_s_per_gb_most": round(costs[-1], 4),
        "mb_s": round(statistics.median(speeds)),
        "mb_s_least": round(speeds[0]),
        "mb_s_most": round(speeds[-1]),
    }
    if row.small:
        summary["cpu_ms_per_request"] = round(statistics.median(costs) * row.size / 1e6, 4)
        summary["wall_ms_per_request"] = round(row.size / 1e3 / statistics.median(speeds), 4)
    return summary


def cost(result: Mapping[str, float]) -> float:
    """What the goal is about: CPU ms per request where requests are small, else CPU-s per GB."""
    return result.get("cpu_ms_per_request", result["cpu_s_per_gb"])


def report(row: Row, found: Mapping[str, Any]) -> None:
    unit = "CPU ms/request" if row.small else "CPU-s/GB"
    print(f"\n{row.name}, {found['server']}; goal {row.goal} {unit}\n{'':14}{unit:>16}{'least-most':>18}{'MB/s':>8}")
    scale = row.size / 1e6 if row.small else 1.0
    for name, result in found["clients"].items():
        spread = f"{result['cpu_s_per_gb_least'] * scale:.3f}-{result['cpu_s_per_gb_most'] * scale:.3f}"
        print(f"{name:14}{cost(result):16.3f}{spread:>18}{result['mb_s']:8}", flush=True)
