"""The fault matrix, writes: what was acknowledged is whole, what failed leaves nothing, and once is enough."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator

import pytest
from fault_proxy import Action, FaultProxy
from faults.actions import INTERNAL_ERROR, SLOW_DOWN, Answer, Delay, Hang, LoseAnswer
from faults.scene import CHUNKS, MARGIN_S, NAMESPACE, ON_REAL_SERVERS, PATIENT, TOKENS, Scene, digest, random_kv

from kvstore_s3.errors import KVStoreError, StoreBusyError, StoreUnavailableError
from kvstore_s3.objectstore.base import ObjectStore
from kvstore_s3.objectstore.open import open_store

pytestmark = [pytest.mark.usefixtures("quiet", "no_leaks"), ON_REAL_SERVERS]

MiB = 1024 * 1024
KEY = "aa/bb/object"
DATA = os.urandom(11 * MiB)
"""Three parts."""

PASSING = {
    "503": SLOW_DOWN,
    "503 before the body is read": Answer("503 Slow Down", "SlowDown", early=True),
    "500": INTERNAL_ERROR,
    "no answer": Hang(),
}
LOST = {
    "done, then reset": LoseAnswer(),
    "done, then 500": LoseAnswer(INTERNAL_ERROR),
    "done, then 503": LoseAnswer(SLOW_DOWN),
}


def with_names(faults: dict[str, Action]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("fault", faults.values(), ids=faults.keys())


@with_names({**PASSING, **LOST})
async def test_a_save_survives_a_fault_that_passes(scene: Scene, fault: Action) -> None:
    async with scene.open() as store:
        with scene.proxy.fault("PutObject", fault, "/l0-6", times=2) as rule:
            saved = await store.save(TOKENS, scene.kv)
        assert rule.met == 2
        assert saved.chunks_new + saved.chunks_present == CHUNKS
        await scene.assert_served_in_full(store)
    assert set(scene.keys) < set(scene.list())
    assert len(scene.list()) == CHUNKS + 1
    assert scene.uploads() == []


async def test_a_save_whose_answers_are_all_lost_finds_that_all_is_there(scene: Scene) -> None:
    async with scene.open() as store:
        with scene.proxy.fault("PutObject", LoseAnswer(), "/l0-6"):
            saved = await store.save(TOKENS, scene.kv)
        assert saved.chunks_new + saved.chunks_present == CHUNKS
        await scene.assert_served_in_full(store)


@with_names({"503": SLOW_DOWN, "no answer": Hang()})
async def test_a_save_that_fails_says_so_in_time_and_the_next_one_mends_it(scene: Scene, fault: Action) -> None:
    async with scene.open(breaker_pause_s=0.1) as store:
        with scene.proxy.fault("PutObject", fault, "/l0-6"):
            begin = time.monotonic()
            with pytest.raises(KVStoreError):
                await store.save(TOKENS, scene.kv)
            assert time.monotonic() - begin < 2 * store.settings.request_deadline_s + MARGIN_S * scene.patience
        assert scene.uploads() == []
        await asyncio.sleep(0.3)
        saved = await saved_at_last(scene, store)
        assert saved.chunks_new + saved.chunks_present == CHUNKS
        await scene.assert_served_in_full(store)


async def saved_at_last(scene: Scene, store: object) -> object:
    """A store that works again takes writes again, soon and without being told."""
    for _ in range(300):
        try:
            return await store.save(TOKENS, scene.kv)  # type: ignore[attr-defined]
        except StoreUnavailableError as error:
            last = error
            await asyncio.sleep(0.1)
    raise AssertionError(f"the store works, and no write reaches it: {last}")


async def test_writes_are_shed_before_reads_where_the_store_is_busy(filled: Scene) -> None:
    longer, more = [*TOKENS, *range(900, 900 + 4 * NAMESPACE.chunk_tokens)], random_kv(seed=1)
    async with filled.open(breaker_pause_s=60.0, max_attempts=1, read_timeout_s=20.0, request_deadline_s=40.0) as store:
        with filled.proxy.fault("PutObject", SLOW_DOWN) as rule:
            for _ in range(5):
                with pytest.raises(StoreBusyError, match="SlowDown"):
                    await store.save(longer, more, first_token=len(TOKENS))
                await filled.assert_served_in_full(store)
        assert rule.met <= 8, "a store that asked to slow down is written to again and again"
        assert store.counters.snapshot()["writes_shed"] >= 4


async def test_four_writers_of_one_prompt_agree(scene: Scene) -> None:
    stores = [scene.open(**PATIENT) for _ in range(4)]
    with scene.proxy.fault("PutObject", Delay(0.05)):
        try:
            saved = await asyncio.gather(*(store.save(TOKENS, scene.kv) for store in stores))
        finally:
            await asyncio.gather(*(store.close() for store in stores))
    assert [one.chunks_new + one.chunks_present for one in saved] == [CHUNKS] * 4
    assert sum(one.chunks_new for one in saved) == CHUNKS
    async with scene.open(**PATIENT) as store:
        await scene.assert_served_in_full(store)
    assert scene.uploads() == []


@pytest.fixture
async def objects(scene: Scene) -> AsyncIterator[ObjectStore]:
    store = open_store(
        scene.url,
        scene.settings(read_timeout_s=2 * scene.patience, request_deadline_s=20 * scene.patience, breaker_pause_s=0.1),
    )
    yield store
    await store.close()


async def assert_stored(scene: Scene) -> None:
    assert digest(await asyncio.to_thread(scene.read, f"{scene.prefix}/{KEY}")) == digest(DATA)
    assert await asyncio.to_thread(scene.uploads, f"{scene.prefix}/{KEY}") == []


STEPS = ["CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload"]


@pytest.mark.parametrize("step", STEPS)
@with_names(PASSING)
async def test_an_upload_in_parts_survives_a_fault_that_passes(
    scene: Scene, objects: ObjectStore, step: str, fault: Action
) -> None:
    with scene.proxy.fault(step, fault, times=1) as rule:
        assert await objects.put(KEY, DATA) is True
    assert rule.met == 1
    await assert_stored(scene)


@pytest.mark.parametrize("step", STEPS[1:])
@with_names(LOST)
async def test_a_lost_acknowledgement_of_an_upload_in_parts_is_no_failure(
    scene: Scene, objects: ObjectStore, step: str, fault: Action
) -> None:
    with scene.proxy.fault(step, fault, times=1) as rule:
        await objects.put(KEY, DATA)
    assert rule.met == 1
    await assert_stored(scene)


@pytest.mark.parametrize("step", STEPS)
@with_names({"503": SLOW_DOWN, "500": INTERNAL_ERROR})
async def test_an_upload_in_parts_that_fails_is_aborted(
    scene: Scene, objects: ObjectStore, step: str, fault: Action
) -> None:
    with scene.proxy.fault(step, fault), pytest.raises(StoreUnavailableError):
        await objects.put(KEY, DATA)
    assert await asyncio.to_thread(scene.uploads, f"{scene.prefix}/{KEY}") == []
    assert await asyncio.to_thread(scene.list) == []


async def test_an_abort_whose_acknowledgement_is_lost_ends_well(scene: Scene, objects: ObjectStore) -> None:
    with (
        scene.proxy.fault("UploadPart", INTERNAL_ERROR),
        scene.proxy.fault("AbortMultipartUpload", LoseAnswer(), times=1) as rule,
        pytest.raises(StoreUnavailableError),
    ):
        await objects.put(KEY, DATA)
    assert rule.met == 1
    assert await asyncio.to_thread(scene.uploads, f"{scene.prefix}/{KEY}") == []


async def test_an_upload_through_an_outage_is_finished_when_it_ends_soon(
    scene: Scene, objects: ObjectStore, proxy: FaultProxy
) -> None:
    with proxy.fault("UploadPart", Delay(0.1)) as rule:
        put = asyncio.create_task(objects.put(KEY, DATA))
        assert await asyncio.to_thread(rule.first_met.wait, 60)
        proxy.reset_connections()
        assert await put is True
    await assert_stored(scene)
