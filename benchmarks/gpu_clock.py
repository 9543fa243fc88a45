"""How long work takes on a device: between two events in its queue, or on the host's clock where there is none."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import count
from statistics import median

import torch

ROUNDS, WARM_UP, WARM_UP_SECONDS = 7, 2, 0.03


def seconds(
    work: Callable[[], object],
    device: torch.device,
    rounds: int = ROUNDS,
    prepare: Callable[[], object] | None = None,
) -> float:
    """The median of `rounds`, after some that do not count. What `work` queues elsewhere it must itself wait for.

    `prepare` comes before each and is not counted.
    """
    if device.type == "cuda":
        end = time.perf_counter() + WARM_UP_SECONDS
        for number in count():
            if number >= WARM_UP and time.perf_counter() > end:
                break
            _once(work, device, prepare)
    return median(_once(work, device, prepare) for _ in range(rounds if device.type == "cuda" else 1))


def _once(work: Callable[[], object], device: torch.device, prepare: Callable[[], object] | None) -> float:
    if prepare is not None:
        prepare()
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


def wake(device: torch.device) -> None:
    """Half a second of work, so that a GPU that rested has the clocks that it keeps, and libraries are loaded."""
    if device.type != "cuda":
        return
    matrix = torch.randn(4096, 4096, device=device).bfloat16()
    end = time.perf_counter() + 0.5
    while time.perf_counter() < end:
        for _ in range(16):
            matrix @ matrix
        torch.cuda.synchronize(device)
