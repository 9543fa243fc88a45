"""Time to the first token of an 8B-shaped model on a GPU: computed, and from the file store, NVMe and host memory.

    python benchmarks/gpu_first_token.py [--name gpu-h100] [--seconds 300] [--directory DIR] [--plain]
    python benchmarks/gpu_first_token.py --emulation LIBRARY

The model is transformers' Llama behind the connector for it or, with `--plain` or where there is no transformers, a
plain one in torch. Its weights are random and so are the prompts, whose KV hardly compresses: the bits it takes are
printed. Time runs from the token ids on the host to the first token there: lookup, reads, copies, decoding, and the
forward of the 32 tokens that a hit computes. Beside it *in place*: that forward alone on KV that the GPU already has,
which no store can beat.

A hit's KV must be what was saved, bit for bit, and its logits those of the same forward on the KV that was computed.
(One pass over the whole prompt goes through other kernels, which round otherwise: whether its token is the same is
kept too.) Files are written below DIR, the store's and the NVMe tier's on one disk, and their pages dropped from the
system's cache before they are read; *disk* is how long plain reads of them take. Figures join results/<name>.json as
"first_token".
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from gpu_machine import Budget, find_machine
from gpu_models import LLAMA_8B, TAIL, TINY, Answer, Engine, Shape, open_engine
from record import add_to_record

from kvstore_s3 import Namespace, Settings, connect
from kvstore_s3.codec.device.decoder import SMALLEST_BUDGET, DeviceDecoder
from kvstore_s3.codec.device.library import Library
from kvstore_s3.config import MiB
from kvstore_s3.device_load import Device
from kvstore_s3.device_save import DeviceKV, LayersMemory
from kvstore_s3.runtime import SyncKVStore

DIRECTORY = Path(__file__).parent.parent / "build" / "gpu"
LENGTHS, TINY_LENGTHS = (8192, 32768, 131072), (96, 160)
ROUNDS, PATIENCE = 3, 12.0
"""Times that a figure is taken, unless that takes longer than so many seconds: one at least."""
SHARE_STORED = 0.8
"""Of the KV's bytes: room that is asked for on disk and in memory before it is known what is needed."""
FILLED_AT_ONCE, PASSES = 4, 3
"""Chunks that a tier is filled with at a time, and how often what it did not take is offered again."""
READ_FROM = {"file": "store_read_bytes", "NVMe": "nvme_hit_bytes", "host": "host_hit_bytes"}
"""Row -> the counter of the bytes that it must read, and no other."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """`place` is where KV is decoded to: `device`, or a decoder into its memory."""

    engine: Engine
    shape: Shape
    device: torch.device
    place: Device
    directory: Path
    budget: Budget

    def rows(self, lengths: Sequence[int]) -> Iterator[Row]:
        """The shortest prompt first; what there is no time or room for is named."""
        chunk = self.shape.chunk_tokens
        for _ in self._measure(max(lengths[0] // 2 // chunk, 2) * chunk):
            pass  # libraries load their kernels
        spent, before = 0.0, 0
        for tokens in lengths:
            what = f"first token after {tokens} tokens"
            expected = spent * (tokens / before) ** 1.2 if before else 0.0
            if not self.budget.allows(what, expected) or not self._has_room(what, tokens):
                continue
            begin = time.monotonic()
            try:
                yield from self._measure(tokens)
            except torch.OutOfMemoryError:
                self.budget.leave_out(what, "the GPU's memory does not hold it")
            spent, before = time.monotonic() - begin, tokens

    def _measure(self, tokens: int) -> Iterator[Row]:
        with tempfile.TemporaryDirectory(dir=self.directory) as folder:
            yield from Prompt(self, tokens, Path(folder)).rows()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _has_room(self, what: str, tokens: int) -> bool:
        stored = SHARE_STORED * tokens * self.shape.token_bytes
        disk, memory = shutil.disk_usage(self.directory).free, available_memory()
        if disk < 2.2 * stored:
            self.budget.leave_out(what, f"{2.2 * stored / 1e9:.0f} GB of files have no room below {self.directory}")
        elif memory < 1.3 * stored:
            self.budget.leave_out(what, f"{1.3 * stored / 1e9:.0f} GB have no room in the host's memory")
        return disk >= 2.2 * stored and memory >= 1.3 * stored


class Prompt:
    """One prompt of `tokens` tokens, a multiple of the chunk's, and its files in `folder`."""

    def __init__(self, bench: Bench, tokens: int, folder: Path) -> None:
        self._bench, self._engine, self._folder, self._tokens = bench, bench.engine, folder, tokens
        generator = torch.Generator().manual_seed(tokens)
        self._prompt = torch.randint(0, bench.shape.vocabulary, (tokens,), generator=generator)
        self._loaded = tokens - TAIL
        self._stored = 0

    def rows(self) -> Iterator[Row]:
        """Computed, saved, in place, and from each tier. Raises `AssertionError` where a hit is not what was saved."""
        times, answer = self._repeat(lambda: self._engine.compute(self._prompt))
        computed, token = median(times), int(answer.logits.argmax())
        yield self._row("computed", times)
        yield self._save(answer.kv)
        expected = fingerprint(self._engine.memory(answer.kv, self._loaded))
        times, logits = self._finish_in_place(answer.kv)
        del answer
        yield self._row("in place", times, computed=computed, same_token_as_one_pass=int(logits.argmax()) == token)
        self._drop_pages()
        yield self._row("disk", [read_files(self._folder)], stored_gb=self._stored / 1e9)
        for what, settings in self._tiers().items():
            yield self._hits(what, settings, computed, expected, logits)

    def _finish_in_place(self, kv: Any) -> tuple[list[float], torch.Tensor]:
        kv = self._engine.finish(self._prompt, kv, self._loaded).kv

        def finish() -> Answer:
            nonlocal kv
            answer = self._engine.finish(self._prompt, kv, self._loaded)
            kv = answer.kv
            return answer

        times, answer = self._repeat(finish)
        return times, answer.logits

    def _save(self, kv: Any) -> Row:
        memory = self._engine.memory(kv, self._tokens)
        assert memory.alike, "kernels cannot read KV whose layers lie differently"
        with self._open({}) as store:
            encoder = store.kv.encoder_for(self._bench.place)
            assert encoder is not None
            begin = time.perf_counter()
            self._stored = store.save(self._prompt, DeviceKV.of_layers(memory, encoder)).bytes
            seconds = time.perf_counter() - begin
        size = self._tokens * self._bench.shape.token_bytes
        return {
            "tokens": self._tokens,
            "what": "saved",
            "milliseconds": seconds * 1e3,
            "bf16_gb": size / 1e9,
            "stored_gb": self._stored / 1e9,
            "bits_per_value": 16 * self._stored / size,
        }

    def _tiers(self) -> dict[str, dict[str, Any]]:
        room = self._stored * 5 // 4 + 16 * MiB
        return {
            "file": {},
            "NVMe": {"nvme_tier_dir": self._folder / "nvme", "nvme_tier_bytes": room},
            "host": {"host_tier_bytes": room},
        }

    def _hits(
        self, what: str, settings: dict[str, Any], computed: float, expected: list[int], logits: torch.Tensor
    ) -> Row:
        if what == "NVMe":
            with self._open(settings) as store:
                self._fill(store)
        with self._open(settings) as store:
            if what == "host":
                self._fill(store)
            read = self._engine.reader(store)
            read(self._prompt)  # its buffers are there from now on
            before = store.kv.counters.snapshot()
            times, answer = self._repeat(lambda: read(self._prompt), self._drop_pages)
            after = store.kv.counters.snapshot()
        assert answer.loaded == self._loaded, f"{answer.loaded} of {self._loaded} tokens were loaded from {what}"
        found = fingerprint(self._engine.memory(answer.kv, self._loaded))
        assert found == expected, f"what came from {what} is not what was saved"
        distance = float((answer.logits - logits).abs().max())
        assert distance == 0, f"logits of a hit from {what} are {distance} off those on the KV that was computed"
        moved = {name: after.get(name, 0) - before.get(name, 0) for name in READ_FROM.values()}
        others = {name: size for name, size in moved.items() if size and name != READ_FROM[what]}
        assert not others, f"{what} was to be read, but {others} came from elsewhere"
        size = moved[READ_FROM[what]] / len(times)
        return self._row(what, times, computed=computed, read_gb=size / 1e9, read_gb_s=size / median(times) / 1e9)

    def _fill(self, store: SyncKVStore) -> None:
        """Read until a tier has all of it. It is offered what was read unless slabs are short: thus a few at once."""
        hit = store.lookup(self._prompt)
        for _ in range(PASSES):
            parts = [hit.chunks[first : first + FILLED_AT_ONCE] for first in range(0, len(hit.chunks), FILLED_AT_ONCE)]
            missing = [part for part in parts if not store.kv.is_near(store.kv.make_hit(part))]
            if not missing:
                return
            for part in missing:
                begin = part[0].first_token
                whole = hit.cut(begin + len(part) * hit.chunk_tokens)
                for _ in store.stream(whole, first_token=begin, device=self._bench.place):
                    pass
                store.runtime.run(store.kv._loader.settle())
        raise AssertionError("the tier does not keep what was read")

    def _open(self, settings: dict[str, Any]) -> Any:
        shape = self._bench.shape
        namespace = Namespace(model=shape.name, revision="random", layout=shape.layout, chunk_tokens=shape.chunk_tokens)
        given = Settings(chunk_tokens=shape.chunk_tokens, verdict_lifetime_s=1e-3, **settings)
        return connect((self._folder / "store").as_uri(), namespace, given)

    def _drop_pages(self) -> None:
        for path in find_files(self._folder):
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def _repeat(
        self, work: Callable[[], Answer], prepare: Callable[[], None] | None = None
    ) -> tuple[list[float], Answer]:
        """Seconds of each time, from a GPU at rest to the logits on the host; and the last answer."""
        times: list[float] = []
        answer: Answer | None = None
        while answer is None or (len(times) < ROUNDS and sum(times) + times[-1] < PATIENCE):
            answer = None  # its memory is for the next
            if prepare is not None:
                prepare()
            if self._bench.device.type == "cuda":
                torch.cuda.synchronize(self._bench.device)
            begin = time.perf_counter()
            answer = work()
            times.append(time.perf_counter() - begin)
        return times, answer

    def _row(self, what: str, times: Sequence[float], *, computed: float | None = None, **more: object) -> Row:
        row: Row = {"tokens": self._tokens, "what": what, "milliseconds": median(times) * 1e3}
        row |= {"rounds_ms": [seconds * 1e3 for seconds in times]}
        if computed is not None:
            row |= {"loaded_tokens": self._loaded, "computed_by_it": computed / median(times)}
        return row | more


