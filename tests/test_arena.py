"""The arena: aligned blocks out of one mapping, none of them twice, and all of the room back after the last one."""

from __future__ import annotations

import logging
import mmap
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore_s3 import arena as arena_module
from kvstore_s3.arena import PAGE, Arena, address_of, round_up
from kvstore_s3.errors import InvalidArgumentError, KVStoreError


def arena_of(pages: int) -> Arena:
    return Arena(pages * PAGE, pin=False)


def test_a_block_is_writable_aligned_and_has_the_size_asked_for() -> None:
    arena = arena_of(4)
    block = arena.allocate(5000)
    assert block is not None
    assert (len(block), block.readonly, block.format, arena.used, arena.size) == (5000, False, "B", 2 * PAGE, 4 * PAGE)
    assert address_of(block) % PAGE == 0
    block[:] = b"x" * 5000
    arena.free(block)
    assert arena.used == 0


def test_the_size_is_rounded_up_to_pages() -> None:
    assert Arena(1, pin=False).size == PAGE
    assert Arena(PAGE + 1, pin=False).size == 2 * PAGE


def test_no_room_is_an_answer_and_freed_neighbours_become_one() -> None:
    arena = arena_of(4)
    blocks = [arena.allocate(PAGE) for _ in range(4)]
    assert arena.allocate(1) is None
    for index in (0, 2, 3):
        arena.free(blocks[index])  # type: ignore[arg-type]
    assert arena.allocate(3 * PAGE) is None
    arena.free(blocks[1])  # type: ignore[arg-type]
    assert arena.allocate(4 * PAGE) is not None


def test_blocks_come_from_the_lowest_address_so_that_untouched_memory_stays_so() -> None:
    arena = arena_of(8)
    first = arena.allocate(2 * PAGE)
    assert first is not None
    address = address_of(first)
    arena.free(first)
    again = arena.allocate(PAGE)
    assert again is not None
    assert address_of(again) == address


def test_a_block_freed_twice_or_of_another_arena_is_refused() -> None:
    arena, other = arena_of(2), arena_of(2)
    block = arena.allocate(PAGE)
    assert block is not None
    with pytest.raises(InvalidArgumentError, match="free each block once"):
        other.free(block)
    arena.free(block)
    with pytest.raises(InvalidArgumentError, match="free each block once"):
        arena.free(block)


def test_a_part_of_a_block_that_is_not_its_beginning_is_refused() -> None:
    arena = arena_of(2)
    block = arena.allocate(2 * PAGE)
    assert block is not None
    with pytest.raises(InvalidArgumentError):
        arena.free(block[PAGE:])
    arena.free(block[:10])
    assert arena.used == 0


@pytest.mark.parametrize("size", [0, -1])
def test_sizes_below_one_are_refused(size: int) -> None:
    with pytest.raises(InvalidArgumentError):
        Arena(size, pin=False)
    with pytest.raises(InvalidArgumentError):
        arena_of(1).allocate(size)


def test_more_than_the_system_has_is_an_error_that_says_so() -> None:
    with pytest.raises(KVStoreError, match="smaller buffer_bytes or host_tier_bytes"):
        Arena(1 << 60, pin=False)


def test_memory_stays_valid_after_close_while_a_view_of_it_lives() -> None:
    arena = arena_of(2)
    block = arena.allocate(PAGE)
    assert block is not None
    arena.close()
    arena.close()
    block[:] = b"y" * PAGE
    assert bytes(block[:3]) == b"yyy"
    assert arena.allocate(1) is None


def test_where_page_locking_fails_the_memory_works_and_one_warning_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("page-locking does not fail here")
    monkeypatch.setattr(arena_module, "_told_unpinned", False)
    with caplog.at_level(logging.WARNING, logger="kvstore_s3"):
        arenas = [Arena(PAGE, pin=True), Arena(PAGE, pin=True)]
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        "4096 bytes of buffers are not page-locked, so copies to the GPU are slower"
    ]
    assert all(not arena.pinned and arena.allocate(1) is not None for arena in arenas)


