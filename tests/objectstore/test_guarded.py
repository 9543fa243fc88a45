"""A guarded store is an object store, and leaves a failing one alone until it answers again."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping

import pytest
from objectstore.suite import KEY, ObjectStoreSuite, names, read

from kvstore_s3.config import Settings
from kvstore_s3.errors import (
    BitstreamFault,
    DamagedObjectError,
    InvalidArgumentError,
    StoreBusyError,
    StoreRefusedError,
    StoreUnavailableError,
)
from kvstore_s3.metrics import Counters
from kvstore_s3.objectstore.base import Buffer, ObjectInfo
from kvstore_s3.objectstore.guarded import GuardedStore
from kvstore_s3.objectstore.memory import MemoryStore

DOWN = StoreUnavailableError("the server is in trouble")
BUSY = StoreBusyError("the server asks to slow down")
REFUSED = StoreRefusedError("the session token has expired; renew the credentials")


class TestGuardedStore(ObjectStoreSuite):
    @pytest.fixture
    async def store(self) -> AsyncIterator[GuardedStore]:
        store = GuardedStore(MemoryStore(), Settings())
        yield store
        await store.close()


class FailingStore(MemoryStore):
    """memory:// whose reads, writes and probes fail or hang as they are told to; counts the requests that reach it."""

    def __init__(self) -> None:
        super().__init__("")
        self.reads: Exception | None = None
        self.writes: Exception | None = None
        self.probes: Exception | None = None
        self.hangs = False
        self.requests = 0
        self.probed = asyncio.Event()
        self.probes_hang = False

    def fail(self, error: Exception | None) -> None:
        self.reads = self.writes = self.probes = error

    async def _answer(self, error: Exception | None) -> None:
        self.requests += 1
        await asyncio.sleep(3600 if self.hangs else 0)
        if error is not None:
            raise error

    async def probe(self) -> None:
        self.probed.set()
        await asyncio.sleep(3600 if self.probes_hang else 0)
        if self.probes is not None:
            raise self.probes

    async def head(self, key: str) -> ObjectInfo | None:
        await self._answer(self.reads)
        return await super().head(key)

    async def get_range(self, key: str, start: int, into: memoryview) -> None:
        await self._answer(self.reads)
        await super().get_range(key, start, into)

    async def list(self, prefix: str = "") -> AsyncIterator[ObjectInfo]:
        await self._answer(self.reads)
        async for info in super().list(prefix):
            yield info

    async def put(
        self, key: str, data: Buffer, *, metadata: Mapping[str, str] | None = None, replace: bool = False
    ) -> bool:
        await self._answer(self.writes)
        return await super().put(key, data, metadata=metadata, replace=replace)

    async def delete(self, key: str) -> None:
        await self._answer(self.writes)
        await super().delete(key)


class Rig:
    """A guarded failing store with a clock that is moved by hand, except where a background probe waits."""

    def __init__(self, *, failures: int = 3, pause_s: float = 0.02, connect_timeout_s: float = 3.0) -> None:
        self.inner = FailingStore()
        self.counters = Counters()
        self.now = 0.0
        self.store = GuardedStore(
            self.inner,
            Settings(breaker_failures=failures, breaker_pause_s=pause_s, connect_timeout_s=connect_timeout_s),
            self.counters.add,
            clock=lambda: self.now,
            spread=lambda: 0.5,
        )

    async def fail_reads(self, error: Exception, times: int = 3) -> None:
        self.inner.reads = error
        for _ in range(times):
            with pytest.raises(type(error)):
                await self.store.head(KEY)

    async def fail_writes(self, error: Exception, times: int = 3) -> None:
        self.inner.writes = error
        for _ in range(times):
            with pytest.raises(type(error)):
                await self.store.put(KEY, b"x")

    async def healed(self) -> None:
        assert self.store._healing is not None
        async with asyncio.timeout(60):
            await asyncio.wait([self.store._healing])


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    rig = Rig()
    yield rig
    await rig.store.close()


async def test_reads_that_fail_in_a_row_open_it_and_nothing_is_asked_any_more(rig: Rig) -> None:
    rig.inner.probes = DOWN
    await rig.fail_reads(DOWN)
    assert not rig.store.available
    asked = rig.inner.requests
    for attempt in (rig.store.head(KEY), read(rig.store, KEY, 0, 1), rig.store.put(KEY, b""), rig.store.delete(KEY)):
        with pytest.raises(StoreUnavailableError, match=r"tried again in 0\.0 s.*the server is in trouble"):
            await attempt
    with pytest.raises(StoreUnavailableError):
        await names(rig.store.list())
    assert rig.inner.requests == asked
    assert rig.counters.snapshot() == {"breaker_opened": 1, "breaker_rejected": 5}


async def test_it_heals_by_a_probe_without_a_request(rig: Rig) -> None:
    rig.inner.probes = DOWN
    await rig.fail_reads(DOWN)
    await rig.inner.probed.wait()
    asked = rig.inner.requests
    rig.inner.fail(None)
    await rig.healed()
    assert rig.store.available
    assert rig.inner.requests == asked
    assert await rig.store.head(KEY) is None


