"""Pages of memory before they are needed: the first write to each makes the system find and clear it."""

from __future__ import annotations

import ctypes
import mmap
import sys

_POPULATE_WRITE = 23
"""MADV_POPULATE_WRITE (Linux 5.14): as if each page were written, but its content stays."""


def populate(address: int, size: int) -> None:
    """Have the system give whole pages within `size` bytes from `address` on. Where it cannot, the first write does."""
    begin = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (address + size - begin) // mmap.PAGESIZE * mmap.PAGESIZE
    if length > 0 and sys.platform == "linux":
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(length), _POPULATE_WRITE)