class Gpus:
    """Two GPUs, of which the second has a context; calls of the runtime by thread and GPU, which fail."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, int]] = []
        self._own = threading.local()

    def set_device(self, gpu: int) -> None:
        self._own.gpu = gpu

    def current_device(self) -> int:
        return getattr(self._own, "gpu", 0)

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:  # noqa: N802 - CUDA's name
        self.calls.append(("register", threading.get_ident(), self.current_device()))
        return 2 if size > PAGE else 0

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        self.calls.append(("unregister", threading.get_ident(), self.current_device()))
        return 0


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Gpus:
    torch = pytest.importorskip("torch")
    gpus = Gpus()

    def check_error(error: int) -> None:
        if error:
            raise RuntimeError("out of memory")

    for name in ("set_device", "current_device"):
        monkeypatch.setattr(torch.cuda, name, getattr(gpus, name))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "check_error", check_error)
    monkeypatch.setattr(torch._C, "_cuda_hasPrimaryContext", lambda gpu: gpu == 1, raising=False)
    return gpus


def test_memory_is_page_locked_on_the_gpu_in_use_and_in_a_thread_to_which_an_error_belongs(gpus: Gpus) -> None:
    arena = Arena(PAGE)
    assert arena.pinned
    arena.close()
    assert not Arena(2 * PAGE).pinned
    assert [(call, gpu) for call, _, gpu in gpus.calls] == [("register", 1), ("unregister", 1), ("register", 1)]
    assert threading.get_ident() not in {thread for _, thread, _ in gpus.calls}
    assert gpus.current_device() == 0


def test_the_callers_own_gpu_comes_first(gpus: Gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch._C, "_cuda_hasPrimaryContext", lambda gpu: False)
    Arena(PAGE).close()
    assert {gpu for *_, gpu in gpus.calls} == {0}
    monkeypatch.setattr(torch._C, "_cuda_hasPrimaryContext", lambda gpu: True)
    gpus.set_device(1)
    Arena(PAGE).close()
    assert [gpu for *_, gpu in gpus.calls] == [0, 0, 1, 1]


def test_a_torch_that_does_not_tell_of_contexts_is_no_error(gpus: Gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.delattr(torch._C, "_cuda_hasPrimaryContext")
    arena = Arena(PAGE)
    assert arena.pinned
    arena.close()
    assert {gpu for *_, gpu in gpus.calls} == {0}


def test_without_cuda_nothing_is_page_locked_and_nothing_said(caplog: pytest.LogCaptureFixture) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert not Arena(PAGE).pinned
    assert caplog.records == []


def test_with_cuda_blocks_are_page_locked_until_close() -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    arena = Arena(16 * PAGE)
    block = arena.allocate(PAGE)
    assert block is not None
    tensor = torch.frombuffer(block, dtype=torch.uint8)
    assert (arena.pinned, tensor.is_pinned()) == (True, True)
    block[:] = bytes(range(256)) * 16
    assert torch.equal(tensor.to("cuda", non_blocking=True).cpu(), tensor)
    arena.close()
    assert (arena.pinned, tensor.is_pinned()) == (False, False)


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 5 * PAGE), st.integers(0, 1 << 16)), max_size=80))
def test_blocks_never_overlap_and_all_room_comes_back(steps: list[tuple[bool, int, int]]) -> None:
    arena = arena_of(16)
    blocks: list[tuple[memoryview, int]] = []
    for number, (take, size, pick) in enumerate(steps):
        if take or not blocks:
            block = arena.allocate(size)
            if block is not None:
                np.frombuffer(block, np.uint8)[:] = number % 251
                blocks.append((block, number % 251))
        else:
            block, mark = blocks.pop(pick % len(blocks))
            assert bytes(block) == bytes([mark]) * len(block), "another block wrote into it"
            arena.free(block)
        assert arena.used == sum(round_up(len(block)) for block, _ in blocks)
    for block, mark in blocks:
        assert bytes(block) == bytes([mark]) * len(block)
        arena.free(block)
    assert arena.allocate(16 * PAGE) is not None


def test_alignment_is_that_of_the_system_or_finer() -> None:
    assert mmap.PAGESIZE % PAGE == 0