async def test_it_is_logged_once_when_it_opens_and_once_when_it_closes(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "kvstore_s3")
    rig.inner.probes = DOWN
    await rig.fail_reads(DOWN)
    for _ in range(3):
        with pytest.raises(StoreUnavailableError):
            await rig.store.head(KEY)
    await asyncio.sleep(0.05)
    rig.inner.fail(None)
    await rig.healed()
    first, second = (record.getMessage() for record in caplog.records)
    assert "left alone" in first
    assert "the server is in trouble" in first
    assert "answers again" in second


async def test_the_callers_own_probe_closes_it_at_once() -> None:
    rig = Rig(pause_s=600)
    await rig.fail_reads(DOWN)
    rig.inner.reads = None
    await rig.store.probe()
    assert rig.store.available
    assert await rig.store.head(KEY) is None
    await rig.store.close()


async def test_a_probe_that_fails_says_why_and_counts(rig: Rig) -> None:
    rig.inner.probes = REFUSED
    for _ in range(3):
        with pytest.raises(StoreRefusedError, match="token has expired"):
            await rig.store.probe()
    assert not rig.store.available


async def test_refused_credentials_open_it_and_the_reason_stays_clear(rig: Rig) -> None:
    rig.inner.probes = REFUSED
    await rig.fail_reads(REFUSED)
    with pytest.raises(StoreUnavailableError, match="token has expired; renew the credentials"):
        await rig.store.head(KEY)


async def test_misses_damage_and_wrong_arguments_are_no_failures(rig: Rig) -> None:
    damage = DamagedObjectError(BitstreamFault.TRUNCATED, "short")
    for error in (damage, InvalidArgumentError("a bad key")):
        await rig.fail_reads(error, times=10)
        await rig.fail_writes(error, times=10)
    rig.inner.fail(None)
    assert await rig.store.head(KEY) is None
    assert rig.store.available
    assert rig.store.writable
    assert rig.counters.snapshot() == {}


async def test_answers_between_failures_keep_it_closed(rig: Rig) -> None:
    for _ in range(5):
        await rig.fail_reads(DOWN, times=2)
        rig.inner.reads = DamagedObjectError(BitstreamFault.TRUNCATED, "an answer, if a sad one")
        with pytest.raises(DamagedObjectError):
            await rig.store.head(KEY)
    assert rig.store.available


async def test_a_store_that_says_slow_down_to_a_write_is_read_on(rig: Rig) -> None:
    await rig.fail_writes(BUSY, times=1)
    asked = rig.inner.requests
    assert not rig.store.writable
    with pytest.raises(StoreBusyError, match="slow down"):
        await rig.store.put(KEY, b"x")
    assert rig.inner.requests == asked
    assert await rig.store.head(KEY) is None
    assert rig.store.available
    assert rig.counters.snapshot() == {"writes_shed": 1}


async def test_a_store_that_says_slow_down_to_a_read_is_not_written_to(rig: Rig) -> None:
    await rig.fail_reads(BUSY, times=1)
    with pytest.raises(StoreBusyError):
        await rig.store.put(KEY, b"x")
    assert rig.store.available


async def test_reads_that_stay_busy_open_it(rig: Rig) -> None:
    rig.inner.probes = BUSY
    await rig.fail_reads(BUSY)
    assert not rig.store.available


