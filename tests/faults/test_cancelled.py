"""The fault matrix, requests that are given up: buffers come back, and nothing is written into them any more."""

from __future__ import annotations

import asyncio
import random

import pytest
from fault_proxy import Action
from faults.actions import Break, Delay, Hang, Stall, Trickle
from faults.scene import PATIENT, TOKENS, Scene

from kvstore_s3.errors import KVStoreError, StoreUnavailableError
from kvstore_s3.objectstore.open import open_store

pytestmark = pytest.mark.usefixtures("quiet", "no_leaks")

PLANES = pytest.mark.parametrize("plane", ["direct", "aiobotocore"])


@PLANES
@pytest.mark.parametrize("fault", [Trickle(200_000), Stall(20_000), Hang()], ids=["trickle", "stall", "no answer"])
async def test_nothing_is_written_into_the_buffer_of_a_read_that_was_cancelled(
    filled: Scene, plane: str, fault: Action
) -> None:
    data = await asyncio.to_thread(filled.read, filled.keys[0])
    store = open_store(filled.url, filled.settings(data_plane=plane, **PATIENT))
    key = filled.keys[0].removeprefix(f"{filled.prefix}/")
    buffer = bytearray(len(data))
    try:
        await store.get_range(key, 0, memoryview(buffer))
        assert buffer == data
        buffer[:] = bytes(len(data))
        with filled.proxy.fault("GetObject", fault, times=1) as rule:
            task = asyncio.create_task(store.get_range(key, 0, memoryview(buffer)))
            assert await asyncio.to_thread(rule.first_met.wait, 60)
            await asyncio.sleep(0.1)
            task.cancel()
            begin = asyncio.get_running_loop().time()
            await asyncio.wait([task])
            assert task.cancelled()
            assert asyncio.get_running_loop().time() - begin < 5, "a cancellation waits for the network"
        buffer[:] = bytes(len(data))
        await asyncio.sleep(0.3)
        assert not any(buffer), "a late write into a buffer that was given back"
        await store.get_range(key, 0, memoryview(buffer))
        assert buffer == data
    finally:
        await store.close()


@pytest.mark.parametrize("fault", [Delay(0.1), Break(after=10_000), Hang()], ids=["late", "broken off", "no answer"])
async def test_loads_that_are_cancelled_give_their_buffers_back(filled: Scene, fault: Action) -> None:
    moments = random.Random(3)
    async with filled.open(buffer_bytes=1024 * 1024, **PATIENT) as store:
        hit = await store.lookup(TOKENS)
        before = asyncio.all_tasks()
        with filled.proxy.fault("GetObject", fault, skip=3, times=10):
            for _ in range(12):
                task = asyncio.create_task(store.load(hit))
                await asyncio.wait([task], timeout=moments.uniform(0.0, 0.15))
                task.cancel()
                await asyncio.wait([task])
                assert store._loader.slabs.leased == 0
        assert not {
            task for task in asyncio.all_tasks() - before if "heal" not in str(task) and "probe" not in str(task)
        }
        await filled.assert_served_in_full(store)


async def test_saves_that_are_cancelled_leave_no_upload_and_no_half_object(scene: Scene) -> None:
    moments = random.Random(5)
    async with scene.open(**PATIENT) as store:
        with scene.proxy.fault("PutObject", Delay(0.05)):
            for _ in range(6):
                task = asyncio.create_task(store.save(TOKENS, scene.kv))
                await asyncio.wait([task], timeout=moments.uniform(0.0, 0.15))
                task.cancel()
                await asyncio.wait([task])
                if not task.cancelled() and task.exception() is not None:
                    assert isinstance(task.exception(), KVStoreError)
        await store.save(TOKENS, scene.kv)
        await scene.assert_served_in_full(store)
    assert await asyncio.to_thread(scene.uploads) == []


@PLANES
@pytest.mark.parametrize("cancelled", [False, True], ids=["closed", "cancelled and closed"])
async def test_a_store_that_is_closed_during_an_upload_aborts_it_first(
    scene: Scene, plane: str, *, cancelled: bool
) -> None:
    store = open_store(scene.url, scene.settings(data_plane=plane, upload_concurrency=2, **PATIENT))
    with scene.proxy.fault("UploadPart", Delay(0.2)) as rule:
        task = asyncio.create_task(store.put("aa/bb/large", bytes(16 * 1024 * 1024)))
        assert await asyncio.to_thread(rule.first_met.wait, 60)
        if cancelled:
            task.cancel()
        await store.close()
    (ended,) = await asyncio.gather(task, return_exceptions=True)
    assert isinstance(ended, asyncio.CancelledError if cancelled else StoreUnavailableError)
    assert scene.uploads(f"{scene.prefix}/aa/bb/large") == []
    assert not list(scene.cache_dir.glob("uploads/*"))
