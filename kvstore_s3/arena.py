"""One fixed piece of anonymous memory, cut into 4 KiB-aligned blocks; page-locked where there is a GPU to copy to."""

from __future__ import annotations

import ctypes
import logging
import mmap
from bisect import bisect_left
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from kvstore_s3.errors import InvalidArgumentError, KVStoreError

log = logging.getLogger("kvstore_s3")

PAGE = 4096
"""Alignment of blocks and unit of their sizes: what O_DIRECT asks for."""

_REGISTER_PORTABLE = 1
"""cudaHostRegisterPortable: page-locked for every CUDA context of the process, not only for the current one."""

_told_unpinned = False


class Arena:
    """Blocks out of one mapping of `size` bytes, rounded up to whole pages. For one thread.

    Pages are committed when they are first written (page-locked ones at once), and blocks come from the lowest address
    that has room, so that memory which was never needed is never used. `pin` None page-locks where CUDA is available;
    where page-locking fails, the memory is used without, and a warning says so once. Raises `InvalidArgumentError` for
    a size below 1, and `KVStoreError` where the system has no such amount of memory.
    """

    def __init__(self, size: int, *, pin: bool | None = None) -> None:
        if size < 1:
            raise InvalidArgumentError(f"an arena of {size} bytes holds nothing; give it at least one page of {PAGE}")
        self.size = round_up(size)
        self._memory = _map(self.size)
        self._view = memoryview(self._memory)
        self._address = address_of(self._view)
        self._free = [(0, self.size)]  # (start, end), sorted, never touching each other
        self._taken: dict[int, int] = {}
        self._used = 0
        self._pinned = pin is not False and _pin(self._memory, self._address, self.size, insist=pin is True)

    @property
    def used(self) -> int:
        """Bytes in blocks that are allocated now, whole pages each."""
        return self._used

    @property
    def pinned(self) -> bool:
        """Whether the memory is page-locked for copies to a GPU."""
        return self._pinned

    def allocate(self, size: int) -> memoryview | None:
        """A writable block of exactly `size` bytes at a page boundary, its content undefined; None: no room now."""
        if size < 1:
            raise InvalidArgumentError(f"a block of {size} bytes cannot be allocated; ask for at least one byte")
        room = round_up(size)
        for index, (start, end) in enumerate(self._free):
            if end - start >= room:
                self._free[index : index + 1] = [(start + room, end)] if end - start > room else []
                self._taken[start] = start + room
                self._used += room
                return self._view[start : start + size]
        return None

    def free(self, block: memoryview) -> None:
        """Take back a block, whole or its beginning. Raises `InvalidArgumentError` where it is not allocated (now)."""
        start = address_of(block) - self._address
        end = self._taken.pop(start, None)
        if end is None:
            raise InvalidArgumentError("this is no block of the arena, or it was freed before; free each block once")
        self._used -= end - start
        index = bisect_left(self._free, (start, end))
        if index < len(self._free) and self._free[index][0] == end:
            end = self._free.pop(index)[1]
        if index > 0 and self._free[index - 1][1] == start:
            index -= 1
            start = self._free.pop(index)[0]
        self._free.insert(index, (start, end))

    def close(self) -> None:
        """Let the memory go; it is unmapped when the last view of it is gone. Safe to call twice."""
        if self._pinned:
            self._pinned = False
            _unpin(self._address)
        self._free.clear()


def round_up(size: int) -> int:
    """`size` in whole pages."""
    return -(-size // PAGE) * PAGE


def address_of(block: memoryview) -> int:
    """Where a writable, contiguous view begins in memory."""
    return ctypes.addressof(ctypes.c_char.from_buffer(block))


def _map(size: int) -> mmap.mmap:
    # Pages of the usual size: once they are there, huge ones (MADV_HUGEPAGE) receive no faster, and the first bytes
    # into each wait for 2 MiB to be cleared.
    try:
        return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise KVStoreError(
            f"the system does not give {size} bytes of memory ({error}); set a smaller buffer_bytes or host_tier_bytes"
        ) from error


def _pin(memory: mmap.mmap, address: int, size: int, *, insist: bool) -> bool:
    import torch  # seconds to import: only where page-locking is wanted

    if not (insist or torch.cuda.is_available()):
        return False
    try:
        _call_cuda("cudaHostRegister", address, size, _REGISTER_PORTABLE)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without CUDA
        _tell_unpinned(size, error)
        return False
    memory.madvise(mmap.MADV_DONTFORK)  # a page copied on write after a fork would leave the GPU with the old one
    return True


def _unpin(address: int) -> None:
    try:
        _call_cuda("cudaHostUnregister", address)
    except RuntimeError as error:
        log.debug("memory could not be un-page-locked: %s", error)


def _call_cuda(name: str, *arguments: int) -> None:
    """Call the CUDA runtime in a thread of its own, on a GPU that has a context.

    An error stays with its thread: torch finds it behind the next kernel there, and takes that for what failed. And on
    a GPU without a context the call would make one, of half a gigabyte.
    """
    import torch

    def call(gpu: int) -> None:
        torch.cuda.set_device(gpu)
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        torch.cuda.check_error(getattr(runtime, name)(*arguments))

    with ThreadPoolExecutor(1) as thread:
        thread.submit(call, _find_gpu_in_use()).result()


def _find_gpu_in_use() -> int:
    """The one that the calling thread uses, if it has a context, or else the first that has one.

    Where torch does not say which have one (it has no public name for that), the calling thread's.
    """
    import torch

    own = torch.cuda.current_device()
    has_context: Any = getattr(torch._C, "_cuda_hasPrimaryContext", lambda _: False)
    return next((gpu for gpu in (own, *range(torch.cuda.device_count())) if has_context(gpu)), own)


def _tell_unpinned(size: int, error: Exception) -> None:
    global _told_unpinned
    if not _told_unpinned:
        _told_unpinned = True
        reason = str(error).partition("\n")[0]
        log.warning("%d bytes of buffers are not page-locked, so copies to the GPU are slower: %s", size, reason)
