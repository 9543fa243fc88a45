"""Memory that is there before it is written."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import numpy as np
import pytest

from kvstore_s3.connectors.vllm.prefault import populate

PAGE = mmap.PAGESIZE


def resident_pages(memory: mmap.mmap, address: int) -> list[bool]:
    """Of each page of a mapping, whether the system has given it."""
    entries = np.fromfile(Path("/proc/self/pagemap"), np.uint64, len(memory) // PAGE, offset=address // PAGE * 8)
    return [bool(entry >> np.uint64(63)) for entry in entries]


def mapped(pages: int) -> tuple[mmap.mmap, int]:
    memory = mmap.mmap(-1, pages * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    return memory, np.frombuffer(memory, np.uint8).ctypes.data


@pytest.mark.skipif(sys.platform != "linux", reason="pages are looked at by way of /proc")
def test_whole_pages_within_the_range_are_given_and_keep_their_content() -> None:
    memory, address = mapped(8)
    memory[3 * PAGE] = 7
    populate(address + 1, 5 * PAGE)
    found = resident_pages(memory, address)
    if found == [False, False, False, True] + [False] * 4:
        pytest.skip("this system does not know MADV_POPULATE_WRITE")
    assert found == [False, True, True, True, True, False, False, False]
    assert memory[3 * PAGE] == 7


@pytest.mark.skipif(sys.platform != "linux", reason="pages are looked at by way of /proc")
@pytest.mark.parametrize(("begin", "size"), [(0, 0), (1, PAGE), (PAGE - 1, PAGE)])
def test_a_range_without_a_whole_page_is_left_alone(begin: int, size: int) -> None:
    memory, address = mapped(4)
    populate(address + begin, size)
    assert not any(resident_pages(memory, address))
