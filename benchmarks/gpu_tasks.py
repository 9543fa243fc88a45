"""What the GPU benchmark measures, one task for each row, in the order of their importance: whenever it is ended, the
rows that matter most are there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from gpu_cases import Model, PagedCache, Sections
from gpu_clock import current_stream, seconds
from gpu_compare import check_row
from gpu_decoding import LosslessDecoding
from gpu_encoding import LosslessEncoding
from gpu_limits import measure_copies, measure_scatter
from gpu_machine import describe_load
from gpu_path import measure_path
from gpu_product import Stored, measure_product
from gpu_scalable import LossyDecoding, LossySections, draw_lossy
from gpu_scalable_encoding import LossyEncoding
from gpu_share import CHUNKS as SHARE_CHUNKS
from gpu_share import SHARES, measure_share

from kvstore_s3.codec.device.decoder import DeviceDecoder
from kvstore_s3.codec.device.library import Library

MAIN = 64
"""Chunks at once that the figures to reach are stated for."""
RANK = (MAIN, 16, 256, 1, 512, 4)
"""Numbers of chunks, the most telling first."""
PATH_CHUNKS = (MAIN, 16)
DISTINCT, DISTINCT_LOSSY = 23, 7
"""Different sections: 62 MB of lossless streams, more than a GPU's cache holds. No factor in common with the numbers of
layer groups, so that neighbours of a section are other ones."""
DISTINCT_TINY = 3
PROFILES = {"near-lossless": 3, "balanced": 2, "small": 1}
"""Profile -> levels that are read, and here written (saves write three, but of values that were computed from fewer).
Calibrated, with a transform of 4 layers; and without one, "uncalibrated"."""

VERBS = ("decode", "encode")

Row = dict[str, Any]


class Case(Protocol):
    """Coding of all sections of some chunks, one way or the other."""

    @property
    def bits_per_value(self) -> float: ...

    def spoil(self) -> None:
        """Forget what came out."""

    def run(self, stream: int) -> None: ...

    def check(self) -> None:
        """Raises `AssertionError` where anything that came out is wrong."""


@dataclass(frozen=True)
class Task:
    """One row of the list `name`, or an object there that it joins (`whole`); "": it prepares what others need.

    `needed` are bytes of the GPU's memory. Tasks of one `pace` take as long as they have `size`.
    """

    what: str
    name: str
    run: Callable[[], Row]
    needed: float = 0.0
    whole: bool = False
    pace: str = ""
    size: float = 0.0


@dataclass(frozen=True)
class Where:
    """A device and its library. `budgets` are those of decoders, by name; `step_tokens` those of an engine's steps."""

    library: Library
    device: torch.device
    budgets: dict[str, int]
    step_tokens: Sequence[int]
    copy_bytes: int


