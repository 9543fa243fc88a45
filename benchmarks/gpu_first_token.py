"""Time to the first token of an 8B-shaped model on a GPU: computed, and from the file store, NVMe and host memory.

    python benchmarks/gpu_first_token.py [--name gpu-h100] [--seconds 300] [--directory DIR] [--plain]
    python benchmarks/gpu_first_token.py --emulation LIBRARY [--results DIR]

The model is transformers' Llama behind the connector for it or, with `--plain` or where there is no transformers, a
plain one in torch. Its weights are random and so are the prompts, whose KV hardly compresses: the bits it takes are
printed. Time runs from the token ids on the host to the first token there: lookup, reads, copies, decoding, and the
forward of the 32 tokens that a hit computes. Beside it *in place*: that forward alone on KV that the GPU already has,
which no store can beat.

A hit's KV must be what was saved, bit for bit, and its logits those of the same forward on the KV that was computed.
(One pass over the whole prompt goes through other kernels, which round otherwise: whether its token is the same is
kept too.) Files are written below DIR, the store's and the NVMe tier's on one disk, and their pages dropped from the
system's cache before they are read; *disk* is how long plain reads of them take. Figures join results/<name>.json as
"first_token", each as it comes. A tier or a length that fails is kept as failed, with why, and the others go on; exit
code 1.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_journal import Journal
from gpu_machine import Budget, GpuLostError, find_machine
from gpu_models import LLAMA_8B, TINY, Engine, PlainEngine, Shape, open_engine
from gpu_prompt import Bench, Prompt
from gpu_watch import LOST, Sign, add_options, result_of, run_watched

from kvstore_s3.codec.device.decoder import SMALLEST_BUDGET, DeviceDecoder
from kvstore_s3.codec.device.library import Library

PART = "first_token"
SILENCE = 75.0
"""Seconds that a row may take: a prompt of 128K tokens is computed in some 15, and filling a tier takes as long."""
DIRECTORY = Path(__file__).parent.parent / "build" / "gpu"
LENGTHS, TINY_LENGTHS = (8192, 32768, 131072), (96, 160)
SHARE_STORED = 0.8
"""Of the KV's bytes: room that is asked for on disk and in memory before it is known what is needed."""
FIRST_PROMPT = "the model and a first prompt, whose figures are not kept"
"""Where that fails with transformers, whichever version there is, another process takes plain torch."""

Row = dict[str, Any]


class EngineError(Exception):
    """This engine does not do what is asked of it."""


