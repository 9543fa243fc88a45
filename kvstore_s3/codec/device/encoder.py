"""Encoding out of a device's memory: kernels gather and code there, compressed bytes come to the host.

Two threads take turns, each with a stream and staging memory of its own: what one has coded travels while the other's
kernels run. They wait by events for their own stream alone. Whoever owns the memory is told nothing before all that
reads it has ended, unless he takes it back: see `Source.revoke`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Self, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from kvstore_s3.codec.device.batch import NOT_RUN
from kvstore_s3.codec.device.library import LOSSLESS_ENCODE_JOB, Library, Pages
from kvstore_s3.codec.device.pieces import Target, round_up
from kvstore_s3.codec.device.sources import EncodeSection, Readable, Source
from kvstore_s3.codec.device.streams import Mark, Streams, open_streams
from kvstore_s3.codec.lossless import MAX_HEAD_BYTES
from kvstore_s3.errors import DeviceError, InvalidArgumentError, StoreUnavailableError

T = TypeVar("T")

SLOTS = 2
"""Batches under way at once: one is coded, and one is on its way to the host."""
CONTROL_BYTES = 1 << 17
"""Of each slot, for jobs, their lengths, planes and block tables: of 2,000 heads, say."""
SMALLEST_BUDGET = SLOTS * 2 * CONTROL_BYTES

_FAILURES = (RuntimeError, AssertionError, MemoryError)
"""What torch raises: AssertionError where it was built without CUDA."""


@dataclass(frozen=True, slots=True)
class _Room:
    """What a section takes of a slot's data: its payload, and as many scratches as it has heads."""

    payload: int
    scratch: int
    heads: int

    @property
    def bytes(self) -> int:
        return self.payload + self.heads * self.scratch


