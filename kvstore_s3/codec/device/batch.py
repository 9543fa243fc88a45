"""One batch on its way: where its pieces lie in a slot of staging memory, and what is launched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kvstore_s3.codec.device.library import Library, Pages
from kvstore_s3.codec.device.pieces import Form, Piece, Places, Run, Scratch, Work, resolve, round_up
from kvstore_s3.codec.device.requests import Part
from kvstore_s3.codec.device.streams import Streams

CONTROL_BYTES = 1 << 20
"""Of each slot, for jobs, planes and faults: of 25,000 lossless streams, say. As much on the host, page-locked."""

NOT_RUN = 0xFFFFFFFF
"""The fault, or the length, of a job that no kernel has come to."""


class _HostBytes:
    """Memory of this process for numpy, which nothing here will write to: a view may be of bytes."""

    def __init__(self, run: Run) -> None:
        self.__array_interface__ = {
            "data": (run.address, False),
            "shape": (run.length,),
            "typestr": "|u1",
            "version": 3,
        }


class Slot:
    """Staging memory of one batch, from torch's allocator, and the streams that it is queued on."""

    def __init__(self, device: torch.device, data_bytes: int, streams: Streams) -> None:
        self.streams = streams
        self._shared = torch.empty(CONTROL_BYTES, dtype=torch.uint8, pin_memory=streams.pin)
        self._memory = torch.empty(CONTROL_BYTES + data_bytes, dtype=torch.uint8, device=device)
        self.control = self._shared.numpy()
        self.control_address: int = self._memory.data_ptr()
        self.data_address: int = self.control_address + CONTROL_BYTES

    def bring(self, run: Run, at: int) -> None:
        """Queue the copy of a run to byte `at` of the slot's data."""
        begin = CONTROL_BYTES + at
        source = torch.from_numpy(np.asarray(_HostBytes(run)))
        self._memory[begin : begin + run.length].copy_(source, non_blocking=True)

    def bring_control(self, size: int) -> None:
        """Queue the copy of the first `size` bytes of `control` to the device."""
        self._memory[:size].copy_(self._shared[:size], non_blocking=True)

    def fetch_control(self, part: slice) -> None:
        """Queue the copy of these bytes back into `control`."""
        self._shared[part].copy_(self._memory[part], non_blocking=True)


@dataclass(frozen=True, slots=True)
class Launch:
    """Pieces of one work and form. Places are offsets: of jobs in the control, of scratch in the data."""

    work: Work
    form: Form
    pieces: list[Piece]
    jobs_at: int
    first_job: int
    numbers_at: int
    order_at: int


@dataclass(frozen=True, slots=True)
class Batch:
    """How a batch lies in its slot. The control has jobs, planes, block tables, faults, in this order."""

    parts: list[tuple[Part, slice]]
    """With the jobs of each."""
    places: list[tuple[Run, int]]
    """Where in the data each run goes."""
    launches: list[Launch]
    planes_at: int
    blocks_at: int
    faults: slice
    """Bytes of the control."""

    def queue(self, slot: Slot, library: Library | None) -> None:
        """Queue all copies and launches."""
        streams = slot.streams
        with streams.copying():
            for run, at in self.places:
                slot.bring(run, at)
            slot.bring_control(self.faults.stop)
        for request in {id(part.request): part.request for part, _ in self.parts}.values():
            streams.wait_for(request.after)
        with streams.decoding():
            for launch in self.launches:
                assert library is not None
                self._launch(launch, slot, library)
            for part, _ in self.parts:
                for copy in part.request.copies if part.piece is None else ():
                    copy.queue()
            slot.fetch_control(self.faults)

    def _launch(self, launch: Launch, slot: Slot, library: Library) -> None:
        form = launch.form
        pages = Pages(
            slot.control_address + self.planes_at,
            slot.control_address + self.blocks_at if form.block_tokens else 0,
            form.block_tokens,
            form.dim,
            form.block_stride,
            form.token_stride,
            form.head_stride,
        )
        data = slot.data_address
        places = Places(slot.control_address + launch.jobs_at, data + launch.numbers_at, data + launch.order_at)
        faults = slot.control_address + self.faults.start + 4 * launch.first_job
        launch.work.launch(library, launch.pieces, pages, places, faults, slot.streams.decode_handle)