def available_memory() -> int:
    """Bytes of the host's memory that can be had, the system's cache of files among them."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def find_files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def read_files(folder: Path) -> float:
    """Seconds for all files of a folder, as many at once as a store reads, a store's range at a time."""
    settings = Settings()

    def read(path: Path) -> None:
        buffer = bytearray(settings.range_bytes)
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass

    begin = time.perf_counter()
    with ThreadPoolExecutor(settings.download_concurrency) as threads:
        list(threads.map(read, find_files(folder)))
    return time.perf_counter() - begin


def fingerprint(memory: LayersMemory) -> list[int]:
    """For each layer's K and V a sum of all bits, weighted by place, modulo 2^64: where these are equal, KV is."""
    sums = []
    for half in (half for layer in memory.layers for half in layer):
        bits = half.reshape(half.shape[0], -1).view(torch.int16).long()
        by_column = torch.arange(1, bits.shape[1] + 1, device=bits.device) * 0x9E3779B97F4A7C1
        by_row = torch.arange(1, bits.shape[0] + 1, device=bits.device) * 0x2545F4914F6CDD1D
        sums.append(((bits * by_column).sum(1) * by_row).sum())
    return [int(one) for one in torch.stack(sums)]


def print_row(row: Row) -> None:
    if row["what"] in ("saved", "disk"):
        bits = f", {row['bits_per_value']:.2f} bits a value" if "bits_per_value" in row else ""
        line = f"{row['stored_gb']:.2f} GB, {row['stored_gb'] / row['milliseconds'] * 1e3:.2f} GB/s{bits}"
    elif "read_gb_s" in row:
        line = f"computing takes {row['computed_by_it']:.1f} times as long; {row['read_gb_s']:.2f} GB/s read"
    else:
        line = f"{len(row['rounds_ms'])} rounds"
    print(f"{row['tokens']:7} tokens, {row['what']:9}{row['milliseconds']:10.1f} ms  {line}", flush=True)


