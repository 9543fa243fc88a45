"""Each CUDA call of a load and of a save fails once: right bytes or a KVStoreError, and the next one succeeds.

These tests run in a process of their own (.ci/fake-gpu-test).
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress

import pytest

if "KVSTORE_S3_TEST_FAKE_GPU" not in os.environ:
    pytest.skip("these tests need the fake runtime: `make test-kernels`", allow_module_level=True)

import torch
from device.fake_gpu.operators import RUNTIME
from partitions import NAMESPACE, TOKENS, WHOLE, draw_kv, new_url, same_bits

from kvstore_s3 import Settings, connect
from kvstore_s3.arena import Arena
from kvstore_s3.errors import DeviceError, KVStoreError
from kvstore_s3.runtime import SyncKVStore

RECORDING = ("cudaEventCreateWithFlags", "cudaEventRecordWithFlags")
"""Fail where `torch.cuda.Event.record` calls them, and nowhere else: torch's allocator of page-locked memory makes and
records events where memory is freed, in a destructor, and an error there ends the process, whoever frees it."""
CALLS = (
    "cudaStreamCreateWithPriority",  # first: torch makes its streams once in a process
    "cudaStreamWaitEvent",
    "cudaMalloc",
    "cudaHostAlloc",
    "cudaMemcpyAsync",
    "cudaLaunchKernel",
    "cudaEventSynchronize",
    *RECORDING,
)
HOST = draw_kv()

Verb = Callable[[SyncKVStore, torch.Tensor], torch.Tensor]


def load(store: SyncKVStore, kv: torch.Tensor) -> torch.Tensor:
    return store.load(store.lookup(TOKENS), device="cuda")


def save(store: SyncKVStore, kv: torch.Tensor) -> torch.Tensor:
    store.save(TOKENS, kv)
    return store.load(store.lookup(TOKENS))


def is_right(found: torch.Tensor) -> bool:
    return same_bits(found.cpu(), HOST[:, :, :WHOLE])


@contextmanager
def opened(verb: Verb) -> Iterator[SyncKVStore]:
    torch.cuda.empty_cache()
    torch._C._host_emptyCache()  # so that memory is asked of the runtime
    with connect(new_url(), NAMESPACE, Settings(layer_group=2)) as store:
        if verb is load:
            store.save(TOKENS, HOST)
        yield store


@contextmanager
def failing(call: str, nth: int) -> Iterator[None]:
    """The nth call of this name fails; `RUNTIME.fake_failed` says whether there was one."""
    gc.disable()  # it could free page-locked memory while an event is recorded
    RUNTIME.fake_fail(call.encode(), nth, call in RECORDING)
    try:
        yield
    finally:
        RUNTIME.fake_fail(b"", 0, False)  # leaves the answer
        gc.enable()


@pytest.fixture(autouse=True)
def mark_records(monkeypatch: pytest.MonkeyPatch) -> None:
    record = torch.cuda.Event.record

    def mark_and_record(event: torch.cuda.Event, stream: torch.cuda.Stream | None = None) -> None:
        RUNTIME.fake_expect_failures(True)
        try:
            record(event, stream)
        finally:
            RUNTIME.fake_expect_failures(False)

    monkeypatch.setattr(torch.cuda.Event, "record", mark_and_record)


@pytest.mark.parametrize(
    ("verb", "call"),
    [
        *((load, call) for call in (*CALLS, "cudaHostRegister")),
        *((save, call) for call in (*CALLS, "cudaStreamSynchronize")),
    ],
)
def test_a_call_that_fails_is_an_error_or_nothing(verb: Verb, call: str) -> None:
    kv = HOST.to("cuda")
    for nth in itertools.count(1):
        with opened(verb) as store:
            found = None
            with failing(call, nth), suppress(KVStoreError):
                found = verb(store, kv)
            failed = bool(RUNTIME.fake_failed())
            assert found is None or is_right(found)
            assert is_right(verb(store, kv))
        if not failed:
            break
    assert nth > 1, f"{verb.__name__} does not call {call}"


@pytest.mark.parametrize("verb", [load, save])
def test_a_full_memory_is_an_error_or_left_to_the_cpu(verb: Verb) -> None:
    gc.collect()  # what other tests' errors hold is memory, too
    kv = HOST.to("cuda")
    with opened(verb) as store:
        RUNTIME.fake_limit_memory(ctypes.c_size_t(16 << 20))  # less than a batch takes
        try:
            with nullcontext() if verb is save else pytest.raises(DeviceError, match="out of memory"):
                assert is_right(verb(store, kv))
        finally:
            RUNTIME.fake_limit_memory(ctypes.c_size_t(80 << 30))
        assert is_right(verb(store, kv))


@pytest.mark.parametrize("call", ["cudaHostRegister", "cudaHostUnregister"])
def test_where_page_locking_fails_the_callers_next_kernel_does_not(call: str) -> None:
    with failing(call, 1):
        arena = Arena(1 << 20)
        assert arena.pinned == (call == "cudaHostUnregister")
        arena.close()
        assert RUNTIME.fake_failed()
    assert torch.ones(3, device="cuda").sum().item() == 3
