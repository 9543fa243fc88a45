"""What decoding costs an engine that computes beside it, by the share of the multiprocessors that it may fill.

The engine's step is the matrix products of some layers of an 8B model, for 64 tokens (a step of answers: bound by
memory) and for 2,048 (a prefill: bound by tensor cores). It runs on one stream while another decodes without a pause.
The share is that of `Settings.device_share`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from gpu_cases import Model, PagedCache, Sections
from gpu_clock import current_stream, seconds
from gpu_compare import check_row
from gpu_decoding import LosslessDecoding
from torch.nn import functional

from kvstore_s3.codec.device.library import Library
from kvstore_s3.devices import allowed_multiprocessors

SHARES = (1.0, 0.5, 0.25, 0.1)
STEP_TOKENS, TINY_STEP_TOKENS = (64, 2048), (8,)
CHUNKS, TINY_CHUNKS = 16, 1
WINDOW = 0.05
"""Seconds of steps that are timed beside decoding."""
PRODUCTS = ((4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096))
"""Columns and rows of a layer's weights: queries, keys and values; the output; gate and up; down."""
TINY_PRODUCTS = ((32, 48), (48, 32))
LAYERS = 4

Row = dict[str, Any]


class Step:
    """The products of `LAYERS` layers for so many tokens, with weights of their own: 1.7 GB of an 8B model."""

    def __init__(self, tokens: int, products: tuple[tuple[int, int], ...], device: torch.device) -> None:
        def draw(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0, 0.02)

        self._weights = [draw(rows, columns) for _ in range(LAYERS) for columns, rows in products]
        self._inputs = {columns: draw(tokens, columns) for columns, _ in products}

    def run(self) -> None:
        for weights in self._weights:
            functional.linear(self._inputs[weights.shape[1]], weights)


@dataclass(frozen=True)
class Beside:
    """Seconds of a step, and decodings that ended in so many seconds of steps."""

    step: float
    decodings: int
    window: float


def measure_share(library: Library, sections: Sections, device: torch.device, tokens: int, share: float) -> Row:
    """Raises `AssertionError` where what was decoded meanwhile is wrong."""
    on_gpu = device.type == "cuda"
    chunks = CHUNKS if on_gpu else TINY_CHUNKS
    case = LosslessDecoding(library, sections, chunks, PagedCache(sections.model, chunks, device), device)
    step = Step(tokens, PRODUCTS if on_gpu else TINY_PRODUCTS, device)
    case.spoil()
    alone = seconds(step.run, device)
    most = limit_to(library, device, share)
    try:
        decoding = seconds(lambda: case.run(current_stream(device)), device)
        beside = run_beside(case, step, alone, decoding, device)
    finally:
        library.limit_multiprocessors(0)
    return check_row(describe(sections.model, chunks, tokens, share, most, alone, decoding, beside), case.check)


def limit_to(library: Library, device: torch.device, share: float) -> int:
    """As a store does for `device_share`; the number of multiprocessors that are left to it."""
    there = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
    allowed = allowed_multiprocessors(there, share)
    library.limit_multiprocessors(allowed)
    return allowed or there


def run_beside(case: LosslessDecoding, step: Step, alone: float, decoding: float, device: torch.device) -> Beside:
    """Steps while another stream decodes all the time. Queued longer where that ended first."""
    if device.type != "cuda":
        case.run(0)
        return Beside(seconds(step.run, device), 1, decoding)
    steps = max(1, ceil(WINDOW / alone))
    queued = ceil(2 * steps * alone / decoding) + 2
    for _ in range(4):
        found = _run_beside(case, step, steps, queued, device)
        if found is not None:
            return found
        queued *= 2
    raise AssertionError("decoding ended before the steps beside it, however much was queued")


def _run_beside(case: LosslessDecoding, step: Step, steps: int, queued: int, device: torch.device) -> Beside | None:
    def event() -> Any:
        return torch.cuda.Event(enable_timing=True)

    other = torch.cuda.Stream(device)
    torch.cuda.synchronize(device)
    ends = []
    for _ in range(queued):
        case.run(other.cuda_stream)
        ends.append(event())
        ends[-1].record(other)
    first, last = event(), event()
    first.record()
    for _ in range(steps):
        step.run()
    last.record()
    torch.cuda.synchronize(device)
    window = first.elapsed_time(last) / 1e3
    done = [first.elapsed_time(end) / 1e3 for end in ends]
    if done[-1] < window:
        return None
    return Beside(window / steps, sum(0 <= end <= window for end in done), window)


def describe(
    model: Model, chunks: int, tokens: int, share: float, most: int, alone: float, decoding: float, beside: Beside
) -> Row:
    size = chunks * model.chunk_bytes
    return {
        "model": model.name,
        "step_tokens": tokens,
        "share": share,
        "multiprocessors": most,
        "step_ms_alone": alone * 1e3,
        "step_ms_beside": beside.step * 1e3,
        "slowdown": beside.step / alone,
        "decode_gb_s_alone": size / decoding / 1e9,
        "decode_gb_s_beside": beside.decodings * size / beside.window / 1e9,
    }
