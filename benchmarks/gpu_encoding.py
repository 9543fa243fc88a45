"""Encoding from an engine's blocks on a GPU: all heads of some chunks, by one call of the plans that saves make."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from gpu_cases import Model, PagedCache, Sections

from kvstore_s3.codec.base import Bits
from kvstore_s3.codec.device.encode_plans import EncodePlan
from kvstore_s3.codec.device.library import Library
from kvstore_s3.codec.device.lossless_encode_jobs import plan_lossless
from kvstore_s3.codec.device.pieces import round_up


class Encoding:
    """All sections of `chunks` chunks. `plans` are those of the first chunk's, one for each layer group.

    `values` [sections][group, 2, tokens, heads, dim] are taken in turn.
    """

    def __init__(
        self,
        model: Model,
        plans: Sequence[EncodePlan],
        values: Sequence[Bits],
        chunks: int,
        cache: PagedCache,
        device: torch.device,
    ) -> None:
        self._model, self._plans, self._cache, self.chunks = model, plans, cache, chunks
        self._values = values
        _fill(cache, model, values, chunks, device)
        self._room = round_up(max(plan.payload_bytes for plan in plans))
        scratch = round_up(max(plan.scratch_bytes for plan in plans))
        self._payloads = torch.empty(len(plans) * chunks * self._room, dtype=torch.uint8, device=device)
        self._scratch = torch.empty(len(plans) * chunks * scratch, dtype=torch.uint8, device=device)
        self._inputs = [[_put(array, device) for array in (plan.header, *plan.angles)] for plan in plans]
        jobs = []
        for group, (plan, inputs) in enumerate(zip(plans, self._inputs, strict=True)):
            header, *angles = (tensor.data_ptr() for tensor in inputs)
            for chunk in range(chunks):
                number = group * chunks + chunk
                payload = self._payloads.data_ptr() + number * self._room
                placed = plan.place(payload, self._scratch.data_ptr() + number * scratch, header, angles)
                placed["token_begin"] = chunk * model.tokens
                jobs.append(placed)
        self._streams = len(jobs[0])
        self._jobs = np.concatenate(jobs)
        self._queue = _put(self._jobs, device)
        self._lengths = torch.zeros(len(self._jobs) * plans[0].work.lengths, dtype=torch.int32, device=device)

    @property
    def bytes_in(self) -> int:
        return self.chunks * self._model.chunk_bytes

    @property
    def bits_per_value(self) -> float:
        """Of all payloads, once encoded."""
        return 8 * int(self._lengths.long().sum()) / (self.bytes_in / 2)

    def run(self, stream: int) -> None:
        work, at = self._plans[0].work, self._queue.data_ptr()
        work.launch(self._jobs, self._cache.pages, at=at, lengths=self._lengths.data_ptr(), stream=stream)

    def read(self, chunk: int, group: int) -> tuple[int, list[bytes]]:
        """Which of the values a section has, and the payloads of its levels."""
        number, plan = group * self.chunks + chunk, self._plans[group]
        rows = self._lengths.cpu().numpy().view(np.uint32).reshape(-1, self._streams, plan.work.lengths)
        sizes = self.sizes_of(plan, rows[number])
        begin = number * self._room
        payload = self._payloads[begin : begin + sum(sizes)].cpu().numpy().tobytes()
        ends = np.cumsum(sizes).tolist()
        found = [payload[end - size : end] for size, end in zip(sizes, ends, strict=True)]
        return (chunk * self._model.groups + group) % len(self._values), found

    def sizes_of(self, plan: EncodePlan, lengths: np.ndarray) -> Sequence[int]:
        """Bytes of each level of a section, from the lengths that the device gave."""
        sizes = plan.level_sizes(lengths)
        assert sizes is not None, "raw would be no longer"
        return sizes

    def read_ends(self) -> list[tuple[int, list[bytes]]]:
        """As `read`, the first section and the last."""
        return [self.read(0, 0), self.read(self.chunks - 1, self._model.groups - 1)]


class LosslessEncoding(Encoding):
    """By the lossless codec."""

    def __init__(
        self, library: Library, sections: Sections, chunks: int, cache: PagedCache, device: torch.device
    ) -> None:
        model, plans = sections.model, []
        shape = (model.layers, 2, model.tokens, model.heads, model.dim)
        for begin in range(0, model.layers, model.group):
            layers, tokens = (begin, begin + model.group), (0, model.tokens)
            plan = plan_lossless(library, shape, "bfloat16", layers=layers, tokens=tokens)
            assert plan is not None
            plans.append(plan)
        super().__init__(model, plans, sections.values, chunks, cache, device)
        self._expected = sections.payloads

    @staticmethod
    def bytes_needed(sections: Sections, chunks: int) -> int:
        """Device memory: the cache, payloads with room for the worst, and scratch as large."""
        return 3 * chunks * sections.model.chunk_bytes + chunks * sections.model.chunk_bytes // 8

    def check(self) -> None:
        """The first and the last payload are the CPU's, byte for byte. Raises `AssertionError`."""
        for which, levels in self.read_ends():
            assert levels == [self._expected[which]], f"values {which} were coded otherwise"


def _fill(cache: PagedCache, model: Model, sections: Sequence[Bits], chunks: int, device: torch.device) -> None:
    values = [torch.from_numpy(value.view(np.int16)).view(torch.bfloat16).to(device) for value in sections]
    for group in range(model.groups):
        for chunk in range(chunks):
            cache.write(model, chunk, group, values[(chunk * model.groups + group) % len(values)])


def _put(array: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(array.tobytes(), np.uint8).copy()).to(device)
