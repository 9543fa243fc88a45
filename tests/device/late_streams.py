"""A GPU's queues on the host: what is asked for is done as late as it may be, in any order that was not ruled out.

`CudaStreams` runs on stand-ins for torch's streams and events. Each stream is a queue. Inside `torch.cuda.stream(...)`
torch's operations are put off (views are made at once, results are garbage at first), and so are the kernels of the
emulated library. They run when a thread waits for an event: then queues are drawn on in an order made up from a seed,
and only order within a queue and events that one was told to wait for are kept.

Memory behaves as that of torch's caching allocators: what a stream has allocated was just now used by it, and will be
once it is freed, so that it is overwritten where that stream's queue has come to at both times; page-locked memory is
overwritten when it is freed. Streams that were not told of each other so find garbage. What is not shown: that copies
from pageable memory may be late, and anything about several devices.
"""

from __future__ import annotations

import ctypes
import itertools
import random
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from kvstore_s3.codec.device import decoder, encoder, streams
from kvstore_s3.codec.device.decoder import DeviceDecoder
from kvstore_s3.codec.device.encoder import DeviceEncoder
from kvstore_s3.codec.device.library import Library

_GARBAGE = 0xB7

_Defer = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.c_void_p, ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_bool)
)


class Event:
    """Stands for `torch.cuda.Event`."""

    def __init__(self, blocking: bool = False) -> None:
        self.queue: Queue | None = None
        self.reached = True  # as long as it was not recorded

    def synchronize(self) -> None:
        if self.queue is not None:
            self.queue.device.reach(self)


class Queue:
    """Stands for `torch.cuda.Stream`."""

    def __init__(self, device: LateDevice, handle: int) -> None:
        self.device = device
        self.cuda_stream = handle
        self.work: deque[Callable[[], None] | Event] = deque()
        """What is to be done; an event is waited for."""

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.queue, event.reached = self, False

        def reach() -> None:
            event.reached = True

        self.put(reach)
        return event

    def wait_event(self, event: Event) -> None:
        self.put(event)

    def synchronize(self) -> None:
        self.record_event().synchronize()

    def put(self, work: Callable[[], None] | Event) -> None:
        with self.device.lock:
            self.work.append(work)
            self.device.run_ahead()

    @property
    def can_go_on(self) -> bool:
        return bool(self.work) and not (isinstance(self.work[0], Event) and not self.work[0].reached)

    def step(self) -> None:
        work = self.work.popleft()
        if not isinstance(work, Event):
            work()


class _Owner:
    """Whoever has a tensor of some memory has this; its end is that memory's."""

    def __init__(self, raw: torch.Tensor) -> None:
        self.__array_interface__ = {
            "data": (raw.data_ptr(), False),
            "shape": tuple(raw.shape),
            "typestr": "|u1",
            "version": 3,
        }