class _Slot:
    """Staging memory of one batch, from torch's allocator, and as much on the host for what comes back."""

    def __init__(self, device: torch.device, data_bytes: int) -> None:
        self.streams = open_streams(device)
        pin = self.streams.pin
        with self.streams.decoding():
            self.control = torch.empty(CONTROL_BYTES, dtype=torch.uint8, pin_memory=pin)
            self.memory = torch.empty(CONTROL_BYTES + data_bytes, dtype=torch.uint8, device=device)
            self.fetched = torch.empty(data_bytes, dtype=torch.uint8, pin_memory=pin)

    @property
    def address(self) -> int:
        return self.memory.data_ptr()

    def fetch(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Bytes of the data, as (offset, length), once the stream has come here."""
        views = []
        at = 0
        with self.streams.decoding():
            for begin, length in ranges:
                view = self.fetched[at : at + length]
                view.copy_(self.memory[CONTROL_BYTES + begin : CONTROL_BYTES + begin + length], non_blocking=True)
                views.append(view)
                at += length
        self.streams.mark_decoded().synchronize()
        return [view.numpy().tobytes() for view in views]


class DeviceEncoder:
    """Encodes sections that lie on `device`, within `budget_bytes` of its memory. For several threads. To be closed.

    `library` None: nothing is encoded here, but fetched. `device` may be the host, for the emulated library.
    Raises `InvalidArgumentError` for a budget below `SMALLEST_BUDGET`.
    """

    def __init__(self, library: Library | None, device: torch.device, budget_bytes: int) -> None:
        if budget_bytes < SMALLEST_BUDGET:
            raise InvalidArgumentError(f"{budget_bytes} bytes are too few to encode in; give {SMALLEST_BUDGET}")
        self.device = device
        self._library = library
        self._data_bytes = (budget_bytes // SLOTS - CONTROL_BYTES) // 16 * 16
        self._threads = ThreadPoolExecutor(SLOTS, "kvstore-s3-device-encode")
        self._slots: SimpleQueue[_Slot | None] = SimpleQueue()
        self._streams: Streams | None = None
        self._lock = threading.Lock()
        for _ in range(SLOTS):
            self._slots.put(None)  # a place for one that was not needed yet

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Wait for what has begun, and let the memory go; what has not is cancelled. Safe to call twice."""
        self._threads.shutdown(cancel_futures=True)
        self._slots = SimpleQueue()

    def mark_current(self) -> Mark | None:
        """A mark in the calling thread's queue: what it computed is there from then on. Raises `DeviceError`."""
        try:
            return self._open().mark_current()
        except _FAILURES as error:
            raise _failed(error, "an event") from error

    def takes(self, memory: Readable, section: EncodeSection) -> bool:
        """Whether kernels encode such a section of `memory`."""
        if self._library is None or memory.dtype != torch.bfloat16 or not self._library.has("kvs_lossless_encode"):
            return False
        heads, dim = memory.shape[3:]
        if 4 * section.layers * dim * section.tokens >= MAX_HEAD_BYTES:
            return False
        needed = heads * (LOSSLESS_ENCODE_JOB.itemsize + 4) + memory.target().control_bytes + 64
        return needed <= CONTROL_BYTES and self._room(section, heads, dim).bytes <= self._data_bytes

    def encode(
        self, source: Source, memory: Readable, sections: Sequence[EncodeSection]
    ) -> list[Future[list[bytes | None]]]:
        """Payloads of codec 1 of `sections`, all of which it `takes`, in batches; None where raw is no longer.

        The bytes are those of the CPU's encoder. When a future is done, nothing of its batch reads the memory any more;
        it may raise `DeviceError`. Raises `StoreUnavailableError` once closed.
        """
        target = memory.target()
        return [self._submit(self._encode, source, memory, target, batch) for batch in self._cut(memory, sections)]

    def fetch(self, source: Source, memory: Readable, out: torch.Tensor) -> Future[None]:
        """Copy values to `out`, contiguous and of `memory`'s shape, on the host; see `encode`."""
        return self._submit(self._fetch, source, memory, out)

    def hold_back(self, sources: Sequence[Source]) -> None:
        """Take the memory of `sources` back, for what the calling thread queues from now on. Raises `DeviceError`."""
        marks = [mark for source in sources for mark in source.revoke()]
        try:
            for mark in marks:
                self._open().hold_current(mark)
        except _FAILURES as error:
            raise _failed(error, "an event") from error

    def staging(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Memory of the host to fetch values to, page-locked where there is a GPU."""
        try:
            return torch.empty(tuple(shape), dtype=dtype, pin_memory=self.device.type == "cuda")
        except _FAILURES as error:
            raise _failed(error, "page-locked memory for values") from error

    def _open(self) -> Streams:
        with self._lock:
            if self._streams is None:
                self._streams = open_streams(self.device)
            return self._streams

    def _submit(self, work: Callable[..., T], *arguments: Any) -> Future[T]:
        try:
            return self._threads.submit(work, *arguments)
        except RuntimeError as error:
            raise StoreUnavailableError("the store was closed; open it again") from error

    def _cut(self, memory: Readable, sections: Sequence[EncodeSection]) -> list[list[EncodeSection]]:
        """Batches that fit into a slot, in order."""
        heads, dim = memory.shape[3:]
        most_jobs = (CONTROL_BYTES - 64 - memory.target().control_bytes) // (LOSSLESS_ENCODE_JOB.itemsize + 4)
        batches: list[list[EncodeSection]] = []
        data = jobs = 0
        for section in sections:
            size = self._room(section, heads, dim).bytes
            if not batches or data + size > self._data_bytes or jobs + heads > most_jobs:
                batches.append([])
                data = jobs = 0
            batches[-1].append(section)
            data += size
            jobs += heads
        return batches

    def _room(self, section: EncodeSection, heads: int, dim: int) -> _Room:
        assert self._library is not None
        components = 2 * section.layers * dim
        scratch = self._library.lossless_encode_scratch(components, section.tokens)
        return _Room(round_up(heads * (8 + 2 * components * section.tokens)), round_up(scratch), heads)

    def _encode(
        self, source: Source, memory: Readable, target: Target, sections: Sequence[EncodeSection]
    ) -> list[bytes | None]:
        """One batch, in a thread. `memory` owns what `target` names."""
        heads, dim = memory.shape[3:]
        rooms = [self._room(section, heads, dim) for section in sections]
        with self._slot() as slot:
            begins = np.cumsum([0, *(room.bytes for room in rooms)]).tolist()
            jobs = _make_jobs(sections, rooms, begins, slot.address + CONTROL_BYTES)
            lengths = self._launch(slot, source, target, jobs)
            sizes = (4 * heads + lengths.reshape(len(sections), heads).sum(axis=1)).tolist()
            raw = [4 * section.layers * heads * dim * section.tokens for section in sections]
            wanted = [index for index, size in enumerate(sizes) if size < raw[index]]
            payloads: list[bytes | None] = [None] * len(sections)
            for index, data in zip(wanted, slot.fetch([(begins[i], sizes[i]) for i in wanted]), strict=True):
                payloads[index] = data
        return payloads

    def _launch(self, slot: _Slot, source: Source, target: Target, jobs: npt.NDArray[np.void]) -> npt.NDArray[np.int64]:
        """Run the kernels on `jobs`; the length of each stream."""
        assert self._library is not None
        blocks = np.zeros(0, np.uint32) if target.blocks is None else target.blocks
        places = []
        at = 0
        control = slot.control.numpy()
        for array in (jobs, target.planes, blocks, np.full(len(jobs), NOT_RUN, np.uint32)):
            data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            control[at : at + len(data)] = data
            places.append(at)
            at = round_up(at + len(data))
        form = target.form
        pages = Pages(
            slot.address + places[1],
            slot.address + places[2] if form.block_tokens else 0,
            form.block_tokens,
            form.dim,
            form.block_stride,
            form.token_stride,
            form.head_stride,
        )
        part = slice(places[3], places[3] + 4 * len(jobs))
        with source.reading(slot.streams), slot.streams.decoding():
            slot.memory[:at].copy_(slot.control[:at], non_blocking=True)
            self._library.lossless_encode(
                slot.address, len(jobs), pages, slot.address + places[3], slot.streams.decode_handle
            )
            slot.control[part].copy_(slot.memory[part], non_blocking=True)
        slot.streams.mark_decoded().synchronize()
        lengths = control[part].view(np.uint32).astype(np.int64)
        if (lengths == NOT_RUN).any():
            raise DeviceError("a kernel has not come to a head; the GPU or its driver failed")
        return lengths

    def _fetch(self, source: Source, memory: Readable, out: torch.Tensor) -> None:
        with self._slot() as slot:
            with slot.streams.decoding():
                gathered = torch.empty(memory.shape, dtype=memory.dtype, device=self.device)
            with source.reading(slot.streams), slot.streams.decoding():
                memory.gather(gathered)
                out.copy_(gathered, non_blocking=True)
            slot.streams.mark_decoded().synchronize()

    @contextmanager
    def _slot(self) -> Iterator[_Slot]:
        """One slot of those that are free. Nothing is under way in it when it is given back."""
        slots, slot = self._slots, self._slots.get()
        try:
            slot = slot or _Slot(self.device, self._data_bytes)
            yield slot
        except _FAILURES as error:
            raise _failed(error, "encoding") from error
        finally:
            if slot is not None:
                with suppress(*_FAILURES):
                    slot.streams.settle()
            slots.put(slot)


def _make_jobs(
    sections: Sequence[EncodeSection], rooms: Sequence[_Room], begins: Sequence[int], data: int
) -> npt.NDArray[np.void]:
    """`LOSSLESS_ENCODE_JOB` for each head of each section; `data` is the address of the slot's data."""
    heads = rooms[0].heads
    jobs = np.zeros((len(sections), heads), LOSSLESS_ENCODE_JOB)
    for row, section, room, begin in zip(jobs, sections, rooms, begins, strict=False):
        row["payload"] = data + begin
        scratch = np.uint64(data + begin + room.payload)
        row["scratch"] = scratch + np.arange(heads, dtype=np.uint64) * np.uint64(room.scratch)
        row["tokens"], row["token_begin"] = section.tokens, section.token_begin
        row["layers"], row["layer_begin"] = section.layers, section.layer_begin
    jobs["kinds"], jobs["heads"] = 2, heads
    jobs["head"] = jobs["index"] = np.arange(heads)
    return jobs.reshape(-1)


def _failed(error: Exception, what: str) -> DeviceError:
    return DeviceError(f"the device failed at {what}: {str(error).partition(chr(10))[0]}")
