"""The queues of a device: one for copies, one for kernels, and marks in them that a thread can wait for.

On a host (for the kernels' emulation, and where everything is decoded by the CPU) what is queued has been done.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import numpy as np
import numpy.typing as npt
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

    def beside(self) -> Streams:
        """The same copy stream with another decode stream, which waits for copies that are queued by it alone."""


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

    def beside(self) -> Streams:
        return self


class CudaStreams:
    """Two streams of one GPU, or one beside the copy stream of others. None waits for the default stream by itself.

    Whatever the device is that the calling thread uses else, it is that afterwards, and no other is touched.
    """

    pin = True

    def __init__(self, device: torch.device, copy: torch.cuda.Stream | None = None) -> None:
        self._device = device
        self._copy: torch.cuda.Stream = copy or torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
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
        with self._using(self._copy):
            yield
        self._decode.wait_event(self._copy.record_event())

    @contextmanager
    def decoding(self) -> Iterator[None]:
        with self._using(self._decode):
            yield

    def mark_decoded(self) -> Mark:
        # blocking: a thread that waits sleeps instead of spinning on a core that others decode with
        mark: torch.cuda.Event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self._decode.record_event(mark)
        return mark

    def settle(self) -> None:
        self._copy.synchronize()
        self._decode.synchronize()

    def beside(self) -> Streams:
        return CudaStreams(self._device, self._copy)

    @contextmanager
    def _using(self, stream: torch.cuda.Stream) -> Iterator[None]:
        # The stream's own context ends by setting the device that the thread had, as streams are of one: where that was
        # another, it would get a context of half a gigabyte. The device's context ends without.
        with torch.cuda.device(self._device), torch.cuda.stream(stream):
            yield


def name_fully(device: torch.device) -> torch.device:
    """The device with the number that `cuda` is in the calling thread: in another it would be another GPU."""
    return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device


def use_device(device: torch.device) -> None:
    """Let the calling thread, which is one of this package's, work with `device` alone, if it is a GPU."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def working_on(device: torch.device) -> AbstractContextManager[object]:
    """Inside, the calling thread works with `device`, if it is a GPU.

    To page-lock memory needs it, too: torch asks for events then, which makes a context on the thread's own GPU.
    """
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def copy_in(streams: Streams, values: npt.NDArray[np.generic], device: torch.device) -> torch.Tensor:
    """A copy of an array, there when this returns; its memory is the decode stream's."""
    source = torch.from_numpy(np.array(values))
    with streams.decoding():
        there = torch.empty(source.shape, dtype=source.dtype, device=device)
        there.copy_(source)
    return there


def open_streams(device: torch.device) -> Streams:
    """The queues of `device`, which is a CUDA device or the host."""
    return CudaStreams(device) if device.type == "cuda" else HostStreams()
