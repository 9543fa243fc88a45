"""Decoding and encoding on a GPU: GB/s of bf16 by profile and number of chunks, beside what limits them.

    python benchmarks/gpu_bench.py [--name gpu-h100] [--seconds 300]
    python benchmarks/gpu_bench.py --emulation LIBRARY

The layouts are those of an 8B (32 layers, 8 KV heads of 128) and a 70B model (80 layers); chunks have 256 tokens,
sections 4 layers, and values go to blocks of 16 tokens in no order. What came out is compared with what went in.
Beside it the limits, decoding beside an engine's step (gpu_share.py), and each kernel's occupancy by its registers and
shared memory. Time to the first token is gpu_first_token.py's. With `--emulation` a tiny case runs on the host, which
proves the benchmark and measures nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_cases import MODELS, TINY, LosslessDecoding, Model, PagedCache, Sections
from gpu_clock import current_stream, seconds
from gpu_encoding import LosslessEncoding
from gpu_limits import measure_limits
from gpu_machine import Budget, find_machine
from gpu_occupancy import describe_occupancy, print_occupancy
from gpu_path import measure_path
from gpu_scalable import LossyDecoding, LossySections, draw_lossy
from gpu_scalable_encoding import LossyEncoding
from gpu_share import CHUNKS as SHARE_CHUNKS
from gpu_share import measure_share, print_share
from record import record

from kvstore_s3.codec.device.library import Library

CHUNKS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
COPY_BYTES = 2**30
DISTINCT = {"8B": 16, "70B": 20, "tiny": 3}
"""Different sections of each layout: 85 MB of streams, more than a GPU's cache holds."""
PATH_CHUNKS = (16, 64)
LOSSY_CHUNKS = (1, 16, 64, 256)
DISTINCT_LOSSY = 4
PROFILES = {"near-lossless": 3, "balanced": 2, "small": 1}
"""Profile -> levels that are read, and here written (saves write three, but of values that were computed from fewer).
Calibrated, with a transform of 4 layers; and without one, "uncalibrated"."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    library: Library
    device: torch.device
    budget: Budget

    def allows(self, what: str, needed: float) -> bool:
        """Whether there is time for it, and memory for `needed` bytes with a tenth left over; says so where not."""
        if not self.budget.allows(what):
            return False
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            free, total = torch.cuda.mem_get_info(self.device)
            if needed + 1e9 > free - total / 10:
                self.budget.leave_out(what, "the GPU's memory does not hold it")
                return False
        return True

    def decode(self, sections: Sections, chunks: int) -> Row | None:
        model = sections.model
        if not self.allows(f"lossless decode, {model.name}, {chunks} chunks", chunks * model.chunk_bytes):
            return None
        case = LosslessDecoding(sections, chunks, PagedCache(model, chunks, self.device), self.device)
        took = seconds(lambda: case.run(self.library, current_stream(self.device)), self.device)
        case.check()
        return describe(model, "lossless", "decode", chunks, took, case.bytes_out, sections.bits_per_value)

    def encode(self, sections: Sections, chunks: int) -> Row | None:
        model = sections.model
        needed = LosslessEncoding.bytes_needed(sections, chunks)
        if not self.allows(f"lossless encode, {model.name}, {chunks} chunks", needed):
            return None
        cache = PagedCache(model, chunks, self.device)
        case = LosslessEncoding(self.library, sections, chunks, cache, self.device)
        took = seconds(lambda: case.run(current_stream(self.device)), self.device)
        case.check()
        return describe(model, "lossless", "encode", chunks, took, case.bytes_in, case.bits_per_value)

    def decode_lossy(self, profile: str, sections: LossySections, levels: int, chunks: int) -> Row | None:
        model = sections.model
        needed = LossyDecoding.bytes_needed(model, chunks)
        if not self.allows(f"{profile} decode, {model.name}, {chunks} chunks", needed):
            return None
        cache = PagedCache(model, chunks, self.device)
        case = LossyDecoding(self.library, sections, levels, chunks, cache, self.device)
        took = seconds(lambda: case.run(current_stream(self.device)), self.device)
        case.check()
        bits = sections.bits_per_value[levels - 1]
        row = describe(model, profile, "decode", chunks, took, case.bytes_out, bits)
        return {**row, "host_parse_ms": case.host_seconds * 1e3}

    def encode_lossy(self, profile: str, sections: LossySections, levels: int, chunks: int) -> Row | None:
        model = sections.model
        needed = LossyEncoding.bytes_needed(model, chunks)
        if not self.allows(f"{profile} encode, {model.name}, {chunks} chunks", needed):
            return None
        cache = PagedCache(model, chunks, self.device)
        case = LossyEncoding(self.library, sections, levels, chunks, cache, self.device)
        took = seconds(lambda: case.run(current_stream(self.device)), self.device)
        case.check()
        return describe(model, profile, "encode", chunks, took, case.bytes_in, case.bits_per_value)


def describe(model: Model, profile: str, verb: str, chunks: int, took: float, size: int, bits: float) -> Row:
    return {
        "model": model.name,
        "profile": profile,
        "verb": verb,
        "chunks": chunks,
        "milliseconds": took * 1e3,
        "bf16_gb_s": size / took / 1e9,
        "compressed_gb_s": size / took / 1e9 * bits / 16,
        "least_moved_gb_s": size / took / 1e9 * (1 + bits / 16),
        "bits_per_value": bits,
    }


def measure(
    bench: Bench, models: tuple[Model, ...], counts: tuple[int, ...], found: dict[str, Any] | None = None
) -> dict[str, Any]:
    """All figures, in `found` where it is given, as they come: what fails later leaves them there."""
    found = {} if found is None else found
    copied = COPY_BYTES if bench.device.type == "cuda" else 2**20
    limits = measure_limits(models[0], min(64, counts[-1]), bench.device, copied)
    print_limits(limits)
    found |= {"limits": limits, "codec": [], "slab_to_block": [], "beside_an_engine": []}
    for model in models:
        sections = Sections.draw(model, DISTINCT[model.name])
        if model is models[0] and bench.allows(
            "decoding beside an engine's step", 2 * model.chunk_bytes * SHARE_CHUNKS
        ):
            for share in measure_share(bench.library, sections, bench.device):
                print_share(share)
                found["beside_an_engine"].append(share)
        for row in measure_codec(bench, sections, counts):
            print_row(row, limits)
            found["codec"].append(row)
        for chunks in PATH_CHUNKS if bench.device.type == "cuda" else counts[:1]:
            if bench.allows(f"slab to block, {model.name}, {chunks} chunks", 1.8 * chunks * model.chunk_bytes):
                path = {"model": model.name, **measure_path(bench.library, sections, chunks, bench.device)}
                print_path(path)
                found["slab_to_block"].append(path)
    return found


def measure_codec(bench: Bench, sections: Sections, counts: tuple[int, ...]) -> Iterator[Row]:
    """Lossless at all counts; every lossy profile at those that show where it saturates."""
    for work in (bench.decode, bench.encode):
        yield from filter(None, (work(sections, chunks) for chunks in counts))
    few = [chunks for chunks in counts if chunks in LOSSY_CHUNKS]
    for calibrated, names in ((True, PROFILES), (False, {"uncalibrated": 3})):
        lossy = draw_lossy(sections.model, DISTINCT_LOSSY, calibrated=calibrated)
        for profile, levels in names.items():
            for lossy_work in (bench.decode_lossy, bench.encode_lossy):
                yield from filter(None, (lossy_work(profile, lossy, levels, chunks) for chunks in few))


def print_limits(limits: dict[str, Any]) -> None:
    shown = {name: f"{value:.1f}" if value is not None else "-" for name, value in limits.items()}
    print(f"limits, GB/s: {', '.join(f'{name} {value}' for name, value in shown.items())}")
    print(f"{'model':6}{'profile':16}{'verb':8}{'chunks':>7}{'ms':>10}{'GB/s bf16':>10}{'of scatter':>12}")


def print_row(row: dict[str, Any], limits: dict[str, Any]) -> None:
    scatter = limits["scatter_gb_s_out"]
    share = f"{row['bf16_gb_s'] / scatter:12.2f}" if scatter else f"{'-':>12}"
    print(
        f"{row['model']:6}{row['profile']:16}{row['verb']:8}{row['chunks']:7}{row['milliseconds']:10.3f}"
        f"{row['bf16_gb_s']:10.1f}{share}",
        flush=True,
    )


def print_path(path: dict[str, Any]) -> None:
    print(
        f"{path['model']}, {path['chunks']} chunks, slab to block: {path['compressed_gb_s']:.1f} GB/s compressed, "
        f"{path['bf16_gb_s']:.1f} of bf16; the copy alone {path['copy_alone_gb_s']:.1f}: "
        f"{path['share_of_copy']:.2f} of it",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", help="of the result (default: gpu-<device>)")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--emulation", type=Path, metavar="LIBRARY")
    options = parser.parse_args()
    budget = Budget(options.seconds)
    if options.emulation:
        library = Library(options.emulation.resolve(), emulated=True)
        measure(Bench(library, torch.device("cpu"), budget), (TINY,), (1, 2))
        return 0
    machine = find_machine(options.name)
    if machine is None:
        return 2
    bench = Bench(machine.library, machine.device, budget)
    kernels = describe_occupancy(machine.gpu["capability"])
    print_occupancy(kernels)
    found = {"gpu": machine.gpu, "occupancy": kernels}
    try:
        measure(bench, MODELS, CHUNKS, found)
    finally:
        record(machine.name, {**found, "left_out": budget.left_out}, "numpy", "torch")
    return 0


if __name__ == "__main__":
    sys.exit(main())
