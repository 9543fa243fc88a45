"""The queues of a device: one for copies, one for kernels, and marks in them that a thread can wait for.

On a host (for the kernels' emulation, and where everything is decoded by the CPU) what is queued has been done.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch


class Mark(Protocol):
    """A point in a queue."""

    def synchronize(self) -> None:
        """Wait until the device has come to it."""


class Streams(Protocol):
    """What the decoder asks of a device. Errors are torch's `RuntimeError`."""

    pin: bool
    """Whether host memory for copies should be page-locked."""

    @property
    def decode_handle(self) -> int:
        """The decode stream, as a cudaStream_t."""

    def mark_current(self) -> Mark | None:
        """A mark in the queue that the calling thread computes in."""

    def wait_for(self, mark: Mark | None) -> None:
        """Let the decode stream wait for a mark."""

    def hold_current(self, mark: Mark) -> None:
        """Let the queue that the calling thread computes in wait for a mark."""

    def copying(self) -> AbstractContextManager[None]:
        """What torch is asked for inside is queued on the copy stream. What is decoded later comes behind it."""

    def decoding(self) -> AbstractContextManager[None]:
        """What torch is asked for inside is queued on the decode stream."""

    def mark_decoded(self) -> Mark:
        """A mark at the end of the decode stream."""

    def settle(self) -> None:
        """Wait until both are empty."""


class _Reached:
    def synchronize(self) -> None:
        pass


class HostStreams:
    """No queues: everything is done at once."""

    pin = False
    decode_handle = 0

    def mark_current(self) -> Mark | None:
        return None

    def wait_for(self, mark: Mark | None) -> None:
        pass

    def hold_current(self, mark: Mark) -> None:
        pass

    def copying(self) -> AbstractContextManager[None]:
        return nullcontext()

    def decoding(self) -> AbstractContextManager[None]:
        return nullcontext()

    def mark_decoded(self) -> Mark:
        return _Reached()

    def settle(self) -> None:
        pass


class CudaStreams:
    """Two streams of one GPU. Neither waits for the default stream by itself."""

    pin = True

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copy: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._decode: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    @property
    def decode_handle(self) -> int:
        return int(self._decode.cuda_stream)

    def mark_current(self) -> Mark | None:
        with torch.cuda.device(self._device):
            mark: Mark = torch.cuda.current_stream().record_event()
        return mark

    def wait_for(self, mark: Mark | None) -> None:
        if isinstance(mark, torch.cuda.Event):
            self._decode.wait_event(mark)

    def hold_current(self, mark: Mark) -> None:
        if isinstance(mark, torch.cuda.Event):
            torch.cuda.current_stream(self._device).wait_event(mark)

    @contextmanager
    def copying(self) -> Iterator[None]:
        with torch.cuda.stream(self._copy):
            yield
        self._decode.wait_event(self._copy.record_event())

    @contextmanager
    def decoding(self) -> Iterator[None]:
        with torch.cuda.stream(self._decode):
            yield

    def mark_decoded(self) -> Mark:
        # blocking: a thread that waits sleeps instead of spinning on a core that others decode with
        mark: torch.cuda.Event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self._decode.record_event(mark)
        return mark

    def settle(self) -> None:
        self._copy.synchronize()
        self._decode.synchronize()


def open_streams(device: torch.device) -> Streams:
    """The queues of `device`, which is a CUDA device or the host."""
    return CudaStreams(device) if device.type == "cuda" else HostStreams()