class Prompts:
    """Of different lengths."""

    def __init__(self, bench: Bench) -> None:
        self._bench, self._journal, self._budget = bench, bench.journal, bench.budget

    def measure(self, lengths: Sequence[int]) -> None:
        """The shortest prompt first. Figures are printed and kept as they come; what there is no time or room for is
        named, and what fails is kept as failed. Raises `GpuLostError`.
        """
        chunk = self._bench.shape.chunk_tokens
        first = max(lengths[0] // 2 // chunk, 2) * chunk
        fine = len(self._journal.failed)
        self._journal.begin(FIRST_PROMPT)
        self._measure(FIRST_PROMPT, first, lambda row: None)
        if len(self._journal.failed) > fine and not isinstance(self._bench.engine, PlainEngine):
            raise EngineError("the first prompt failed; plain torch is tried instead")
        self._journal.end()
        spent, before = 0.0, 0
        for tokens in lengths:
            what = f"first token after {tokens} tokens"
            expected = spent * (tokens / before) ** 1.2 if before else 0.0
            if not self._journal.begin(what) or not self._budget.allows(what, expected):
                continue
            if self.has_room(what, tokens):
                begin = time.monotonic()
                self._measure(what, tokens, self._keep)
                spent, before = time.monotonic() - begin, tokens
            self._journal.end()

    def _measure(self, what: str, tokens: int, keep: Callable[[Row], None]) -> None:
        """Libraries load their kernels with the first."""
        with self._bench.attempt(what), tempfile.TemporaryDirectory(dir=self._bench.directory) as folder:
            Prompt(self._bench, tokens, Path(folder)).measure(keep)

    def _keep(self, row: Row) -> None:
        self._journal.add("rows", row)
        print_row(row)

    def has_room(self, what: str, tokens: int) -> bool:
        stored = SHARE_STORED * tokens * self._bench.shape.token_bytes
        disk, memory = shutil.disk_usage(self._bench.directory).free, available_memory()
        if disk < 2.2 * stored:
            self._budget.leave_out(
                what, f"{2.2 * stored / 1e9:.0f} GB of files have no room below {self._bench.directory}"
            )
        elif memory < 1.3 * stored:
            self._budget.leave_out(what, f"{1.3 * stored / 1e9:.0f} GB have no room in the host's memory")
        return disk >= 2.2 * stored and memory >= 1.3 * stored


def available_memory() -> int:
    """Bytes of the host's memory that can be had, the system's cache of files among them."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def print_row(row: Row) -> None:
    if row["what"] in ("saved", "disk"):
        bits = f", {row['bits_per_value']:.2f} bits a value" if "bits_per_value" in row else ""
        line = f"{row['stored_gb']:.2f} GB, {row['stored_gb'] / row['milliseconds'] * 1e3:.2f} GB/s{bits}"
    elif "read_gb_s" in row:
        line = f"computing takes {row['computed_by_it']:.1f} times as long; {row['read_gb_s']:.2f} GB/s read"
    else:
        line = f"{len(row['rounds_ms'])} rounds"
    print(f"{row['tokens']:7} tokens, {row['what']:9}{row['milliseconds']:10.1f} ms  {line}", flush=True)


def measure(bench: Bench, lengths: Sequence[int]) -> int:
    """All figures. The exit code."""
    print(f"{bench.shape.name}-shaped model of random weights, {bench.engine.name}, files below {bench.directory}")
    bench.journal.document.setdefault("rows", [])
    Prompts(bench).measure(lengths)
    bench.journal.close()
    for failed in bench.journal.failed:
        print(f"FAILED: {failed['what']}: {failed['why']}")
    return 1 if bench.journal.failed else 0


def describe(engine: Engine, shape: Shape) -> dict[str, Any]:
    return {"model": f"{shape.name}, random weights", "engine": engine.name}


def emulate(path: Path, journal: Journal, *, plain: bool, directory: Path, seconds: float = 600) -> int:
    """All of it on the host, with a tiny model."""
    host = torch.device("cpu")
    with DeviceDecoder(Library(path.resolve(), emulated=True), host, SMALLEST_BUDGET) as decoder:
        engine = open_engine(TINY, host, decoder, plain=plain)
        journal.document |= describe(engine, TINY)
        budget = Budget(seconds, journal.left_out)
        return measure(Bench(engine, TINY, host, decoder, directory, budget, journal), TINY_LENGTHS)


def run_here(options: argparse.Namespace) -> int:
    """All of it in this process, with files below `options.directory`."""
    sign = Sign(options.sign) if options.sign is not None else None

    def open_journal(path: Path | None) -> Journal:
        return Journal(path, {}, part=PART, resume=options.resume, on_sign=sign)

    if options.emulation:
        journal = open_journal(result_of(options) if options.results else None)
        plain, seconds = options.plain, options.seconds
        return emulate(options.emulation, journal, plain=plain, directory=options.directory, seconds=seconds)
    begin = time.monotonic()
    machine = find_machine(options.name)
    if machine is None:
        return 2
    journal = open_journal(result_of(options))
    journal.begin(FIRST_PROMPT)
    plain = options.plain or any(failed["what"] == FIRST_PROMPT for failed in journal.failed)
    engine = open_engine(LLAMA_8B, machine.device, machine.device, plain=plain)
    journal.document |= {"gpu": machine.gpu, **describe(engine, LLAMA_8B)}
    budget = Budget(options.seconds - (time.monotonic() - begin), journal.left_out)
    bench = Bench(engine, LLAMA_8B, machine.device, machine.device, options.directory, budget, journal)
    try:
        return measure(bench, LENGTHS)
    except (GpuLostError, EngineError) as error:
        print(f"this process cannot go on: {error}", flush=True)
        if isinstance(error, EngineError):
            journal.fail(FIRST_PROMPT, str(error))
        journal.end()
        os._exit(LOST)  # what would be freed now would fail, and might not return


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument(
        "--directory", type=Path, default=DIRECTORY, help="where files are written (default: build/gpu)"
    )
    parser.add_argument("--plain", action="store_true", help="the model in plain torch")
    options = parser.parse_args()
    if options.sign is not None:
        for left in options.directory.iterdir():  # by a process that is gone
            shutil.rmtree(left)
        return run_here(options)
    options.directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        options.directory = Path(folder)
        if options.emulation and not options.results:
            return run_here(options)
        more = ["--directory", folder, *(["--plain"] if options.plain else [])]
        return run_watched(options, [__file__, *more], part=PART, silence=SILENCE)


if __name__ == "__main__":
    sys.exit(main())
