"""Decoding and encoding on a GPU: GB/s of bf16 by profile and number of chunks, beside what limits them.

    python benchmarks/gpu_bench.py [--name gpu-h100] [--seconds 300]
    python benchmarks/gpu_bench.py --emulation LIBRARY [--results DIR]

The layouts are those of an 8B (32 layers, 8 KV heads of 128) and a 70B model (80 layers); chunks have 256 tokens,
sections 4 layers, and values go to blocks of 16 tokens in no order. All that came out is compared with what went in.
Beside it the limits, from slab to block, decoding beside an engine's step (gpu_share.py), and each kernel's occupancy
by its registers and shared memory. Time to the first token is gpu_first_token.py's.

Rows are kept as they come, the most important first. One that fails is kept as failed, with why, and the others go on;
exit code 1. With `--emulation` a tiny case runs on the host, which proves the benchmark and measures nothing.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from gpu_cases import MODELS, TINY
from gpu_clock import wake
from gpu_journal import Journal
from gpu_machine import Budget, GpuLostError, attempt, find_machine
from gpu_occupancy import describe_occupancy, print_occupancy
from gpu_product import BUDGETS
from gpu_share import STEP_TOKENS, TINY_STEP_TOKENS
from gpu_tasks import Task, Tasks, Where
from gpu_watch import LOST, Sign, add_options, result_of, run_watched

from kvstore_s3.codec.device.decoder import SMALLEST_BUDGET
from kvstore_s3.codec.device.library import Library

CHUNKS, TINY_CHUNKS = (1, 4, 16, 64, 256, 512), (1, 2)
COPY_BYTES = 2**30
LISTS = ("codec", "slab_to_block", "product_path", "beside_an_engine")
SILENCE = 40.0
"""Seconds that a task may take: the longest, 512 chunks of which each section is parsed, takes some five."""
Row = dict[str, Any]


class Bench:
    """Runs tasks on `device`, within `budget`, and keeps what they found."""

    def __init__(self, device: torch.device, budget: Budget, journal: Journal) -> None:
        self._device, self._budget, self._journal = device, budget, journal
        self._paces: dict[str, float] = {}

    def run(self, task: Task) -> None:
        """Measure and keep; leave out what there is no time or memory for. Raises `GpuLostError`."""
        if not self._journal.begin(task.what):
            return
        if self._allows(task):
            begin = time.monotonic()
            with attempt(task.what, self._journal, self._budget, self._device):
                self._keep(task, task.run())
            if task.size:
                self._paces[task.pace] = (time.monotonic() - begin) / task.size
        self._journal.end()

    def _keep(self, task: Task, row: Row) -> None:
        if task.name:
            (self._journal.put if task.whole else self._journal.add)(task.name, row)
            print_row(task.name, row, self._journal.document)

    def _allows(self, task: Task) -> bool:
        """Whether there is time for it, and memory with a tenth left over; says so where not."""
        if not self._budget.allows(task.what, self._paces.get(task.pace, 0.0) * task.size):
            return False
        if self._device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
            free, total = torch.cuda.mem_get_info(self._device)
            if task.needed + 1e9 > free - total / 10:
                why = f"it takes {task.needed / 1e9:.0f} GB of the GPU's memory, and {free / 1e9:.0f} are free"
                self._budget.leave_out(task.what, why)
                return False
        return True


def measure(bench: Bench, tasks: Iterable[Task], journal: Journal) -> int:
    """All figures. The exit code."""
    for name in LISTS:
        journal.document.setdefault(name, [])
    print(f"{'model':6}{'profile':16}{'verb':8}{'chunks':>7}{'ms':>10}{'GB/s bf16':>10}")
    for task in tasks:
        bench.run(task)
    journal.close()
    for failed in journal.failed:
        print(f"FAILED: {failed['what']}: {failed['why']}")
    return 1 if journal.failed else 0


def print_row(name: str, row: Row, document: Row) -> None:
    PRINTED[name](row, document)
    sys.stdout.flush()


def _print_limits(row: Row, _: Row) -> None:
    shown = {name: f"{value:.1f}" if value is not None else "-" for name, value in row.items()}
    print(f"limits, GB/s: {', '.join(f'{name} {value}' for name, value in shown.items())}")


def _print_codec(row: Row, document: Row) -> None:
    scatter = document.get("limits", {}).get("scatter_gb_s_out")
    share = f", {row['bf16_gb_s'] / scatter:.2f} of scatter" if scatter else ""
    print(
        f"{row['model']:6}{row['profile']:16}{row['verb']:8}{row['chunks']:7}{row['milliseconds']:10.3f}"
        f"{row['bf16_gb_s']:10.1f}{share}"
    )


def _print_path(row: Row, _: Row) -> None:
    how = f", the product's with {row['device_buffer_bytes'] >> 20} MiB" if "device_buffer_bytes" in row else ""
    print(
        f"{row['model']}, {row['chunks']} chunks, {row.get('profile', 'lossless')}, slab to block{how}: "
        f"{row['compressed_gb_s']:.1f} GB/s compressed, {row['bf16_gb_s']:.1f} of bf16; the copy alone "
        f"{row['copy_alone_gb_s']:.1f}: {row['share_of_copy']:.2f} of it"
    )


def _print_share(row: Row, _: Row) -> None:
    print(
        f"decoding on {row['share']:.0%} of the multiprocessors, a step of {row['step_tokens']} tokens: "
        f"{row['step_ms_alone']:.2f} ms alone, {row['slowdown']:.2f} times that beside it; decoding "
        f"{row['decode_gb_s_alone']:.0f} GB/s of bf16 alone, {row['decode_gb_s_beside']:.0f} beside"
    )


def _print_load(row: Row, _: Row) -> None:
    if row:
        print("under load: " + ", ".join(f"{name} {value}" for name, value in row.items()))


PRINTED: dict[str, Callable[[Row, Row], None]] = {
    "limits": _print_limits,
    "codec": _print_codec,
    "slab_to_block": _print_path,
    "product_path": _print_path,
    "beside_an_engine": _print_share,
    "gpu": _print_load,
    "occupancy": lambda row, _: print_occupancy(row),
}


def occupancy_task(capability: str) -> Task:
    return Task("occupancy", "occupancy", lambda: describe_occupancy(capability), whole=True)


def run_here(options: argparse.Namespace) -> int:
    """All of it in this process."""
    sign = Sign(options.sign) if options.sign is not None else None
    if options.emulation:
        library = Library(options.emulation.resolve(), emulated=True)
        where = Where(library, torch.device("cpu"), {"smallest": SMALLEST_BUDGET}, TINY_STEP_TOKENS, 2**20)
        path = result_of(options) if options.results else None
        journal = Journal(path, {}, resume=options.resume, on_sign=sign)
        bench = Bench(where.device, Budget(options.seconds, journal.left_out), journal)
        return measure(bench, Tasks(where, (TINY,), TINY_CHUNKS), journal)
    machine = find_machine(options.name)
    if machine is None:
        return 2
    journal = Journal(result_of(options), {"gpu": machine.gpu}, resume=options.resume, on_sign=sign)
    wake(machine.device)
    where = Where(machine.library, machine.device, BUDGETS, STEP_TOKENS, COPY_BYTES)
    bench = Bench(machine.device, Budget(options.seconds, journal.left_out), journal)
    try:
        tasks = Tasks(where, MODELS, CHUNKS)
        return measure(bench, [occupancy_task(machine.gpu["capability"]), *tasks], journal)
    except GpuLostError as error:
        print(f"the GPU is lost to this process: {error}", flush=True)
        journal.end()
        os._exit(LOST)  # what would be freed now would fail, and might not return


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    options = parser.parse_args()
    if options.sign is not None or (options.emulation and not options.results):
        return run_here(options)
    return run_watched(options, [__file__], part=None, silence=SILENCE)


if __name__ == "__main__":
    sys.exit(main())
