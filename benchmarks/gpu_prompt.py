"""One prompt: computed, saved, and answered from each tier; a hit must be what was saved."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from gpu_compare import check_row
from gpu_journal import Journal
from gpu_machine import Budget, attempt
from gpu_models import TAIL, Answer, Engine, Shape

from kvstore_s3 import Namespace, Settings, connect
from kvstore_s3.config import MiB
from kvstore_s3.device_load import Device
from kvstore_s3.device_save import DeviceKV, LayersMemory
from kvstore_s3.runtime import SyncKVStore

ROUNDS, PATIENCE = 3, 12.0
"""Times that a figure is taken, unless that takes longer than so many seconds: one at least."""
FILLED_AT_ONCE, PASSES = 4, 3
"""Chunks that a tier is filled with at a time, and how often what it did not take is offered again."""
READ_FROM = {"file": "store_read_bytes", "NVMe": "nvme_hit_bytes", "host": "host_hit_bytes"}
"""Row -> the counter of the bytes that it must read, and no other."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """`place` is where KV is decoded to: `device`, or a decoder into its memory. Files lie below `directory`."""

    engine: Engine
    shape: Shape
    device: torch.device
    place: Device
    directory: Path
    budget: Budget
    journal: Journal

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """As `gpu_machine.attempt`, of this benchmark."""
        with attempt(what, self.journal, self.budget, self.device):
            yield
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()


class Prompt:
    """One prompt of `tokens` tokens, a multiple of the chunk's, and its files in `folder`."""

    def __init__(self, bench: Bench, tokens: int, folder: Path) -> None:
        self._bench, self._engine, self._folder, self._tokens = bench, bench.engine, folder, tokens
        generator = torch.Generator().manual_seed(tokens)
        self._prompt = torch.randint(0, bench.shape.vocabulary, (tokens,), generator=generator)
        self._loaded = tokens - TAIL
        self._stored = 0

    def measure(self, keep: Callable[[Row], None]) -> None:
        """Computed, saved, in place, and from each tier. What fails of a tier is kept as failed; raises
        `AssertionError` for what all need.
        """
        times, answer = self._repeat(lambda: self._engine.compute(self._prompt))
        computed, token = median(times), int(answer.logits.argmax())
        keep(self._row("computed", times))
        keep(self._save(answer.kv))
        expected = fingerprint(self._engine.memory(answer.kv, self._loaded))
        times, logits = self._finish_in_place(answer.kv)
        del answer
        keep(self._row("in place", times, computed=computed, same_token_as_one_pass=int(logits.argmax()) == token))
        with self._bench.attempt(f"disk, {self._tokens} tokens"):
            self._drop_pages()
            keep(self._row("disk", [read_files(self._folder)], stored_gb=self._stored / 1e9))
        for what, settings in self._tiers().items():
            with self._bench.attempt(f"{what}, {self._tokens} tokens"):
                keep(self._hits(what, settings, computed, expected, logits))

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
        moved = {name: after.get(name, 0) - before.get(name, 0) for name in READ_FROM.values()}
        size = moved[READ_FROM[what]] / len(times)
        row = self._row(what, times, computed=computed, read_gb=size / 1e9, read_gb_s=size / median(times) / 1e9)

        def check() -> None:
            assert answer.loaded == self._loaded, f"{answer.loaded} of {self._loaded} tokens were loaded from {what}"
            found = fingerprint(self._engine.memory(answer.kv, self._loaded))
            assert found == expected, f"what came from {what} is not what was saved"
            distance = float((answer.logits - logits).abs().max())
            assert distance == 0, f"logits of a hit from {what} are {distance} off those on the KV that was computed"
            others = {name: size for name, size in moved.items() if size and name != READ_FROM[what]}
            assert not others, f"{what} was to be read, but {others} came from elsewhere"

        return check_row(row, check)

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
