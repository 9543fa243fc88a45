"""Decoding into a device's memory: compressed bytes go to it, kernels decode them where the values belong.

One thread queues: it takes all that waits, up to a slot of staging memory, copies it on the copy stream and launches
on the slot's decode stream, so that the more waits, the more is decoded at once. Another thread waits for what was
queued, by events, and tells whose it was. With several slots, bytes travel while others are decoded, side by side: a
batch alone has too few streams to fill a GPU. Nothing waits for the whole device, nor on the engine's streams.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Self

import numpy as np
import numpy.typing as npt
import torch

from kvstore_s3.codec.device.batch import CONTROL_BYTES, Slot, lay_out
from kvstore_s3.codec.device.library import Library
from kvstore_s3.codec.device.pieces import ALIGNMENT, Piece, Target
from kvstore_s3.codec.device.requests import Deed, OnQueued, Part, Request, Room, Waiting
from kvstore_s3.codec.device.scalable_calls import ScalableCalls
from kvstore_s3.codec.device.scalable_jobs import ScalablePlanner
from kvstore_s3.codec.device.streams import Mark, Streams, copy_in, name_fully, open_streams, use_device, working_on
from kvstore_s3.errors import (
    BitstreamFault,
    DamagedObjectError,
    DeviceError,
    InvalidArgumentError,
    KVStoreError,
)

log = logging.getLogger("kvstore_s3")

SLOTS = 4
"""Batches under way at once: one is copied, two or three are decoded, and one is being told of or queued."""
SMALLEST_BUDGET = SLOTS * 2 * CONTROL_BYTES
CALIBRATION_BUDGETS = 2
"""So many times the budget calibrations may take beside it."""

LOSSLESS = 1
"""The codec that kernels decode."""

_FAILURES = (RuntimeError, AssertionError, MemoryError)
"""What torch raises: AssertionError where it was built without CUDA."""


@dataclass(frozen=True, slots=True)
class Flight:
    """A batch that was queued: its parts, each with its jobs, and when it has ended."""

    parts: Sequence[tuple[Part, slice]]
    slot: Slot | None
    faults: slice
    """Bytes of the slot's control."""
    end: Mark | None
    error: KVStoreError | None = None
    """Why it could not be queued."""


