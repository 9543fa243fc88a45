"""Encoding from an engine's blocks on a GPU: all heads of some chunks, by one call of the plans that saves make."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from gpu_cases import Model, PagedCache, Sections, pick
from gpu_compare import ExpectedPayloads, split, tell_wrong

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
        self._values, self._device, self._all = values, device, range(chunks)
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
    def bits_per_value(self) -> float:
        """Of all payloads, once encoded."""
        return 8 * int(self._lengths.long().sum()) / (self.chunks * self._model.chunk_bytes / 2)

    def run(self, stream: int) -> None:
        work, at = self._plans[0].work, self._queue.data_ptr()
        work.launch(self._jobs, self._cache.pages, at=at, lengths=self._lengths.data_ptr(), stream=stream)

    def spoil(self) -> None:
        """Forget what was coded."""
        self._payloads.fill_(0xA5)
        self._lengths.fill_(-1)

    def check(self) -> None:
        """Every payload is what it must be. Raises `AssertionError`."""
        groups = len(self._plans)
        picks = [pick(self._model, len(self._values), chunk, group) for group in range(groups) for chunk in self._all]
        sizes = self._read_sizes()
        first = {which: number for number, which in reversed(list(enumerate(picks)))}
        with ThreadPoolExecutor() as threads:
            found = threads.map(
                lambda which: self.expected(which, self._read(first[which], sizes[first[which]])), first
            )
            known = dict(zip(first, found, strict=True))
        payloads = ExpectedPayloads([b"".join(known.get(which, [])) for which in range(max(known) + 1)], self._device)
        wrong = payloads.find_wrong(self._payloads.view(len(picks), self._room), picks)
        other = [size != [len(level) for level in known[which]] for size, which in zip(sizes, picks, strict=True)]
        tell_wrong((wrong | np.array(other)).reshape(groups, self.chunks))

    def expected(self, which: int, found: list[bytes]) -> Sequence[bytes]:
        """The payloads of the levels of these values; `found` are the first of them that came out."""
        raise NotImplementedError

    def _read_sizes(self) -> list[list[int]]:
        """Of the levels of each section."""
        rows = self._lengths.cpu().numpy().view(np.uint32)
        rows = rows.reshape(len(self._plans), self.chunks, self._streams, self._plans[0].work.lengths)
        found = []
        for group, (plan, mine) in enumerate(zip(self._plans, rows, strict=True)):
            for chunk, lengths in enumerate(mine):
                sizes = self.sizes_of(plan, lengths)
                sound = sizes is not None and sum(sizes) <= self._room
                assert sound, f"chunk {chunk}, layer group {group} has no lengths, or they are too large"
                found.append(list(sizes or ()))
        return found

    def _read(self, number: int, sizes: Sequence[int]) -> list[bytes]:
        begin = number * self._room
        payload = self._payloads[begin : begin + sum(sizes)].cpu().numpy().tobytes()
        ends = np.cumsum(sizes).tolist()
        return [payload[end - size : end] for size, end in zip(sizes, ends, strict=True)]

    def sizes_of(self, plan: EncodePlan, lengths: np.ndarray) -> Sequence[int] | None:
        """Bytes of each level of a section, from the lengths that the device gave; None: raw would be no longer."""
        return plan.level_sizes(lengths)


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
    def bytes_needed(model: Model, chunks: int) -> int:
        """Device memory: the cache, payloads with room for the worst, and scratch as large."""
        return 3 * chunks * model.chunk_bytes + chunks * model.chunk_bytes // 8

    def expected(self, which: int, found: list[bytes]) -> Sequence[bytes]:
        """The CPU's."""
        return [self._expected[which]]


def _fill(cache: PagedCache, model: Model, sections: Sequence[Bits], chunks: int, device: torch.device) -> None:
    values = torch.from_numpy(np.stack(sections).view(np.int16)).view(torch.bfloat16).to(device)
    for group in range(model.groups):
        for part in split(chunks, 2 * sections[0].size):
            picks = [pick(model, len(sections), chunk, group) for chunk in part]
            cache.put(group, part, values[torch.tensor(picks, device=device)])


def _put(array: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(array.tobytes(), np.uint8).copy()).to(device)