async def test_one_write_tries_after_the_pause_and_opens_the_way(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    await rig.fail_writes(BUSY, times=1)
    rig.now = 0.02
    assert rig.store.writable
    asked = rig.inner.requests
    outcomes = await asyncio.gather(*(rig.store.put(KEY, b"x") for _ in range(5)), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == 5 * [StoreBusyError]
    assert rig.inner.requests == asked + 1
    assert not rig.store.writable
    rig.now += 0.03
    assert not rig.store.writable, "the second pause is twice the first"
    rig.now += 0.01
    rig.inner.writes = None
    assert await rig.store.put(KEY, b"x")
    assert rig.store.writable
    assert [record.getMessage().endswith("written to again") for record in caplog.records] == [False, True]


async def test_a_full_disk_stops_writes_and_not_reads(rig: Rig) -> None:
    full = StoreUnavailableError("no space is left")
    await rig.fail_writes(full)
    await rig.healed()
    assert rig.store.available
    with pytest.raises(StoreUnavailableError, match="no space is left") as caught:
        await rig.store.put(KEY, b"x")
    assert not isinstance(caught.value, StoreBusyError)
    assert await rig.store.head(KEY) is None


async def test_writes_that_fail_because_all_fails_open_it_for_reads_too(rig: Rig) -> None:
    rig.inner.fail(DOWN)
    await rig.fail_writes(DOWN)
    await rig.inner.probed.wait()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    asked = rig.inner.requests
    with pytest.raises(StoreUnavailableError):
        await rig.store.head(KEY)
    assert rig.inner.requests == asked


async def test_many_requests_that_fail_together_open_it_once(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    rig.inner.fail(DOWN)
    await asyncio.gather(*(rig.store.head(KEY) for _ in range(64)), return_exceptions=True)
    assert rig.counters.snapshot() == {"breaker_opened": 1}
    assert len(caplog.records) == 1


async def test_a_cancellation_is_no_failure(rig: Rig) -> None:
    rig.inner.hangs = True
    for number in range(20):
        task = asyncio.create_task(rig.store.head(KEY) if number % 2 else rig.store.delete(KEY))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    rig.inner.hangs = False
    assert await rig.store.head(KEY) is None
    assert rig.store.writable
    assert not rig.inner.probed.is_set()


async def test_writes_that_come_together_after_the_pause_succeed_together(rig: Rig) -> None:
    await rig.fail_writes(BUSY, times=1)
    rig.now, rig.inner.writes = 1.0, None
    assert await asyncio.gather(*(rig.store.put(f"key-{number}", b"x") for number in range(5))) == 5 * [True]
    assert rig.counters.snapshot() == {}


async def test_a_cancelled_trial_makes_room_for_the_next_that_waits(rig: Rig) -> None:
    await rig.fail_writes(BUSY, times=1)
    rig.now = 1.0
    rig.inner.hangs, rig.inner.writes = True, None
    trial, *waiting = (asyncio.create_task(rig.store.put(f"key-{number}", b"x")) for number in range(4))
    for _ in range(3):
        await asyncio.sleep(0)
    asked = rig.inner.requests
    trial.cancel()
    waiting[0].cancel()
    rig.inner.hangs = False
    assert await asyncio.gather(*waiting[1:]) == [True, True]
    assert rig.inner.requests == asked + 2


async def test_a_store_that_dies_while_writes_wait_fails_them(rig: Rig) -> None:
    await rig.fail_writes(BUSY, times=1)
    rig.now = 1.0
    rig.inner.hangs, rig.inner.writes = True, None
    trial, waiting = (asyncio.create_task(rig.store.put(f"key-{number}", b"x")) for number in range(2))
    await asyncio.sleep(0)
    rig.inner.hangs, rig.inner.probes = False, DOWN
    await rig.fail_reads(DOWN)
    trial.cancel()
    with pytest.raises(StoreUnavailableError, match="not asked at the moment"):
        await waiting


async def test_a_cancelled_trial_does_not_keep_writes_shut(rig: Rig) -> None:
    await rig.fail_writes(BUSY, times=1)
    rig.now = 1.0
    rig.inner.hangs, rig.inner.writes = True, None
    trial = asyncio.create_task(rig.store.put(KEY, b"x"))
    await asyncio.sleep(0)
    trial.cancel()
    await asyncio.gather(trial, return_exceptions=True)
    rig.inner.hangs = False
    assert await rig.store.put(KEY, b"x")


async def test_a_caller_that_gives_up_early_leads_to_a_probe_of_a_dead_store(rig: Rig) -> None:
    rig.inner.hangs, rig.inner.probes = True, DOWN
    task = asyncio.create_task(rig.store.head(KEY))
    await asyncio.sleep(0)
    rig.now = 3.0
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await rig.inner.probed.wait()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not rig.store.available


async def test_many_callers_that_give_up_sooner_lead_to_it_too(rig: Rig) -> None:
    rig.inner.hangs, rig.inner.probes = True, DOWN
    for _ in range(4):
        assert not rig.inner.probed.is_set()
        task = asyncio.create_task(rig.store.head(KEY))
        await asyncio.sleep(0)
        rig.now += 0.8
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    await rig.inner.probed.wait()


async def test_a_background_probe_does_not_wait_for_long() -> None:
    rig = Rig(connect_timeout_s=0.01)
    rig.inner.probes_hang = True
    await rig.fail_reads(DOWN)
    await rig.inner.probed.wait()
    await asyncio.sleep(0.1)
    with pytest.raises(StoreUnavailableError, match=r"did not answer a small request within 0\.0 s"):
        await rig.store.head(KEY)
    rig.inner.fail(None)
    rig.inner.probes_hang = False
    await rig.healed()
    assert rig.store.available
    await rig.store.close()


async def test_closing_ends_the_background_probe() -> None:
    rig = Rig(pause_s=600)
    await rig.fail_reads(DOWN)
    healing = rig.store._healing
    assert healing is not None
    await rig.store.close()
    assert healing.done()
    await rig.store.close()
    with pytest.raises(StoreUnavailableError):
        await rig.store.put(KEY, b"x")


async def test_reading_part_of_a_listing_is_no_failure(rig: Rig) -> None:
    await rig.store.put("a", b"")
    await rig.store.put("b", b"")
    listing = rig.store.list()
    assert (await anext(listing)).key == "a"
    await listing.aclose()
    assert rig.store.available
