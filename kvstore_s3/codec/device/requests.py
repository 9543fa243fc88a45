"""What waits to be decoded on a device, and which of it goes together."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

import torch

from kvstore_s3.codec.device.pieces import ALIGNMENT, Piece, Target, round_up
from kvstore_s3.codec.device.streams import Mark
from kvstore_s3.errors import KVStoreError, StoreUnavailableError


class Deed(Protocol):
    """What torch does for a request, beside the kernels."""

    def queue(self) -> None:
        """Queue it on the stream that torch uses now. What it needs must stay until the request has ended."""


@dataclass(frozen=True, slots=True)
class Copy:
    """Values that the CPU decoded, on the host, and where they go on the device: tensors of one shape and dtype."""

    values: torch.Tensor
    to: torch.Tensor

    def queue(self) -> None:
        self.to.copy_(self.values, non_blocking=True)


OnQueued = Callable[[Future[None], Sequence[Mark]], None]
"""Told, in the thread that queues, when all of a request is in the device's queue: its future, and the marks behind
which its values are there, if they are sound: that is known only when the future is done."""


class Request:
    """One share of a load. `future` is done when nothing of it is under way any more, and only then.

    `after` is a mark from which on the target's memory may be written to.
    """

    def __init__(
        self,
        target: Target,
        pieces: Sequence[Piece],
        copies: Sequence[Deed],
        after: Mark | None,
        on_queued: OnQueued | None = None,
    ) -> None:
        self.target = target
        self.copies = copies
        self.after = after
        self.future: Future[None] = Future()
        self.parts: list[Piece | None] = [*pieces, *([None] if copies else [])]
        """Pieces; None stands for the copies."""
        self._left = self._unqueued = len(self.parts)
        self._on_queued = on_queued
        self._marks: list[Mark] = []
        self._begun = self._cancelled = False
        self._error: KVStoreError | None = None
        self._lock = threading.Lock()  # parts end in two threads

    def begin(self) -> bool:
        """Whether a part of it should begin: it was not cancelled, and has not failed."""
        if not self._begun and not self._cancelled:
            self._begun = self.future.set_running_or_notify_cancel()
            self._cancelled = not self._begun
        return self._begun and self._error is None

    def note_queued(self, mark: Mark) -> None:
        """Note that a part is in the queue, in front of `mark`. For the thread that queues."""
        self._marks.append(mark)
        self._unqueued -= 1
        if not self._unqueued and self._on_queued is not None:
            self._on_queued(self.future, self._marks)

    def end_part(self, error: KVStoreError | None = None) -> None:
        """Note that a part has ended, or will not begin; the last one ends the request."""
        with self._lock:
            self._left -= 1
            self._error = self._error or error
            if self._left or not self._begun:
                return
        if self._error is not None:
            self.future.set_exception(self._error)
        else:
            self.future.set_result(None)


@dataclass(frozen=True, slots=True)
class Part:
    """One piece of a request, or (None) its copies."""

    request: Request
    piece: Piece | None


class Room:
    """What still fits into one batch: bytes of streams, and of jobs, their faults, and targets' planes and blocks."""

    def __init__(self, data_bytes: int, control: int) -> None:
        self._data, self._control = data_bytes, control - 3 * ALIGNMENT
        self._requests: set[int] = set()
        self._runs: set[tuple[int, int]] = set()

    def take(self, part: Part) -> bool:
        """Make room for a part; False where there is none."""
        piece = part.piece
        if piece is None:
            return True
        runs = {(run.address, run.length) for run in piece.runs} - self._runs  # what several read is copied once
        data = piece.scratch.bytes + sum(round_up(length) for _, length in runs)
        control = control_bytes(piece)
        if id(part.request) not in self._requests:
            control += part.request.target.control_bytes
        if data > self._data or control > self._control:
            return False
        self._data -= data
        self._control -= control
        self._requests.add(id(part.request))
        self._runs |= runs
        return True


def control_bytes(piece: Piece) -> int:
    """Bytes of jobs and their faults, and of gaps between kinds of them."""
    return piece.jobs.nbytes + 4 * len(piece.jobs) + 2 * ALIGNMENT


class Waiting:
    """Parts of requests, first come first served. For several threads."""

    def __init__(self) -> None:
        self._parts: deque[Part] = deque()
        self._closed = False
        self._changed = threading.Condition()

    def add(self, request: Request) -> None:
        """Raises `StoreUnavailableError` once closed."""
        with self._changed:
            if self._closed:
                raise StoreUnavailableError("the store was closed; open it again")
            self._parts.extend(Part(request, piece) for piece in request.parts)
            self._changed.notify()

    def take(self, room: Room) -> list[Part]:
        """Wait for parts, and take as many as there is room for; none: closed."""
        with self._changed:
            while True:
                taken: list[Part] = []
                while self._parts and self._take_first(room, taken):
                    pass
                if taken or self._closed:
                    return taken
                self._changed.wait()

    def close(self) -> None:
        """Fail what has not begun, and wake who waits."""
        error = StoreUnavailableError("the store was closed; open it again")
        with self._changed:
            self._closed = True
            while self._parts:
                part = self._parts.popleft()
                part.request.begin()
                part.request.end_part(error)
            self._changed.notify_all()

    def _take_first(self, room: Room, taken: list[Part]) -> bool:
        part = self._parts[0]
        if not part.request.begin():
            self._parts.popleft()
            part.request.end_part()
            return True
        if not room.take(part):
            return False
        taken.append(self._parts.popleft())
        return True