class LateDevice:
    """Queues, and memory. `launches` counts kernels that were put off; `faults` says what would be an error there."""

    def __init__(self, seed: int) -> None:
        self.lock = threading.RLock()
        self.launches = 0
        self.streams_launched_on: frozenset[int] = frozenset()
        self.faults: list[str] = []
        self.allocated = self.most_allocated = 0
        """Bytes of the device's memory that streams but the default one have given to somebody, now and at most."""
        self.may_run = threading.Event()
        """Cleared, nothing runs, and who waits for an event goes on waiting."""
        self.may_run.set()
        self._random = random.Random(seed)
        self._ahead = (0.0, 0.2, 0.6)[seed % 3]
        self._handles = itertools.count(0x1000, 0x10)
        self._queues: dict[int, Queue] = {}
        self._memory: dict[int, tuple[torch.Tensor, bool]] = {}
        """By address: all of it, and whether it is the device's."""
        self._freed: list[torch.Tensor] = []
        self._of_thread = threading.local()
        self.default = self.make_queue()

    def make_queue(self, _: object = None) -> Queue:
        queue = Queue(self, next(self._handles))
        with self.lock:
            self._queues[queue.cuda_stream] = queue
        return queue

    @property
    def current(self) -> Queue:
        queue: Queue = getattr(self._of_thread, "queue", self.default)
        return queue

    @contextmanager
    def using(self, queue: Queue) -> Iterator[None]:
        """As `torch.cuda.stream`."""
        before = self.current
        self._of_thread.queue = queue
        try:
            with Deferring(self):
                yield
        finally:
            self._of_thread.queue = before

    def computing(self) -> AbstractContextManager[None]:
        """What torch is asked for inside is queued where this thread computes."""
        return self.using(self.current)

    def reach(self, event: Event) -> None:
        """Run what must be run before an event, and perhaps more. Whoever waits for longer would wait for ever."""
        assert self.may_run.wait(60)
        with self.lock:
            if not event.reached:
                self._drive(event)

    def finish(self) -> None:
        """Run all there is."""
        for queue in list(self._queues.values()):
            queue.synchronize()

    def run_ahead(self) -> None:
        """Some queues are fast now and then."""
        if self.may_run.is_set() and self._random.random() < self._ahead:
            queue = self._random.choice(list(self._queues.values()))
            for _ in range(self._random.choice([1, 3, 10])):
                if queue.can_go_on:
                    queue.step()

    def adopt(self, values: torch.Tensor) -> torch.Tensor:
        """Take the memory of a tensor for the device's; nobody frees it."""
        whole = torch.empty(0, dtype=torch.uint8).set_(values.untyped_storage())
        self._memory[values.untyped_storage().data_ptr()] = (whole, True)
        return values

    def on_device(self, values: torch.Tensor) -> torch.Tensor:
        """A copy that is there already."""
        return self.adopt(values.clone())

    def allocate(self, shape: Sequence[int], dtype: torch.dtype, queue: Queue | None) -> torch.Tensor:
        """Memory of the device, of a stream; or (None) of the host, page-locked."""
        size = dtype.itemsize
        for length in shape:
            size *= length
        with torch._C._DisableTorchDispatch():
            raw = torch.full((size,), _GARBAGE, dtype=torch.uint8)
            if not size:
                return torch.empty(tuple(shape), dtype=dtype)
            with self.lock:
                self._memory[raw.data_ptr()] = (raw, queue is not None)
                if queue not in (None, self.default):
                    self.allocated += size
                    self.most_allocated = max(self.most_allocated, self.allocated)
            if queue is not None:
                queue.put(lambda: _spoil(raw))
            owner = _Owner(raw)
            weakref.finalize(owner, self._free, raw, queue).atexit = False
            found: torch.Tensor = torch.from_numpy(np.asarray(owner)).view(dtype).view(tuple(shape))
            return found

    def defer(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """One of torch's operations, asked for in the current queue."""
        queue = self.current
        if func is torch.ops.aten.empty.memory_format:
            return self.allocate(
                args[0], kwargs.get("dtype") or torch.float32, None if kwargs.get("pin_memory") else queue
            )
        if any(result.alias_info is not None and not result.alias_info.is_write for result in func._schema.returns):
            return func(*args, **kwargs)
        later_args, later_kwargs = tree_map_only(torch.Tensor, self._alias, (tuple(args), dict(kwargs)))
        if func._schema.is_mutable:
            queue.put(lambda: _run(func, later_args, later_kwargs))
            if func is torch.ops.aten.copy_.default and not (len(args) > 2 and args[2]) and self._is_host(*args[:2]):
                queue.synchronize()
            return args[0]
        found = func(*args, **kwargs)  # of garbage, perhaps; but of this shape
        assert isinstance(found, torch.Tensor), f"{func} waits for the device"
        result = self.allocate(found.shape, found.dtype, queue).as_strided(found.shape, found.stride())
        to = self._alias(result)

        def work() -> None:
            to.copy_(func(*later_args, **later_kwargs))

        queue.put(lambda: _run(work))
        return result

    def defer_launch(self, stream: int, launch: int, end: Callable[[int, bool], None]) -> None:
        self.launches += 1
        self.streams_launched_on = self.streams_launched_on | {stream}
        jobs = ctypes.c_uint64.from_address(launch).value  # the first argument of every kernel

        def work() -> None:
            is_there = ctypes.string_at(jobs, 32) != bytes([_GARBAGE]) * 32
            if not is_there:
                self.faults.append("a kernel ran before its jobs were there, or when they were gone")
            end(launch, is_there)

        self._queues[stream].put(work)

    def _drive(self, event: Event) -> None:
        """Until it is reached: only what it needs, or all queues in an order of these moments."""
        order = list(self._queues.values())
        self._random.shuffle(order)
        only_needed = self._random.random() < 0.5
        while not event.reached:
            queue = self._needed(event) if only_needed else next(queue for queue in order if queue.can_go_on)
            queue.step()

    def _needed(self, event: Event) -> Queue:
        """The queue whose next work has to come before an event."""
        assert event.queue is not None
        first = event.queue.work[0]
        return self._needed(first) if isinstance(first, Event) and not first.reached else event.queue

    def _free(self, raw: torch.Tensor, queue: Queue | None) -> None:
        with self.lock:
            del self._memory[raw.data_ptr()]
            self._freed.append(raw)  # a kernel that comes too late reads garbage, and nobody else's memory
            if queue is None:
                _spoil(raw)
                return
            if queue is not self.default:
                self.allocated -= raw.numel()
            queue.work.append(lambda: _spoil(raw))

    def _alias(self, values: torch.Tensor) -> torch.Tensor:
        """The same values, without a share in their memory: that it is freed before they are used is to be seen."""
        known = self._memory.get(values.untyped_storage().data_ptr())
        if known is None:
            return values
        storage = known[0].untyped_storage()
        with torch._C._DisableTorchDispatch():
            empty = torch.empty(0, dtype=values.dtype)
            return empty.set_(storage, values.storage_offset(), values.shape, values.stride())

    def _is_host(self, *tensors: torch.Tensor) -> bool:
        """Whether one of them is the host's."""
        return not all(self._memory.get(one.untyped_storage().data_ptr(), (None, False))[1] for one in tensors)


class Deferring(TorchDispatchMode):
    """Puts torch's operations off."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # which takes ten seconds to import

    def __init__(self, device: LateDevice) -> None:
        super().__init__()
        self._device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._device.defer(func, args, kwargs or {})


class _Torch:
    """The module, with another `cuda`."""

    def __init__(self, cuda: object) -> None:
        self.cuda = cuda

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _spoil(raw: torch.Tensor) -> None:
    _run(raw.fill_, (_GARBAGE,))


def _run(work: Callable[..., object], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None) -> None:
    """Now, whatever the calling thread puts off."""
    with torch._C._DisableTorchDispatch():
        work(*args, **(kwargs or {}))


@contextmanager
def late_device(library: Library, seed: int) -> Iterator[LateDevice]:
    """Decoders and encoders that are made inside run on such a device, with the kernels of an emulated library."""
    device = LateDevice(seed)
    cuda = SimpleNamespace(
        Stream=device.make_queue,
        Event=Event,
        current_stream=lambda _=None: device.current,
        stream=device.using,
        device=lambda _: nullcontext(),
    )

    def empty(_: object, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return device.allocate(shape, dtype, device.current)

    def staging(_: object, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return device.allocate(shape, dtype, None)

    callback = _Defer(device.defer_launch)
    hook = ctypes.CDLL(str(library.path)).kvs_emulator_defer
    hook.restype = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "torch", _Torch(cuda))
        for module in (decoder, encoder):
            patch.setattr(module, "open_streams", streams.CudaStreams)
        patch.setattr(DeviceDecoder, "empty", empty)
        for one in (DeviceDecoder, DeviceEncoder):
            patch.setattr(one, "staging", staging)
        hook(callback)
        try:
            yield device
        finally:
            device.finish()
            hook(None)
    assert not device.faults, device.faults
