"""How long work takes on a device: between two events in its queue, or on the host's clock where there is none."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

ROUNDS, WARM_UP = 7, 2


def seconds(work: Callable[[], object], device: torch.device, rounds: int = ROUNDS) -> float:
    """The median of `rounds`, after some that do not count. What `work` queues elsewhere it must itself wait for."""
    for _ in range(WARM_UP if device.type == "cuda" else 0):
        work()
    return median(_once(work, device) for _ in range(rounds if device.type == "cuda" else 1))


def _once(work: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        begin = time.perf_counter()
        work()
        return time.perf_counter() - begin
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    first.record()
    work()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3


def current_stream(device: torch.device) -> int:
    """The queue that `seconds` times, as a cudaStream_t."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