class Tasks:
    """Of `models`, whose sections have one shape and are the same, and of `counts` of chunks."""

    def __init__(self, where: Where, models: Sequence[Model], counts: Sequence[int]) -> None:
        self._where, self._models = where, models
        ranked = [chunks for chunks in RANK if chunks in counts]
        self._main, *self._others = [*ranked, *(chunks for chunks in counts if chunks not in ranked)]
        self._paths = [chunks for chunks in PATH_CHUNKS if chunks in counts] or [self._main]
        self._tiny = where.device.type != "cuda"
        self._lossless: Sections | None = None
        self._lossy: dict[bool, LossySections] = {}

    def __iter__(self) -> Iterator[Task]:
        first = self._models[0]
        copied = self._where.copy_bytes
        yield Task("copies", "limits", lambda: measure_copies(self._where.device, copied), 3 * copied, whole=True)
        for model in self._models:
            yield from self._important(model)
            if model is first:
                yield self._scatter(model)
                yield from self._beside(model)
                yield Task("clocks under load", "gpu", lambda: describe_load(self._where.device), 2**31, whole=True)
            yield from self._codec(model, ("balanced", "small", "uncalibrated"), self._main)
        for chunks in self._others:
            for model in self._models:
                yield from self._codec(model, ("lossless", "near-lossless"), chunks)
        for chunks in self._others:
            for model in self._models:
                yield from self._codec(model, ("balanced", "small", "uncalibrated"), chunks)

    def _important(self, model: Model) -> Iterator[Task]:
        if model is self._models[0]:
            yield Task("values for lossless", "", self._draw_lossless)
        yield self._task(model, "lossless", "decode", self._main)
        for chunks in self._paths:
            yield self._path(model, chunks)
        yield from (self._product(model, "lossless", budget, self._main) for budget in self._where.budgets)
        if model is self._models[0]:
            yield Task("values for near-lossless", "", lambda: self._draw_lossy(True))
        yield self._task(model, "near-lossless", "decode", self._main)
        yield self._task(model, "lossless", "encode", self._main)
        yield self._task(model, "near-lossless", "encode", self._main)
        yield from (self._product(model, "near-lossless", budget, self._main) for budget in self._where.budgets)

    def _codec(self, model: Model, profiles: Sequence[str], chunks: int) -> Iterator[Task]:
        for profile in profiles:
            yield from (self._task(model, profile, verb, chunks) for verb in VERBS)

    def _task(self, model: Model, profile: str, verb: str, chunks: int) -> Task:
        decoding, lossless = verb == "decode", profile == "lossless"
        needed: float
        if decoding:
            needed = (LosslessDecoding if lossless else LossyDecoding).bytes_needed(model, chunks)
        elif lossless:
            needed = LosslessEncoding.bytes_needed(model, chunks)
        else:
            needed = LossyEncoding.bytes_needed(model, chunks, calibrated=profile != "uncalibrated")
        return Task(
            f"{profile} {verb}, {model.name}, {chunks} chunks",
            "codec",
            lambda: self._measure(model, profile, verb, chunks),
            needed=needed,
            pace=f"{profile} {verb}",
            size=chunks * model.chunk_bytes,
        )

    def _measure(self, model: Model, profile: str, verb: str, chunks: int) -> Row:
        device = self._where.device
        case = self._open(model, profile, verb, chunks)
        took = seconds(lambda: case.run(current_stream(device)), device, prepare=case.spoil)
        row = describe(model, profile, verb, chunks, took, case.bits_per_value)
        if isinstance(case, LossyDecoding):
            row["host_parse_ms"] = case.host_seconds * 1e3
        return check_row(row, case.check)

    def _open(self, model: Model, profile: str, verb: str, chunks: int) -> Case:
        library, device = self._where.library, self._where.device
        cache, decoding = PagedCache(model, chunks, device), verb == "decode"
        if profile == "lossless":
            make = LosslessDecoding if decoding else LosslessEncoding
            return make(library, self._find_lossless(model), chunks, cache, device)
        sections = self._find_lossy(model, profile)
        levels = PROFILES.get(profile, 3)
        return (LossyDecoding if decoding else LossyEncoding)(library, sections, levels, chunks, cache, device)

    def _path(self, model: Model, chunks: int) -> Task:
        def run() -> Row:
            found = measure_path(self._where.library, self._find_lossless(model), chunks, self._where.device)
            return {"model": model.name, **found}

        what = f"slab to block, {model.name}, {chunks} chunks"
        return Task(what, "slab_to_block", run, needed=1.8 * chunks * model.chunk_bytes)

    def _product(self, model: Model, profile: str, budget: str, chunks: int) -> Task:
        size = self._where.budgets[budget]

        def run() -> Row:
            stored: Stored = self._find_lossless(model)
            if profile != "lossless":
                stored = self._find_lossy(model, profile)
            with DeviceDecoder(self._where.library, self._where.device, size) as decoder:
                found = measure_product(decoder, stored, chunks)
            return {"model": model.name, "profile": profile, "device_buffer_bytes": size, **found}

        what = f"the product's path, {profile}, {model.name}, {chunks} chunks, device_buffer_bytes {budget}"
        return Task(what, "product_path", run, needed=chunks * model.chunk_bytes + size + 2**30)

    def _scatter(self, model: Model) -> Task:
        needed = 1.6 * self._main * model.chunk_bytes
        return Task(
            "dequantise and scatter",
            "limits",
            lambda: {"scatter_gb_s_out": measure_scatter(model, self._main, self._where.device)},
            needed,
            whole=True,
        )

    def _beside(self, model: Model) -> Iterator[Task]:
        def task(tokens: int, share: float) -> Task:
            what = f"decoding on {share:.0%} of the multiprocessors beside a step of {tokens} tokens"
            where = self._where
            return Task(
                what,
                "beside_an_engine",
                lambda: measure_share(where.library, self._find_lossless(model), where.device, tokens, share),
                needed=2 * model.chunk_bytes * SHARE_CHUNKS + 2**31,
            )

        yield from (task(tokens, share) for tokens in self._where.step_tokens for share in SHARES)

    def _draw_lossless(self) -> Row:
        self._lossless = Sections.draw(self._models[0], DISTINCT_TINY if self._tiny else DISTINCT)
        return {}

    def _draw_lossy(self, calibrated: bool) -> Row:
        count = DISTINCT_TINY if self._tiny else DISTINCT_LOSSY
        self._lossy[calibrated] = draw_lossy(self._models[0], count, calibrated=calibrated)
        return {}

    def _find_lossless(self, model: Model) -> Sections:
        if self._lossless is None:
            self._draw_lossless()
        assert self._lossless is not None
        return replace(self._lossless, model=model)

    def _find_lossy(self, model: Model, profile: str) -> LossySections:
        calibrated = profile != "uncalibrated"
        if calibrated not in self._lossy:
            self._draw_lossy(calibrated)
        return replace(self._lossy[calibrated], model=model)


def describe(model: Model, profile: str, verb: str, chunks: int, took: float, bits: float) -> Row:
    speed = chunks * model.chunk_bytes / took / 1e9
    return {
        "model": model.name,
        "profile": profile,
        "verb": verb,
        "chunks": chunks,
        "milliseconds": took * 1e3,
        "bf16_gb_s": speed,
        "compressed_gb_s": speed * bits / 16,
        "least_moved_gb_s": speed * (1 + bits / 16),
        "bits_per_value": bits,
        "sections_compared": chunks * model.groups,
    }
