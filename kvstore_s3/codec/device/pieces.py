"""What a device is asked to decode: bytes that are copied to it, and jobs that read them there. Pure.

Before a piece has its place on the device, addresses of what is copied are written as bit 63, the number of the run in
bits 48 to 62, and the byte in the run: no address of a host or a device has bit 63 set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from kvstore_s3.codec.device.library import Library, Pages

Jobs = npt.NDArray[np.void]
"""Structs of a kernel's jobs. Their fields `layer_begin` and `token_begin` count from the target's first."""

ALIGNMENT = 16
"""Of each run in the device's memory, in bytes."""

_COPIED = 1 << 63
_RUN_SHIFT = 48
_OFFSET = (1 << _RUN_SHIFT) - 1


@dataclass(frozen=True, slots=True)
class Run:
    """Bytes of this process that are copied in one go. Whoever planned them keeps them, or `held` does."""

    address: int
    length: int
    held: object = None

    @property
    def end(self) -> int:
        return self.address + self.length


class Scratch(NamedTuple):
    """What jobs need of the device's memory while they run: numbers (int16), and an order of components (uint32)."""

    numbers: int = 0
    order: int = 0

    @property
    def bytes(self) -> int:
        return round_up(2 * self.numbers) + round_up(4 * self.order)


NO_SCRATCH = Scratch()


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Jobs that go together, and the runs that they read."""

    runs: tuple[Run, ...]
    jobs: Jobs
    work: Work
    scratch: Scratch = NO_SCRATCH
    totals: Any = None
    """What else the jobs' kernel is told; see the work."""
    held: Sequence[object] = ()
    """What the jobs point to beside the runs is there as long as this is."""

    @property
    def data_bytes(self) -> int:
        """Bytes that the piece takes of a slot's data."""
        return sum(round_up(run.length) for run in self.runs) + self.scratch.bytes


class Work(Protocol):
    """What kernel jobs are for. Jobs of equal works and forms are launched together."""

    def addresses(self, jobs: Jobs) -> npt.NDArray[np.uint64]:
        """All fields of `jobs` that are addresses; a view."""

    def move_scratch(self, jobs: Jobs, by: Scratch) -> None:
        """Let jobs use scratch that begins so many elements later."""

    def launch(
        self, library: Library, pieces: Sequence[Piece], pages: Pages, places: Places, faults: int, stream: int
    ) -> None:
        """Queue the jobs of `pieces`. `faults` is the device address of a uint32 for each job."""


@dataclass(frozen=True, slots=True)
class Places:
    """Device addresses: of jobs, and of their scratch."""

    jobs: int
    numbers: int
    order: int


@dataclass(frozen=True, slots=True)
class Form:
    """How pages lie, but for their planes and block table. Strides in elements; see `KvsPages` in api.h.

    `block_tokens` 0: there are no blocks, and `token_stride` leads from each token to the next.
    """

    dim: int
    token_stride: int
    head_stride: int
    block_tokens: int = 0
    block_stride: int = 0


@dataclass(frozen=True, slots=True)
class Target:
    """Where values lie in the device's memory: addresses of each layer's K and V, [layers, 2], and their form.

    `blocks`, on the host, are the numbers of the blocks that hold its tokens, in order; None where there are none.
    """

    planes: npt.NDArray[np.uint64]
    form: Form
    blocks: npt.NDArray[np.uint32] | None = None

    @property
    def control_bytes(self) -> int:
        """Bytes that the target takes of a slot's control."""
        return self.planes.nbytes + (0 if self.blocks is None else self.blocks.nbytes)


def find_target(address: int, shape: Sequence[int], strides: Sequence[int], itemsize: int) -> Target:
    """The target that is a tensor [layers, 2, tokens, heads, dim] at `address`, strides in elements, dim contiguous."""
    layers, kinds, _, _, dim = shape
    assert strides[4] == 1
    first = np.arange(layers, dtype=np.int64)[:, None] * strides[0] + np.arange(kinds, dtype=np.int64) * strides[1]
    return Target((address + first * itemsize).astype(np.uint64), Form(dim, strides[2], strides[3]))


def round_up(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def place_in(run: int, offset: int = 0) -> int:
    """The address, for now, of a byte of a run."""
    return _COPIED | run << _RUN_SHIFT | offset


def resolve(addresses: npt.NDArray[np.uint64], runs: Sequence[int]) -> None:
    """Turn addresses in runs into those on the device, where run i begins at `runs[i]`."""
    copied = addresses >= np.uint64(_COPIED)
    found = addresses[copied]
    numbers = (found >> np.uint64(_RUN_SHIFT)).astype(np.int64) & 0x7FFF
    addresses[copied] = np.array(runs, np.uint64)[numbers] + (found & np.uint64(_OFFSET))


def address_of(view: memoryview | npt.NDArray[Any]) -> int:
    """Where a view begins in this process's memory; it may be of bytes that cannot be written to."""
    array = np.frombuffer(view, np.uint8) if isinstance(view, memoryview) else view
    where: dict[str, Any] = array.__array_interface__
    return int(where["data"][0])
