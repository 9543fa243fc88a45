"""From pinned memory to blocks: layer group by layer group, copies on one stream and decoding on another.

Beside it, in the same run, the copy of the same compressed bytes alone: what an ideal overlap would take.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gpu_cases import PagedCache, Sections
from gpu_clock import seconds
from gpu_compare import Expected, check_faults, check_row
from gpu_decoding import place_streams

from kvstore_s3.codec.device.library import LOSSLESS_JOB, Library


class OverlappedPath:
    """The sections of `chunks` chunks in a pinned slab, group after group, and as much room on the device."""

    def __init__(self, sections: Sections, chunks: int, device: torch.device) -> None:
        model = sections.model
        self._model, self._chunks, self._device = model, chunks, device
        self.cache = PagedCache(model, chunks, device)
        order = [[sections.pick(chunk, group) for chunk in range(chunks)] for group in range(model.groups)]
        sizes = [(len(payload) + 15) // 16 * 16 for payload in sections.payloads]
        bounds = np.cumsum([0, *(sum(sizes[one] for one in picks) for picks in order)])
        self._bounds = [int(bound) for bound in bounds]
        self._slab = torch.zeros(self._bounds[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._staged = torch.empty(self._bounds[-1], dtype=torch.uint8, device=device)
        jobs = np.zeros((model.groups, chunks, model.heads), LOSSLESS_JOB)
        jobs["tokens"], jobs["layers"], jobs["kinds"] = model.tokens, model.group, 2
        jobs["head"] = np.arange(model.heads)
        place = 0
        for group, picks in enumerate(order):
            for chunk, one in enumerate(picks):
                payload = sections.payloads[one]
                self._slab[place : place + len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
                mine = jobs[group, chunk]
                place_streams(mine, payload)
                mine["stream"] += np.uint64(self._staged.data_ptr() + place)
                mine["token_begin"], mine["layer_begin"] = chunk * model.tokens, group * model.group
                place += sizes[one]
        self._expected = Expected(sections.values)
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._group_jobs = chunks * model.heads
        self._jobs = torch.from_numpy(jobs.reshape(-1).view(np.uint8)).to(device)
        self.faults = torch.full((jobs.size,), -1, dtype=torch.int32, device=device)

    @property
    def bytes_in(self) -> int:
        return self._bounds[-1]

    @property
    def bytes_out(self) -> int:
        return self._chunks * self._model.chunk_bytes

    def copy_group(self, group: int) -> None:
        part = slice(self._bounds[group], self._bounds[group + 1])
        self._staged[part].copy_(self._slab[part], non_blocking=True)

    def copy_all(self) -> None:
        for group in range(self._model.groups):
            self.copy_group(group)

    def decode_group(self, library: Library, group: int, stream: int) -> None:
        first = group * self._group_jobs
        jobs = self._jobs.data_ptr() + first * LOSSLESS_JOB.itemsize
        library.lossless_decode(jobs, self._group_jobs, self.cache.pages, self.faults[first:].data_ptr(), stream)

    def spoil(self) -> None:
        """Forget what was copied and decoded."""
        self.cache.spoil()
        self._staged.zero_()
        self.faults.fill_(-1)

    def check(self) -> None:
        """Every head decoded, and every section came out as it went in. Raises `AssertionError`."""
        check_faults(self.faults, "heads")
        self._expected.check(self.cache, self._model, self._chunks)

    def run(self, library: Library) -> None:
        """Copies run ahead on a stream of their own; the current stream decodes each group when it has come."""
        if self._copies is None:
            for group in range(self._model.groups):
                self.copy_group(group)
                self.decode_group(library, group, 0)
            return
        current, copies = torch.cuda.current_stream(self._device), self._copies
        copies.wait_stream(current)
        for group in range(self._model.groups):
            with torch.cuda.stream(copies):
                self.copy_group(group)
            current.wait_event(copies.record_event())
            self.decode_group(library, group, current.cuda_stream)


def measure_path(library: Library, sections: Sections, chunks: int, device: torch.device) -> dict[str, Any]:
    """`share_of_copy` is the copy's time by that of the whole; 1 would be decoding hidden altogether."""
    path = OverlappedPath(sections, chunks, device)
    copy = seconds(path.copy_all, device)
    whole = seconds(lambda: path.run(library), device, prepare=path.spoil)
    row = {
        "chunks": chunks,
        "milliseconds": whole * 1e3,
        "compressed_gb_s": path.bytes_in / whole / 1e9,
        "bf16_gb_s": path.bytes_out / whole / 1e9,
        "copy_alone_gb_s": path.bytes_in / copy / 1e9,
        "share_of_copy": copy / whole,
    }
    return check_row(row, path.check)
