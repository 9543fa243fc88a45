"""Reads and writes past the page cache, blocking; called in threads.

O_DIRECT wants address, offset and length in whole pages. A read that starts or ends inside a page gets the pages at its
edges into scratch memory, and all between them straight into the caller's buffer, with one system call. Where the
buffer's address does not match the file's offset, the bytes travel through scratch memory; that costs one copy and is
still cheaper than the page cache, whose pages have to be found, filled and copied from.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Iterator, Sequence

import numpy as np

from kvstore_s3.tier.base import PAGE

_SCRATCH = 256 * PAGE
_MOST_BUFFERS = 64


class _Scratch(threading.local):
    """Aligned memory of a thread: made once, since fresh pages have to be cleared by the kernel first."""

    def __init__(self) -> None:
        self.memory = memoryview(mmap.mmap(-1, _SCRATCH))


_scratch = _Scratch()


def page_down(position: int) -> int:
    return position // PAGE * PAGE


def page_up(position: int) -> int:
    return -(-position // PAGE) * PAGE


def is_aligned(buffer: memoryview, position: int = 0) -> bool:
    """Whether the buffer's address lies inside its page as `position` lies inside its own."""
    address: int = np.frombuffer(buffer, np.uint8).ctypes.data
    return (address - position) % PAGE == 0


def read_fully(file: int, position: int, into: memoryview, *, direct: bool) -> None:
    """Fill `into` with the file's bytes from `position` on; OSError (EIO) where the file ends before."""
    if not direct:
        _read_plain(file, position, into)
    elif len(into) > PAGE and is_aligned(into, position):
        _read_straight(file, position, into)
    else:
        _read_by_scratch(file, position, into)


def write_all(file: int, writes: Sequence[tuple[int, memoryview]], *, direct: bool) -> None:
    """Write each buffer at its position; where `direct`, positions and lengths are whole pages."""
    for position, buffers in _neighbours(sorted(writes, key=lambda write: write[0])):
        if direct and not all(map(is_aligned, buffers)):
            for buffer in buffers:
                _write_by_scratch(file, position, buffer)
                position += len(buffer)
        else:
            _write_together(file, position, buffers)


def _neighbours(writes: list[tuple[int, memoryview]]) -> Iterator[tuple[int, list[memoryview]]]:
    """Buffers that go to one place behind each other, for one system call."""
    position, buffers, end = 0, list[memoryview](), -1
    for start, buffer in writes:
        if start != end or len(buffers) == _MOST_BUFFERS:
            if buffers:
                yield position, buffers
            position, buffers = start, []
        buffers.append(buffer)
        end = start + len(buffer)
    if buffers:
        yield position, buffers


def _write_together(file: int, position: int, buffers: list[memoryview]) -> None:
    while buffers:
        done = os.pwritev(file, buffers, position)
        position += done
        while buffers and done >= len(buffers[0]):
            done -= len(buffers.pop(0))
        if done:
            buffers[0] = buffers[0][done:]


def _read_plain(file: int, position: int, into: memoryview) -> None:
    done = 0
    while done < len(into):
        count = os.preadv(file, [into[done:]], position + done)
        if count == 0:
            raise _ended(position + done)
        done += count


def _read_straight(file: int, position: int, into: memoryview) -> None:
    lead = position % PAGE
    head = (PAGE - lead) % PAGE
    tail = (len(into) - head) % PAGE
    inner = into[head : len(into) - tail]
    first, last = _scratch.memory[:PAGE], _scratch.memory[PAGE : 2 * PAGE]
    buffers = [*([first] if head else []), *([inner] if inner else []), *([last] if tail else [])]
    _read_pages(file, page_down(position), buffers)
    into[:head] = first[PAGE - head :] if head else b""
    into[len(into) - tail :] = last[:tail]


def _read_pages(file: int, position: int, buffers: list[memoryview]) -> None:
    wanted = sum(len(buffer) for buffer in buffers)
    if os.preadv(file, buffers, position) != wanted:
        raise _ended(position)


def _read_by_scratch(file: int, position: int, into: memoryview) -> None:
    done = 0
    while done < len(into):
        lead = (position + done) % PAGE
        count = min(_SCRATCH - lead, len(into) - done)
        pages = _scratch.memory[: page_up(lead + count)]
        _read_pages(file, position + done - lead, [pages])
        into[done : done + count] = pages[lead : lead + count]
        done += count


def _write_by_scratch(file: int, position: int, data: memoryview) -> None:
    for start in range(0, len(data), _SCRATCH):
        part = data[start : start + _SCRATCH]
        pages = _scratch.memory[: len(part)]
        pages[:] = part
        _write_together(file, position + start, [pages])


def _ended(position: int) -> OSError:
    return OSError(errno.EIO, f"the file ends near byte {position}, more was expected")
