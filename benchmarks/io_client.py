"""One client under measurement in a process of its own, kept on one core: rounds are asked for on stdin as JSON.

{"work": "get", "count": 32, "size": 8388608, "connections": 8}  ->  {"cpu_s": ..., "wall_s": ...}
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from importlib import import_module
from typing import Any

import numpy as np
from io_servers import OBJECT_BYTES, choose_cores
from peers.base import Client, Job, make_buffers

CLIENTS = {
    "kvstore_s3": ("peers.ours", "direct"),
    "aiobotocore": ("peers.with_aiobotocore", "Aiobotocore"),
    "obstore": ("peers.with_obstore", "Obstore"),
    "minio SDK": ("peers.with_minio", "MinioSdk"),
    "awscrt": ("peers.with_awscrt", "Awscrt"),
    "boto3": ("peers.with_boto3", "Boto3"),
    "curl": ("peers.with_curl", "Curl"),
}


def main() -> None:
    os.sched_setaffinity(0, {choose_cores()[0]})
    client = open_client(sys.argv[1], Job(**json.loads(sys.argv[2])))
    print(json.dumps({"ready": True}), flush=True)
    buffers: dict[tuple[int, int], list[memoryview]] = {}
    for line in sys.stdin:
        print(json.dumps(measure(client, buffers, **json.loads(line))), flush=True)
    client.close()


def open_client(name: str, job: Job) -> Client:
    module, what = CLIENTS[name]
    try:
        client: Client = getattr(import_module(module), what)(job)
    except ImportError as error:
        raise SystemExit(f"{name}: skipped, {error}") from error
    return client


def measure(
    client: Client,
    buffers: dict[tuple[int, int], list[memoryview]],
    *,
    work: str,
    count: int,
    size: int,
    connections: int,
) -> dict[str, Any]:
    """One round: `count` requests of `size` bytes, `connections` at once."""
    place = (connections, size)
    if place not in buffers:
        buffers[place] = make_buffers(*place)
    into = buffers[place]
    who = resource.RUSAGE_CHILDREN if getattr(client, "in_children", False) else resource.RUSAGE_SELF
    starts = [index * size % OBJECT_BYTES for index in range(count)]
    keys = [f"bench/sink/{index}" for index in range(count)]
    for buffer in into:
        buffer[:8] = b"\xff" * 8
    before, began = _cpu_s(who), time.perf_counter()
    if work == "get":
        client.get(starts, into)
    else:
        client.put(keys, into[0], connections)
    found = {"cpu_s": _cpu_s(who) - before, "wall_s": time.perf_counter() - began}
    if work == "get" and who == resource.RUSAGE_SELF:
        _check(into)
    return found


def _cpu_s(who: int) -> float:
    usage = resource.getrusage(who)
    return usage.ru_utime + usage.ru_stime


def _check(buffers: list[memoryview]) -> None:
    """Whether each buffer holds a range of the object, whose words count."""
    for buffer in buffers:
        words = np.frombuffer(buffer, "<u8")
        assert words[0] % (len(buffer) // 8) == 0
        assert np.array_equal(words, np.arange(words[0], words[0] + len(words), dtype="<u8"))


if __name__ == "__main__":
    main()