def lay_out(parts: Sequence[Part], slot: Slot) -> Batch:
    """Give all of `parts` their places, and write the slot's control."""
    return _Layout(slot).lay_out(parts)


class _Layout:
    """Fills a slot from its beginning: jobs of each launch, planes, block tables, faults; runs and scratch in the data.

    All requests share one array of planes and one of block tables: their jobs are told from where on theirs lie.
    """

    def __init__(self, slot: Slot) -> None:
        self._slot = slot
        self._control_at = self._data_at = self._jobs = 0
        self._places: dict[tuple[int, int], tuple[Run, int]] = {}
        self._rows: dict[int, int] = {}  # of requests: where their planes begin
        self._blocks: dict[int, int] = {}  # and where their blocks do

    def lay_out(self, parts: Sequence[Part]) -> Batch:
        groups: dict[tuple[Work, Form], list[tuple[Part, Piece]]] = {}
        placed = [(part, slice(0)) for part in parts if part.piece is None]
        planes, tables = [], []
        row = block = 0
        for part in parts:
            if part.piece is None:
                continue
            target = part.request.target
            groups.setdefault((part.piece.work, target.form), []).append((part, part.piece))
            if id(part.request) not in self._rows:
                self._rows[id(part.request)] = row
                self._blocks[id(part.request)] = block
                planes.append(target.planes.ravel())
                row += len(target.planes)
                if target.blocks is not None:
                    tables.append(target.blocks)
                    block += len(target.blocks)
        launches = [self._add(work, form, pieces, placed) for (work, form), pieces in groups.items()]
        planes_at = self._write(np.concatenate(planes) if planes else np.zeros(0, np.uint64))
        blocks_at = self._write(np.concatenate(tables) if tables else np.zeros(0, np.uint32))
        faults_at = self._write(np.full(self._jobs, NOT_RUN, np.uint32))
        faults = slice(faults_at, faults_at + 4 * self._jobs)
        return Batch(placed, list(self._places.values()), launches, planes_at, blocks_at, faults)

    def _add(
        self, work: Work, form: Form, pieces: list[tuple[Part, Piece]], placed: list[tuple[Part, slice]]
    ) -> Launch:
        jobs_at, first_job = self._control_at, self._jobs
        needed = Scratch()
        for part, piece in pieces:
            jobs = piece.jobs.copy()
            resolve(work.addresses(jobs), [self._place(run) for run in piece.runs])
            work.move_scratch(jobs, needed)
            jobs["layer_begin"] += np.uint32(self._rows[id(part.request)])
            jobs["token_begin"] += np.uint32(self._blocks[id(part.request)] * form.block_tokens)
            needed = Scratch(needed.numbers + piece.scratch.numbers, needed.order + piece.scratch.order)
            end = self._control_at + jobs.nbytes  # jobs of one launch lie without gaps
            self._slot.control[self._control_at : end] = jobs.view(np.uint8)
            self._control_at = end
            placed.append((part, slice(self._jobs, self._jobs + len(jobs))))
            self._jobs += len(jobs)
        self._control_at = round_up(self._control_at)
        numbers_at = self._take(2 * needed.numbers)
        order_at = self._take(4 * needed.order)
        return Launch(work, form, [piece for _, piece in pieces], jobs_at, first_job, numbers_at, order_at)

    def _place(self, run: Run) -> int:
        """The device address of a run; what several pieces read is copied once."""
        key = (run.address, run.length)
        if key not in self._places:
            self._places[key] = (run, self._take(run.length))
        return self._slot.data_address + self._places[key][1]

    def _take(self, size: int) -> int:
        at = self._data_at
        self._data_at += round_up(size)
        return at

    def _write(self, values: np.ndarray[tuple[int], np.dtype[np.uint64 | np.uint32]]) -> int:
        """Write into the control; where."""
        at = self._control_at
        self._slot.control[at : at + values.nbytes] = values.view(np.uint8)
        self._control_at = round_up(at + values.nbytes)
        return at
