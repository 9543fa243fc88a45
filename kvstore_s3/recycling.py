"""Memory for loaded values that is used again once nobody looks at it: fresh pages cost more than the network does.

The first write to a new page makes the system find and clear it, 0.5 s/GB of CPU where a copy takes 0.06.
"""

from __future__ import annotations

import threading
import weakref

import numpy as np
import numpy.typing as npt
import torch

_SMALL = 1 << 20
"""Less than this is left to the allocator, which keeps small blocks by itself."""

Block = npt.NDArray[np.uint8]


class Recycler:
    """Gives out memory, and takes it back when its last tensor or view is gone, in whatever thread that is.

    At most `budget` bytes wait to be used again; what has waited longest goes to the system for what comes back.
    """

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._waiting: dict[int, Block] = {}
        """By id, the longest waiting first."""
        self._bytes = 0
        # Reentrant: the collector may give a block back in the middle of `_take`, in the same thread.
        self._lock = threading.RLock()

    @property
    def waiting_bytes(self) -> int:
        """Bytes that wait to be used again."""
        return self._bytes

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor on the CPU, its content undefined."""
        size = dtype.itemsize
        for length in shape:
            size *= length
        if size < _SMALL:
            return torch.empty(shape, dtype=dtype)
        block = self._take(size)
        if block is None:
            block = np.empty(size, np.uint8)  # in huge pages, where the system has them: a tenth of the faults
        # Not a view by numpy: views of views forget the ones between, and the end of this very array is what counts.
        lent = np.frombuffer(block.data[:size], dtype=np.uint8)
        weakref.finalize(lent, self._give_back, block).atexit = False
        return torch.from_numpy(lent).view(dtype).view(shape)

    def close(self) -> None:
        """Let go what waits; what is lent goes to the system when it comes back."""
        with self._lock:
            self._budget = self._bytes = 0
            self._waiting.clear()

    def _take(self, size: int) -> Block | None:
        """The smallest block that waits and is large enough, but not more than twice so."""
        with self._lock:
            fitting = [block for block in list(self._waiting.values()) if size <= len(block) <= 2 * size]
            if not fitting:
                return None
            best = min(fitting, key=len)
            found = self._waiting.pop(id(best), None)
            if found is not None:  # else it made room for what the collector gave back just now
                self._bytes -= len(found)
            return found

    def _give_back(self, block: Block) -> None:
        with self._lock:
            if len(block) > self._budget:
                return
            while self._bytes + len(block) > self._budget:
                self._bytes -= len(self._waiting.pop(next(iter(self._waiting))))
            self._waiting[id(block)] = block
            self._bytes += len(block)
