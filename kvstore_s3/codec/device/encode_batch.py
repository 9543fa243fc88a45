"""One batch of sections to encode: where they lie in a slot of staging memory, what is launched, what comes back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kvstore_s3.codec.device.batch import NOT_RUN
from kvstore_s3.codec.device.encode_plans import EncodePlan, Lengths
from kvstore_s3.codec.device.library import Pages
from kvstore_s3.codec.device.pieces import Target, round_up
from kvstore_s3.codec.device.sources import Source
from kvstore_s3.codec.device.streams import Streams
from kvstore_s3.errors import DeviceError

CONTROL_BYTES = 1 << 17
"""Of each slot, for jobs, their lengths, planes, block tables and headers: of 800 streams, say."""

_ROUNDING = 128
"""What is lost in a control to alignment, beside that of headers."""

Levels = list[bytes]
"""Payloads of one section, level by level."""


class EncodeSlot:
    """Streams for one batch, and staging memory, from torch's allocator, with as much on the host for what comes back.

    The memory is there from its first use on: values are fetched without it where there is not enough.
    """

    def __init__(self, device: torch.device, data_bytes: int, streams: Streams) -> None:
        self.streams = streams
        self._device, self._data_bytes = device, data_bytes
        self._brought: list[torch.Tensor] = []

    @cached_property
    def control(self) -> torch.Tensor:
        return self._allocate(CONTROL_BYTES, pin_memory=self.streams.pin)

    @cached_property
    def memory(self) -> torch.Tensor:
        return self._allocate(CONTROL_BYTES + self._data_bytes, device=self._device)

    @cached_property
    def fetched(self) -> torch.Tensor:
        return self._allocate(self._data_bytes, pin_memory=self.streams.pin)

    def _allocate(self, size: int, **where: Any) -> torch.Tensor:
        with self.streams.decoding():
            return torch.empty(size, dtype=torch.uint8, **where)

    @property
    def address(self) -> int:
        """Of the control; the data is `CONTROL_BYTES` behind it."""
        return self.memory.data_ptr()

    def bring(self, values: npt.NDArray[np.generic], at: int) -> None:
        """Queue the copy of an array to byte `at` of the data."""
        source = torch.from_numpy(np.array(values).reshape(-1).view(np.uint8))
        self._brought.append(source)  # where a GPU reads any memory of the host by itself, it does so later
        begin = CONTROL_BYTES + at
        with self.streams.decoding():
            self.memory[begin : begin + len(source)].copy_(source, non_blocking=True)

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
        self._brought.clear()
        return [view.numpy().tobytes() for view in views]


@dataclass(frozen=True, slots=True)
class Room:
    """What a batch may take of a slot. The target's planes and blocks are in the control, too."""

    control: int
    data: int

    @classmethod
    def of(cls, target: Target, data_bytes: int) -> Room:
        return cls(CONTROL_BYTES - target.control_bytes - _ROUNDING, data_bytes)

    def fits(self, plan: EncodePlan) -> bool:
        """Whether a slot holds it alone."""
        return _control_bytes(plan) <= self.control and _angle_bytes(plan) + _data_bytes(plan) <= self.data

    def cut(self, plans: Iterable[tuple[int, EncodePlan]]) -> Iterator[list[tuple[int, EncodePlan]]]:
        """Batches of numbered plans, in order, all of which fit."""
        batch: list[tuple[int, EncodePlan]] = []
        control = data = 0
        for number, plan in plans:
            control += _control_bytes(plan)
            data += _data_bytes(plan)
            if batch and (control > self.control or data > self.data or not _are_alike(batch[0][1], plan)):
                yield batch
                batch = []
            if not batch:
                control, data = _control_bytes(plan), _angle_bytes(plan) + _data_bytes(plan)
            batch.append((number, plan))
        if batch:
            yield batch


def encode_batch(slot: EncodeSlot, source: Source, target: Target, plans: Sequence[EncodePlan]) -> list[Levels | None]:
    """Encode a batch that was cut for the slot. None: a section that the CPU is to code.

    Raises `RevokedError` where the memory was taken back, and `DeviceError`.
    """
    placed = _Placed(slot, plans)
    lengths = placed.launch(source, target)
    sizes = [plan.level_sizes(own) for plan, own in zip(plans, lengths, strict=True)]
    wanted = [index for index, found in enumerate(sizes) if found is not None]
    payloads = slot.fetch([(placed.payloads_at[index], sum(sizes[index] or ())) for index in wanted])
    found: list[Levels | None] = [None] * len(plans)
    for index, payload in zip(wanted, payloads, strict=True):
        found[index] = _split(payload, sizes[index] or ())
    return found