class DeviceDecoder:
    """Decodes sections into tensors on `device`, within `budget_bytes` of its memory, and `CALIBRATION_BUDGETS` times
    as much for calibrations. For several threads.

    `library` None: what the CPU decoded is copied, and nothing decoded here. `device` may be the host, for the
    emulated library. `side_by_side`: batches are decoded at once; else one after the other, so that what bounds a
    launch (`Library.limit_multiprocessors`) bounds all of decoding. Raises `InvalidArgumentError` for a budget below
    `SMALLEST_BUDGET`. To be closed.
    """

    def __init__(
        self, library: Library | None, device: torch.device, budget_bytes: int, *, side_by_side: bool = True
    ) -> None:
        if budget_bytes < SMALLEST_BUDGET:
            raise InvalidArgumentError(f"{budget_bytes} bytes are too few to decode in; give {SMALLEST_BUDGET}")
        self.device = name_fully(device)
        self.largest = (budget_bytes // SLOTS - CONTROL_BYTES) // ALIGNMENT * ALIGNMENT
        """Bytes of the largest piece."""
        self.library = library
        self.scalable = self._make_planner(CALIBRATION_BUDGETS * budget_bytes)
        """Plans sections of codec 3; None where the library does not decode them."""
        self._side_by_side = side_by_side
        self._streams: Streams | None = None
        self._waiting = Waiting()
        self._free: SimpleQueue[Slot | None] = SimpleQueue()
        self._flights: SimpleQueue[Flight | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        for _ in range(SLOTS):
            self._free.put(None)  # a place for one that was not needed yet

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Wait for what was queued, and let the memory go; what still waits fails. Safe to call twice."""
        self._waiting.close()
        with self._lock:
            threads, self._threads = self._threads, []
        for thread in threads:
            thread.join()
        self._free = SimpleQueue()

    def put(self, values: npt.NDArray[np.generic]) -> torch.Tensor:
        """A copy of an array on the device, for kernels queued from now on. Raises `DeviceError`."""
        try:
            return copy_in(self._open(), values, self.device)
        except _FAILURES as error:
            raise _failed(error, "a copy of what decoding needs") from error

    def pin(self, values: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
        """A copy of an array in page-locked memory, where there is a GPU: others are copied to it when streams end."""
        if self.device.type != "cuda":
            return values
        try:
            with working_on(self.device):
                pinned: npt.NDArray[np.generic] = torch.from_numpy(np.array(values)).pin_memory().numpy()
        except _FAILURES as error:
            raise _failed(error, "page-locked memory for what decoding needs") from error
        return pinned

    def takes(self, codec: int, dtype: str, size: int) -> bool:
        """Whether kernels decode a payload of `size` bytes of this codec and dtype."""
        return (
            self.library is not None
            and codec == LOSSLESS
            and dtype == "bfloat16"
            and size <= self.largest
            and self.library.has("kvs_lossless_decode")
        )

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Memory of the device, its content undefined. Raises `DeviceError` where there is not enough."""
        try:
            return torch.empty(tuple(shape), dtype=dtype, device=self.device)
        except _FAILURES as error:
            raise _failed(error, "memory for values") from error

    def staging(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Memory of the host to copy values from, page-locked where there is a GPU."""
        try:
            with working_on(self.device):
                return torch.empty(tuple(shape), dtype=dtype, pin_memory=self.device.type == "cuda")
        except _FAILURES as error:
            raise _failed(error, "page-locked memory for values") from error

    def mark_current(self) -> Mark | None:
        """A mark in the calling thread's queue: memory that it allocated may be written to from there on."""
        try:
            return self._open().mark_current()
        except _FAILURES as error:
            raise _failed(error, "an event") from error

    def hold_current(self, mark: Mark) -> None:
        """Let the queue that the calling thread computes in wait for a mark of this decoder's. Raises `DeviceError`."""
        try:
            self._open().hold_current(mark)
        except _FAILURES as error:
            raise _failed(error, "an event") from error

    def decode(
        self,
        target: Target,
        pieces: Sequence[Piece],
        copies: Sequence[Deed] = (),
        *,
        after: Mark | None = None,
        on_queued: OnQueued | None = None,
    ) -> Future[None]:
        """Decode `pieces`, none larger than `largest`, into `target`, and make `copies`.

        The bytes of the pieces and the target must stay until the future is done: then all values are there for any
        stream. It raises `DamagedObjectError` or `DeviceError`, and the target is undefined. It can be cancelled until
        it has begun. Raises `StoreUnavailableError` once closed.
        """
        request = Request(target, pieces, copies, after, on_queued)
        if not request.parts:
            request.future.set_result(None)
            return request.future
        self._waiting.add(request)
        self._start()
        return request.future

    def _make_planner(self, calibration_bytes: int) -> ScalablePlanner | None:
        if self.library is None or not self.library.has("kvs_scalable_decode"):
            return None
        try:
            return ScalablePlanner(ScalableCalls(self.library), self.put, self.pin, calibration_bytes)
        except DeviceError as error:
            log.warning("lossy values are decoded by the CPU: %s", error)
            return None

    def _start(self) -> None:
        with self._lock:
            if not self._threads:
                for work, name in ((self._queue_all, "queue"), (self._land_all, "land")):
                    thread = threading.Thread(target=work, name=f"kvstore-s3-device-{name}", daemon=True)
                    self._threads.append(thread)
                    thread.start()

    def _open(self) -> Streams:
        with self._lock:
            if self._streams is None:
                self._streams = open_streams(self.device)
            return self._streams

    def _queue_all(self) -> None:
        while True:
            slot = self._free.get()
            parts = self._waiting.take(Room(self.largest, CONTROL_BYTES))
            if not parts:
                self._flights.put(None)
                return
            self._flights.put(self._try_queue(slot, parts))

    def _try_queue(self, slot: Slot | None, parts: list[Part]) -> Flight:
        try:
            use_device(self.device)
            if slot is None:
                slot = self._make_slot(self._open())
            return self._queue(slot, parts)
        except Exception as error:  # noqa: BLE001 - whatever it is: without this thread, loads would wait for ever
            told = error if isinstance(error, KVStoreError) else _failed(error, "queueing work")
            return Flight([(part, slice(0)) for part in parts], slot, slice(0), None, told)

    def _make_slot(self, streams: Streams) -> Slot:
        # Copies are the first to write to it: what the allocator gives a stream was perhaps just now in use there, and
        # the copy stream does not wait for others.
        with streams.copying():
            return Slot(self.device, self.largest, streams.beside() if self._side_by_side else streams)

    def _queue(self, slot: Slot, parts: list[Part]) -> Flight:
        batch = lay_out(parts, slot)
        batch.queue(slot, self.library)
        end = slot.streams.mark_decoded()
        for part in parts:
            part.request.note_queued(end)
        return Flight(batch.parts, slot, batch.faults, end)

    def _land_all(self) -> None:
        while (flight := self._flights.get()) is not None:
            self._land(flight)

    def _land(self, flight: Flight) -> None:
        error, faults = flight.error, np.zeros(0, np.uint32)
        try:
            use_device(self.device)
            if flight.end is not None and flight.slot is not None:
                flight.end.synchronize()
                faults = flight.slot.control[flight.faults].view(np.uint32).copy()
            elif flight.slot is not None:
                flight.slot.streams.settle()  # nothing of it may be under way when its memory is given to others
        except Exception as failure:  # noqa: BLE001 - as in _try_queue
            error = error or _failed(failure, "decoding")
        self._free.put(flight.slot)
        for part, jobs in flight.parts:
            part.request.end_part(error or _fault_of(faults[jobs]))


def _fault_of(faults: npt.NDArray[np.uint32]) -> KVStoreError | None:
    bad = faults[faults != 0]
    if not len(bad):
        return None
    if int(bad[0]) not in BitstreamFault.__members__.values():
        return DeviceError("a kernel has not come to a stream; the GPU or its driver failed")
    return DamagedObjectError(
        BitstreamFault(int(bad[0])), f"{len(bad)} of {len(faults)} heads do not decode to the layout's shape"
    )


def _failed(error: Exception, what: str) -> DeviceError:
    return DeviceError(f"the device failed at {what}: {str(error).partition(chr(10))[0]}")
