"""The blocking face of KVStore."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType

import pytest
import torch

from kvstore_s3 import KVLayout, Namespace, connect
from kvstore_s3.errors import DeviceError, InvalidArgumentError, StoreUnavailableError
from kvstore_s3.runtime import Runtime

LAYOUT = KVLayout(layers=2, kv_heads=1, head_dim=8, dtype="bfloat16")
NAMESPACE = Namespace(model="tiny", revision="1", layout=LAYOUT, chunk_tokens=16)


def test_the_verbs_block_and_return(tmp_path: Path) -> None:
    kv = torch.randn(2, 2, 32, 1, 8).bfloat16()
    with connect(tmp_path.as_uri(), NAMESPACE) as store:
        assert store.save(range(32), kv).chunks_new == 2
        hit = store.lookup(torch.arange(40))
        assert hit.tokens == 32
        assert torch.equal(store.load(hit), kv)
        assert torch.equal(torch.cat([group.kv for group in store.stream(hit, first_token=16)]), kv[:, :, 16:])
        assert store.namespace is NAMESPACE


def test_errors_reach_the_caller(tmp_path: Path) -> None:
    with connect(tmp_path.as_uri(), NAMESPACE) as store, pytest.raises(InvalidArgumentError):
        store.lookup([-1] * 16)


def test_leaving_ends_the_thread(tmp_path: Path) -> None:
    with connect(tmp_path.as_uri(), NAMESPACE) as store:
        thread = store.runtime._thread
        assert thread.is_alive()
    assert not thread.is_alive()
    with pytest.raises(StoreUnavailableError, match="closed"):
        store.lookup(range(16))


def test_a_forked_child_is_told_to_connect_again(tmp_path: Path) -> None:
    with connect(tmp_path.as_uri(), NAMESPACE) as store:
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            try:
                store.lookup(range(16))
            except StoreUnavailableError as error:
                os.write(writing, str(error).encode())
            os._exit(0)
        os.close(writing)
        with open(reading, "rb") as answer:
            assert b"forked" in answer.read()
        os.waitpid(child, 0)


def test_a_fork_may_leave_the_block_in_which_it_was_made(tmp_path: Path) -> None:
    child = 0
    try:
        with connect(tmp_path.as_uri(), NAMESPACE):
            child = os.fork()
            if child == 0:
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.alarm(10)  # ends it where it waits for a thread that it does not have
    finally:
        if child == 0:
            os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def test_work_that_is_cut_off_by_the_end_is_an_error_of_ours() -> None:
    runtime = Runtime()
    running, errors = threading.Event(), []

    async def work() -> None:
        running.set()
        await asyncio.Event().wait()

    def call() -> None:
        for _ in range(2):  # what is under way, and what comes later
            try:
                runtime.run(work())
            except StoreUnavailableError as error:
                errors.append(str(error))

    caller = threading.Thread(target=call, daemon=True)
    caller.start()
    running.wait()
    runtime.close()
    caller.join(10)
    assert len(errors) == 2
    assert all("closed" in error for error in errors)


def test_a_stream_that_outlives_its_store_ends_quietly(tmp_path: Path) -> None:
    with connect(tmp_path.as_uri(), NAMESPACE) as store:
        store.save(range(32), torch.zeros(2, 2, 32, 1, 8, dtype=torch.bfloat16))
        groups = store.stream(store.lookup(range(32)))
        next(groups)
    groups.close()


def test_a_stream_that_is_dropped_is_closed(tmp_path: Path) -> None:
    with connect(tmp_path.as_uri(), NAMESPACE) as store:
        store.save(range(32), torch.zeros(2, 2, 32, 1, 8, dtype=torch.bfloat16))
        for _ in store.stream(store.lookup(range(32))):
            break
        assert store.kv._loader.slabs.leased == 0


def calls_of(frame: FrameType | None) -> set[str]:
    """The names of all functions that a thread is in."""
    names = set()
    while frame is not None:
        names.add(frame.f_code.co_name)
        frame = frame.f_back
    return names


def test_an_interrupt_cancels_the_work_and_waits_for_its_end() -> None:
    runtime = Runtime()
    running = threading.Event()
    cleaned = threading.Event()

    async def work() -> None:
        running.set()
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.to_thread(time.sleep, 0.05)
            cleaned.set()

    def interrupt() -> None:
        running.wait()
        main = threading.main_thread().ident or 0
        while "result" not in calls_of(sys._current_frames()[main]):
            time.sleep(0.01)
        time.sleep(0.1)  # until it sleeps in there
        signal.pthread_kill(main, signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        runtime.run(work())
    assert cleaned.is_set()
    runtime.close()


def test_closing_cancels_what_still_runs() -> None:
    runtime = Runtime()
    future = runtime.submit(asyncio.Event().wait())
    runtime.close()
    runtime.close()
    assert future.cancelled()


@pytest.mark.parametrize(("used", "expected"), [(0, []), (1, [1])])
def test_the_thread_uses_the_callers_gpu_and_makes_no_context_on_the_first(
    monkeypatch: pytest.MonkeyPatch, used: int, expected: list[int]
) -> None:
    given: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: used)
    monkeypatch.setattr(torch.cuda, "set_device", given.append)
    runtime = Runtime()
    runtime.run(asyncio.sleep(0))
    runtime.close()
    assert given == expected


class OnGpu(torch.Tensor):
    is_cuda = True


def test_a_gpu_that_fails_at_a_save_is_a_device_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: torch.device) -> torch.cuda.Stream:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be ...")

    monkeypatch.setattr(torch.cuda, "current_stream", refuse)
    kv = torch.zeros(1).as_subclass(OnGpu)
    with (
        connect(f"file://{tmp_path}", NAMESPACE) as store,
        pytest.raises(DeviceError, match=r"event: CUDA error: an illegal memory access was encountered$"),
    ):
        store.save([1], kv)