def describe(bench: Bench, rows: Sequence[Row]) -> dict[str, Any]:
    return {
        "model": f"{bench.shape.name}, random weights",
        "engine": bench.engine.name,
        "rows": list(rows),
        "left_out": bench.budget.left_out,
    }


def measure(bench: Bench, lengths: Sequence[int], keep: Callable[[dict[str, Any]], None]) -> None:
    """Figures are printed and kept as they come: nothing is lost where the time ends."""
    print(f"{bench.shape.name}-shaped model of random weights, {bench.engine.name}, files below {bench.directory}")
    rows: list[Row] = []
    for row in bench.rows(lengths):
        rows.append(row)
        print_row(row)
        keep(describe(bench, rows))
    keep(describe(bench, rows))


def emulate(path: Path, *, plain: bool, directory: Path) -> dict[str, Any]:
    """All of it on the host, with a tiny model."""
    host, kept = torch.device("cpu"), {}
    with DeviceDecoder(Library(path.resolve(), emulated=True), host, SMALLEST_BUDGET) as decoder:
        engine = open_engine(TINY, host, decoder, plain=plain)
        measure(Bench(engine, TINY, host, decoder, directory, Budget(600)), TINY_LENGTHS, kept.update)
    return kept


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", help="of the result that the figures join (default: gpu-<device>)")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument(
        "--directory", type=Path, default=DIRECTORY, help="where files are written (default: build/gpu)"
    )
    parser.add_argument("--plain", action="store_true", help="the model in plain torch")
    parser.add_argument("--emulation", type=Path, metavar="LIBRARY")
    options = parser.parse_args()
    budget = Budget(options.seconds)
    options.directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        if options.emulation:
            emulate(options.emulation, plain=options.plain, directory=Path(folder))
            return 0
        machine = find_machine(options.name)
        if machine is None:
            return 2
        engine = open_engine(LLAMA_8B, machine.device, machine.device, plain=options.plain)
        bench = Bench(engine, LLAMA_8B, machine.device, machine.device, Path(folder), budget)
        measure(bench, LENGTHS, lambda found: add_to_record(machine.name, {"gpu": machine.gpu, "first_token": found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
