"""Encoding out of a device's memory: kernels gather and code there, compressed bytes come to the host.

Two threads take turns, each with a stream and staging memory of its own: what one has coded travels while the other's
kernels run. They wait by events for their own stream alone. Whoever owns the memory is told nothing before all that
reads it has ended, unless he takes it back: see `Source.revoke`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from queue import SimpleQueue
from typing import Any, Self, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from kvstore_s3.codec.device.encode_batch import CONTROL_BYTES, EncodeSlot, Levels, Room, encode_batch
from kvstore_s3.codec.device.encode_plans import EncodePlan
from kvstore_s3.codec.device.library import Library
from kvstore_s3.codec.device.lossless_encode_jobs import plan_lossless
from kvstore_s3.codec.device.scalable_encode import ScalableEncodeCalls
from kvstore_s3.codec.device.scalable_encode_jobs import ScalableEncodePlanner, SectionInPages
from kvstore_s3.codec.device.sources import EncodeSection, Lossy, Readable, Source
from kvstore_s3.codec.device.streams import Mark, Streams, copy_in, name_fully, open_streams, use_device, working_on
from kvstore_s3.errors import DeviceError, InvalidArgumentError, StoreUnavailableError

log = logging.getLogger("kvstore_s3")

T = TypeVar("T")

SLOTS = 2
"""Batches under way at once: one is coded, and one is on its way to the host."""
SMALLEST_BUDGET = SLOTS * 2 * CONTROL_BYTES
CALIBRATION_BUDGETS = 4
"""So many times the budget calibrations may take beside it: their matrices are put on the device once, if they fit."""

_FAILURES = (RuntimeError, AssertionError, MemoryError)
"""What torch raises: AssertionError where it was built without CUDA."""


class DeviceEncoder:
    """Encodes sections that lie on `device`, within `budget_bytes` of its memory, and `CALIBRATION_BUDGETS` times as
    much for calibrations. For several threads. To be closed.

    `library` None: nothing is encoded here, but fetched. `device` may be the host, for the emulated library.
    `side_by_side`: what several threads encode runs at once on the device, as in `DeviceDecoder`.
    Raises `InvalidArgumentError` for a budget below `SMALLEST_BUDGET`.
    """

    def __init__(
        self, library: Library | None, device: torch.device, budget_bytes: int, *, side_by_side: bool = True
    ) -> None:
        if budget_bytes < SMALLEST_BUDGET:
            raise InvalidArgumentError(f"{budget_bytes} bytes are too few to encode in; give {SMALLEST_BUDGET}")
        self.device = name_fully(device)
        self._library = library
        self._planner = self._make_planner(CALIBRATION_BUDGETS * budget_bytes)
        self._data_bytes = (budget_bytes // SLOTS - CONTROL_BYTES) // 16 * 16
        self._threads = ThreadPoolExecutor(SLOTS, "kvstore-s3-device-encode")
        self._slots: SimpleQueue[EncodeSlot | None] = SimpleQueue()
        self._side_by_side = side_by_side
        self._streams: Streams | None = None
        self._told_large = False
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

    @property
    def can_encode(self) -> bool:
        """Whether kernels encode anything."""
        return self._library is not None

    def encode(
        self, source: Source, memory: Readable, sections: Sequence[EncodeSection]
    ) -> Future[list[Levels | None]]:
        """Payloads of `sections` of one chunk: of codec 1, or the levels of codec 3; None where the CPU is to code it.

        That is what kernels do not code, or what is stored otherwise for its size. The bytes are those of the CPU's
        encoder, but that numbers which a matrix gives may round apart. When the future is done, nothing reads the
        memory any more; it may raise `DeviceError`. Raises `StoreUnavailableError` once closed.
        """
        return self._submit(self._encode, source, memory, sections)

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
            with working_on(self.device):
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

    def _encode(self, source: Source, memory: Readable, sections: Sequence[EncodeSection]) -> list[Levels | None]:
        """All of them, batch by batch, in a thread. `memory` owns what its target names."""
        target = memory.target()
        found: list[Levels | None] = [None] * len(sections)
        room = Room.of(target, self._data_bytes)
        for batch in room.cut(self._plan_all(memory, sections, room)):
            with self._slot() as slot:
                coded = encode_batch(slot, source, target, [plan for _, plan in batch])
            for (index, _), levels in zip(batch, coded, strict=True):
                found[index] = levels
        return found

    def _plan_all(
        self, memory: Readable, sections: Sequence[EncodeSection], room: Room
    ) -> Iterator[tuple[int, EncodePlan]]:
        """Those for the device, by number. One after the other: each holds its calibration's matrices there."""
        for index, section in enumerate(sections):
            with _telling("a copy of what encoding needs"):
                plan = self._plan(memory, section)
            if plan is not None and room.fits(plan):
                yield index, plan
            elif plan is not None and not self._told_large:
                self._told_large = True
                log.warning("some KV is coded by the CPU: its layer groups need more than half of the encoder's memory")

    def _plan(self, memory: Readable, section: EncodeSection) -> EncodePlan | None:
        """None: nothing for the device."""
        if self._library is None:
            return None
        layers = (section.layer_begin, section.layer_begin + section.layers)
        tokens = (section.token_begin, section.token_begin + section.tokens)
        dtype = str(memory.dtype).removeprefix("torch.")
        if section.lossy is None:
            return plan_lossless(self._library, memory.shape, dtype, layers=layers, tokens=tokens)
        if self._planner is None:
            return None
        return self._planner.plan(_place_in_model(section, section.lossy, memory.shape, dtype))

    def _make_planner(self, calibration_bytes: int) -> ScalableEncodePlanner | None:
        """None where the library does not encode codec 3."""
        if self._library is None or not self._library.has("kvs_scalable_encode"):
            return None
        try:
            return ScalableEncodePlanner(ScalableEncodeCalls(self._library), self._put, calibration_bytes)
        except DeviceError as error:
            log.warning("lossy values are coded by the CPU: %s", error)
            return None

    def _put(self, values: npt.NDArray[np.generic]) -> torch.Tensor:
        """A copy of an array on the device, there when this returns, for kernels of any stream."""
        return copy_in(self._open(), values, self.device)

    def _fetch(self, source: Source, memory: Readable, out: torch.Tensor) -> None:
        with self._slot() as slot:
            with slot.streams.decoding():
                gathered = torch.empty(memory.shape, dtype=memory.dtype, device=self.device)
            with source.reading(slot.streams), slot.streams.decoding():
                memory.gather(gathered)
                out.copy_(gathered, non_blocking=True)
            slot.streams.mark_decoded().synchronize()

    def _make_streams(self) -> Streams:
        """Of a slot: its own, or those of all."""
        return open_streams(self.device) if self._side_by_side else self._open()

    @contextmanager
    def _slot(self) -> Iterator[EncodeSlot]:
        """One slot of those that are free. Nothing is under way in it when it is given back."""
        slots, slot = self._slots, self._slots.get()
        try:
            with _telling("encoding"):
                use_device(self.device)
                slot = slot or EncodeSlot(self.device, self._data_bytes, self._make_streams())
                yield slot
        finally:
            if slot is not None:
                with suppress(*_FAILURES):
                    slot.streams.settle()
            slots.put(slot)


def _place_in_model(section: EncodeSection, lossy: Lossy, shape: tuple[int, ...], dtype: str) -> SectionInPages:
    return SectionInPages(
        layers=(lossy.first_layer, lossy.first_layer + section.layers),
        first_head=lossy.first_head,
        heads=shape[3],
        head_dim=shape[4],
        tokens=section.tokens,
        token_begin=section.token_begin,
        layer_begin=section.layer_begin,
        head=0,
        first_position=lossy.first_position,
        dtype=dtype,
        levels=lossy.levels,
        calibration=lossy.calibration,
        rotation=lossy.rotation,
    )


@contextmanager
def _telling(what: str) -> Iterator[None]:
    try:
        yield
    except _FAILURES as error:
        raise _failed(error, what) from error


def _failed(error: Exception, what: str) -> DeviceError:
    return DeviceError(f"the device failed at {what}: {str(error).partition(chr(10))[0]}")