class _Placed:
    """A batch in its slot: angles, and of each plan payload and scratch in the data; the rest in the control."""

    def __init__(self, slot: EncodeSlot, plans: Sequence[EncodePlan]) -> None:
        self._slot = slot
        self._plans = plans
        self._angles_at: list[int] = []
        self._control_at = self._data_at = 0
        for table in plans[0].angles:
            self._angles_at.append(self._data_at)
            slot.bring(table, self._take(table.nbytes))
        self.payloads_at: list[int] = []
        self._scratch_at: list[int] = []
        for plan in plans:
            self.payloads_at.append(self._take(plan.payload_bytes))
            self._scratch_at.append(self._take(plan.scratch_bytes))

    def launch(self, source: Source, target: Target) -> list[Lengths]:
        """Run the kernels; what they gave for the jobs of each plan."""
        slot, work = self._slot, self._plans[0].work
        counts = [len(plan.jobs) for plan in self._plans]
        headers = [slot.address + self._write(plan.header) for plan in self._plans]
        jobs = self._place(headers)
        jobs_at = self._write(jobs.view(np.uint8))
        pages = self._write_pages(target)
        part = slice(self._control_at, self._control_at + 4 * len(jobs) * work.lengths)
        self._write(np.full(len(jobs) * work.lengths, NOT_RUN, np.uint32).view(np.uint8))
        with source.reading(slot.streams), slot.streams.decoding():
            slot.memory[: self._control_at].copy_(slot.control[: self._control_at], non_blocking=True)
            at, lengths = slot.address + jobs_at, slot.address + part.start
            work.launch(jobs, pages, at=at, lengths=lengths, stream=slot.streams.decode_handle)
            slot.control[part].copy_(slot.memory[part], non_blocking=True)
        slot.streams.mark_decoded().synchronize()
        found = slot.control.numpy()[part].view(np.uint32).reshape(len(jobs), work.lengths)
        if (found == NOT_RUN).any():
            raise DeviceError("a kernel has not come to a head; the GPU or its driver failed")
        return np.split(found, np.cumsum(counts)[:-1])

    def _place(self, headers: Sequence[int]) -> npt.NDArray[np.void]:
        data = self._slot.address + CONTROL_BYTES
        angles = [data + at for at in self._angles_at]
        places = zip(self._plans, self.payloads_at, self._scratch_at, headers, strict=True)
        jobs = [plan.place(data + payload, data + scratch, header, angles) for plan, payload, scratch, header in places]
        return np.concatenate(jobs)

    def _write_pages(self, target: Target) -> Pages:
        form = target.form
        planes_at = self._write(np.ascontiguousarray(target.planes).reshape(-1).view(np.uint8))
        blocks = np.zeros(0, np.uint32) if target.blocks is None else target.blocks
        blocks_at = self._write(np.ascontiguousarray(blocks).view(np.uint8))
        return Pages(
            self._slot.address + planes_at,
            self._slot.address + blocks_at if form.block_tokens else 0,
            form.block_tokens,
            form.dim,
            form.block_stride,
            form.token_stride,
            form.head_stride,
        )

    def _write(self, data: npt.NDArray[np.uint8]) -> int:
        """Write into the control; where."""
        at = self._control_at
        self._slot.control.numpy()[at : at + len(data)] = data
        self._control_at = round_up(at + len(data))
        return at

    def _take(self, size: int) -> int:
        at = self._data_at
        self._data_at += round_up(size)
        return at


def _are_alike(one: EncodePlan, other: EncodePlan) -> bool:
    """Whether they go by one launch, and with the same angles."""
    same = len(one.angles) == len(other.angles) and all(a is b for a, b in zip(one.angles, other.angles, strict=True))
    return same and one.work == other.work


def _control_bytes(plan: EncodePlan) -> int:
    return plan.jobs.nbytes + 4 * len(plan.jobs) * plan.work.lengths + round_up(len(plan.header))


def _data_bytes(plan: EncodePlan) -> int:
    return round_up(plan.payload_bytes) + round_up(plan.scratch_bytes)


def _angle_bytes(plan: EncodePlan) -> int:
    return sum(round_up(table.nbytes) for table in plan.angles)


def _split(payload: bytes, sizes: Sequence[int]) -> Levels:
    ends = np.cumsum(sizes).tolist()
    return [payload[end - size : end] for size, end in zip(sizes, ends, strict=True)]
